"""Solve a wrong gradient for the weights of its micro-batches, as an audit does, and compare with the right ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradaccum.exercises.compare import TOLERANCE, Plain
from gradaccum.verdicts import CLOSE, Facts, kind_of, percent

Numbers = list[float]
NO_SUM = "no weighted sum"
NO_WEIGHTED_SUM = (
    "of this gradient is not a weighted sum of the micro-batches' gradients: is it from another loss or an earlier "
    "window, did the model change inside this window, or was only a part of the gradient changed?"
)
# The audit's sentences in TRUE are true of any code with such weights. The others guess at the code, which the learner
# can see: they are asked as questions.
TRUE = ("not divided", "a partial window over k", "each mean over k")
ASKED = {
    "only the last micro-batch": "Only the last micro-batch contributes: are the gradients cleared inside the window, "
    "or is backward called after its loop?",
    "clipped or divided inside": "Each micro-batch lost a different share: are gradients clipped, or divided, at each "
    "micro-batch?",
}


@dataclass(frozen=True)
class Gradient:
    """A gradient that an answer computed, and its correct composition; micro-batches are numbered from 1.

    Attributes:
        held: the gradient, as plain data; if `means` is None, the weights themselves.
        means: the gradient of each micro-batch's own mean loss, at the same parameters, in the same order.
        right: the right weight of each micro-batch that belongs in it.
        counts: the number of items in each; empty if weights are not shares of items, and an audit does not apply.
        steps: k, the accumulation steps asked for.
        name: where it is, to begin a sentence: "In update 2".
        unit: the name of a micro-batch.
    """

    held: Plain
    means: Mapping[int, Numbers] | None
    right: Mapping[int, float]
    counts: Mapping[int, int]
    steps: int = 0
    name: str = ""
    unit: str = "micro-batch"


class Weights(NamedTuple):
    """The weights in a wrong gradient; empty if it is not a weighted sum."""

    name: str
    numbers: list[int]
    got: Numbers
    right: Numbers
    kind: str
    sentence: str
    whole: bool = True  # whether these are all micro-batches
    unit: str = "micro-batch"

    def __str__(self) -> str:
        """Return the weights and the right weights in a sentence."""
        several = "es" if self.unit.endswith("h") else "s"
        who = f"{self.unit}{several if len(self.numbers) > 1 else ''}"
        who = f"the {who}" if self.whole else f"{who} {_ranges(self.numbers)}"
        got, right = _written(self.got, self.right)
        text = f"{who} got the weight{'s' if len(self.got) > 1 else ''} {got} and should have {right}."
        return f"{self.name}, {text}" if self.name else text[0].upper() + text[1:]


def own_gradients(
    model: nn.Module, micro_batches: Mapping[int, Any], loss: Callable[..., Tensor] | None = None
) -> dict[int, Numbers]:
    """Return the gradient of each micro-batch's own loss, by default its mean cross-entropy."""
    parameters, found = list(model.parameters()), {}
    for number, micro_batch in micro_batches.items():
        inputs, targets = micro_batch
        own = loss(model, micro_batch) if loss else cross_entropy(model(inputs), targets)
        parts = torch.autograd.grad(own, parameters)
        found[number] = torch.cat([part.double().flatten() for part in parts]).tolist()
    return found


def scaled(factor: float, values: Plain) -> Numbers | None:
    """Return an answer's vector times a factor; None if it is not a vector of finite numbers.

    Example:
        >>> scaled(-2, [1, 0.5]), scaled(1, [1, "a"]), scaled(1, float("nan"))
        ([-2.0, -1.0], None, None)
    """
    if not isinstance(values, list) or not values:
        return None
    if not all(isinstance(each, int | float) and abs(each) < 1e100 for each in values):  # False for nan
        return None
    return [float(factor * each) for each in values]


