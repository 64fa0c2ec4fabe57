"""Devices: which one is meant, which tensors lie on it, what it counts, and what names one that is not there."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU: Final = torch.device("cpu")
# Fused kernels with workspaces that nothing outside of them can see, and one whose results are larger than torch says.
_OUT_OF_SIGHT: Final = {"embedding_bag"} | {
    kind + cell for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")
}
# What autocast computes in float32 on CUDA and not on a CPU; the names of functions, tensor methods too.
# fmt: off
_FLOAT32: Final = {
    "layer_norm", "native_layer_norm", "group_norm", "softmax", "log_softmax", "softmin", "logsumexp",
    "softplus", "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div",
    "binary_cross_entropy_with_logits", "cosine_similarity", "exp", "expm1", "log", "log1p", "log2", "log10",
    "pow", "__pow__", "rsqrt", "reciprocal", "norm", "cumsum", "cumprod", "prod", "cdist",
}
# fmt: on


def chosen_device(named: str | torch.device | None, tensors: Iterable[Tensor]) -> torch.device:
    """Return the device that is named, else the one on which the tensors lie, else the CPU.

    Raises:
        TypeError: what was named is no device.
        ValueError: it is not there, or none was named and the tensors lie on several.

    Example:
        >>> chosen_device(None, [torch.zeros(2)])
        device(type='cpu')
    """
    if named is None:
        found = sorted({str(tensor.device) for tensor in tensors if not tensor.is_meta})
        if len(found) > 1:
            raise ValueError(f"The tensors given lie on {' and '.join(found)}: name one of them, device={found[-1]!r}.")
        named = found[0] if found else "cpu"
    try:
        device = torch.device(named)
    except (RuntimeError, TypeError):
        raise TypeError(f'device must be such as "cpu" or "cuda", but {named!r:.80} was given.') from None
    if device.type == "cpu":
        return CPU
    here, count = torch.accelerator.current_accelerator(check_available=True), torch.accelerator.device_count()
    if here is None or here.type != device.type or (device.index or 0) >= count:
        there = ", ".join(["cpu", *(f"{here.type}:{index}" for index in range(count) if here)])
        raise ValueError(f"There is no {device} here, only {there}: name one of these, or predict for a device.")
    return torch.device(device.type, torch.accelerator.current_device_index() if device.index is None else device.index)


def predicted_type(device: object) -> str:
    """Return "cpu" or "cuda", or refuse the device in one sentence.

    Example:
        >>> predicted_type("cuda:1")
        'cuda'
    """
    try:
        kind = torch.device(device).type  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise TypeError(f'device must be "cuda" or "cpu", but {device!r:.80} was given.') from None
    if kind not in ("cpu", "cuda"):
        raise NotImplementedError(f'Memory is predicted for "cuda" and "cpu", not for {kind!r}: give one of the two.')
    return str(kind)


def storages_on(device: torch.device, tree: object) -> Iterator[tuple[torch.UntypedStorage, Tensor]]:
    """Yield the memory on the device of each tensor in nested lists, tuples and dicts, and the tensor.

    Raises:
        NotImplementedError: a tensor is sparse, or on another device where the CPU is followed.

    Example:
        >>> [storage.nbytes() for storage, _ in storages_on(CPU, [torch.zeros(2), {"x": torch.zeros(3)}, None])]
        [8, 12]
    """
    if isinstance(tree, Tensor):
        if hasattr(tree, "__tensor_flatten__"):  # a subclass that wraps other tensors
            yield from storages_on(device, [getattr(tree, name) for name in tree.__tensor_flatten__()[0]])
            return
        here = tree.is_cpu if device is CPU else tree.device == device
        if here and tree.layout == torch.strided:
            yield tree.untyped_storage(), tree
        elif here:
            # A sparse gradient could be followed, but autograd copies it under a mode where it would not else.
            raise NotImplementedError(f"measure_memory follows dense tensors, not one in {tree.layout} on {device}.")
        elif device is CPU and not tree.is_meta:  # which has a shape and no memory
            given = f"measure_memory follows tensors on the CPU here, not one on {tree.device}"
            raise NotImplementedError(f"{given}: name the device to measure, device={str(tree.device)!r}.")
    elif isinstance(tree, list | tuple | dict):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from storages_on(device, item)


class DeviceCounters:
    """A device's own counters over a block of code, synchronized before each reading and before the reset.

    The device has one peak, and starting resets it: blocks inside each other each keep the peak that they saw.

    Attributes:
        peak_bytes: the most bytes in use at one moment of the block.
        reserved_bytes: the most that the allocator held, in use or not; 0 where it does not tell.

    Raises:
        NotImplementedError: the device does not count.
    """

    _running: Final[list[DeviceCounters]] = []

    def __init__(self, device: torch.device) -> None:
        self._device, self.peak_bytes, self.reserved_bytes = device, 0, 0
        try:
            counts = torch.accelerator.max_memory_allocated(device) >= torch.accelerator.memory_allocated(device)
        except RuntimeError:
            counts = False
        if not counts:
            given = f"{device.type} does not count its memory in torch {torch.__version__}"
            raise NotImplementedError(f'{given}: measure with the model and the data on the CPU, or predict for "cpu".')

    def start(self) -> int:
        """Reset the peak, and return the bytes in use."""
        torch.accelerator.synchronize(self._device)
        for outer in self._running:
            outer._note()
        torch.accelerator.reset_peak_memory_stats(self._device)
        self._running.append(self)
        return torch.accelerator.memory_allocated(self._device)

    def stop(self) -> tuple[int, int]:
        """Note the peaks, and return the peak and the bytes in use."""
        self._running.remove(self)
        torch.accelerator.synchronize(self._device)
        self._note()
        return self.peak_bytes, torch.accelerator.memory_allocated(self._device)

    def _note(self) -> None:
        self.peak_bytes = max(self.peak_bytes, torch.accelerator.max_memory_allocated(self._device))
        self.reserved_bytes = max(self.reserved_bytes, torch.accelerator.max_memory_reserved(self._device))


class DeviceFunctions(TorchFunctionMode):
    """For tensors without data: map the names of devices and what is kept on CUDA alone, copy, refuse the unseen."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._cuda = device == "cuda"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _OUT_OF_SIGHT:
            raise NotImplementedError(f"The memory of {name} is not predicted: its kernels hold some out of sight.")
        if func is Tensor.__deepcopy__ and args[0].is_leaf:
            return _deepcopy(*args)
        if not self._cuda:
            return func(*args, **kwargs)
        if name in ("cuda", "pin_memory"):
            return args[0]
        if func is torch.device and _host(args[0], "device") == "cpu":
            return torch.device("cpu")  # without the number of a device
        place = "device" if name == "to" else ""  # x.to(0)
        args, kwargs = [_host(x, place) for x in args], {key: _host(x, key) for key, x in kwargs.items()}
        if name in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            low = torch.bfloat16, torch.float16
            args = [x.float() if isinstance(x, Tensor) and x.dtype in low else x for x in args]
        elif name == "dropout" and isinstance(args[0], Tensor):
            options = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
            p, training = options.get("p", 0.5), options.get("training", options.get("train", True))
            if training and 0 < p < 1 and not options.get("inplace"):
                return torch.native_dropout(args[0], p, True)[0]  # keeps a mask of bytes, as on CUDA
        return func(*args, **kwargs)


def _deepcopy(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
    """Copy a leaf as `copy.deepcopy` does; torch's own would copy the mode of a tensor without data too."""
    if id(tensor) not in memo:
        new = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, tensor.requires_grad)  # without its gradient
        elif tensor.grad is not None:
            new.grad = copy.deepcopy(tensor.grad, memo)
        memo[id(tensor)] = new
    return memo[id(tensor)]


def _host(value: Any, key: str = "") -> Any:
    named = (isinstance(value, str) and value.partition(":")[0] == "cuda") or (key == "device" and type(value) is int)
    return "cpu" if named or (isinstance(value, torch.device) and value.type == "cuda") else value
