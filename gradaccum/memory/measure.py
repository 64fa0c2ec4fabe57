"""What a step holds in memory, by role, to the byte: every storage is followed from its making to its end."""

from __future__ import annotations

import heapq
import sys
import weakref
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

# Private, but the only way to see each operation's result, those of backward too, without touching the model.
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum import ranks
from gradaccum.memory.device import CPU, DeviceCounters, chosen_device, storages_on

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


class MemoryReport:
    """What a block of code held in memory; filled when the block ends, by an exception too.

    Attributes:
        peak_bytes: the most bytes held at one moment: on a CPU of what is followed, on an accelerator what the
            device counted, which is all that this process has there, known or not.
        start_bytes: the bytes held when the block began: on a CPU those of what was given to `measure_memory`, on
            an accelerator all that the device counted.
        end_bytes: the bytes held when the block ended, by the same count.
        reserved_bytes: the most that the device's allocator held back at one moment, in use or not; None on a CPU
            and where the allocator does not tell.
        followed_bytes: the most bytes held at one moment of what is followed. On a CPU it is `peak_bytes`; on an
            accelerator, as the rest below, only with `roles=True`, and it leaves out what was not given, the
            rounding of the allocator and the workspaces of libraries.
        at_peak: the bytes of each role at the (first) moment of that; they add up to `followed_bytes`. All of
            `ROLES` are there, in that order, those that held nothing with 0.
        largest: the ten largest storages held at that moment (fewer where fewer were held), as `Held`, the
            largest first.
        timeline: with `timeline=True` only: the bytes of each role when the block began and then after each
            storage that was made or became free (one that is resized becomes free and is made again), by the
            role that it had in the end. The largest sum over the roles is `followed_bytes`.

    Raises:
        AttributeError: one of them is read before the block has ended, or was not asked for.

    Example:
        >>> batch = torch.zeros(1000)
        >>> with measure_memory(batch) as memory:
        ...     pass
        >>> memory
        Peak memory: 4,000 bytes (start 4,000, end 4,000)
          parameters                         0     0.0%
          gradients                          0     0.0%
          optimizer state                    0     0.0%
          inputs                         4,000   100.0%
          activations                        0     0.0%
          backward temporaries               0     0.0%
          optimizer temporaries              0     0.0%
        >>> memory.largest
        [Held(nbytes=4000, role='inputs', operator='given', shape=(1000,), dtype=torch.float32)]
    """

    peak_bytes: int
    start_bytes: int
    end_bytes: int
    reserved_bytes: int | None
    followed_bytes: int
    at_peak: dict[str, int]
    largest: list[Held]
    timeline: dict[str, list[int]]

    def __getattr__(self, name: str) -> Any:
        names = list(MemoryReport.__annotations__)
        if name in names and "peak_bytes" in vars(self):
            raise AttributeError(f"No {name!r}: ask for it with {name if name == 'timeline' else 'roles'}=True.")
        raise AttributeError(f"No {name!r}: {', '.join(names)} are there once the block has ended.")

    def __repr__(self) -> str:
        reserved = f", reserved {self.reserved_bytes:,}" if self.reserved_bytes else ""
        head = f"Peak memory: {self.peak_bytes:,} bytes (start {self.start_bytes:,}, end {self.end_bytes:,}{reserved})"
        roles = vars(self).get("at_peak", {})
        whole = max(sum(roles.values()), 1)
        rows = [f"  {role:21}{held:>15,}{held / whole:9.1%}" for role, held in roles.items()]
        return "\n".join([head, *rows])


