"""The sheet of faults: as made, and each fault is what its row says."""

import faults
import pytest

KINDS = {
    "the leftover waits": "cut elsewhere",
    "off by one": "cut elsewhere",
    "the last window over k": "a partial window over k",
    "cleared in the window": "only the last micro-batch",
    "clipped in the window": "clipped or divided inside",
    "scheduled in the window": "right",
    "the last loss is logged": "right",
    "no division": "not divided",
    "sums, not divided": "not divided",
    "a mean of means": "each mean over k",
    "counted before the shift": "another divisor",
    "never cleared": "gradients of an earlier update",
    "the scale is left in": "one common factor",
    "a penalty each time": "no weighted sum",
}


def test_the_sheet_is_as_made():
    assert faults.PAGE.read_text("utf-8") == faults.page(), "make it again: python tools/faults.py"


def test_the_sheet_has_every_fault_once():
    assert [fault.name for fault in faults.FAULTS] == list(KINDS)


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_a_wrong_line_is_what_its_row_says(fault):
    updates, rates, logged = faults.run(fault)
    assert updates[fault.update].kind == KINDS[fault.name]
    if fault.wrong == fault.line:
        return  # the tutorial's own loop
    updates, right_rates, right = faults.run(fault._replace(wrong=fault.line))
    assert updates[fault.update].kind != KINDS[fault.name] or fault.note
    assert (rates != right_rates) == (fault.note == "rate")
    assert fault.note != "logged" or logged != right
