"""Find the largest micro-batch that fits a memory budget, with exactly the given effective batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gradaccum.bars import progress
from gradaccum.memory.predict import PredictedMemory, _predict, _start_bytes, predicted_type


@dataclass(frozen=True, repr=False)
class MicroBatchPlan:
    """The result of `plan_micro_batches`.

    Attributes:
        micro_batch: the largest number of samples for which the update fits.
        sizes: the sizes of the window's micro-batches; they add up to the effective batch, and the last may be smaller.
        peak_bytes: the predicted peak of an update, the larger of the first and a later one.
        next_micro_batch_peak_bytes: the same for one more sample, which is above the budget; None if the window
            is a single micro-batch.
        budget_bytes: the budget.
        device: the device that was predicted.
    """

    micro_batch: int
    sizes: tuple[int, ...]
    peak_bytes: int
    next_micro_batch_peak_bytes: int | None
    budget_bytes: int
    device: str

    @property
    def accumulation_steps(self) -> int:
        """The number of micro-batches in the window."""
        return len(self.sizes)

    def __repr__(self) -> str:
        last = f", the last {self.sizes[-1]}" if self.sizes[-1] != self.micro_batch else ""
        lines = [
            f"micro-batch {self.micro_batch}, {self.accumulation_steps} accumulation steps: "
            f"effective batch {sum(self.sizes)}{last}",
            f"  predicted peak {self.peak_bytes:>18,} bytes on {self.device}",
        ]
        if self.next_micro_batch_peak_bytes is not None:
            lines.append(f"  one sample more{self.next_micro_batch_peak_bytes:>18,} bytes")
        return "\n".join([*lines, f"  budget        {self.budget_bytes:>19,} bytes"])


def plan_micro_batches(
    build: Callable[[list[int]], Any],
    step: Callable[..., object],
    *,
    effective_batch: int,
    budget: int | str,
    device: str | torch.device = "cuda",
) -> MicroBatchPlan:
    """Find the largest micro-batch with which an update stays within `budget`, with `predict_memory`.

    The window is split into micro-batches of equal size and, if that does not divide the effective batch, a smaller
    one at the end. A plan takes about eight predictions. In each, two or three micro-batches represent all of the same
    size: one more adds to the peak only its inputs, which are counted for the whole window, and what `step` keeps of
    it, which is the same for each (tested against whole windows, to the byte). Both the answer and the next larger
    size are predicted. For other sizes it is assumed that, with the same number of micro-batches or fewer, a larger
    micro-batch needs at least as much memory. If tqdm is installed, a plan that takes more than two seconds shows its
    progress: the current micro-batch and the last predicted peak.

    Args:
        build: called with the sizes of a window's micro-batches, a list of ints; creates the model, the optimizer
            and the window. It is also called with the sizes of shorter windows.
        step: one update, called as `step(*built)`.
        effective_batch: the number of samples in an update.
        budget: an int in bytes, or a string such as "24 GB" (10^9) or "24 GiB" (2^30). Leave room for what
            `predict_memory` does not count.
        device: "cuda" or "cpu", as for `predict_memory`.

    Returns:
        A `MicroBatchPlan`: the micro-batch, the window's sizes, and the peaks for it and for one more sample.

    Raises:
        TypeError, ValueError: an argument is invalid.
        ValueError: not even single samples fit; the message has the peak and its largest role.
        NotImplementedError, Exception: as for `predict_memory`.

    Example:
        >>> def build(sizes):
        ...     model = torch.nn.Linear(1000, 1000)
        ...     optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ...     return model, optimizer, [torch.zeros(size, 1000) for size in sizes]
        >>> def step(model, optimizer, window):
        ...     for batch in window:
        ...         (model(batch).square().sum() / 1000).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> plan_micro_batches(build, step, effective_batch=1000, budget="39 MB")
        micro-batch 872, 2 accumulation steps: effective batch 1000, the last 128
          predicted peak         38,998,528 bytes on cuda
          one sample more        39,015,424 bytes
          budget                 39,000,000 bytes
    """
    if type(effective_batch) is not int or effective_batch < 1:
        given = f"effective_batch must be an int of at least 1, but {effective_batch!r:.80} was given"
        raise (ValueError if type(effective_batch) is int else TypeError)(f"{given}: the samples of one update.")
    if not callable(build):
        raise TypeError(f"build must be a function of a list of sizes, but {build!r:.80} was given.")
    if not callable(step):
        raise TypeError(f"step must be a function, but {step!r:.80} was given.")
    limit, kind = _budget_bytes(budget), predicted_type(device)
    with progress("planning") as tick:
        return _plan(_Search(build, step, effective_batch, limit, kind, tick))


def _plan(search: _Search) -> MicroBatchPlan:
    best = search.largest()
    if not best:
        report = search.report((search.least,) * min(2, search.effective_batch))
        at_peak = max(report, report.first, key=lambda one: one.peak_bytes).at_peak
        role = max(at_peak, key=lambda name: at_peak[name])
        raise ValueError(
            f"Not even micro-batches of {search.least} fit: the peak is {search.peak(search.least):,} bytes on "
            f"{search.device}, the budget {search.limit:,}; most of it is {role}, {at_peak[role]:,} bytes."
        )
    following = search.peak(best + 1) if best < search.effective_batch else None
    return MicroBatchPlan(best, search.sizes(best), search.peak(best), following, search.limit, search.device)


def _budget_bytes(budget: int | str) -> int:
    """Return a budget such as "24 GB" in bytes, or raise."""
    if type(budget) is int:
        number: float = budget
    else:
        found = isinstance(budget, str) and re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(i?)B\s*", budget, re.I)
        if not found:
            raise (ValueError if isinstance(budget, str) else TypeError)(
                f'budget must be an int in bytes or a string such as "24 GB" or "24 GiB", but {budget!r:.80} was given.'
            )
        number = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
    if number < 1:
        raise ValueError(f"budget must be at least 1 byte, but {budget!r} was given.")
    return int(number)


class _Search:
    """The search of one plan, and its cached predictions."""

    def __init__(self, build: Any, step: Any, effective_batch: int, limit: int, device: str, tick: Any) -> None:
        self._build, self._step, self.device, self._tick = build, step, device, tick
        self.effective_batch, self.limit = effective_batch, limit
        self.least = 1  # the micro-batch with the lowest peak; `largest` may increase it
        self._state: dict[str, object] = {}  # shown as the progress
        self._reports: dict[tuple[int, ...], PredictedMemory] = {}
        self._starts: dict[tuple[int, ...], int] = {}

    def sizes(self, micro_batch: int) -> tuple[int, ...]:
        whole, rest = divmod(self.effective_batch, micro_batch)
        return (micro_batch,) * whole + (rest,) * (rest > 0)

    def peak(self, micro_batch: int) -> int:
        """Predict the peak of the whole window; for a long one, from windows of two and three full micro-batches."""
        three = self._beyond_start(self._shortened(micro_batch, 3))
        further = three - self._beyond_start(self._shortened(micro_batch, 2))
        return self._of_two(micro_batch) + further * (self.sizes(micro_batch).count(micro_batch) - 2)

    def _of_two(self, micro_batch: int) -> int:
        """Predict the same, without what micro-batches after the second add beyond their inputs."""
        return self._start(self.sizes(micro_batch)) + self._beyond_start(self._shortened(micro_batch, 2))

    def _shortened(self, micro_batch: int, most: int) -> tuple[int, ...]:
        sizes = self.sizes(micro_batch)
        return sizes[max(0, sizes.count(micro_batch) - most) :]

    def largest(self) -> int:
        """Return the largest micro-batch that fits, or 0."""
        whole = self.effective_batch
        above_half = whole // 2 + 1
        if self.peak(whole) <= self.limit:
            return whole
        # Above half, the second micro-batch is smaller than the first, and may fit together with the gradients: the
        # first must fit, and then the window of both.
        at_half = self._starts_with(above_half) if above_half < whole else self.peak(whole)
        if above_half < whole and at_half <= self.limit:
            best = self._narrow(self._starts_with, {above_half: at_half}, above_half, whole, [whole - 1])
            if self.peak(best) <= self.limit:
                return best
        # First with windows of two, which is fast; then the result and its neighbours with the whole window.
        while (least := self._of_two(self.least)) > self.limit:
            if 2 * self.least >= above_half or self._of_two(2 * self.least) >= least:
                break
            self.least *= 2  # many small inputs, each rounded up, may need more than a few large ones
        known = {above_half: at_half, self.least: least}
        near = self._narrow(self._of_two, known, self.least if least <= self.limit else 0, above_half, [])
        return self._narrow(self.peak, {}, 0, above_half, [near, near + 1, near - 1] if near else [self.least])

    def _narrow(
        self, peak: Callable[[int], int], known: dict[int, int], fits: int, too_large: int, tries: list[int]
    ) -> int:
        """Try `tries`, then interpolate between two known sizes; return the largest that fits."""
        while too_large - fits > 1:
            guess = (fits + too_large) // 2
            if tries:
                guess = tries.pop(0)
            # Interpolation is right if the micro-batch dominates the peak, and wrong if the optimizer's step does:
            # now and then the middle is tried instead.
            elif fits in known and known[fits] < known.get(too_large, 0) and len(known) % 4:
                slope = (known[too_large] - known[fits]) / (too_large - fits)
                guess = min(max(fits + int((self.limit - known[fits]) / slope), fits + 1), too_large - 1)
            if fits < guess < too_large:
                known[guess] = peak(guess)
                fits, too_large = (guess, too_large) if known[guess] <= self.limit else (fits, guess)
        return fits

    def _starts_with(self, micro_batch: int) -> int:
        return self._start(self.sizes(micro_batch)) + self._beyond_start((micro_batch, 1))

    def _beyond_start(self, sizes: tuple[int, ...]) -> int:
        report = self.report(sizes)
        return max(report.peak_bytes, report.first.peak_bytes) - report.first.start_bytes

    def _start(self, sizes: tuple[int, ...]) -> int:
        if sizes not in self._starts:
            self._starts[sizes] = _start_bytes(lambda: self._build(list(sizes)), self.device, self._tick)
        return self._starts[sizes]

    def report(self, sizes: tuple[int, ...]) -> PredictedMemory:
        if sizes not in self._reports:
            self._state["micro_batch"] = sizes[0]
            self._tick(**self._state)
            report = _predict(lambda: self._build(list(sizes)), self._step, self.device, self._tick)
            self._state["last_peak"] = f"{max(report.peak_bytes, report.first.peak_bytes):,} bytes"
            self._reports[sizes] = report
        return self._reports[sizes]