class measure_memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Measure what a block of code holds in memory, on the CPU to the byte and as what.

    On a CPU every tensor storage is followed from the operation that makes it until it is free. A storage counts
    once however many tensors view it, and whole however small the views are. `known` are the model, the optimizer
    and the batch: modules (parameters, buffers and the gradients they have), optimizers (the state they have),
    tensors, and lists, tuples and dicts of these. They are held at the start, and are not kept alive.

    On an accelerator (CUDA, XPU, MPS where torch can count there) the device's own counters are read, by
    `torch.accelerator`, synchronized. **This resets the device's peak counter**; one `measure_memory` may be in
    another's block, but the block should not reset it. With `roles=True` the tensors on that device are followed
    as well, those on the host and on other devices are not. This part has been tested with a stand-in for the
    device's counters and has not been run on a device yet.

    The roles (`ROLES`): "parameters" (buffers too), "gradients" (whatever became a known parameter's `.grad`),
    "optimizer state", "inputs" (known tensors), "activations" (all else made outside of backward and of
    `step()`), "backward temporaries" (made in backward, what checkpointing computes again included),
    "optimizer temporaries" (made in a known optimizer's `step()`).

    Under `fully_shard` the gradients that were not sent yet, which no parameter's `.grad` has, are gradients too.

    Not followed: storages made before the block and not given; memory within a kernel (an LSTM, or bfloat16 on
    the CPU, may hold some); memory that NumPy owns; tensors made in other threads or processes; the buckets of
    DistributedDataParallel, the gradients once more (or, as views, the only time), made when it is. Do not
    compile the code of a block that is followed: under `torch.compile` one would measure a run that is not
    compiled. (The device's own counters see compiled code as it is.)

    Args:
        known: what is held at the start; in a list, tuple or dict, numbers, strings and None are passed over.
        device: where to measure, such as "cpu" or "cuda"; None: where the known modules and tensors are, or the
            CPU if there are none.
        roles: on an accelerator, follow the tensors too, for `followed_bytes`, `at_peak` and `largest`. On a CPU
            they are there anyway.
        timeline: follow them, keep a record of every storage, those that are free again too, and report
            `timeline`.

    Returns:
        On entering, a `MemoryReport`, in bytes. It is filled when the block ends, by an exception too, which
        passes through (running out of memory too). On a CPU its peak agrees with the allocator's own events
        (torch.profiler) to 64 bytes and with a closed form to the byte, in `tests/test_measure.py`.

    Raises:
        TypeError: something known is none of these, or the device is none; nothing was changed.
        ValueError: the device is not there, or none was named and what is known lies on several.
        NotImplementedError: the device does not count its memory. Where tensors are followed: a known module is
            compiled, a tensor is sparse, or on a device when the CPU is measured; raised in the block where the
            block makes such a tensor (`nn.Embedding(sparse=True)`).
        RuntimeError: it is entered a second time.

    Example:
        >>> with measure_memory() as memory:
        ...     x = torch.zeros(1000)  # float32: 4000 bytes
        ...     x = x + 1              # 4000 more, before the first are free
        >>> memory.peak_bytes, memory.end_bytes
        (8000, 4000)
        >>> with measure_memory(x, timeline=True) as memory:
        ...     x = x.sum()
        >>> memory.timeline["inputs"], memory.timeline["activations"]
        ([4000, 4000, 0], [0, 4, 4])
    """

    def __init__(
        self, *known: object, device: str | torch.device | None = None, roles: bool = False, timeline: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._timeline = timeline
        self._live: dict[int, _Record] = {}
        self._gone: list[_Record] = []  # alive at the peak, free since; all that are free, for a timeline
        # Time is counted in storages made and freed.
        self._clock = self._start_at = self._peak_at = self._held = self._peak = 0
        self._step_task: int | None = None
        self._in_backward, self._sharded = False, weakref.WeakSet[nn.Module]()
        self._known: dict[str, list[Any]] = {role: [] for role in ROLES}
        self._optimizers = weakref.WeakSet[torch.optim.Optimizer]()
        self._compiled = ""
        for thing in known:
            self._sort(thing, nested=False)
        tensors = self._known["parameters"] + self._known["inputs"]
        self._device = chosen_device(device, tensors)
        self._counters = None if self._device is CPU else DeviceCounters(self._device)
        self._follows = self._device is CPU or roles or timeline
        if self._follows and self._compiled:
            given = f"measure_memory was given a compiled {self._compiled} and would measure it uncompiled"
            raise NotImplementedError(f"{given}: give it the plain module, and run that one in the block.")
        leaves = [tensor for tensor in tensors if tensor.is_leaf]
        self._known["gradients"] += [leaf.grad for leaf in leaves]
        self._leaves = weakref.WeakValueDictionary({id(leaf): leaf for leaf in leaves})
        if self._follows:
            list(storages_on(self._device, self._known))  # refuses what cannot be, before anything is changed

    def _sort(self, thing: object, nested: bool) -> None:
        if isinstance(thing, Tensor):
            self._known["inputs"].append(thing)
        elif isinstance(thing, nn.Module):
            # The two marks that torch.compile(module) and module.compile() leave, read without importing dynamo.
            if any("_orig_mod" in m._modules or vars(m).get("_compiled_call_impl") for m in thing.modules()):
                self._compiled = type(thing).__name__
            self._known["parameters"] += (*thing.parameters(), *thing.buffers())
            self._sharded.update(ranks.sharded_in([thing]))
        elif isinstance(thing, torch.optim.Optimizer):
            self._known["parameters"] += (parameter for group in thing.param_groups for parameter in group["params"])
            self._known["optimizer state"] += (thing.state, thing.param_groups)
            self._optimizers.add(thing)
        elif isinstance(thing, list | tuple | Mapping):
            for item in thing.values() if isinstance(thing, Mapping) else thing:
                self._sort(item, nested=True)
        elif not (nested and (thing is None or isinstance(thing, str | bytes | int | float))):
            given = f"measure_memory was given {thing!r:.80}, a {type(thing).__name__}"
            raise TypeError(f"{given}: give it modules, optimizers, tensors, or lists, tuples and dicts of them.")

    def __enter__(self) -> MemoryReport:
        if not self._known:
            raise RuntimeError("This measure_memory(...) was entered before: make a new one for each block.")
        self._report = MemoryReport()
        start = self._counters.start() if self._counters else 0
        if self._follows:
            self._start_following()
        self._known = {}  # what the block drops must become free
        self._report.start_bytes, self._start_at = start if self._counters else self._held, self._clock
        return self._report

    def _start_following(self) -> None:
        for role, trees in self._known.items():
            for storage, tensor in storages_on(self._device, trees):
                if self._is_new(storage, tensor, "given"):
                    self._add(storage, tensor, "given", role)
        trained = [leaf for leaf in self._leaves.values() if leaf.requires_grad]
        self._hooks = [leaf.register_post_accumulate_grad_hook(self._after_gradient) for leaf in trained]
        for one in self._optimizers:
            self._hooks += one.register_step_pre_hook(self._before_step), one.register_step_post_hook(self._after_step)
        super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        if self._follows:
            super().__exit__(*error)  # type: ignore[no-untyped-call]
            for hook in self._hooks:
                hook.remove()
        if self._counters:
            self._report.peak_bytes, self._report.end_bytes = self._counters.stop()
        self._report.reserved_bytes = (self._counters and self._counters.reserved_bytes) or None
        if self._follows:
            self._report_followed()

    def _report_followed(self) -> None:
        # Once more, for a .grad that was assigned by hand and for a first step that was interrupted.
        self._label([leaf.grad for leaf in self._leaves.values()], "gradients")
        self._label([(one.state, one.param_groups) for one in self._optimizers], "optimizer state")
        # Taken away first, so that what the garbage collector frees meanwhile does not change what is added up.
        live, self._live = self._live, {}
        self._report.followed_bytes = self._peak
        if not self._counters:
            self._report.peak_bytes, self._report.end_bytes = self._peak, self._held
        records = [*self._gone, *live.values()]
        at_peak = [record for record in records if record.born <= self._peak_at < record.died]
        self._report.at_peak = dict.fromkeys(ROLES, 0)
        for record in at_peak:
            self._report.at_peak[record.role] += record.nbytes
        ten = heapq.nlargest(10, at_peak, key=lambda record: (record.nbytes, -record.born))
        self._report.largest = [record.held() for record in ten]
        if self._timeline:
            self._report.timeline = self._follow_up(records)

    def _follow_up(self, records: Iterable[_Record]) -> dict[str, list[int]]:
        changes = {role: [0] * (self._clock - self._start_at + 1) for role in ROLES}
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
