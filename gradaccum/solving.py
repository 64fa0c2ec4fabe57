"""Solve the gradient of each step for the weights of its micro-batches.

If the loss is additive and the model's weights do not change inside a window, any loop gives the optimizer a weighted
sum of its micro-batches' own mean gradients. There are few weights and many parameters, so least squares finds the
weights, from outside of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradaccum import refusals
from gradaccum.borrowed import borrowed, nudge, others_untouched, random_state
from gradaccum.verdicts import CLOSE

COORDINATES = 100_000  # a sample of the gradient: enough for weights to 5e-10; the whole would take gigabytes


@dataclass
class Step:
    """The record of a step until the block ends: the state before the step, on the CPU.

    Attributes:
        drawn: the number of micro-batches drawn until then; -1 until the step is complete.
        trained: the tensors that the optimizer steps.
        values: the values of the parameters.
        buffers: the values of the buffers, by module and name, since a forward may replace the tensors.
        modes: whether each module is in training mode.
        required: whether each parameter requires a gradient.
        gradient: the gradient of `trained` as one vector in float64, or a sample of it.
        lengths: the number of elements of each trained tensor in `gradient`.
    """

    drawn: int
    trained: list[Tensor]
    values: dict[Tensor, Tensor]
    buffers: list[tuple[nn.Module, str, Tensor]]
    modes: list[tuple[nn.Module, bool]]
    required: dict[Tensor, bool]
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    lengths: list[int] = field(default_factory=list)


def before_step(modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> Step:
    """Record what a step is about to change."""
    inner = refusals.inner(modules)
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    values = {each: each.detach().to("cpu", copy=True) for each in [*refusals.named(modules, "parameters").values()]}
    buffers = [
        (module, name, buffer.detach().to("cpu", copy=True))
        for module in inner
        for name, buffer in module.named_buffers(recurse=False)
    ]
    required = {each: each.requires_grad for each in [*values, *trained]}
    return Step(-1, trained, values, buffers, [(module, module.training) for module in inner], required)


def after_step(step: Step, drawn: int) -> None:
    """Record the gradient of the step, and the number of micro-batches drawn until then."""
    step.trained = [each for each in step.trained if step.required[each] or each.grad is not None]
    step.drawn, (step.gradient, step.lengths) = drawn, sampled([each.grad for each in step.trained], step.trained)


def sampled(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return gradients, or a sample of them, as one float64 vector on the CPU, and the length of each tensor's part."""
    total, generator, parts = sum(each.numel() for each in parameters), torch.Generator().manual_seed(0), []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        flat = torch.zeros_like(parameter) if gradient is None else gradient
        flat = (flat.detach().to_dense() if flat.layout != torch.strided else flat.detach()).flatten()
        if total > COORDINATES:  # the same positions each time
            many = min(parameter.numel(), max(16, parameter.numel() * COORDINATES // total))
            flat = flat[torch.randint(parameter.numel(), (many,), generator=generator).to(flat.device)]
        parts.append((torch.view_as_real(flat).flatten() if flat.is_complex() else flat).to("cpu", torch.float64))
    return torch.cat(parts) if parts else torch.empty(0), [len(part) for part in parts]


class Solution(NamedTuple):
    """The solution of one step.

    Attributes:
        window: the index of the window that it belongs to.
        weights: the weights of the micro-batches in it.
        earlier: the factor of the previous step's gradient.
        residual: the share of the gradient that is not a weighted sum of gradients.
        apart: name and residual of the worst parameter, if its residual is much larger.
        uncertainty: the possible error of a weight.
        error: the error of the gradient, relative to the right gradient of its window.
        finite: whether the gradient is finite.
        drew: whether the forward draws random numbers.
    """

    window: int
    weights: Mapping[int, float] = {}
    earlier: float = 0.0
    residual: float = 0.0
    apart: tuple[str, float] | None = None
    uncertainty: float = math.inf
    error: float = math.nan
    finite: bool = True
    drew: bool = False

    def holds(self, index: int, share: float) -> bool:
        """Return whether the step contains a micro-batch with this share of its window."""
        return abs(self.weights[index]) > max(CLOSE * share, self.uncertainty)


SHARED = ("earlier", "residual", "apart", "uncertainty", "error", "finite")  # fields that `Facts` shares


def windows_of(drawn: Sequence[tuple[int, Any]], accumulation_steps: int) -> list[list[int]]:
    """Return the intended windows as lists of indices: k micro-batches of an epoch, the last may be shorter.

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


@dataclass
class Solver:
    """Solve steps for the weights of their micro-batches, in order of time."""

    modules: list[nn.Module]
    loss_sum: Callable[[Any], Tensor]
    drawn: list[tuple[int, Any]]
    windows: list[list[int]]
    counts: list[float]
    taken: set[int] = field(default_factory=set)  # windows that already have a step
    columns: dict[int, Tensor | None] = field(default_factory=dict)  # by micro-batch, at the parameters of one step
    drew: bool = False

    def __post_init__(self) -> None:
        self.of = {index: number for number, window in enumerate(self.windows) for index in window}
        totals = [sum(self.counts[index] for index in window) for window in self.windows]
        self.share = {index: self.counts[index] / (totals[number] or 1) for index, number in self.of.items()}

    def solutions(self, steps: Sequence[Step]) -> list[Solution]:
        """Return a solution for each step."""
        found = []
        for number, step in enumerate(steps):
            self.columns, self.drew = {}, False
            since = steps[number - 2].drawn if number > 1 else 0  # the number drawn until the step before last
            solution = self._solution(step, steps[number - 1] if number else None, since)
            self.taken.add(solution.window)
            found.append(solution._replace(error=self._error(step, solution), drew=self.drew))
        return found

    def _solution(self, step: Step, before: Step | None, since: int) -> Solution:
        """Solve for the window that is due; if a residual remains, try other micro-batches and the step before."""
        last = self.of[step.drawn - 1]
        expected = min(max(self.taken, default=-1) + 1, last)
        if not step.gradient.isfinite().all():
            return Solution(expected, finite=False)
        if not step.gradient.any():
            return Solution(expected)  # cleared before it was read, or a zero gradient
        due = [index for index in self.windows[expected] if index < step.drawn]
        near = sorted({*due, *range(since, step.drawn)})
        leak = before.gradient if before and before.gradient.any() and before.gradient.isfinite().all() else None
        leak = None if leak is None or leak.shape != step.gradient.shape else leak
        if leak is not None and _equal(step.gradient, leak):
            return Solution(expected, {}, 1.0, uncertainty=0.0)  # the same step once more
        exact = min(CLOSE, 100 * max(torch.finfo(each.dtype).eps for each in step.trained))
        if last not in self.taken and last != expected:  # a step was skipped, or the loop draws ahead
            latest = [index for index in self.windows[last] if index < step.drawn]
            skipped = self._solved(step, latest, None, exact)
            if skipped is not None and skipped.residual <= exact:
                return skipped._replace(window=last)
        best, window = None, expected
        leaks = [None] if leak is None else [None, leak]
        for some, with_leak in [(some, each) for some in ([due] if near == due else [due, near]) for each in leaks]:
            solution = self._solved(step, some, with_leak, exact)
            if solution is None or (best is not None and solution.residual > 0.05 * best.residual):
                continue  # more unknowns always reduce the residual; only a large reduction counts
            best, window = solution, expected if some is due else self._belongs(solution.weights, expected)
            if best.residual <= exact:
                break
        return Solution(expected) if best is None else best._replace(window=window)

    def _belongs(self, weights: Mapping[int, float], expected: int) -> int:
        """Return the window with the most weight in a step, preferably one that no other step has."""
        shares: dict[int, float] = {}
        for index, weight in weights.items():
            shares[self.of[index]] = shares.get(self.of[index], 0.0) + abs(weight)
        free = {number: share for number, share in shares.items() if number not in self.taken}
        of = free or shares or {expected: 1.0}
        return max(of, key=lambda number: of[number])

    def _solved(self, step: Step, some: Sequence[int], leak: Tensor | None, exact: float) -> Solution | None:
        indices: list[int] = []
        columns: list[Tensor] = []
        for index in reversed(some):
            column = self._column(step, index)
            # A micro-batch drawn in an earlier epoch too is one unknown; equal micro-batches in one window are two.
            apart = [other for at, other in zip(indices, columns, strict=True) if self.of[at] != self.of[index]]
            if column is not None and not any(_equal(column, other) for other in apart):
                indices.append(index)
                columns.append(column)
        matrix = torch.stack([*columns, *([] if leak is None else [leak])], dim=1) if columns else None
        if matrix is None or matrix.shape[0] <= matrix.shape[1]:
            return None
        size, lengths = step.gradient.norm().item(), matrix.norm(dim=0).clamp(min=1e-300)
        matrix = matrix / lengths
        solution = torch.linalg.lstsq(matrix, step.gradient[:, None], driver="gelsd").solution[:, 0]
        rest = matrix @ solution - step.gradient
        residual = rest.norm().item() / size
        if leak is not None and (residual > exact or solution.min() < -CLOSE * solution.max()):
            return None  # the previous step is similar, and absorbs a further term that both have
        found = (solution / lengths).tolist()
        earlier = 0.0 if leak is None else found.pop()
        eps = max(torch.finfo(each.dtype).eps for each in step.trained)
        smallest = max(torch.linalg.svdvals(matrix)[-1].item(), 1e-300)
        uncertainty = max(min(residual, CLOSE), eps) * size / smallest / lengths[: len(indices)].min().item()
        weights = dict(zip(indices, found, strict=True))
        if any(self.of[index] != self.of[some[-1]] for index in some):  # weights that are only noise
            least = CLOSE * max(map(abs, found))
            weights = {index: weight for index, weight in weights.items() if abs(weight) > least}
        return Solution(0, weights, earlier, residual, self._apart(step, rest, weights), uncertainty)

    def _apart(self, step: Step, rest: Tensor, weights: Mapping[int, float]) -> tuple[str, float] | None:
        """Return the worst parameter whose gradient is not a weighted sum, though too small to show in the whole."""
        names = {tensor: name for name, tensor in refusals.named(self.modules, "parameters").items()}
        total, noise, worst = step.gradient.norm().item(), None, None
        parts = zip(step.trained, *(torch.split(vector, step.lengths) for vector in (step.gradient, rest)), strict=True)
        for at, (parameter, own, other) in enumerate(parts):
            left = other.norm().item()
            size = max(own.norm().item(), left)  # if a gradient is lost, all of it is the residual
            if size <= 1e-6 * total or left <= 0.05 * size or (worst is not None and left <= worst[1] * size):
                continue
            if noise is None:  # the rounding of one column; a bias before BatchNorm has only that
                pairs = ((index, self._column(step, index)) for index in weights)
                some, column = next((index, column) for index, column in pairs if column is not None)
                change = self._gradient(step, some, nudged=True) - column
                noise = torch.split(change * sum(map(abs, weights.values())), step.lengths)
            if left > 100 * noise[at].norm().item():
                worst = (names.get(parameter, "a parameter"), left / size)
        return worst

    def _column(self, step: Step, index: int) -> Tensor | None:
        """Return the mean gradient of a micro-batch at the parameters of a step; None if its count is 0."""
        if not self.counts[index]:
            return None
        if index not in self.columns:
            column = self._gradient(step, index)
            self.columns[index] = column if column.isfinite().all() else None
        return self.columns[index]

    def _gradient(self, step: Step, index: int, nudged: bool = False) -> Tensor:
        with borrowed(self.modules), refusals.forgetting(self.modules), torch.enable_grad():
            here = refusals.named(self.modules, "parameters").values()
            for parameter in here:
                if parameter in step.values:
                    parameter.data = step.values[parameter].to(parameter.device, copy=True)
                    parameter.requires_grad_(step.required[parameter])
            if nudged:
                nudge(self.modules)
            for module, name, value in step.buffers:
                buffer = dict(module.named_buffers(recurse=False)).get(name)
                if buffer is not None:
                    buffer.data = value.to(buffer.device, copy=True)
            for module, training in step.modes:
                module.training = training
            before = random_state(self.modules)
            loss = self.loss_sum(self.drawn[index][1])
            refusals.refuse_unless_scalar_with_graph(loss, f"micro-batch {index}")
            self.drew = self.drew or random_state(self.modules) != before
            with others_untouched(loss, here), without_hooks(here):
                (loss / self.counts[index]).backward()  # type: ignore[no-untyped-call]
            return sampled([each.grad for each in step.trained], step.trained)[0]

    def _error(self, step: Step, solution: Solution) -> float:
        window = [index for index in self.windows[solution.window] if self.share[index]]
        if not solution.finite or not window:
            return math.nan
        columns = ((self.share[index], self._column(step, index)) for index in window)
        expected = sum((share * column for share, column in columns if column is not None), torch.zeros(()))
        size = expected.norm().item()
        return (step.gradient - expected).norm().item() / size if size else math.nan


@contextmanager
def without_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Disable the hooks of the loop, which may change a gradient or make a step.

    The names are private: there is no public way to disable hooks, and replacing the parameters, tried first, breaks
    everything that refers to the old ones (closures, ties, TorchScript).
    """
    held = [(hooks, dict(hooks)) for hooks in hooks_of(parameters)]
    try:
        for hooks, _ in held:
            hooks.clear()
        yield
    finally:
        for hooks, content in held:
            hooks.update(content)


def hooks_of(parameters: Iterable[Tensor]) -> list[dict[Any, Any]]:
    """Return the dicts of hooks of the parameters, without empty ones."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return [hooks for each in parameters for name in names if (hooks := getattr(each, name, None))]


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= 1e-6 * one.norm())