def weigh(gradients: Iterable[Gradient]) -> Weights | None:
    """Return the weights in the first of these gradients that is wrong; None if they cannot be determined.

    Example:
        >>> means = {1: [1.0, 0.0, 2.0], 2: [0.0, 1.0, 1.0]}
        >>> print(weigh([Gradient([1.0, 1.0, 3.0], means, right={1: 0.5, 2: 0.5}, counts={1: 4, 2: 4}, steps=2)]))
        The micro-batches got the weights 1 each and should have 1/2 each.
    """
    for each in gradients:
        held = scaled(1, each.held)
        if held is None or not any(held):
            return None
        if each.means is None:
            numbers, got, residual = list(each.right), held, 0.0
            if len(held) != len(numbers):
                return None
        else:
            numbers, solved = list(each.means), _solved(held, list(each.means.values()))
            if solved is None:
                return None
            got, residual = solved
        if residual > CLOSE:
            return Weights(each.name, [], [], [], NO_SUM, f"{percent(residual)} {NO_WEIGHTED_SUM}")
        if residual > TOLERANCE or not got:
            return None
        right = [each.right.get(number, 0.0) for number in numbers]
        least = TOLERANCE * max(map(abs, (*got, *right)))
        got = [0.0 if abs(weight) <= least else weight for weight in got]
        if any(abs(weight - share) > 10 * least for weight, share in zip(got, right, strict=True)):
            shown = [index for index in range(len(got)) if got[index] or numbers[index] in each.right]
            kind, sentence = _kind(each, dict(zip(numbers, got, strict=True)))
            return Weights(
                each.name,
                [numbers[index] for index in shown],
                [got[index] for index in shown],
                [right[index] for index in shown],
                kind,
                sentence,
                whole=[numbers[index] for index in shown] == list(range(1, len(got) + 1)),
                unit=each.unit,
            )
    return None


def _solved(held: Numbers, columns: Sequence[Numbers]) -> tuple[Numbers, float] | None:
    """Return the weights, an empty list if they are not unique, and the residual's share."""
    if not columns or len(held) != len(columns[0]) or len(held) <= len(columns):
        return None
    matrix, vector = torch.tensor(columns, dtype=torch.float64).T, torch.tensor(held, dtype=torch.float64)
    lengths, size = matrix.norm(dim=0), vector.norm().item()
    if not lengths.isfinite().all() or not lengths.all():
        return None
    matrix = matrix / lengths
    found = torch.linalg.lstsq(matrix, vector[:, None], driver="gelsd").solution[:, 0]
    residual = (matrix @ found - vector).norm().item() / size
    weights = found / lengths
    uncertainty = max(residual, 1e-12) * size / max(torch.linalg.svdvals(matrix)[-1].item(), 1e-300) / lengths.min()
    if residual <= TOLERANCE and uncertainty > 1e-3 * weights.abs().max():
        return [], residual
    return weights.tolist(), residual


def _kind(gradient: Gradient, got: Mapping[int, float]) -> tuple[str, str]:
    """Return the audit's kind of these weights, and its sentence if that is true of any code with them."""
    if not gradient.counts:
        return "", ""
    inside = list(gradient.right)
    counts, right = [gradient.counts[each] for each in inside], list(gradient.right.values())
    outside = {each: weight for each, weight in got.items() if each not in gradient.right and weight}
    kind, sentence = kind_of(Facts([got[each] for each in inside], right, counts, gradient.steps, outside))
    if kind in TRUE:
        return kind, sentence
    if kind in ("another divisor", "one common factor"):
        return _as_if(max(got.values()) / max(right), counts)
    return kind, ASKED.get(kind, "")


def _as_if(factor: float, counts: Sequence[int]) -> tuple[str, str]:
    """Return which integer divisor explains this factor: of the means, if all counts are equal, or of the sums."""
    whole = [("each sum", sum(counts), "items count")]
    if len(set(counts)) == 1:
        whole.insert(0, ("each mean", len(counts), "micro-batches are in the window"))
    for what, right, these in whole:
        divisor = right / factor
        if 0.5 < divisor < 1000 and abs(divisor - round(divisor)) <= TOLERANCE * divisor:
            return what, f"That is as if {what} were divided by {round(divisor)}, where {right} {these}."
    return "", ""


def _written(*lists: Numbers) -> list[str]:
    """Format lists of weights for comparison: as fractions if all are simple, otherwise with enough digits to differ.

    Example:
        >>> _written([1.0, 0.5], [1 / 3, 1 / 3]), _written([0.2007, 0.4], [0.2, 0.4])
        (['1, 1/2', '1/3 each'], ['0.201, 0.4', '0.2, 0.4'])
    """
    fractions = [_fraction(value) for values in lists for value in values]
    if all(fractions):
        return [_listed(list(map(_fraction, values))) for values in lists]
    for digits in range(3, 8):
        found = [_listed([f"{value:.{digits}g}" for value in values]) for values in lists]
        if len(set(found)) == len(found):
            break
    return found


def _fraction(value: float) -> str:
    fraction = Fraction(value).limit_denominator(12)
    simple = abs(fraction) < 1 or fraction.denominator == 1
    return str(fraction) if simple and abs(value - fraction) <= TOLERANCE * abs(value) else ""


def _listed(shown: Sequence[str]) -> str:
    if len(shown) > 1 and len(set(shown)) == 1:
        return f"{shown[0]} each"
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers[:-1])) + (" and " if len(numbers) > 1 else "") + str(numbers[-1])
