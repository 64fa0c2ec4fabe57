"""Several ranks as threads of one process, with real gloo groups on the loopback, for notebooks and tests.

DistributedDataParallel works as on processes. `fully_shard` does not: its mesh needs a group of the whole job.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

# Private: the only way to see each collective before it is sent, including those of DDP's C++ code.
from torch.utils._python_dispatch import TorchDispatchMode

Result = TypeVar("Result")


class RankError(RuntimeError):
    """Raised on a rank if another rank calls a different collective, has ended, or calls none in time."""


class _Meeting:
    """A meeting point where the ranks compare the collectives that they are about to call."""

    def __init__(self, size: int, timeout: float) -> None:
        # A condition, not a barrier: a barrier broken by a rank that ends may still be waking up the others.
        self._changed = threading.Condition()
        self._came = [0] * size  # number of calls per rank
        self._said = [["", ""] for _ in range(size)]  # the last two calls: no rank can be further ahead
        self._ended: dict[int, str] = {}
        self._timeout = timeout
        self._stopped = False

    def meet(self, rank: int, what: str) -> None:
        """Wait until all ranks are about to call the same collective, or raise RankError."""
        with self._changed:
            if self._stopped:
                raise RankError(f"Rank {rank} was interrupted before {what}.")
            self._came[rank] += 1
            turn = self._came[rank]
            self._said[rank][turn % 2] = what
            self._changed.notify_all()
            self._changed.wait_for(lambda: all(each in self._ended for each in self._absent(turn)), self._timeout)
            absent = sorted(self._absent(turn))
            said = [each[turn % 2] for each in self._said]
        if absent:
            how = [f"rank {each} {self._ended.get(each, 'did not come')}" for each in absent]
            raise RankError(f"Rank {rank} waits in {what}, but {', '.join(how)}.")
        if len(set(said)) > 1:
            told = "; ".join(f"rank {number} in {each}" for number, each in enumerate(said))
            raise RankError(f"The ranks call different collectives and would wait forever: {told}.")

    def _absent(self, turn: int) -> set[int]:
        return {rank for rank, came in enumerate(self._came) if came < turn}

    def stop(self) -> None:
        """End each rank at its next collective."""
        with self._changed:
            self._stopped = True
            self._ended = dict.fromkeys(range(len(self._came)), "was interrupted") | self._ended
            self._changed.notify_all()

    def end(self, rank: int, how: str) -> None:
        """Tell the waiting ranks that a rank has ended."""
        with self._changed:
            self._ended.setdefault(rank, how)
            self._changed.notify_all()


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compare operation and shapes over the ranks before each collective: if they differ, gloo ends the process."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rank, self._meeting = rank, meeting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            shapes = ", ".join(f"{tuple(each.shape)} {each.dtype}".replace("torch.", "") for each in _tensors(args))
            self._meeting.meet(self._rank, f"{func._opname.rstrip('_')} of {shapes or 'nothing'}")
        return func(*args, **(kwargs or {}))


def _tensors(args: Any) -> Iterator[Tensor]:
    for each in args:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)


def _group(rank: int, size: int, store: Any, timeout: float) -> Any:
    """Return a rank's gloo group; `init_process_group` would create one for the whole process."""
    c10d: Any = torch.distributed
    gloo, name = c10d.ProcessGroupGloo, "gradaccum"
    options = gloo._Options()  # private, like the next names, which init_process_group uses
    options._devices = [gloo.create_device(hostname="127.0.0.1")]  # unreachable from other machines
    options._timeout = datetime.timedelta(seconds=timeout)
    group = c10d.ProcessGroup(c10d.PrefixStore(name, store), rank, size)
    backend = gloo(c10d.PrefixStore(f"{name}/gloo", store), rank, size, options)
    kind = c10d.ProcessGroup.BackendType.GLOO
    group._set_default_backend(kind)
    group._register_backend(torch.device("cpu"), kind, backend)
    group._set_group_name(name)
    return group


def run_ranks(size: int, work: Callable[[int, Any], Result], *, timeout: float = 20.0) -> list[Result]:
    """Run `work(rank, group)` on `size` ranks, each a thread of this process, and return the results.

    Pass the group to everything that communicates: `DistributedDataParallel(model, process_group=group)`,
    `windows(..., group=group)`. There is no default group, so a call without a group fails.
    Threads share the process, and so one generator for `torch.manual_seed`: build the model before, and give each rank
    a `copy.deepcopy` of it.

    Args:
        size: the number of ranks, at least 1.
        work: called as `work(rank, group)` in each thread.
        timeout: seconds that a rank waits for the others in a collective. (A rank that does not communicate may take
            longer, if no other rank waits for it.)

    Returns:
        A list of the results, in the order of the ranks.

    Raises:
        ValueError: `size` is below 1.
        RankError: the ranks call different collectives (gloo would end the process), or one waits for a rank that has
            ended or does not come. If a rank raised another error, that error is raised instead.
        Exception: the error of a rank, the lowest rank's first.

    Example:
        >>> def work(rank, group):
        ...     mine = torch.full((2,), float(rank + 1))
        ...     torch.distributed.all_reduce(mine, group=group)
        ...     return mine.tolist()
        >>> run_ranks(2, work)
        [[3.0, 3.0], [3.0, 3.0]]
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, but {size} was given.")
    c10d: Any = torch.distributed
    store, meeting = c10d.HashStore(), _Meeting(size, timeout)
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}

    def rank(number: int) -> None:
        try:
            group = _group(number, size, store, timeout)
            with _Guard(number, meeting):
                results[number] = work(number, group)
            meeting.end(number, "has ended")
        except BaseException as error:
            errors[number] = error
            meeting.end(number, f"has ended with {type(error).__name__}")

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(size)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # in steps, so that an interrupt gets through
    except BaseException:
        meeting.stop()
        raise
    for error in sorted(errors.items(), key=lambda pair: (isinstance(pair[1], RankError), pair[0])):
        raise error[1]
    return [results[number] for number in range(size)]
