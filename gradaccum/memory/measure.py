"""Measure the memory of a step, by role: to the byte on a CPU, with the device's own counters on an accelerator."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradaccum import ranks
from gradaccum.memory.follow import CPU, Following, Held, storages_on


class MemoryReport:
    """The memory use of a block of code; filled when the block ends, also by an exception.

    Attributes:
        peak_bytes: the peak of the memory in use: on a CPU, of the tracked storages; on an accelerator, as counted by
            the device, which includes everything that this process has allocated there.
        start_bytes: the bytes in use when the block began: on a CPU, of what was given to `measure_memory`; on an
            accelerator, as counted by the device.
        end_bytes: the bytes in use when the block ended, counted in the same way.
        reserved_bytes: the peak of the memory that the device's allocator reserved, in use or not; None on a CPU and
            if the allocator does not report it. In a prediction for "cuda", what a model of the caching allocator
            reserves for the tracked storages until the end of the update.
        followed_bytes: the peak of the tracked storages. On a CPU it equals `peak_bytes`. On an accelerator it is
            available, like the attributes below, only with `roles=True`; it does not include tensors that were not
            given, the rounding of the allocator, and the workspaces of libraries.
        at_peak: the bytes of each role at the (first) moment of that peak; they add up to `followed_bytes`. It has all
            of `ROLES`, in that order, also those with 0 bytes.
        largest: the ten largest storages at that moment (or fewer, if there were fewer), as `Held`, the
            largest first.
        timeline: only with `timeline=True`: the bytes of each role when the block began and after each allocation
            and release of a storage (a resized storage is released and allocated again), by the final role of the
            storage. The largest sum over the roles is `followed_bytes`.

    Raises:
        AttributeError: an attribute is read before the block has ended, or was not requested.

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
            raise AttributeError(f"No {name!r}: request it with {name if name == 'timeline' else 'roles'}=True.")
        raise AttributeError(f"No {name!r}: {', '.join(names)} are available when the block has ended.")

    def __repr__(self) -> str:
        reserved = f", reserved {self.reserved_bytes:,}" if self.reserved_bytes else ""
        head = f"Peak memory: {self.peak_bytes:,} bytes (start {self.start_bytes:,}, end {self.end_bytes:,}{reserved})"
        roles = vars(self).get("at_peak", {})
        whole = max(sum(roles.values()), 1)
        rows = [f"  {role:21}{held:>15,}{held / whole:9.1%}" for role, held in roles.items()]
        return "\n".join([head, *rows])


