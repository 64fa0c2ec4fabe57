"""What a step holds in memory, by role, to the byte: every storage is followed from its making to its end."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

# Private, but the only way to see each operation's result, those of backward too, without touching the model.
from torch.utils._python_dispatch import TorchDispatchMode

# What a storage is called at first because of when it was made; it may turn out to be a gradient or a state.
_PASSING: Final = ("activations", "backward temporaries", "optimizer temporaries")
ROLES: Final = ("parameters", "gradients", "optimizer state", "inputs", *_PASSING)
_aten = torch.ops.aten
# These give a tensor made out of sight of the mode (torch.tensor, copy.deepcopy, torch.load), so that its
# storage is new although it comes in as an argument. (A deep copy of a tensor that was not given counts both.)
_UNSEEN = (_aten.lift_fresh.default, _aten.set_.source_Storage, _aten.set_.source_Storage_storage_offset)


class MemoryReport:
    """What a block of code held in memory; filled when the block ends, by an exception too.

    Attributes:
        peak_bytes: the most bytes held at one moment.
        start_bytes: the bytes of what was given to `measure_memory`, when the block began.
        end_bytes: the bytes held when the block ended.
        at_peak: the bytes of each role at the (first) moment of the peak; they add up to `peak_bytes`. All of
            `ROLES` are there, in that order, those that held nothing with 0.

    Raises:
        AttributeError: one of them is read before the block has ended.

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
    """

    peak_bytes: int
    start_bytes: int
    end_bytes: int
    at_peak: dict[str, int]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"No {name!r}: {', '.join(self.__annotations__)} are there once the block has ended.")

    def __repr__(self) -> str:
        head = f"Peak memory: {self.peak_bytes:,} bytes (start {self.start_bytes:,}, end {self.end_bytes:,})"
        whole = max(self.peak_bytes, 1)
        rows = [f"  {role:21}{held:>15,}{held / whole:9.1%}" for role, held in self.at_peak.items()]
        return "\n".join([head, *rows])


class measure_memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Measure what a block of code holds in memory on the CPU, to the byte, and as what.

    Every tensor storage is followed from the operation that makes it until it is free. A storage counts once
    however many tensors view it, and whole however small the views are. `known` are the model, the optimizer
    and the batch: modules (parameters, buffers and the gradients they have), optimizers (the state they have),
    tensors, and lists, tuples and dicts of these. They are held at the start, and are not kept alive.

    The roles (`ROLES`): "parameters" (buffers too), "gradients" (whatever became a known parameter's `.grad`),
    "optimizer state", "inputs" (known tensors), "activations" (all else made outside of backward and of
    `step()`), "backward temporaries" (made in backward, what checkpointing computes again included),
    "optimizer temporaries" (made in a known optimizer's `step()`).

    Not counted: storages made before the block and not given; memory within a kernel (an LSTM, or bfloat16 on
    the CPU, may hold some); memory that NumPy owns; tensors made in other threads or processes. Do not
    compile the code of the block: under `torch.compile` one would measure a run that is not compiled.

    Args:
        known: what is held at the start; in a list, tuple or dict, numbers, strings and None are passed over.

    Returns:
        On entering, a `MemoryReport`, in bytes. It is filled when the block ends, by an exception too, which
        passes through. Its peak agrees with the allocator's own events (torch.profiler) to 64 bytes and
        with a closed form to the byte, in `tests/test_measure.py`.

    Raises:
        TypeError: something known is none of these; nothing was changed.
        NotImplementedError: a known module is compiled, or a tensor lives on another device than the CPU or
            is sparse; raised in the block where the block makes such a tensor (`nn.Embedding(sparse=True)`).
        RuntimeError: it is entered a second time.

    Example:
        >>> with measure_memory() as memory:
        ...     x = torch.zeros(1000)  # float32: 4000 bytes
        ...     x = x + 1              # 4000 more, before the first are free
        >>> memory.peak_bytes, memory.end_bytes
        (8000, 4000)
    """

    def __init__(self, *known: object) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, _Record] = {}
        self._gone: list[_Record] = []  # alive at the peak, free since
        self._clock = self._peak_at = self._held = self._peak = 0  # time is counted in storages made
        self._step_task: int | None = None
        self._known: dict[str, list[Any]] = {role: [] for role in ROLES}
        self._optimizers = weakref.WeakSet[torch.optim.Optimizer]()
        for thing in known:
            self._sort(thing, nested=False)
        leaves = [tensor for tensor in self._known["parameters"] + self._known["inputs"] if tensor.is_leaf]
        self._known["gradients"] += [leaf.grad for leaf in leaves]
        self._leaves = weakref.WeakValueDictionary({id(leaf): leaf for leaf in leaves})
        list(_storages(self._known))  # refuses what cannot be followed, before anything is changed

    def _sort(self, thing: object, nested: bool) -> None:
        if isinstance(thing, Tensor):
            self._known["inputs"].append(thing)
        elif isinstance(thing, nn.Module):
            # The two marks that torch.compile(module) and module.compile() leave, read without importing dynamo.
            if any("_orig_mod" in m._modules or vars(m).get("_compiled_call_impl") for m in thing.modules()):
                given = f"measure_memory was given a compiled {type(thing).__name__} and would measure it uncompiled"
                raise NotImplementedError(f"{given}: give it the plain module, and run that one in the block.")
            self._known["parameters"] += (*thing.parameters(), *thing.buffers())
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
        for role, trees in self._known.items():
            for storage in _storages(trees):
                if self._is_new(storage):
                    self._add(storage, role)
        self._known = {}  # what the block drops must become free
        self._report = MemoryReport()
        self._report.start_bytes = self._held
        trained = [leaf for leaf in self._leaves.values() if leaf.requires_grad]
        self._hooks = [leaf.register_post_accumulate_grad_hook(self._after_gradient) for leaf in trained]
        for one in self._optimizers:
            self._hooks += one.register_step_pre_hook(self._before_step), one.register_step_post_hook(self._after_step)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self._report

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        # Once more, for a .grad that was assigned by hand and for a first step that was interrupted.
        self._label([leaf.grad for leaf in self._leaves.values()], "gradients")
        self._label([(one.state, one.param_groups) for one in self._optimizers], "optimizer state")
        self._report.peak_bytes, self._report.end_bytes, at_peak = self._peak, self._held, dict.fromkeys(ROLES, 0)
        # Taken away first, so that what the garbage collector frees meanwhile does not change what is added up.
        live, self._live = self._live, {}
        for record in (*self._gone, *live.values()):
            if record.born <= self._peak_at:
                at_peak[record.role] += record.nbytes
        self._report.at_peak = at_peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and follow the storages that it made."""
        result = func(*args, **(kwargs or {}))
        made = {id(storage): storage for storage in _storages(result) if self._is_new(storage)}
        if made and func not in _UNSEEN:
            # An argument's storage that is not followed was made before the block, and so is not counted.
            for storage in _storages([args, kwargs]):
                made.pop(id(storage), None)
        for storage in made.values():
            if func is not _aten.lift_fresh.default or storage.resizable():  # else NumPy owns the memory
                self._add(storage, self._role_now())
        return result

    def _role_now(self) -> str:
        # Private: nothing public tells whether a backward is running, and which.
        task: int = torch._C._current_graph_task_id()
        # step() works without gradients; a closure that it calls does not, nor does the code after a step that
        # failed. A closure's backward is another task than the one (-1: none) that step() was called from.
        if task == self._step_task and not torch.is_grad_enabled():
            return "optimizer temporaries"
        return "activations" if task == -1 else "backward temporaries"

    def _is_new(self, storage: torch.UntypedStorage) -> bool:
        record = self._live.get(id(storage))
        if record is not None and record.nbytes != self._size(storage):  # resized: as if freed and made again
            self._free(record)
            self._add(storage, record.role)
        return record is None

    def _size(self, storage: torch.UntypedStorage) -> int:
        return storage.nbytes()  # a prediction rounds it up as a device would

    def _add(self, storage: torch.UntypedStorage, role: str) -> None:
        # torch keeps a storage's Python object for as long as the storage lives, so its id serves as a key.
        self._live[id(storage)] = record = _Record(storage, self._free)
        self._clock += 1
        record.born, record.key, record.nbytes, record.role = self._clock, id(storage), self._size(storage), role
        self._held += record.nbytes
        if self._held > self._peak:
            self._peak, self._peak_at = self._held, self._clock
            self._gone.clear()

    def _free(self, record: _Record) -> None:
        if self._live.get(record.key) is record:  # else it was resized, and a younger record follows it
            del self._live[record.key]
            self._held -= record.nbytes
            if record.born <= self._peak_at:
                self._gone.append(record)

    def _label(self, tree: object, role: str) -> None:
        for storage in _storages(tree):
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
    """A weak reference to a storage, and what is known about it: its key, its place in time, size and role."""

    key, born, nbytes, role = 0, 0, 0, ""


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """Yield the memory behind the tensors in nested lists, tuples and dicts; all else is passed over."""
    if isinstance(tree, Tensor):
        if hasattr(tree, "__tensor_flatten__"):  # a subclass that wraps other tensors
            yield from _storages([getattr(tree, name) for name in tree.__tensor_flatten__()[0]])
        elif tree.is_cpu and tree.layout == torch.strided:
            yield tree.untyped_storage()
        elif not tree.is_meta:  # which has a shape and no memory
            # A sparse gradient could be followed, but autograd copies it under a mode where it would not else.
            given = f"measure_memory follows dense tensors on the CPU, not one in {tree.layout} on {tree.device}"
            raise NotImplementedError(f"{given}: measure with the model and the data on the CPU.")
    elif isinstance(tree, list | tuple | dict):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _storages(item)
