"""Track every tensor storage from allocation to release, with its role."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

# Private, but the only way to see each operation's result, also in backward, without changing the model.
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum import ranks

CPU: Final = torch.device("cpu")
# Preliminary roles, by the time of allocation; the storage may later become a gradient or a state.
_PASSING: Final = ("activations", "backward temporaries", "optimizer temporaries")
ROLES: Final = ("parameters", "gradients", "optimizer state", "inputs", *_PASSING)
_aten = torch.ops.aten
# These take a tensor that was created where the mode does not see it (torch.tensor, copy.deepcopy, torch.load), so its
# storage is new although it is an argument. (A deep copy of a tensor that was not given counts both.)
_UNSEEN = (_aten.lift_fresh.default, _aten.set_.source_Storage, _aten.set_.source_Storage_storage_offset)


class Held(NamedTuple):
    """A storage that was alive at the peak: its size, its role, its operator, and the first tensor seen on it.

    Attributes:
        nbytes: its size in bytes.
        role: one of `ROLES`.
        operator: the operation that created it, such as "aten.mm", or "given" if it was known at the start.
        shape: the shape of the first tensor seen on it.
        dtype: the dtype of that tensor.
    """

    nbytes: int
    role: str
    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def storages_on(device: torch.device, tree: object) -> Iterator[tuple[torch.UntypedStorage, Tensor]]:
    """Yield the storage of each tensor on the device in nested lists, tuples and dicts, and the tensor.

    Raises:
        NotImplementedError: a tensor is sparse, or on another device while the CPU is tracked.

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
            # A sparse gradient could be tracked, but under a mode autograd makes a copy that it otherwise would not.
            raise NotImplementedError(f"measure_memory tracks dense tensors, not one in {tree.layout} on {device}.")
        elif device is CPU and not tree.is_meta:  # a meta tensor has no memory
            given = f"measure_memory tracks tensors on the CPU here, not one on {tree.device}"
            raise NotImplementedError(f"{given}: name the device to measure, device={str(tree.device)!r}.")
    elif isinstance(tree, list | tuple | dict):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from storages_on(device, item)


class Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Track the storages that operations allocate on a device; the base class of `measure_memory`.

    Args:
        known: the tensors in memory at the start, by role, in lists, tuples and dicts.
        optimizers: the optimizers whose steps and states have roles of their own.
        sharded: modules of `fully_shard`, which hide their unsent gradients.
        device: the device to track.
        timeline: also keep a record of released storages.
    """

    roles: tuple[str, ...] = ROLES

    def __init__(
        self,
        known: Mapping[str, list[Any]],
        optimizers: Iterable[torch.optim.Optimizer],
        sharded: Iterable[nn.Module],
        device: torch.device,
        timeline: bool,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known, self._device, self._timeline = dict(known), device, timeline
        self._optimizers = weakref.WeakSet(optimizers)
        self._in_backward, self._sharded = False, weakref.WeakSet(sharded)
        self._live: dict[int, _Record] = {}
        self._gone: list[_Record] = []  # released since the peak; with a timeline, all released storages
        # Time is counted in allocations and releases.
        self._clock = self._start_at = self._peak_at = self._held = self._peak = 0
        self._step_task: int | None = None
        leaves = [each for each in self._known["parameters"] + self._known["inputs"] if each.is_leaf]
        self._known["gradients"] = self._known["gradients"] + [leaf.grad for leaf in leaves]
        self._leaves = weakref.WeakValueDictionary({id(leaf): leaf for leaf in leaves})

    def _start_following(self) -> None:
        for role, trees in self._known.items():
            for storage, tensor in storages_on(self._device, trees):
                if self._is_new(storage, tensor, "given"):
                    self._add(storage, tensor, "given", role)
        trained = [leaf for leaf in self._leaves.values() if leaf.requires_grad]
        self._hooks = [leaf.register_post_accumulate_grad_hook(self._after_gradient) for leaf in trained]
        for one in self._optimizers:
            self._hooks += one.register_step_pre_hook(self._before_step), one.register_step_post_hook(self._after_step)
        TorchDispatchMode.__enter__(self)  # type: ignore[no-untyped-call]

    def _stop_following(self, *error: Any) -> list[_Record]:
        """Stop, and return the records of the storages alive at the peak; with a timeline, of all."""
        TorchDispatchMode.__exit__(self, *error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        # Again, for a .grad that was assigned by hand and for a first step that was interrupted.
        self._label([leaf.grad for leaf in self._leaves.values()], "gradients")
        self._label([(one.state, one.param_groups) for one in self._optimizers], "optimizer state")
        # Detached first, so that a garbage collection meanwhile does not change the sums.
        live, self._live = self._live, {}
        return [*self._gone, *live.values()]

    def _follow_up(self, records: Iterable[_Record]) -> dict[str, list[int]]:
        changes = {role: [0] * (self._clock - self._start_at + 1) for role in self.roles}
        for record in records:
            changes[record.role][max(0, record.born - self._start_at)] += record.nbytes
            if record.died <= self._clock:
                changes[record.role][max(0, record.died - self._start_at)] -= record.nbytes
        return {role: list(accumulate(change)) for role, change in changes.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and track the storages that it allocates."""
        result = func(*args, **(kwargs or {}))
        made = {id(pair[0]): pair for pair in storages_on(self._device, result) if self._is_new(*pair, func)}
        if made and func not in _UNSEEN:
            # An argument's untracked storage was allocated before the block, and is not counted.
            for storage, _ in storages_on(self._device, [args, kwargs]):
                made.pop(id(storage), None)
        if made and self._sharded:
            before, self._in_backward = self._in_backward, torch._C._current_graph_task_id() != -1
            if before and not self._in_backward:  # no hook runs when an unsent gradient is complete
                self._label(ranks.unsent_in(self._sharded), "gradients")
        for storage, tensor in made.values():
            if func is not _aten.lift_fresh.default or storage.resizable():  # otherwise NumPy owns the memory
                self._add(storage, tensor, func, self._role_now())
        return result

    def _role_now(self) -> str:
        # Private: there is no public way to know whether a backward is running, and which.
        task: int = torch._C._current_graph_task_id()
        # step() runs without gradients; a closure that it calls does not, and neither does code after a failed step.
        # A closure's backward is another task than that in which step() was called (-1: none).
        if task == self._step_task and not torch.is_grad_enabled():
            return "optimizer temporaries"
        return "activations" if task == -1 else "backward temporaries"

    def _is_new(self, storage: torch.UntypedStorage, tensor: Tensor, operator: Any) -> bool:
        record = self._live.get(id(storage))
        if record is not None and record.nbytes != self._size(storage):  # resized: released and allocated again
            self._free(record)
            self._add(storage, tensor, operator, record.role)
        return record is None

    def _size(self, storage: torch.UntypedStorage) -> int:
        return storage.nbytes()  # a prediction rounds it up like the device

    def _add(self, storage: torch.UntypedStorage, tensor: Tensor, operator: Any, role: str) -> None:
        # torch keeps a storage's Python object as long as the storage is alive, so its id can be a key.
        self._live[id(storage)] = record = _Record(storage, self._free)
        record.key, record.nbytes, record.role = id(storage), self._size(storage), role
        record.first = operator, tensor.shape, tensor.dtype
        # No calls from here on: during a call the garbage collector might free another storage.
        self._clock += 1
        record.born = self._clock
        self._held += record.nbytes
        if self._held > self._peak:
            self._peak, self._peak_at = self._held, self._clock
            if not self._timeline:
                self._gone.clear()

    def _free(self, record: _Record) -> None:
        if self._live.get(record.key) is record:  # otherwise it was resized, and has a newer record
            del self._live[record.key]
            self._held -= record.nbytes
            self._clock += 1
            record.died = self._clock
            if self._timeline or record.born <= self._peak_at:
                self._gone.append(record)

    def _label(self, tree: object, role: str) -> None:
        for storage, _ in storages_on(self._device, tree):
            record = self._live.get(id(storage))
            if record is not None and record.role in _PASSING:
                record.role = role

    def _after_gradient(self, leaf: Tensor) -> None:
        self._label(leaf.grad, "gradients")

    def _before_step(self, optimizer: torch.optim.Optimizer, *call: object) -> None:
        self._step_task = torch._C._current_graph_task_id()
        self._label([[leaf.grad for leaf in group["params"]] for group in optimizer.param_groups], "gradients")

    def _after_step(self, optimizer: torch.optim.Optimizer, *call: object) -> None:
        self._step_task = None
        # The groups may have a learning rate that is a tensor; their parameters are already labelled.
        self._label([optimizer.state, optimizer.param_groups], "optimizer state")


class _Record(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage, with its key, times, size, role and operator."""

    key, born, died, nbytes, role = 0, 0, sys.maxsize, 0, ""
    first: tuple[Any, torch.Size, torch.dtype]  # operator, shape and dtype of the first tensor

    def held(self) -> Held:
        operator, shape, dtype = self.first
        return Held(self.nbytes, self.role, str(getattr(operator, "overloadpacket", operator)), tuple(shape), dtype)
