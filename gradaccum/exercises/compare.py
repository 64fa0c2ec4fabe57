"""Compare plain data with the expected data, and describe the difference in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

Plain = Any  # the types of JSON: numbers, strings, booleans, None, and lists and dicts of them

TOLERANCE = 1e-6
"""The largest relative error of a right answer. All data is float64, in which right answers agree to 1e-15; but an
answer that computes its weights in float32 has an error of 6e-8 and is right. Wrong answers have 1e-3 or more."""


LARGE = 10**300  # a larger int is not converted to float, and not shown


ALL_ZEROS, EMPTY = "all zeros", "`.grad` is empty or all zeros"
ZEROS = {"weights moved by": "the weights did not move", "gradient": EMPTY, "gradient of a second call": EMPTY}
"""What all zeros mean, by the name of the compared value."""


class Difference(NamedTuple):
    """The expected and the actual value, as text, and how they relate, if that is known."""

    expected: str
    got: str
    relation: str = ""


def agree(got: Plain, expected: Plain) -> Difference | None:
    """Return the difference of plain data, None if equal; lists of floats are compared as vectors, to `TOLERANCE`.

    Example:
        >>> agree([2.0, 4.0], [0.5, 1.0])
        Difference(expected='[0.5, 1]', got='[2, 4]', relation='exactly 4 times as large')
        >>> agree({"updates": 3}, {"updates": 3}) is None
        True
    """
    if isinstance(expected, dict):
        if not isinstance(got, dict) or got.keys() != expected.keys():
            return Difference(short(expected), short(got))
        for key, value in expected.items():
            if difference := agree(got[key], value):
                said = ZEROS.get(key, ALL_ZEROS) if difference.relation == ALL_ZEROS else difference.relation
                return Difference(f"{key} {difference.expected}", f"{key} {difference.got}", said)
        return None
    if _is_vector(expected):
        same_length = _is_vector(got, any_number=True) and len(got) == len(expected)
        relation = _relation(got, expected) if same_length else None
        return None if relation == "" else Difference(short(expected), short(got), relation or "")
    if isinstance(expected, list) and isinstance(got, list) and len(got) == len(expected):
        differences = [agree(one, other) for one, other in zip(got, expected, strict=True)]
        return Difference(short(expected), short(got)) if any(differences) else None
    if _is_number(expected) and _is_number(got):
        relation = "" if got == expected else _relation([got], [expected])
        if isinstance(expected, int) and got != expected:  # a count: a factor would not help
            return Difference(short(expected), short(got), "" if relation else "close, but not exact")
        return Difference(short(expected), short(got), relation) if relation else None
    same = type(got) is type(expected) and got == expected
    return None if same else Difference(short(expected), short(got))


def _relation(got: Sequence[float], expected: Sequence[float]) -> str:
    """Return how two vectors relate, in words; "" if they are equal within the tolerance."""
    if not all(map(math.isfinite, (*got, *expected))):  # `expected` may be the result of a known mistake
        return "not finite"
    norm = math.hypot(*expected)
    error = math.hypot(*(one - other for one, other in zip(got, expected, strict=True)))
    if error <= TOLERANCE * norm:
        return ""
    if norm == 0 or not any(got):
        return ALL_ZEROS if norm else "zeros were expected"
    factor = sum(one * other for one, other in zip(got, expected, strict=True)) / norm**2
    rest = math.hypot(*(one - factor * other for one, other in zip(got, expected, strict=True)))
    # A factor between single numbers is worth saying only if it, or its inverse, is an integer.
    simple = any(
        abs(one - round(one)) <= TOLERANCE and abs(one) <= 64 for one in (factor, 1 / factor if factor else 0.5)
    )
    if rest <= TOLERANCE * norm and (len(got) > 1 or simple):
        part = Fraction(factor).limit_denominator(12)  # as the weights are written
        if 0 < part < 1 and abs(factor - part) <= TOLERANCE * factor:
            return f"exactly {part} as large"
        return f"exactly {factor:.5g} times as large"
    apart = f"{100 * error / norm:.3g} % off"
    return apart if len(got) == 1 else f"{apart}, relative to the length of what was expected"


def _is_number(value: Plain) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGE)


def _is_vector(value: Plain, any_number: bool = False) -> bool:
    numbers = isinstance(value, list) and bool(value) and all(map(_is_number, value))
    return numbers and (any_number or any(isinstance(item, float) for item in value))


def short(value: Plain) -> str:
    """Format plain data for a card: numbers with four digits, and only the beginning of a long list."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) < LARGE else "an int with more than 300 digits"
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(item)}" for key, item in value.items())
    if isinstance(value, list):
        shown = [repr(item) if isinstance(item, str) else short(item) for item in value[:6]]
        return f"[{', '.join(shown)}{', ...' if len(value) > 6 else ''}]"
    return f"{value:.100}" if isinstance(value, str) else f"{value!r:.100}"
