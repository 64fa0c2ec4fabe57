"""What code holds in memory: every tensor storage is tracked from allocation to release, with the role that it has."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

# Private, but the only way to see each operation's result, those of backward too, without touching the model.
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum import ranks

CPU: Final = torch.device("cpu")
# What a storage is called at first because of when it was made; it may turn out to be a gradient or a state.
_PASSING: Final = ("activations", "backward temporaries", "optimizer temporaries")
ROLES: Final = ("parameters", "gradients", "optimizer state", "inputs", *_PASSING)
_aten = torch.ops.aten
# These give a tensor made out of sight of the mode (torch.tensor, copy.deepcopy, torch.load), so that its
# storage is new although it comes in as an argument. (A deep copy of a tensor that was not given counts both.)
_UNSEEN = (_aten.lift_fresh.default, _aten.set_.source_Storage, _aten.set_.source_Storage_storage_offset)


class Held(NamedTuple):
    """One storage that was held at the peak: its size, its role, what made it, and the first tensor seen on it.

    Attributes:
        nbytes: its size in bytes.
        role: one of `ROLES`.
        operator: the operation that made it, such as "aten.mm", or "given" for what was known at the start.
        shape: of the first tensor seen on it.
        dtype: of the same tensor.
    """

    nbytes: int
    role: str
    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype


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


class Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Track the storages that operations make on a device; `measure_memory` is one, and says what is seen.

    Args:
        known: what is held at the start, by role: tensors, in lists, tuples and dicts.
        optimizers: whose steps and states are told apart.
        sharded: modules of `fully_shard`, which hide the gradients that they have not sent.
        device: the one to look at.
        timeline: keep a record of the storages that are free again too.
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
        self._gone: list[_Record] = []  # alive at the peak, free since; all that are free, for a timeline
        # Time is counted in storages made and freed.
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
        """Stop, and return the records of all that was alive at the peak; of all, for a timeline."""
        TorchDispatchMode.__exit__(self, *error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        # Once more, for a .grad that was assigned by hand and for a first step that was interrupted.
        self._label([leaf.grad for leaf in self._leaves.values()], "gradients")
        self._label([(one.state, one.param_groups) for one in self._optimizers], "optimizer state")
        # Taken away first, so that what the garbage collector frees meanwhile does not change what is added up.
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
        """Run an operation, and follow the storages that it made."""
        result = func(*args, **(kwargs or {}))
        made = {id(pair[0]): pair for pair in storages_on(self._device, result) if self._is_new(*pair, func)}
        if made and func not in _UNSEEN:
            # An argument's storage that is not followed was made before the block, and so is not counted.
            for storage, _ in storages_on(self._device, [args, kwargs]):
                made.pop(id(storage), None)
        if made and self._sharded:
            before, self._in_backward = self._in_backward, torch._C._current_graph_task_id() != -1
            if before and not self._in_backward:  # no hook says when a gradient that is not sent is complete
                self._label(ranks.unsent_in(self._sharded), "gradients")
        for storage, tensor in made.values():
            if func is not _aten.lift_fresh.default or storage.resizable():  # else NumPy owns the memory
                self._add(storage, tensor, func, self._role_now())
        return result

    def _role_now(self) -> str:
        # Private: nothing public tells whether a backward is running, and which.
        task: int = torch._C._current_graph_task_id()
        # step() works without gradients; a closure that it calls does not, nor does the code after a step that
        # failed. A closure's backward is another task than the one (-1: none) that step() was called from.
        if task == self._step_task and not torch.is_grad_enabled():
            return "optimizer temporaries"
        return "activations" if task == -1 else "backward temporaries"

    def _is_new(self, storage: torch.UntypedStorage, tensor: Tensor, operator: Any) -> bool:
        record = self._live.get(id(storage))
        if record is not None and record.nbytes != self._size(storage):  # resized: as if freed and made again
            self._free(record)
            self._add(storage, tensor, operator, record.role)
        return record is None

    def _size(self, storage: torch.UntypedStorage) -> int:
        return storage.nbytes()  # a prediction rounds it up as a device would

    def _add(self, storage: torch.UntypedStorage, tensor: Tensor, operator: Any, role: str) -> None:
        # torch keeps a storage's Python object for as long as the storage lives, so its id serves as a key.
        self._live[id(storage)] = record = _Record(storage, self._free)
        record.key, record.nbytes, record.role = id(storage), self._size(storage), role
        record.first = operator, tensor.shape, tensor.dtype
        # From here on no call, during which the garbage collector might free something else.
        self._clock += 1
        record.born = self._clock
        self._held += record.nbytes
        if self._held > self._peak:
            self._peak, self._peak_at = self._held, self._clock
            if not self._timeline:
                self._gone.clear()

    def _free(self, record: _Record) -> None:
        if self._live.get(record.key) is record:  # else it was resized, and a younger record follows it
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
        # The groups for a learning rate that is a tensor; what else they hold are parameters, labelled before.
        self._label([optimizer.state, optimizer.param_groups], "optimizer state")


class _Record(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage, and what is known about it: its key, its times, its size, role and maker."""

    key, born, died, nbytes, role = 0, 0, sys.maxsize, 0, ""
    first: tuple[Any, torch.Size, torch.dtype]  # the operator, and of the tensor that it made the shape and dtype

    def held(self) -> Held:
        operator, shape, dtype = self.first
        return Held(self.nbytes, self.role, str(getattr(operator, "overloadpacket", operator)), tuple(shape), dtype)
