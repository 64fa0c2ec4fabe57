"""Which weight did each micro-batch get in each update of a loop? What a step is given, and the report.

What is noted here is solved in `solving`, and named in `verdicts`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from gradaccum import refusals
from gradaccum.borrowed import refuse_to_borrow
from gradaccum.refusals import Model
from gradaccum.solving import SHARED, Solver, Step, after_step, before_step, hooks_of, windows_of
from gradaccum.verdicts import KINDS, Facts, kind_of


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


class Audit:
    """The context that `audit` returns, and after the block its findings: `updates`, and a table as `str()`."""

    def __init__(
        self,
        modules: list[nn.Module],
        optimizer: torch.optim.Optimizer,
        loss_sum: Callable[[Any], Tensor],
        count: Callable[[Any], Any],
        accumulation_steps: int,
        limit: int | None,
    ) -> None:
        self.updates: list[Update] = []
        self._optimizer, self._loss_sum, self._count = optimizer, loss_sum, count
        self._k, self._limit = accumulation_steps, limit
        own = set(refusals.named(modules, "parameters").values())
        others = [each for group in optimizer.param_groups for each in group["params"] if each not in own]
        self._modules = [*modules, *([nn.ParameterList(others)] if others else [])]
        self._drawn, self._steps, self._handles, self._epochs = list[tuple[int, Any]](), list[Step](), list[Any](), 0

    def __call__(self, micro_batches: Iterable[Any]) -> _Noted:
        """Return the same micro-batches, each noted as it is drawn; each `iter()` is a new epoch."""
        return _Noted(self, micro_batches)

    def note(self, micro_batch: Any) -> Any:
        """Note a micro-batch, in a collator say, and return it; this knows of no epochs.

        A collator in a worker process notes nothing here: use `num_workers=0` for the audit.
        """
        if self._limit is None or len(self._steps) < self._limit or self._steps[-1].drawn < 0:
            popped = isinstance(micro_batch, Mapping | list)  # loops take labels out of them
            self._drawn.append((self._epochs, copy.copy(micro_batch) if popped else micro_batch))
        return micro_batch

    def __enter__(self) -> Self:
        self._drawn.clear()
        self._epochs = 0
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
        self._steps[:] = [step for step in self._steps if step.drawn >= 0]  # a step that raised is none
        try:
            if kind is None:
                self.updates = self._solved()
        finally:
            self._steps.clear()
            self._drawn.clear()

    def __str__(self) -> str:
        lines = list(_lines(self.updates)) or ["No update was seen."]
        if self.updates and not self._epochs:
            lines.append("Noted without epochs: one that ends in a shorter window shifts the windows after it.")
        return "\n".join(lines)

    # A step may run the loop's forward and backward itself (Lightning's closure), and in it a fused optimizer takes the
    # scale off: so parameters are read before it, and gradients after it.
    def _before_step(self, *_: Any) -> None:
        if self._limit is None or len(self._steps) < self._limit:
            self._steps.append(before_step(self._modules, self._optimizer))

    def _after_step(self, *_: Any) -> None:
        if self._steps and self._steps[-1].drawn < 0:
            after_step(self._steps[-1], len(self._drawn))

    def _solved(self) -> list[Update]:
        steps, windows = self._steps, windows_of(self._drawn, self._k)
        if steps and not steps[0].drawn:
            raise RuntimeError(
                "No micro-batch was noted before the first step: draw from seen(loader), or call seen.note in a "
                "collator of this process (num_workers=0)."
            )
        # With a 1 more, since what counts nothing at all is not refused here.
        read, _ = refusals.counts_and_totals([*(self._count(micro_batch) for _, micro_batch in self._drawn), 1])
        counts = [each[None] for each in read[:-1]]
        solver = Solver(self._modules, self._loss_sum, self._drawn, windows, counts)
        solutions, share = solver.solutions(steps), solver.share
        held = [{index for index in each.weights if each.holds(index, share[index])} for each in solutions]
        rows, earlier = [], set[int]()
        for number, (step, solution) in enumerate(zip(steps, solutions, strict=True)):
            window, again = set(windows[solution.window]), earlier & held[number]
            if number and held[number - 1] == held[number]:
                again = set()  # a second pass over a window, as PPO makes it
            facts = Facts(
                weights=[solution.weights.get(index, 0.0) for index in sorted(window)],
                right=[share[index] for index in sorted(window)],
                counts=[counts[index] for index in sorted(window)],
                steps=self._k,
                outside={index: weight for index, weight in sorted(solution.weights.items()) if index not in window},
                elsewhere=len(window & earlier.union(*held[number + 1 :]) - held[number]),
                before=len(window & again),
                suspects=self._suspects(solution.drew),
                **{name: getattr(solution, name) for name in SHARED},
            )
            rows.append((float(step.drawn), _row(sorted(window), facts)))
            earlier |= held[number]
        taken = {solution.window for solution in solutions}
        last = len(windows) if self._limit is None else max(taken, default=-1)
        for number, indices in enumerate(windows[:last]):
            never = [index for index in indices if index not in earlier]
            if never and number not in taken:
                many = f"{len(never)} micro-batch{'es were' if len(never) > 1 else ' was'}"
                shares, sentence = [share[index] for index in never], f"{many} drawn, and no step came."
                row = Update(never, [0.0] * len(never), shares, 0.0, 1.0, 0.0, KINDS[0], sentence)
                rows.append((never[-1] + 0.5, row))
        return [row for _, row in sorted(rows, key=lambda pair: pair[0])]

    def _suspects(self, drew: bool) -> list[str]:
        suspects = []
        if drew:
            modules = refusals.inner(self._modules)
            kinds = {type(module).__name__ for module in modules if module.training and _draws(module)}
            names = ", ".join(sorted(kinds)) or "the forward"
            suspects.append(f"{names}, which draws random numbers anew (audit without)")
        if hooks_of(each for module in self._modules for each in module.parameters()):
            suspects.append("hooks on parameters, such as masks")
        if isinstance(self._optimizer, torch.optim.LBFGS):
            suspects.append("LBFGS, which moves inside its step")
        trained = {each for group in self._optimizer.param_groups for each in group["params"]}
        if any(each.requires_grad and each not in trained for one in self._modules for each in one.parameters()):
            suspects.append("the step of another optimizer, if it came first")
        return suspects


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
        model: the module that `loss_sum` uses, not wrapped, or a list of modules. Its forward hooks run again when the
            block ends, hooks on its parameters do not.
        optimizer: the one that steps, raw or wrapped by accelerate, Lightning or Fabric.
        loss_sum: returns the sum of a micro-batch's losses, given the micro-batch as it was drawn (on the CPU still).
        count: returns the number of items in that sum.
        accumulation_steps: k, the micro-batches of a window that the loop is meant to have.
        updates: after how many updates to stop noting, None for never. Kept for each until the block ends: a copy of
            parameters and buffers on the CPU, and up to 100,000 numbers of the gradient; and every micro-batch.

    Returns:
        A context manager: `seen(loader)` in place of the loader (with accelerate, of the one that `prepare` returned),
        `seen.note(micro_batch)` in a collator; afterwards `seen.updates`, a list of `Update` in order of time, and a
        table as `print(seen)`.

    Raises:
        TypeError, ValueError: before the loop, if there is nothing to train, the optimizer is none, or
            `accumulation_steps` is no positive int; at the end, if `loss_sum` or `count` returns a dict.
        NotImplementedError: before the loop, if several processes train together.

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
    if updates is not None and (not isinstance(updates, int) or isinstance(updates, bool) or updates < 1):
        raise ValueError(f"updates must be None or an int of at least 1, but {updates!r} was given.")
    for name, function in (("loss_sum", loss_sum), ("count", count)):
        if not callable(function):
            raise TypeError(f"{name} must be a function of a micro-batch, but {type(function).__name__} was given.")
    modules = refusals.modules_of(model)
    refuse_to_borrow(modules, None)
    if (several := refusals.ranks()) > 1:
        raise NotImplementedError(
            f"{several} processes train together, and audit sees this one's micro-batches only: audit the same loop in "
            "one process, on the model that is not wrapped."
        )

    def one_loss(given: Any, name: str) -> Any:
        if isinstance(given, Mapping):
            raise TypeError(f"audit takes one loss, but {name} returned a dict: audit each loss of several alone.")
        return given

    return Audit(
        modules,
        _raw(optimizer),
        lambda micro_batch: one_loss(loss_sum(micro_batch), "loss_sum"),
        lambda micro_batch: one_loss(count(micro_batch), "count"),
        accumulation_steps,
        updates,
    )


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
        if name.startswith("_"):  # while it is being copied there is nothing to ask
            raise AttributeError(name)
        return getattr(self._micro_batches, name)


def _raw(optimizer: Any) -> torch.optim.Optimizer:
    raw = optimizer
    while isinstance(getattr(raw, "optimizer", None), torch.optim.Optimizer):  # accelerate's, Lightning's, Fabric's
        raw = raw.optimizer
    if not isinstance(raw, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer or wrap one, but {type(optimizer).__name__} was given.")
    return raw


def _draws(module: nn.Module) -> bool:
    name = type(module).__name__
    return ("Dropout" in name and getattr(module, "p", 1.0) > 0) or "DropPath" in name or "StochasticDepth" in name


def _row(window: list[int], facts: Facts) -> Update:
    return Update(
        [*window, *facts.outside],
        [*facts.weights, *facts.outside.values()],
        [*facts.right, *[0.0] * len(facts.outside)],
        facts.earlier,
        facts.error,
        facts.residual,
        *kind_of(facts),
    )


def _lines(updates: Sequence[Update]) -> Iterator[str]:
    """Lay out each update: its micro-batches and what that is, and below it the weights, got and right."""
    for number, update in enumerate(updates):
        yield f"{number}: micro-batches {_ranges(update.micro_batches)}: {update.kind}. {update.verdict}"
        yield f"   weights {' '.join(f'{each:.4f}' for each in update.weights)}"
        if update.kind != "right":
            yield f"   right   {' '.join(f'{each:.4f}' for each in update.right)}"


def _ranges(indices: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"