class measure_memory(Following):  # type: ignore[no-untyped-call]
    """Measure the memory that a block of code uses, on a CPU to the byte and by role.

    On a CPU every tensor storage is tracked from allocation to release. A storage counts once, however many tensors
    view it, and with its full size, however small the views are. `known` is the model, the optimizer and the batch:
    modules (with their parameters, buffers and gradients), optimizers (with their state), tensors, and lists, tuples
    and dicts of these. They count from the start, and are not kept alive.

    On an accelerator (CUDA, XPU, MPS if torch counts its memory) it reads the device's own counters through
    `torch.accelerator`, synchronized. **This resets the device's peak counter**. `measure_memory` blocks can be
    nested, but other code in the block should not reset the counter. With `roles=True` the tensors on that device are
    tracked as well, but not those on the host or on other devices. This part has been tested with a stand-in for the
    device's counters, and not yet on a device.

    The roles (`ROLES`): "parameters" (including buffers), "gradients" (the `.grad` of a known parameter),
    "optimizer state", "inputs" (known tensors), "activations" (everything else allocated outside of backward and
    `step()`), "backward temporaries" (allocated in backward, including what checkpointing recomputes),
    "optimizer temporaries" (allocated in a known optimizer's `step()`).

    Under `fully_shard`, unsent gradients, which are not in any parameter's `.grad`, count as gradients too.

    Not tracked: storages allocated before the block and not given; memory inside a kernel (an LSTM, or bfloat16 on
    the CPU, may use some); memory owned by NumPy; tensors created in other threads or processes; the buckets of
    DistributedDataParallel, allocated when it is created (a second copy of the gradients or, as views, the only one).
    Do not compile tracked code: under `torch.compile` the measured run would not be compiled. (The device's own
    counters do measure compiled code.)

    Args:
        known: what is in memory at the start; in a list, tuple or dict, numbers, strings and None are ignored.
        device: the device to measure, such as "cpu" or "cuda"; None for the device of the known modules and tensors,
            or the CPU if there are none.
        roles: on an accelerator, track the tensors too, for `followed_bytes`, `at_peak` and `largest`. On a CPU these
            are always available.
        timeline: track the tensors, keep a record of every storage, also of released ones, and report
            `timeline`.

    Returns:
        On entry, a `MemoryReport`, in bytes. It is filled when the block ends, also by an exception, which is passed
        on. On a CPU its peak agrees with the allocator's own events (torch.profiler) to 64 bytes, and with a closed
        form to the byte, in `tests/test_measure.py`.

    Raises:
        TypeError: an argument has another type, or the device is not a device; nothing was changed.
        ValueError: the device is not available, or no device was named and the known tensors are on several.
        NotImplementedError: the device does not count its memory. If tensors are tracked: a known module is
            compiled, or a tensor is sparse, or on a device while the CPU is measured; raised inside the block if the
            block creates such a tensor (`nn.Embedding(sparse=True)`).
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
        found: dict[str, list[Any]] = {role: [] for role in self.roles}
        optimizers, modules = list[torch.optim.Optimizer](), list[nn.Module]()
        for thing in known:
            _sort(thing, found, optimizers, modules)
        chosen = chosen_device(device, found["parameters"] + found["inputs"])
        self._counters = None if chosen is CPU else DeviceCounters(chosen)
        self._follows = chosen is CPU or roles or timeline
        # The two marks that torch.compile(module) and module.compile() leave, read without importing dynamo.
        compiled = [
            type(one).__name__
            for one in modules
            if any("_orig_mod" in each._modules or vars(each).get("_compiled_call_impl") for each in one.modules())
        ]
        if self._follows and compiled:
            given = f"measure_memory was given a compiled {compiled[0]} and would measure it uncompiled"
            raise NotImplementedError(f"{given}: pass the module that is not compiled, and run it in the block.")
        super().__init__(found, optimizers, ranks.sharded_in(modules), chosen, timeline)
        if self._follows:
            list(storages_on(self._device, self._known))  # raises for unsupported tensors, before anything is changed

    def __enter__(self) -> MemoryReport:
        if not self._known:
            raise RuntimeError("This measure_memory(...) was entered before: create a new one for each block.")
        self._report = MemoryReport()
        start = self._counters.start() if self._counters else 0
        if self._follows:
            self._start_following()
        self._known = {}  # otherwise they would stay alive
        self._report.start_bytes, self._start_at = start if self._counters else self._held, self._clock
        return self._report

    def __exit__(self, *error: Any) -> None:
        records = self._stop_following(*error) if self._follows else []
        if self._counters:
            self._report.peak_bytes, self._report.end_bytes = self._counters.stop()
        self._report.reserved_bytes = (self._counters and self._counters.reserved_bytes) or None
        if not self._follows:
            return
        self._report.followed_bytes = self._peak
        if not self._counters:
            self._report.peak_bytes, self._report.end_bytes = self._peak, self._held
        at_peak = [record for record in records if record.born <= self._peak_at < record.died]
        self._report.at_peak = dict.fromkeys(self.roles, 0)
        for record in at_peak:
            self._report.at_peak[record.role] += record.nbytes
        ten = heapq.nlargest(10, at_peak, key=lambda record: (record.nbytes, -record.born))
        self._report.largest = [record.held() for record in ten]
        if self._timeline:
            self._report.timeline = self._follow_up(records)


def _sort(
    thing: object,
    known: dict[str, list[Any]],
    optimizers: list[torch.optim.Optimizer],
    modules: list[nn.Module],
    nested: bool = False,
) -> None:
    """Sort a known object into its role; collect the optimizers and the modules."""
    if isinstance(thing, Tensor):
        known["inputs"].append(thing)
    elif isinstance(thing, nn.Module):
        modules.append(thing)
        known["parameters"] += (*thing.parameters(), *thing.buffers())
    elif within := optimizers_in(thing):
        for each in within:
            known["parameters"] += (parameter for group in each.param_groups for parameter in group["params"])
            known["optimizer state"] += (each.state, each.param_groups)
        optimizers += within
    elif isinstance(thing, list | tuple | Mapping):
        for item in thing.values() if isinstance(thing, Mapping) else thing:
            _sort(item, known, optimizers, modules, nested=True)
    elif not (nested and (thing is None or isinstance(thing, str | bytes | int | float))):
        given = f"measure_memory was given {thing!r:.80}, a {type(thing).__name__}"
        raise TypeError(f"{given}: pass modules, optimizers, tensors, or lists, tuples and dicts of them.")


def optimizers_in(thing: object) -> list[torch.optim.Optimizer]:
    """Return the optimizer, or the optimizers in a wrapper: the wrappers of accelerate and Fabric have no hooks.

    Example:
        >>> class Wrapper:
        ...     def __init__(self, optimizer):
        ...         self.optimizer = optimizer
        >>> optimizer = torch.optim.SGD([torch.zeros(2)])
        >>> optimizers_in(Wrapper(optimizer)) == [optimizer]
        True
    """
    if isinstance(thing, str | bytes | int | float | Tensor | nn.Module | list | tuple | Mapping):
        return []
    held = vars(thing).values() if hasattr(thing, "__dict__") else ()
    inner = [each for each in held if isinstance(each, torch.optim.Optimizer)]
    if inner:
        return [found for each in inner for found in optimizers_in(each)]
    return [thing] if isinstance(thing, torch.optim.Optimizer) else []


def chosen_device(named: str | torch.device | None, tensors: Iterable[Tensor]) -> torch.device:
    """Return the named device, or the device of the tensors, or the CPU.

    Raises:
        TypeError: `named` is not a device.
        ValueError: the device is not available, or none was named and the tensors are on several.

    Example:
        >>> chosen_device(None, [torch.zeros(2)])
        device(type='cpu')
    """
    if named is None:
        found = sorted({str(tensor.device) for tensor in tensors if not tensor.is_meta})
        if len(found) > 1:
            raise ValueError(f"The given tensors are on {' and '.join(found)}: name one of them, device={found[-1]!r}.")
        named = found[0] if found else "cpu"
    try:
        device = torch.device(named)
    except (RuntimeError, TypeError):
        raise TypeError(f'device must be a device such as "cpu" or "cuda", but {named!r:.80} was given.') from None
    if device.type == "cpu":
        return CPU
    here, count = torch.accelerator.current_accelerator(check_available=True), torch.accelerator.device_count()
    if here is None or here.type != device.type or (device.index or 0) >= count:
        there = ", ".join(["cpu", *(f"{here.type}:{index}" for index in range(count) if here)])
        raise ValueError(f"There is no {device} here, only {there}: name one of these, or use predict_memory.")
    return torch.device(device.type, torch.accelerator.current_device_index() if device.index is None else device.index)


class DeviceCounters:
    """A device's own counters over a block of code, synchronized before each reading and before the reset.

    The device has one peak counter, which `start` resets: nested blocks each keep the peak that they have seen.

    Attributes:
        peak_bytes: the peak of the bytes in use during the block.
        reserved_bytes: the peak of the bytes that the allocator reserved; 0 if it does not report them.

    Raises:
        NotImplementedError: the device does not count its memory.
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
        """Record the peaks, and return the peak and the bytes in use."""
        self._running.remove(self)
        torch.accelerator.synchronize(self._device)
        self._note()
        return self.peak_bytes, torch.accelerator.memory_allocated(self._device)

    def _note(self) -> None:
        self.peak_bytes = max(self.peak_bytes, torch.accelerator.max_memory_allocated(self._device))
        self.reserved_bytes = max(self.reserved_bytes, torch.accelerator.max_memory_reserved(self._device))
