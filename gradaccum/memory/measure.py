"""What a step holds in memory, by role: to the byte on a CPU, by the device's own counters on an accelerator."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradaccum import ranks
from gradaccum.memory.follow import CPU, Following, Held, storages_on


class MemoryReport:
    """What a block of code held in memory; filled when the block ends, by an exception too.

    Attributes:
        peak_bytes: the most bytes held at one moment: on a CPU of what is followed, on an accelerator what the
            device counted, which is all that this process has there, known or not.
        start_bytes: the bytes held when the block began: on a CPU those of what was given to `measure_memory`, on
            an accelerator all that the device counted.
        end_bytes: the bytes held when the block ended, by the same count.
        reserved_bytes: the most that the device's allocator held back at one moment, in use or not; None on a CPU
            and where the allocator does not tell. In a prediction for "cuda", what a model of its caching allocator
            reserves for what is followed, up to the update's end.
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


class measure_memory(Following):  # type: ignore[no-untyped-call]
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
            raise NotImplementedError(f"{given}: give it the plain module, and run that one in the block.")
        super().__init__(found, optimizers, ranks.sharded_in(modules), chosen, timeline)
        if self._follows:
            list(storages_on(self._device, self._known))  # refuses what cannot be, before anything is changed

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
    """Put a thing where it belongs, by role; note the optimizers and the modules."""
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
        raise TypeError(f"{given}: give it modules, optimizers, tensors, or lists, tuples and dicts of them.")


def optimizers_in(thing: object) -> list[torch.optim.Optimizer]:
    """Return the optimizer itself, or those that a wrapper holds: what accelerate or Fabric make of one has no hooks.

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
