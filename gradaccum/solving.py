"""The gradient of each step, solved for the micro-batches that are in it.

Whatever a loop does, it hands the optimizer a weighted sum of its micro-batches' own mean gradients, where the loss is
additive and the weights of the model stand still inside a window. The unknown are few and the parameters many, so they
can be solved for by least squares, from outside of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradaccum import refusals
from gradaccum.borrowed import borrowed, others_untouched
from gradaccum.verdicts import CLOSE

COORDINATES = 100_000  # of the parameters: enough for weights to 5e-10, where all would take gigabytes


@dataclass
class Step:
    """What is kept of a step until the block ends."""

    drawn: int  # micro-batches until then; -1 before it is through
    tensors: list[Tensor]  # parameters and buffers as they were before it, on the CPU
    modes: list[bool]
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))  # sampled, in float64


@dataclass
class Noted:
    """What an audit notes of a loop, and what it was given."""

    modules: list[nn.Module]
    trained: list[Tensor]
    loss_sum: Callable[[Any], Tensor]
    drawn: list[tuple[int, Any]] = field(default_factory=list)  # epoch, micro-batch
    steps: list[Step] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """Return all parameters and buffers."""
        return [each for what in ("parameters", "buffers") for each in refusals.named(self.modules, what).values()]

    def inner(self) -> list[nn.Module]:
        """Return all modules, those inside of others too."""
        return [module for outer in self.modules for module in outer.modules()]

    def gradient(self) -> Tensor:
        """Return the `.grad` of what is trained as one vector, in float64 on the CPU; of many numbers, a sample."""
        total, generator, parts = sum(each.numel() for each in self.trained), torch.Generator().manual_seed(0), []
        for parameter in self.trained:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            flat = gradient.detach().to_dense() if gradient.layout != torch.strided else gradient.detach()
            flat = flat.flatten()
            if total > COORDINATES:  # the same places each time
                many = min(parameter.numel(), max(16, parameter.numel() * COORDINATES // total))
                flat = flat[torch.randint(parameter.numel(), (many,), generator=generator).to(flat.device)]
            parts.append((torch.view_as_real(flat).flatten() if flat.is_complex() else flat).to("cpu", torch.float64))
        return torch.cat(parts)


class Solution(NamedTuple):
    """What was found of one step.

    Attributes:
        window: the number of the window that it belongs to.
        weights: of the micro-batches that are in it.
        earlier: the factor of the gradient of the step before.
        residual: the share of the gradient that is no such sum.
        uncertainty: by how much a weight may be off.
        error: of the gradient, relative to the right one of its window.
        finite: whether the gradient is.
    """

    window: int
    weights: Mapping[int, float] = {}
    earlier: float = 0.0
    residual: float = math.inf
    uncertainty: float = math.inf
    error: float = math.nan
    finite: bool = True


def windows_of(drawn: Sequence[tuple[int, Any]], accumulation_steps: int) -> list[list[int]]:
    """Return the windows as they are meant: k of an epoch, the last may be shorter; by index.

    Example:
        >>> windows_of([(1, "a"), (1, "b"), (1, "c"), (2, "a")], accumulation_steps=2)
        [[0, 1], [2], [3]]
    """
    found: list[list[int]] = []
    for index, (epoch, _) in enumerate(drawn):
        if index == 0 or epoch != drawn[index - 1][0] or len(found[-1]) == accumulation_steps:
            found.append([])
        found[-1].append(index)
    return found


class Solver:
    """Solves the steps that were noted, in order of time."""

    def __init__(self, noted: Noted, windows: list[list[int]], counts: list[float]) -> None:
        self.noted, self.windows, self.counts = noted, windows, counts
        self.of = {index: number for number, window in enumerate(windows) for index in window}
        self.taken: set[int] = set()  # windows that a step belongs to
        self.columns: dict[int, Tensor | None] = {}  # by micro-batch, at the parameters of one step

    def solutions(self) -> list[Solution]:
        """Return one for each step."""
        found, previous = [], None
        for step in self.noted.steps:
            self.columns = {}
            solution = self._solution(step, previous)
            self.taken.add(solution.window)
            found.append(solution._replace(error=self._error(step, solution)))
            previous = step.gradient
        return found

    def _solution(self, step: Step, previous: Tensor | None) -> Solution:
        """Solve for the window that is due; for others, and the step before, only where that leaves a rest."""
        expected = min(max(self.taken, default=-1) + 1, self.of[step.drawn - 1])
        if not step.gradient.isfinite().all():
            return Solution(expected, finite=False)
        due = [index for index in self.windows[expected] if index < step.drawn]
        near = [index for window in self.windows[max(expected - 2, 0) : expected + 3] for index in window]
        near = [index for index in near if index < step.drawn]
        reach = 8 * len(max(self.windows, key=len))
        far = list(range(max(0, step.drawn - reach), step.drawn))
        leaks = [None] if previous is None or not previous.any() else [None, previous]
        best = first = None
        for some in (due, near, far):
            for leak in leaks:
                solution = self._solved(step, due, some, leak)
                first = first or solution
                if solution is None or (best is not None and solution.residual > 0.05 * best.residual):
                    continue  # more unknowns always leave less; only much less says anything
                best = solution
                if best.residual <= CLOSE:
                    return best._replace(window=self._belongs(best.weights, expected))
        if best is None:
            return Solution(expected, residual=0.0)  # fewer parameters than micro-batches
        return best._replace(window=self._belongs(best.weights, expected) if best is not first else expected)

    def _belongs(self, weights: Mapping[int, float], expected: int) -> int:
        """Return the window with which a step shares most weight, of those that no other step has, if it can be."""
        shares: dict[int, float] = {}
        for index, weight in weights.items():
            shares[self.of[index]] = shares.get(self.of[index], 0.0) + abs(weight)
        free = {number: share for number, share in shares.items() if number not in self.taken}
        of = free or shares or {expected: 1.0}
        return max(of, key=lambda number: of[number])

    def _solved(self, step: Step, due: Sequence[int], some: Sequence[int], leak: Tensor | None) -> Solution | None:
        indices: list[int] = []
        columns: list[Tensor] = []
        for index in [*due, *(each for each in reversed(some) if each not in due)]:
            column = self._column(step, index)
            # The same micro-batch, drawn in an earlier epoch, is no second unknown.
            if column is not None and (index in due or not any(_equal(column, other) for other in columns)):
                indices.append(index)
                columns.append(column)
        matrix = torch.stack([*columns, *([] if leak is None else [leak])], dim=1) if columns else None
        if matrix is None or matrix.shape[0] <= matrix.shape[1]:
            return None
        size, lengths = step.gradient.norm().item(), matrix.norm(dim=0).clamp(min=1e-300)
        matrix = matrix / lengths
        solution = torch.linalg.lstsq(matrix, step.gradient[:, None], driver="gelsd").solution[:, 0]
        residual = (matrix @ solution - step.gradient).norm().item() / size if size else 0.0
        found = (solution / lengths).tolist()
        earlier = 0.0 if leak is None else found.pop()
        eps = max(torch.finfo(each.dtype).eps for each in self.noted.trained)
        smallest = max(torch.linalg.svdvals(matrix)[-1].item(), 1e-300)
        uncertainty = max(min(residual, CLOSE), eps) * size / smallest / lengths[: len(indices)].min().item()
        least = CLOSE * max(map(abs, found))
        weights = {index: weight for index, weight in zip(indices, found, strict=True) if abs(weight) > least}
        return Solution(0, weights, earlier, residual, uncertainty)

    def _column(self, step: Step, index: int) -> Tensor | None:
        """Return the mean gradient of a micro-batch at the parameters of a step; None if it counts nothing."""
        if not self.counts[index]:
            return None
        if index not in self.columns:
            noted = self.noted
            with borrowed(noted.modules), refusals.forgetting(noted.modules), torch.enable_grad():
                for tensor, value in zip(noted.tensors(), step.tensors, strict=True):
                    tensor.data.copy_(value)
                for module, training in zip(noted.inner(), step.modes, strict=True):
                    module.training = training
                loss = noted.loss_sum(noted.drawn[index][1])
                refusals.refuse_unless_scalar_with_graph(loss, f"micro-batch {index}")
                with others_untouched(loss, [*refusals.named(noted.modules, "parameters").values()]):
                    (loss / self.counts[index]).backward()  # type: ignore[no-untyped-call]
                self.columns[index] = noted.gradient()
        return self.columns[index]

    def _error(self, step: Step, solution: Solution) -> float:
        window = self.windows[solution.window]
        total = sum(self.counts[index] for index in window)
        if not solution.finite or not total:
            return math.nan
        columns = ((self.counts[index] / total, self._column(step, index)) for index in window)
        expected = sum((share * column for share, column in columns if column is not None), torch.zeros(()))
        size = expected.norm().item()
        return (step.gradient - expected).norm().item() / size if size else math.nan


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= 1e-6 * one.norm())
