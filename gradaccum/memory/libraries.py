"""What libraries hold on CUDA beside the tensors."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

WORKSPACE: Final = 8_519_680  # bytes
_aten = torch.ops.aten
_MATMULS: Final = {
    getattr(_aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "addbmm", "linear")
}


class Workspaces:
    """What cuBLAS holds on CUDA: a block for each thread that multiplies matrices, from the first time on.

    torch's default for devices before Hopper, 2 x 4,096 + 8 x 16 KiB (`parseChosenWorkspaceSize` in
    aten/src/ATen/cuda/CublasHandlePool.cpp); Hopper's is said to be 32 MiB, which no figure at hand confirms.
    """

    def __init__(self, device: str) -> None:
        self._is_counted = device == "cuda"
        self.held: dict[str, Tensor] = {}

    def made_for(self, func: Any) -> Tensor | None:
        """Return the block that an operation makes torch allocate, if it does."""
        if func.overloadpacket not in _MATMULS or not self._is_counted:
            return None
        # Private: nothing public tells whether a backward is running. On CUDA it has a thread of its own.
        thread = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        if thread in self.held:
            return None
        self.held[thread] = torch.empty(WORKSPACE, dtype=torch.uint8)
        return self.held[thread]
