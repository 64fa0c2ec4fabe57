"""Ranks as threads of one process: what would end the process or wait for ever is an error that names the ranks."""

import _thread
import signal
import threading
import time

import pytest
import torch
from threaded import errors_of, refused

from gradaccum.threads import RankError, run_ranks


def send(numbers, group):
    tensor = torch.full((numbers,), 1.0 + group.rank())
    torch.distributed.all_reduce(tensor, group=group)
    return tensor.tolist()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_add_up_and_leave_no_thread(size):
    before = threading.active_count()
    total = size * (size + 1) / 2
    assert run_ranks(size, lambda rank, group: (rank, send(2, group))) == [(rank, [total] * 2) for rank in range(size)]
    assert threading.active_count() == before


def test_ranks_that_send_different_sizes_are_told():
    def work(rank, group):
        torch.distributed.all_reduce(torch.zeros(1 if rank else 1000), group=group)

    for error in errors_of(2, work):
        assert type(error) is RankError
        assert "rank 0 in allreduce of (1000,) float32; rank 1 in allreduce of (1,) float32" in str(error)


def test_a_rank_that_is_waited_for_is_named():
    def work(rank, group):
        if rank == 0:
            torch.distributed.all_reduce(torch.zeros(3), group=group)

    with refused(RankError, "Rank 0 waits in allreduce of (3,) float32", "rank 1 has ended"):
        run_ranks(2, work)
    with pytest.raises(KeyError):
        run_ranks(2, lambda rank, group: {}[1] if rank else torch.distributed.all_reduce(torch.zeros(3), group=group))
    start = time.monotonic()
    with refused(RankError, "rank 1 did not come"):
        run_ranks(
            2,
            lambda rank, group: time.sleep(2) if rank else torch.distributed.all_reduce(torch.zeros(3), group=group),
            timeout=0.5,
        )
    assert time.monotonic() - start < 4
    with refused(ValueError, "at least 1"):
        run_ranks(0, work)


def test_an_interrupt_ends_the_ranks():
    began = time.monotonic()
    # Whoever runs the tests in the background ignores SIGINT.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def work(rank, group):
        if rank == 0:
            _thread.interrupt_main()
        while time.monotonic() - began < 5:
            send(2, group)
            time.sleep(0.01)

    before = threading.active_count()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_ranks(2, work)
    finally:
        signal.signal(signal.SIGINT, handler)
    while threading.active_count() > before and time.monotonic() - began < 4:
        time.sleep(0.01)
    assert threading.active_count() == before
