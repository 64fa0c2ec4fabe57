"""Which weight did each micro-batch get? The gradient at each optimizer step, solved for its micro-batches.

Whatever a loop does, it hands the optimizer a weighted sum of its micro-batches' own mean gradients, where the loss is
additive and the weights stand still inside a window. The weights are few and the parameters many, so they can be
solved for, by least squares, from outside of the loop.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from gradaccum import refusals
from gradaccum.borrowed import borrowed, others_untouched, refuse_to_borrow
from gradaccum.refusals import Model
from gradaccum.verdicts import CLOSE, Facts, kind_of

COORDINATES = 100_000  # of the parameters: enough for weights to 5e-10, and 2.5 GB less for 9 million parameters


@dataclass
class Update:
    """One optimizer step, or a window that got none.

    Attributes:
        micro_batches: the indices of its window, and of all others that have a weight in it.
        weights: beside them, the factor that each one's own mean gradient got.
        right: beside them, the factor that it should have got: its count over the window's, 0 outside of the window.
        earlier: the factor of the gradient of the update before, which was not cleared.
        error: of the gradient, relative to the right one.
        residual: the share of the gradient that is no such sum.
        kind: one of `gradaccum.verdicts.KINDS`.
        verdict: a sentence.
    """

    micro_batches: list[int]
    weights: list[float]
    right: list[float]
    earlier: float = 0.0
    error: float = math.nan
    residual: float = math.nan
    kind: str = ""
    verdict: str = ""


@dataclass
class _Step:
    """What is kept of a step until the block ends."""

    drawn: int  # micro-batches until then
    tensors: list[Tensor]  # parameters and buffers as they were before it, on the CPU
    modes: list[bool]
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))  # sampled coordinates, in float64


class Audit:
    """The context that `audit` returns, and after the block its findings: `updates`, and a table as `str()`."""

    def __init__(
        self,
        model: Model,
        optimizer: Any,
        loss_sum: Callable[[Any], Tensor],
        count: Callable[[Any], Any],
        accumulation_steps: int,
        updates: int | None,
    ) -> None:
        self.updates: list[Update] = []
        self._optimizer = _raw(optimizer)
        modules = refusals.modules_of(model)
        own = {id(each) for module in modules for each in module.parameters()}
        trained = [each for group in self._optimizer.param_groups for each in group["params"] if each.requires_grad]
        others = [each for each in trained if id(each) not in own]
        self._modules = [*modules, nn.ParameterList(others)] if others else modules
        self._trained, self._loss_sum, self._count = trained, loss_sum, count
        self._k, self._limit = accumulation_steps, updates
        self._drawn: list[tuple[int, Any]] = []  # epoch, micro-batch
        self._epochs, self._steps, self._handles = 0, list[_Step](), list[Any]()
        self._sample = _coordinates(trained)

    def __call__(self, micro_batches: Iterable[Any]) -> _Noted:
        """Return the same micro-batches, each noted as it is drawn; each `iter()` is a new epoch."""
        return _Noted(self, micro_batches)

    def note(self, micro_batch: Any) -> Any:
        """Note a micro-batch, in a collator say, and return it; this knows of no epochs.

        A collator in a worker process notes nothing here: use `num_workers=0` for the audit.
        """
        self._drawn.append((self._epochs, copy.copy(micro_batch) if _is_container(micro_batch) else micro_batch))
        return micro_batch

    def __enter__(self) -> Self:
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is None:
            self.updates = _Solver(self).rows()
        self._steps.clear()

    def __str__(self) -> str:
        return _table(self.updates)

    # A step may run the loop's forward and backward itself (Lightning's closure), and a fused optimizer takes a scale off
    # in it: so parameters are read before it, and gradients after it.
    def _before_step(self, *_: Any) -> None:
        if self._limit is None or len(self._steps) < self._limit:
            tensors = [each.detach().to("cpu", copy=True) for each in self._tensors()]
            self._steps.append(_Step(-1, tensors, [module.training for module in self._inner()]))

    def _after_step(self, *_: Any) -> None:
        if self._steps and self._steps[-1].drawn < 0:
            self._steps[-1].drawn = len(self._drawn)
            self._steps[-1].gradient = _sampled([each.grad for each in self._trained], self._trained, self._sample)

    def _tensors(self) -> list[Tensor]:
        return [each for what in ("parameters", "buffers") for each in refusals.named(self._modules, what).values()]

    def _inner(self) -> list[nn.Module]:
        return [module for outer in self._modules for module in outer.modules()]


def audit(
    model: Model,
    optimizer: Any,
    loss_sum: Callable[[Any], Tensor],
    count: Callable[[Any], Any],
    *,
    accumulation_steps: int,
    updates: int | None = None,
) -> Audit:
    """Say which weight each micro-batch got in each update of a loop, whatever library the loop is from.

    Put the loop into the block and draw its micro-batches through what the block gives. When the block ends, each
    gradient that the optimizer stepped with is solved for its micro-batches' own mean gradients, at the parameters of
    that step. The loop is not changed: afterwards model, optimizer and random state are bit for bit what they would be.

    It sees what a loop does with the micro-batches' gradients. It does not see whether the loss may be cut at all
    (BatchNorm: the pieces are the same pieces); that is `check_split`'s.

    Args:
        model: the module that `loss_sum` uses, not wrapped, or a list of modules.
        optimizer: the one that steps, raw or wrapped by accelerate, Lightning or Fabric.
        loss_sum: returns the sum of a micro-batch's losses, given the micro-batch as it was drawn (on the CPU still).
        count: returns the number of items in that sum.
        accumulation_steps: k, the micro-batches of a window that the loop is meant to have.
        updates: after how many updates to stop noting, None for never. Kept for each until the block ends: a copy of
            parameters and buffers on the CPU, and up to 100,000 numbers of the gradient; and every micro-batch.

    Returns:
        A context manager: `seen(loader)` in place of the loader, `seen.note(micro_batch)` in a collator; afterwards
        `seen.updates`, a list of `Update` in order of time, and a table as `print(seen)`.

    Raises:
        TypeError, ValueError: before the loop, if there is nothing to train, the optimizer is none, or
            `accumulation_steps` is no positive int; at the end, if `loss_sum` or `count` returns a dict.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batches = list(torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0)))
        >>> with audit(model, optimizer, lambda x: model(x).square().sum(), len, accumulation_steps=2) as seen:
        ...     for index, x in enumerate(seen(batches)):
        ...         model(x).square().mean().backward()
        ...         if index % 2 == 1:
        ...             optimizer.step()
        ...             optimizer.zero_grad()
        >>> [(update.micro_batches, update.kind) for update in seen.updates]
        [([0, 1], 'not divided'), ([2, 3], 'not divided'), ([4, 5], 'not divided')]
    """
    if not isinstance(accumulation_steps, int) or isinstance(accumulation_steps, bool) or accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be an int of at least 1, but {accumulation_steps!r} was given.")
    modules = refusals.modules_of(model)
    refuse_to_borrow(modules, None)
    return Audit(modules, optimizer, loss_sum, count, accumulation_steps, updates)


class _Noted:
    """An iterable that notes what is drawn from it; all else is the iterable's own."""

    def __init__(self, seen: Audit, micro_batches: Iterable[Any]) -> None:
        self._seen, self._micro_batches = seen, micro_batches

    def __iter__(self) -> Iterator[Any]:
        seen = self._seen
        for number, micro_batch in enumerate(self._micro_batches):
            seen._epochs += number == 0
            seen.note(micro_batch)
            yield micro_batch

    def __len__(self) -> int:
        return len(self._micro_batches)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._micro_batches, name)


