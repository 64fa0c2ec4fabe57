"""What tests of one process and of several ranks share: what a refusal looks like, and the errors of each rank."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from gradaccum.threads import run_ranks


@contextmanager
def refused(error, *said):
    """Expect an error whose message is one sentence with all of `said` in it."""
    with pytest.raises(error) as caught:
        yield
    text = str(caught.value)
    assert [part for part in said if part not in text] == [], text
    assert (text[-1], text.count(". "), text.count("\n")) == (".", 0, 0)


def errors_of(size, work):
    """What each rank raises, or None; a rank that hangs would raise RankError."""

    def guarded(rank, group):
        try:
            work(rank, group)
        except Exception as error:
            return error

    return run_ranks(size, guarded)


@contextmanager
def ended(processes, timeout):
    """Wait for our processes, and leave none behind."""
    try:
        yield [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def said_by_ranks(job, size, store, prefix):
    """What each rank of a job says of each of its cases; `ranks_job.py` says how a job is called."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, job, str(rank), str(size), store, prefix],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]
    with ended(processes, timeout=120) as outputs:
        pass
    lines = [(rank, json.loads(line)) for rank, output in enumerate(outputs) for line in output.splitlines()]
    return {(name, rank): what for rank, (name, what) in lines}
