"""`audit`: the weight of each micro-batch in each update of a loop. This file records steps and reports the result.

`solving` solves the recorded steps for weights, and `verdicts` names the fault.
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
    """One optimizer step, or a window without a step.

    Attributes:
        micro_batches: the indices of the window's micro-batches, and of all others with a weight in this update.
        weights: for each of them, the factor that its own mean gradient got.
        right: for each of them, the right factor: its count over the window's, 0 outside of the window.
        earlier: the factor of the previous update's gradient, if it was not cleared.
        error: the relative error of the gradient.
        residual: the share of the gradient that is not a weighted sum of the micro-batches' gradients.
        kind: one of `gradaccum.verdicts.KINDS`.
        verdict: the diagnosis, in one sentence.
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
    """The context manager that `audit` returns; after the block, `updates` has the results and `str()` is a table."""

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
        """Return an iterable that yields the micro-batches and records each; each `iter()` is a new epoch."""
        return _Noted(self, micro_batches)

    def note(self, micro_batch: Any) -> Any:
        """Record a micro-batch, for example in a collator, and return it; epochs are not recorded.

        A collator in a worker process records nothing: use `num_workers=0` for the audit.
        """
        if self._limit is None or len(self._steps) < self._limit or self._steps[-1].drawn < 0:
            popped = isinstance(micro_batch, Mapping | list)  # loops pop labels from them
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
        self._steps[:] = [step for step in self._steps if step.drawn >= 0]  # drop a step that raised
        try:
            if kind is None:
                self.updates = self._solved()
        finally:
            self._steps.clear()
            self._drawn.clear()

    def __str__(self) -> str:
        lines = list(_lines(self.updates)) or ["No update was seen."]
        if self.updates and not self._epochs:
            lines.append("Recorded without epochs: an epoch that ends in a shorter window shifts the windows after it.")
        return "\n".join(lines)

    # A step may run the forward and backward itself (Lightning's closure), and a fused optimizer unscales in its step:
    # so parameters are read before it, and gradients after it.
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
                "No micro-batch was recorded before the first step: iterate over seen(loader), or call seen.note in a "
                "collator of this process (num_workers=0)."
            )
        # With an additional 1, so that windows without items do not raise here.
        read, _ = refusals.counts_and_totals([*(self._count(micro_batch) for _, micro_batch in self._drawn), 1])
        counts = [each[None] for each in read[:-1]]
        solver = Solver(self._modules, self._loss_sum, self._drawn, windows, counts)
        solutions, share = solver.solutions(steps), solver.share
        held = [{index for index in each.weights if each.holds(index, share[index])} for each in solutions]
        rows, earlier = [], set[int]()
        for number, (step, solution) in enumerate(zip(steps, solutions, strict=True)):
            window, again = set(windows[solution.window]), earlier & held[number]
            if number and held[number - 1] == held[number]:
                again = set()  # a second pass over a window, as in PPO
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
                shares, sentence = [share[index] for index in never], f"{many} drawn, but no step followed."
                row = Update(never, [0.0] * len(never), shares, 0.0, 1.0, 0.0, KINDS[0], sentence)
                rows.append((never[-1] + 0.5, row))
        return [row for _, row in sorted(rows, key=lambda pair: pair[0])]

    def _suspects(self, drew: bool) -> list[str]:
        suspects = []
        if drew:
            modules = refusals.inner(self._modules)
            kinds = {type(module).__name__ for module in modules if module.training and _draws(module)}
            names = ", ".join(sorted(kinds)) or "the forward"
            suspects.append(f"{names}, which draws new random numbers (audit without it)")
        if hooks_of(each for module in self._modules for each in module.parameters()):
            suspects.append("hooks on parameters, such as masks")
        if isinstance(self._optimizer, torch.optim.LBFGS):
            suspects.append("LBFGS, which changes parameters inside its step")
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
    """Compute the weight that each micro-batch got in each update of a loop, of any library.

    Run the loop in the block, and draw its micro-batches through the object that the block returns. When the block
    ends, each gradient that the optimizer stepped with is expressed as a weighted sum of its micro-batches' own mean
    gradients, at the parameters of that step. Model, optimizer and random state are bitwise the same as without it.

    It checks what a loop does with the gradients of micro-batches, not whether the loss can be split (BatchNorm): use
    `check_split` for that.

    Args:
        model: the unwrapped module that `loss_sum` uses, or a list of modules. Its forward hooks run again when the
            block ends; hooks on its parameters do not.
        optimizer: the optimizer that steps, plain or wrapped by accelerate, Lightning or Fabric.
        loss_sum: returns the sum of a micro-batch's losses, given the micro-batch as drawn (still on the CPU).
        count: returns the number of items in that sum.
        accumulation_steps: k, the intended number of micro-batches in a window.
        updates: stop recording after this many updates; None for no limit. Until the block ends, each update keeps
            a CPU copy of parameters and buffers and up to 100,000 numbers of the gradient; micro-batches are kept too.

    Returns:
        A context manager. Inside, use `seen(loader)` in place of the loader (with accelerate, the loader that `prepare`
        returned), or `seen.note(micro_batch)` in a collator. Afterwards `seen.updates` is a list of `Update`, in order,
        and `print(seen)` prints a table.

    Raises:
        TypeError, ValueError: before the loop, if there is nothing to train, `optimizer` is not an optimizer, or
            `accumulation_steps` is not a positive int; at the end, if `loss_sum` or `count` returns a dict.
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
            f"{several} processes train together, but audit sees only the micro-batches of this one: audit the same "
            "loop in one process, on the unwrapped model."
        )

    def one_loss(given: Any, name: str) -> Any:
        if isinstance(given, Mapping):
            raise TypeError(f"audit takes one loss, but {name} returned a dict: audit each loss separately.")
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
    """An iterable that records what is drawn from it; other attributes are those of the wrapped iterable."""

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
        if name.startswith("_"):  # during a copy there is no wrapped iterable yet
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
    """Yield the lines of the table: micro-batches, kind and verdict of each update, its weights and the right ones."""
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
