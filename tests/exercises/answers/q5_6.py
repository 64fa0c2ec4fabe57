"""5.6: further right answers, which must get full points, and wrong ones, which must not."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from gradaccum.exercises.questions.rules_05 import NAMES, by_rules
from gradaccum.verdicts import Facts, kind_of

LINES = {"right": "F", "only the last micro-batch": "D", "clipped or divided inside": "E"}


def paired(name_of):
    """Make an answer of what finds the name alone."""

    def read(weights, counts, accumulation_steps):
        name = name_of(weights, counts, accumulation_steps)
        return name, LINES.get(name, "A")

    return read


# ----------------------------------------------------------------------------------------------------------- right


@paired
def by_numpy(weights, counts, k):
    weights, counts = np.array(weights), np.array(counts)
    if np.allclose(weights, counts / counts.sum()):
        return "right"
    if np.allclose(weights, 1) or np.allclose(weights, counts):
        return "not divided"
    if len(weights) > 1 and np.allclose(weights[:-1], 0):
        return "only the last micro-batch"
    if np.ptp(weights) < 1e-4:
        return "each mean over k" if np.isclose(weights.sum(), 1) else "a partial window over k"
    return "clipped or divided inside"


@paired
def by_rounding(weights, counts, k):
    rounded = [round(w, 3) for w in weights]
    if rounded == [round(c / sum(counts), 3) for c in counts]:
        return "right"
    if rounded == [1] * len(counts) or rounded == counts:
        return "not divided"
    if len(set(rounded)) == 1:
        return "each mean over k" if abs(sum(weights) - 1) < 0.01 else "a partial window over k"
    return "only the last micro-batch" if not any(rounded[:-1]) else "clipped or divided inside"


@paired
def by_the_sum(weights, counts, k):
    """Looks at what the weights add up to, then at the shares."""
    total, shares = sum(weights), [c / sum(counts) for c in counts]
    right = all(math.isclose(w, s, rel_tol=1e-3, abs_tol=1e-3) for w, s in zip(weights, shares, strict=True))
    if total > 1.005:
        return "not divided"
    if total > 0.995:
        return "right" if right else "each mean over k"
    if all(math.isclose(w, 1 / k, rel_tol=1e-3) for w in weights):
        return "a partial window over k"
    if sum(abs(w) > 1e-3 for w in weights) == 1:
        return "only the last micro-batch"
    return "clipped or divided inside"


@paired
def by_ratios(weights, counts, k):
    """Looks at the weights over the right ones, where anything counts."""
    pairs = [(w, c) for w, c in zip(weights, counts, strict=True) if c]
    ratios = torch.tensor([w / c * sum(counts) for w, c in pairs], dtype=torch.float32)
    if (ratios - 1).abs().max() < 1e-4:
        return "right"
    if ratios[:-1].abs().lt(1e-4).all() and abs(ratios[-1] - 1) < 1e-4:
        return "only the last micro-batch"
    plain = torch.tensor([w for w, _ in pairs])
    if torch.allclose(plain, torch.tensor(1 / k, dtype=plain.dtype)) and len(counts) < k:
        return "a partial window over k"
    if torch.allclose(plain, torch.tensor(1 / len(counts), dtype=plain.dtype)):
        return "each mean over k"
    return "clipped or divided inside" if (ratios < 1).all() else "not divided"


@paired
def by_fractions(weights, counts, k):
    """Makes of each weight the fraction that it is, where it is a simple one."""
    simple = [Fraction(w).limit_denominator(100) for w in weights]
    simple = [s if abs(s - w) < 1e-4 else Fraction(w) for s, w in zip(simple, weights, strict=True)]
    total, many = sum(counts), len(counts)
    table = {
        "right": [[Fraction(c, total) for c in counts]],
        "not divided": [[Fraction(1)] * many, [Fraction(c) for c in counts]],
        "each mean over k": [[Fraction(1, many)] * many],
        "a partial window over k": [[Fraction(1, k)] * many],
        "only the last micro-batch": [[Fraction(0)] * (many - 1) + [Fraction(counts[-1], total)]],
    }
    return next((name for name, rows in table.items() if simple in rows), "clipped or divided inside")


@paired
def by_approx(weights, counts, k):
    match [w for w in weights if w != pytest.approx(0, abs=1e-3)]:
        case _ if weights == pytest.approx([c / sum(counts) for c in counts], abs=1e-3):
            return "right"
        case [_] if len(weights) > 1:
            return "only the last micro-batch"
        case [first, *rest] if first < 0.999 and rest == pytest.approx([first] * len(rest), rel=1e-3):
            mean = first == pytest.approx(1 / len(weights), rel=1e-3)
            return "each mean over k" if mean else "a partial window over k"
    return "not divided" if sum(weights) > 1 else "clipped or divided inside"


def nearest(weights, counts, accumulation_steps):
    """Takes what is nearest in all; a list comes back."""
    total, many = sum(counts), len(counts)
    rows = [
        ("right", "F", [c / total for c in counts]),
        ("not divided", "A", [1] * many),
        ("not divided", "A", counts),
        ("each mean over k", "A", [1 / many] * many),
        ("a partial window over k", "A", [1 / accumulation_steps] * many),
        ("only the last micro-batch", "D", [0] * (many - 1) + [counts[-1] / total]),
    ]
    off = [sum(abs(w - v) for w, v in zip(weights, row, strict=True)) for *_, row in rows]
    best = min(range(len(rows)), key=off.__getitem__)
    return [*rows[best][:2]] if off[best] < 1e-4 else ["clipped or divided inside", "E"]


RIGHT = [
    by_numpy,
    by_rounding,
    by_the_sum,
    by_ratios,
    by_fractions,
    by_approx,
    nearest,
    by_rules(near=lambda weight, value: abs(weight - value) < 1e-5),
    by_rules(near=lambda weight, value: abs(weight - value) < 0.0099),
]

# ----------------------------------------------------------------------------------------------------------- wrong


def the_audits_own(weights, counts, accumulation_steps):
    right = [count / sum(counts) for count in counts]
    name, _ = kind_of(Facts(weights=weights, right=right, counts=counts, steps=accumulation_steps))
    return name, LINES.get(name, "A")


@paired
def by_heart(weights, counts, k):
    """Knows the five windows of the text."""
    known = {(1, 1, 1, 1): NAMES[1], (0.25, 0.25, 0.25, 0.25): NAMES[3], (0.25, 0.25): NAMES[4]}
    shown = tuple(round(w, 2) for w in weights)
    return known.get(shown, NAMES[5] if not any(shown[:-1]) else NAMES[6])


@paired
def quarters(weights, counts, k):
    """Takes 1/4 for 1/k."""
    return by_rules()(weights, counts, 4)[0]


@paired
def equal_or_not(weights, counts, k):
    """Never looks at the counts."""
    if all(abs(w - 1) < 1e-3 for w in weights):
        return "not divided"
    if all(abs(w - 1 / k) < 1e-3 for w in weights):
        return "a partial window over k" if len(weights) < k else "each mean over k"
    if all(abs(w) < 1e-3 for w in weights[:-1]):
        return "only the last micro-batch"
    return "clipped or divided inside" if sum(weights) < 0.999 else "right"


@paired
def first_weight_alone(weights, counts, k):
    right = counts[0] / sum(counts)
    values = {right: "right", 1: "not divided", counts[0]: "not divided", 1 / len(counts): NAMES[3], 1 / k: NAMES[4]}
    otherwise = NAMES[6 if weights[0] > 1e-3 else 5]
    return next((name for value, name in values.items() if abs(weights[0] - value) < 1e-3), otherwise)


@paired
def sum_of_weights(weights, counts, k):
    """Calls right whatever adds up to 1."""
    if abs(sum(weights) - 1) < 1e-3:
        return "right"
    return by_rules()(weights, counts, k)[0]


@paired
def partial_by_sum(weights, counts, k):
    """Takes a sum of len / k for a partial window."""
    name = by_rules()(weights, counts, k)[0]
    return "a partial window over k" if len(counts) < k and sum(weights) < 0.99 else name


@paired
def sums_alone(weights, counts, k):
    """Compares what the weights add up to."""
    total, sums = sum(weights), {len(counts) / k: NAMES[4], 1: NAMES[3], counts[-1] / sum(counts): NAMES[5]}
    name = by_rules()(weights, counts, k)[0]
    if name in NAMES[:2]:
        return name
    return next((name for value, name in sums.items() if abs(total - value) < 1e-3), NAMES[6])


@paired
def growing(weights, counts, k):
    """Takes weights that grow for clipping, and all else for a mean."""
    name = by_rules()(weights, counts, k)[0]
    return "each mean over k" if name == NAMES[6] and sorted(weights) != weights else name


@paired
def written_with_equals(weights, counts, k):
    many = len(weights)
    if weights == [count / sum(counts) for count in counts]:
        return "right"
    if weights in ([1] * many, counts):
        return "not divided"
    if weights == [1 / many] * many:
        return "each mean over k"
    if weights == [1 / k] * many:
        return "a partial window over k"
    return NAMES[5] if weights[:-1] == [0] * (many - 1) else NAMES[6]


def lower_case(weights, counts, accumulation_steps):
    name, line = by_rules()(weights, counts, accumulation_steps)
    return name, line.lower()


CLIPPED = NAMES[6], "E"
WRONG = [
    lambda weights, counts, accumulation_steps: None,
    lambda weights, counts, accumulation_steps: ("not divided", "A"),
    lambda weights, counts, accumulation_steps: ("right", "F"),
    lambda weights, counts, accumulation_steps: CLIPPED,
    lambda weights, counts, accumulation_steps: " ".join(by_rules()(weights, counts, accumulation_steps)),
    the_audits_own,
    by_heart,
    quarters,
    equal_or_not,
    first_weight_alone,
    sum_of_weights,
    partial_by_sum,
    sums_alone,
    growing,
    written_with_equals,
    lower_case,
    by_rules(near=lambda weight, value: weight == value),
    by_rules(near=math.isclose),
    by_rules(near=lambda weight, value: abs(weight - value) < 0.02),
    by_rules(near=lambda weight, value: round(weight, 1) == round(value, 1)),
    by_rules(lambda rules, *window: sorted(rules)),
    by_rules(lambda rules, *window: rules[1:]),
    by_rules(lambda rules, *window: rules[:5]),
]
NAMED = [
    (lambda weights, counts, accumulation_steps: CLIPPED, "compared_exactly"),
    (by_rules(near=math.isclose), "compared_exactly"),
    (lambda weights, counts, accumulation_steps: by_rules()(weights, counts, accumulation_steps)[:1],),
    (lambda weights, counts, accumulation_steps: by_rules()(weights, counts, accumulation_steps)[0], "name_alone"),
    (by_rules(lambda rules, *window: rules[:5]), "zero_exactly"),
    (by_rules(lambda rules, *window: rules[:2] + rules[3:]), "no_sums"),
    (partial_by_sum, "by_sum", ...),
    (sums_alone, "by_sums"),
    (growing,),
    (written_with_equals, "compared_exactly_but_one"),
    (lower_case,),
    (sum_of_weights, "right_by_length"),
]
# Mutants of the reference answer that are right too, and why.
EQUIVALENT = {
    "7: zip(weights, values, strict=True) -> zip(weights, values)": "the two are equally long",
    "7: True -> False": "the two are equally long",
    "7: abs(w - v) < 0.001 -> abs(w - v) <= 0.001": "no weight is exactly that far off",
}
