"""What tests of one process and of several ranks share: what a refusal looks like, and the errors of each rank."""

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
