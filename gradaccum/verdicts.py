"""The kinds of update that an audit distinguishes by its weights, and a sentence for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# In the order of the tests. Those after "right" are faults, or choices such as clipping.
KINDS = (
    "left over, never stepped",
    "not finite",
    "no weighted sum",
    "cannot be told apart",
    "gradients of an earlier update",
    "right",
    "only the last micro-batch",
    "cut elsewhere",
    "not divided",
    "a partial window over k",
    "each mean over k",
    "another divisor",
    "one common factor",
    "clipped or divided inside",
    "does not fit",
)
CLOSE = 1e-3  # relative to the largest right weight: the accuracy of weights in float32


@dataclass
class Facts:
    """The solution of one update; `weights`, `right` and `counts` have one entry per micro-batch of its window.

    Attributes:
        weights: the factor that each micro-batch's own mean gradient got.
        right: the right factor, its count over the window's.
        counts: the number of items in each.
        steps: k, the accumulation steps given to `audit`.
        outside: the weights of micro-batches of other windows, by index.
        elsewhere: how many of the window's micro-batches have a weight only in another update.
        before: how many have a weight in an earlier update too.
        earlier: the factor of the previous update's gradient.
        residual: the share of the gradient that is not a weighted sum of gradients.
        apart: name and residual of a parameter, if its residual does not show in the whole gradient.
        error: the relative error of the gradient.
        uncertainty: the possible error of a weight.
        finite: whether the gradient is finite.
        suspects: parts of the model and the loop that may explain a residual.
    """

    weights: Sequence[float]
    right: Sequence[float]
    counts: Sequence[float]
    steps: int
    outside: dict[int, float] = field(default_factory=dict)
    elsewhere: int = 0
    before: int = 0
    earlier: float = 0.0
    residual: float = 0.0
    apart: tuple[str, float] | None = None
    error: float = 0.0
    uncertainty: float = 0.0
    finite: bool = True
    suspects: Sequence[str] = ()


def kind_of(facts: Facts) -> tuple[str, str]:
    """Return the first of `KINDS` that fits, and its sentence.

    Example:
        >>> kind_of(Facts(weights=[1, 1, 1, 1], right=[0.25] * 4, counts=[8] * 4, steps=4))
        ('not divided', 'Each micro-batch got the weight 1: the gradient is 4 times too large. Divide by the count.')
    """
    found = _unless_known(facts)
    if found:
        return found
    weights, right, counts = facts.weights, facts.right, facts.counts
    k, many = facts.steps, len(weights)
    scale = max(right)

    def close(values: Sequence[float]) -> bool:
        """Return whether each weight is close: to 1e-3 of its value, or within its uncertainty."""
        least = min(facts.uncertainty, CLOSE * scale)
        return all(abs(w - v) <= max(CLOSE * abs(v), least) for w, v in zip(weights, values, strict=True))

    if not facts.outside and (close(right) or _within(weights, right, facts.uncertainty)):
        if not close(right) or facts.error > 0.02:
            return ALIKE
        if facts.before:
            return EARLIER, "Its micro-batches were in an earlier step already: step once per window, then clear."
        return "right", "Each micro-batch got its count over the window's."
    counted = [index for index, share in enumerate(right) if share]
    missing = [index for index in counted if abs(weights[index]) <= max(CLOSE * right[index], facts.uncertainty)]
    if len(counted) > 1 and missing == counted[:-1] and not facts.outside and not facts.elsewhere:
        return "only the last micro-batch", (
            f"Only the last of {many} micro-batches contributes (weight {_number(weights[-1])}): "
            "gradients are cleared inside the window."
        )
    if facts.outside or missing:
        return _cut_elsewhere(facts, missing)
    if close([1.0 if share else 0.0 for share in right]) and many > 1:
        return (
            "not divided",
            f"Each micro-batch got the weight 1: the gradient is {_too_large(facts)}. Divide by the count.",
        )
    if close(counts) and sum(counts) != 1:
        return "not divided", (
            f"Each item got the weight 1: losses are summed, and the gradient is {sum(counts):g} times too large. "
            "Divide by the count."
        )
    over_k = [1 / k if share else 0.0 for share in right]
    if many < k and close(over_k):
        return "a partial window over k", (
            f"Divided by k = {k}, and the window has {many}: the weights add up to {_number(sum(weights))}. "
            "Divide by the window's own count."
        )
    if close([1 / many if share else 0.0 for share in right]):
        return "each mean over k", (
            f"Each mean was divided by {many}: micro-batches of {_listed(counts)} items got the same weight. "
            "Divide each sum by the window's count."
        )
    return _by_factor(facts)


EARLIER = "gradients of an earlier update"
ALIKE = (
    "cannot be told apart",
    "The micro-batches' gradients are too similar or too small, or there are too few parameters.",
)


def _unless_known(facts: Facts) -> tuple[str, str] | None:
    if not any(facts.right):
        return "does not fit", "The count of its window is 0: there is no right gradient."
    if not facts.finite:
        return "not finite", "The gradient is infinite or NaN: a loss was, or the loss scale was too large."
    if facts.residual > CLOSE:
        suspects = list(facts.suspects)
        if facts.residual < 2e-2:
            suspects = ["rounding in 16 bits", "a small further term", *suspects]
        else:
            suspects = ["a further term or another loss", "a backward of another model", *suspects]
        return "no weighted sum", (
            f"{percent(facts.residual)} of this gradient is not a weighted sum of these losses' gradients. "
            f"Suspects: {', '.join(suspects)}."
        )
    if facts.apart:
        name, share = facts.apart
        return "no weighted sum", (
            f"{percent(share)} of the gradient of {name} is not a weighted sum, though little of the whole: is it "
            "cleared, and trained by this loss alone?"
        )
    if facts.uncertainty > 0.05 * max(facts.right):
        return ALIKE
    if abs(facts.earlier) > CLOSE:
        return EARLIER, (
            f"It still contains {_number(facts.earlier)} times the previous update's gradient: clear after each step."
        )
    return None


def _cut_elsewhere(facts: Facts, missing: Sequence[int]) -> tuple[str, str]:
    weights = [weight for index, weight in enumerate(facts.weights) if index not in missing] + [*facts.outside.values()]
    if weights and max(weights) - min(weights) > 0.5 * max(map(abs, weights)) and len(set(facts.counts)) == 1:
        return "does not fit", "It contains other micro-batches than its window, with different weights."
    of = f"{len(facts.weights) - len(missing)} of its window's {len(facts.weights)} micro-batches"
    if facts.outside:
        of += f" and {len(facts.outside)} of others"
    return "cut elsewhere", (
        f"It contains {of}: steps do not come after every {facts.steps} of an epoch, or gradients are cleared in "
        "between, or a micro-batch is mistaken for another."
    )


def _by_factor(facts: Facts) -> tuple[str, str]:
    shares = [(weight, share) for weight, share in zip(facts.weights, facts.right, strict=True) if share]
    factors = [weight / share for weight, share in shares]
    factor, total = sum(factors) / len(factors), sum(facts.counts)
    spread = max(abs(each - factor) for each in factors)
    if spread <= CLOSE * abs(factor) and factor > 0:
        divisor = total / factor
        off = divisor * max(spread / factor, 1e-5)
        if off < 0.05 and 0.5 < divisor < 1000 and abs(divisor - round(divisor)) <= off:
            return "another divisor", (
                f"Divided by {round(divisor)} where {total:g} items were counted: the gradient is {_number(factor)} "
                "times the right one. Check what is counted."
            )
        return "one common factor", (
            f"All weights are {_number(factor)} times the right ones: by clipping, which is not a fault, by a "
            "loss scale that was not removed, or by the number of processes."
        )
    counted = [weight for weight, _ in shares]
    if max(counted) - min(counted) <= CLOSE * max(counted):
        return "does not fit", (
            f"Each micro-batch got {_number(counted[0])}, whatever its count: a mean of means, times a factor."
        )
    if all(0 < weight <= (1 + CLOSE) * share for weight, share in shares):
        return "clipped or divided inside", (
            "Each micro-batch lost a different share: gradients are clipped, or divided, at each micro-batch."
        )
    return "does not fit", "The weights match no known kind: compare them with the right ones."


def _within(weights: Sequence[float], right: Sequence[float], by: float) -> bool:
    return all(abs(one - other) <= by for one, other in zip(weights, right, strict=True))


def _too_large(facts: Facts) -> str:
    if len(set(facts.counts)) == 1:
        return f"{len(facts.weights)} times too large"
    return f"the sum of {len(facts.weights)} means, whatever their counts"


def _listed(counts: Sequence[float]) -> str:
    shown = [f"{count:g}" for count in counts[:8]]
    return ", ".join(shown[:-1]) + f" and {shown[-1]}" if len(counts) <= 8 else ", ".join(shown) + " and more"


def percent(share: float) -> str:
    """Format a share as a percentage with two digits, from 100 % on as an integer.

    Example:
        >>> percent(0.1284), percent(3.5)
        ('13 %', '350 %')
    """
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"


def _number(value: float) -> str:
    return f"{value:.4g}"