class _Solver:
    """Solves an audit's steps, in order of time."""

    def __init__(self, seen: Audit) -> None:
        self.seen = seen
        self.counts = [_counted(seen._count(micro_batch)) for _, micro_batch in seen._drawn]
        self.windows: list[list[int]] = []  # as they are meant: k of an epoch, the last may be shorter
        for index, (epoch, _) in enumerate(seen._drawn):
            fresh = index == 0 or epoch != seen._drawn[index - 1][0] or len(self.windows[-1]) == seen._k
            self.windows.append([index]) if fresh else self.windows[-1].append(index)
        self.of = {index: number for number, window in enumerate(self.windows) for index in window}
        self.taken: set[int] = set()  # windows that an update belongs to
        self.columns: dict[int, Tensor] = {}  # of the step that is being solved, by micro-batch

    def rows(self) -> list[Update]:
        rows: list[tuple[float, Update]] = []
        weighted: set[int] = set()
        previous = None
        for step in self.seen._steps:
            if step.drawn < 0:  # its step raised
                continue
            with borrowed(self.seen._modules) as restart:
                self.columns, self.restart, self.step = {}, restart, step
                update = self._solve(step, previous)
            weighted |= {index for index, weight in zip(update.micro_batches, update.weights, strict=True) if weight}
            rows.append((step.drawn, update))
            previous = step.gradient
        last = max(self.taken, default=-1) if self.seen._limit is not None else len(self.windows)
        for number, window in enumerate(self.windows[: last + 1]):
            never = [index for index in window if index not in weighted]
            if number not in self.taken and never:
                total = sum(self.counts[index] for index in window)
                right = [self.counts[index] / total if total else 0.0 for index in never]
                sentence = f"{len(never)} micro-batches were drawn, and no step came for them."
                verdict = "left over, never stepped"
                rows.append(
                    (never[-1] + 0.5, Update(never, [0.0] * len(never), right, 0.0, 1.0, 0.0, verdict, sentence))
                )
        return [row for _, row in sorted(rows, key=lambda pair: pair[0])]

    def _solve(self, step: _Step, previous: Tensor | None) -> Update:
        drawn = range(step.drawn)
        if not drawn:
            return Update(
                [],
                [],
                [],
                kind="does not fit",
                verdict="No micro-batch was noted before this step: draw through "
                "seen(loader), or note in a collator of this process (num_workers=0).",
            )
        expected = max(self.taken, default=-1) + 1
        expected = min(expected, self.of[drawn[-1]])
        if not step.gradient.isfinite().all():
            return self._row(step, expected, {}, 0.0, 0.0, 0.0, finite=False)
        near = [
            index for number in range(expected - 2, expected + 3) for index in self._window(number) if index in drawn
        ]
        base = [index for index in self.windows[expected] if index in drawn]
        leak = previous is not None and bool(previous.any())
        tries = [(base, False), (base, leak), (near, False), (near, leak), (list(drawn)[-8 * self.seen._k :], leak)]
        best: tuple[float, dict[int, float], float, float] | None = None
        for some, with_leak in tries:
            solved = self._weights(some, previous if with_leak else None, base)
            if solved and (best is None or solved[0] < 0.5 * best[0]):
                best = solved
            if best and best[0] <= CLOSE:
                break
        if best is None:
            return self._row(step, expected, {}, 0.0, 0.0, math.inf)
        residual, weights, earlier, uncertainty = best
        kept = {index: weight for index, weight in weights.items() if abs(weight) > CLOSE / self.seen._k}
        return self._row(step, self._belongs(kept, expected), kept, earlier, residual, uncertainty)

    def _window(self, number: int) -> list[int]:
        return self.windows[number] if 0 <= number < len(self.windows) else []

    def _belongs(self, weights: Mapping[int, float], expected: int) -> int:
        """Return the window with which an update shares most weight, of those that no other update has."""
        shares: dict[int, float] = {}
        for index, weight in weights.items():
            shares[self.of[index]] = shares.get(self.of[index], 0.0) + abs(weight)
        free = {number: share for number, share in shares.items() if number not in self.taken}
        return max(free or shares or {expected: 1.0}, key=lambda number: (free or shares or {expected: 1.0})[number])

    def _weights(
        self, some: Sequence[int], previous: Tensor | None, base: Sequence[int]
    ) -> tuple[float, dict[int, float], float, float] | None:
        """Return residual, weights, the factor of the previous gradient, and how far off a weight may be."""
        indices: list[int] = []
        columns: list[Tensor] = []
        for index in [*base, *(each for each in some if each not in base)]:
            column = self._column(index)
            if column is None:
                continue
            if index not in base and any(_equal(column, other) for other in columns):
                continue  # the same micro-batch, drawn in another epoch
            indices.append(index)
            columns.append(column)
        matrix = torch.stack(columns + ([previous] if previous is not None else []), dim=1) if columns else None
        gradient = self.step.gradient
        size = gradient.norm().item()
        if matrix is None or len(gradient) <= matrix.shape[1]:
            return None
        lengths = matrix.norm(dim=0).clamp(min=1e-300)
        solution = torch.linalg.lstsq(matrix / lengths, gradient[:, None], driver="gelsd").solution[:, 0]
        residual = (matrix / lengths @ solution - gradient).norm().item() / size if size else 0.0
        smallest = torch.linalg.svdvals(matrix / lengths)[-1].item()
        found = (solution / lengths).tolist()
        rounding = max(residual, self._rounding()) * size
        uncertainty = rounding / max(smallest, 1e-300) / lengths[: len(indices)].min().item()
        earlier = found.pop() if previous is not None else 0.0
        return residual, dict(zip(indices, found, strict=True)), earlier, uncertainty

    def _rounding(self) -> float:
        return max(torch.finfo(each.dtype).eps for each in self.seen._trained)

    def _column(self, index: int) -> Tensor | None:
        """Return the mean gradient of a micro-batch at the parameters of this step, None if it counts nothing."""
        if not self.counts[index]:
            return None
        if index not in self.columns:
            seen, step = self.seen, self.step
            self.restart()
            for tensor, value in zip(seen._tensors(), step.tensors, strict=True):
                tensor.data.copy_(value)
            for module, training in zip(seen._inner(), step.modes, strict=True):
                module.training = training
            with torch.enable_grad():
                loss = seen._loss_sum(seen._drawn[index][1])
            if isinstance(loss, Mapping):
                raise TypeError("audit takes one loss: let loss_sum return a tensor and count a number, not dicts.")
            refusals.refuse_unless_scalar_with_graph(loss, f"micro-batch {index}")
            with others_untouched(loss, refusals.named(seen._modules, "parameters").values()):
                (loss / self.counts[index]).backward()  # type: ignore[no-untyped-call]
            self.columns[index] = _sampled([each.grad for each in seen._trained], seen._trained, seen._sample)
        return self.columns[index]

    def _row(
        self,
        step: _Step,
        number: int,
        weights: Mapping[int, float],
        earlier: float,
        residual: float,
        uncertainty: float,
        finite: bool = True,
    ) -> Update:
        window = self.windows[number]
        total = sum(self.counts[index] for index in window)
        right = [self.counts[index] / total if total else 0.0 for index in window]
        inside = [weights.get(index, 0.0) for index in window]
        outside = {index: weight for index, weight in weights.items() if index not in window}
        error = self._error(step, window, right) if finite else math.nan
        counts = [self.counts[index] for index in window]
        facts = Facts(
            inside,
            right,
            counts,
            self.seen._k,
            outside,
            earlier,
            residual,
            error,
            uncertainty,
            finite,
            self._suspects(),
        )
        if not any(right):
            kind, sentence = "does not fit", "Its window counts nothing: there is no right gradient."
        else:
            kind, sentence = kind_of(facts)
        self.taken.add(number)
        every = [*window, *sorted(outside)]
        return Update(
            every,
            [*inside, *(outside[index] for index in sorted(outside))],
            right + [0.0] * len(outside),
            earlier,
            error,
            residual,
            kind,
            sentence,
        )

    def _error(self, step: _Step, window: Sequence[int], right: Sequence[float]) -> float:
        columns = [(share, self._column(index)) for index, share in zip(window, right, strict=True) if share]
        if not columns:
            return math.nan
        expected = sum(share * column for share, column in columns if column is not None)
        size = expected.norm().item()  # type: ignore[union-attr]
        return (step.gradient - expected).norm().item() / size if size else math.nan

    def _suspects(self) -> list[str]:
        found = {type(module).__name__ for module in self.seen._inner() if module.training and _draws(module)}
        suspects = [f"{name}, which draws anew" for name in sorted(found)]
        if isinstance(self.seen._optimizer, torch.optim.LBFGS):
            suspects.append("LBFGS, which moves inside its step")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                suspects.append("other processes' micro-batches")
        return suspects


def _raw(optimizer: Any) -> torch.optim.Optimizer:
    raw = optimizer
    while isinstance(getattr(raw, "optimizer", None), torch.optim.Optimizer):  # accelerate's, Lightning's, Fabric's
        raw = raw.optimizer
    if not isinstance(raw, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer or wrap one, but {type(optimizer).__name__} was given.")
    return raw


def _is_container(micro_batch: Any) -> bool:
    return isinstance(micro_batch, Mapping | list)


def _counted(count: Any) -> float:
    if isinstance(count, Mapping):
        raise TypeError("audit takes one loss: let loss_sum return a tensor and count a number, not dicts.")
    return float(count)


def _draws(module: nn.Module) -> bool:
    name = type(module).__name__
    return ("Dropout" in name and getattr(module, "p", 1.0) > 0) or "DropPath" in name or "StochasticDepth" in name


def _coordinates(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return for each parameter the coordinates that are looked at, None for all of them."""
    total = sum(each.numel() for each in parameters)
    if total <= COORDINATES:
        return [None] * len(parameters)
    generator, chosen = torch.Generator().manual_seed(0), list[Tensor | None]()
    for each in parameters:
        many = min(each.numel(), max(16, each.numel() * COORDINATES // total))
        chosen.append(torch.randint(each.numel(), (many,), generator=generator))
    return chosen


def _sampled(gradients: Iterable[Tensor | None], parameters: Sequence[Tensor], sample: list[Tensor | None]) -> Tensor:
    parts = []
    for gradient, parameter, chosen in zip(gradients, parameters, sample, strict=True):
        flat = torch.zeros(parameter.numel()) if gradient is None else gradient.detach()
        flat = (flat.to_dense() if flat.layout != torch.strided else flat).flatten()
        flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
        parts.append((flat if chosen is None else flat[chosen.to(flat.device)]).to("cpu", torch.float64, copy=True))
    return torch.cat(parts)


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= 1e-6 * one.norm())


def _table(updates: Sequence[Update]) -> str:
    """Lay out a row for each update: micro-batches, weights, right weights, and what that is."""
    if not updates:
        return "No update was seen."
    lines = []
    for number, update in enumerate(updates):
        listed = _ranges(update.micro_batches)
        weights, right = (" ".join(f"{each:.4f}" for each in some) for some in (update.weights, update.right))
        lines.append(f"{number}: micro-batches {listed}: {update.kind}. {update.verdict}")
        lines.append(f"   weights {weights}")
        if update.kind != "right":
            lines.append(f"   right   {right}")
    return "\n".join(lines)


def _ranges(indices: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"
