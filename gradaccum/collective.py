"""One window on several ranks: the agreement before the first forward, the passes, and the global loss."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from gradaccum import ranks, refusals
from gradaccum.ranks import Group, Replicated, Sharded

ERRORS: Final = (ValueError, TypeError, NotImplementedError, RuntimeError)
SLOTS: Final = 8  # losses whose counts fit into the table; more take a second collective


class Row(NamedTuple):
    """The values that a rank sends to the others before the first forward."""

    rank: float
    micro_batches: float
    refusal: float  # 0 for none, otherwise 1 + an index of ERRORS
    divisor: float
    lockstep: float  # every pass needs all ranks
    each: float  # every pass sends
    raises: float  # nonfinite="raise"
    keys: float  # a digest of the losses' names


class Together:
    """One rank's view of all ranks of a window; returned by `together`.

    Attributes:
        divisor: D, by which the engine divides a sum over the ranks.
        passes: the number of forward and backward passes that this rank runs; set by `agree`.
    """

    def __init__(self, modules: Sequence[nn.Module], parts: Sequence[Replicated | Sharded]) -> None:
        self._modules, self._parts = modules, parts
        first = parts[0]
        self._groups, self.divisor, self._device = first.groups, first.divisor, first.device
        self.passes, self._each, self._lockstep, self._waits = 0, False, False, False
        self._rank, self._size = 0, 1
        for group in self._groups:
            self._rank, self._size = self._rank + self._size * group.rank(), self._size * group.size()
        default = torch.distributed.is_initialized()
        self.name = torch.distributed.get_rank() if default else self._rank  # as the user knows it

    def agree(
        self,
        micro_batches: int,
        check: Callable[[], tuple[list[nn.Parameter], list[Any]]],
        *,
        each: bool,
        raises: bool,
    ) -> tuple[list[nn.Parameter], list[dict[Any, Any]], dict[Any, int | float]]:
        """Return the trainable parameters, this rank's counts and all ranks' totals, or raise on all ranks together.

        `check` returns the parameters and the counts, or the spare's counts if there are no micro-batches.
        Takes one collective and synchronizes with the device once, which also reads this rank's counts.
        """
        error: Exception | None = None
        parameters, keys, table = list[nn.Parameter](), list[Any]([None]), list[list[Any]]()
        order, own = [0], self._matrix([], [0])
        try:
            covered = self._covered()
            parameters, counted = check()
            self._refuse_uncovered(parameters, covered)
            keys, table = refusals.checked_counts(counted)
            table = table[:micro_batches]
            order = sorted(range(len(keys)), key=lambda index: repr(keys[index]))
            own = self._matrix(table, order)
        except Exception as caught:
            error = caught
        kind = next((index for index, one in enumerate(ERRORS, 1) if isinstance(error, one)), len(ERRORS))
        digest = hashlib.blake2b(repr([keys[index] for index in order]).encode(), digest_size=6).digest()
        each = each or any(part.sends_each for part in self._parts)
        row = Row(
            rank=self.name,
            micro_batches=micro_batches,
            refusal=kind if error else 0,
            divisor=self.divisor,
            lockstep=each or any(part.lockstep for part in self._parts) or self._talks(),
            each=each,
            raises=raises,
            keys=int.from_bytes(digest, "big"),
        )
        rows, sums, numbers = self._exchange(row, own)
        with _naming(self.name):
            if error is not None:
                raise error
            read = [[line[order.index(index)] for index in range(len(order))] for line in numbers]
            counts = refusals.counts_of_each(keys, table, read)
        self._refuse_together(rows)
        if len(order) > SLOTS:
            sums = self._summed(own.sum(0)).tolist()
        whole = all(type(number) is int for each_of in counts for number in each_of.values())
        totals = {
            keys[index]: int(total) if whole and total == int(total) else total
            for index, total in zip(order, sums, strict=False)
        }
        if not any(totals.values()):
            raise ValueError(
                f"count returned 0 for all micro-batches of all {self._size} ranks: skip this window, its mean has no "
                "gradient."
            )
        self._each = any(other.each for other in rows)
        self._lockstep = any(other.lockstep for other in rows)
        most = int(max(other.micro_batches for other in rows))
        self.passes = most if self._lockstep else max(micro_batches, 1)
        return parameters, counts, {key: totals[key] for key in keys}

    def _covered(self) -> set[int]:
        covered = set[int]()
        for part in self._parts:
            covered |= part.refuse()
            if part.divisor != self.divisor or [*map(ranks.members, part.groups)] != [
                *map(ranks.members, self._groups)
            ]:
                raise NotImplementedError(
                    "The modules are averaged over different groups or with different factors: "
                    "give accumulate modules of one group."
                )
        return covered

    def _refuse_uncovered(self, parameters: Sequence[nn.Parameter], covered: set[int]) -> None:
        for parameter in parameters:
            if id(parameter) not in covered:
                named = refusals.named(self._modules, "parameters").items()
                name = next(name for name, each in named if each is parameter)
                raise ValueError(
                    f"Parameter {name!r} is trainable and no engine averages it, so each rank would train its own: "
                    "wrap the module that has it too, after it is made trainable."
                )

    def _talks(self) -> bool:
        """Return whether the ranks communicate in each forward, also that of a frozen `fully_shard` model."""
        modules = refusals.inner(self._modules)
        synced = any(isinstance(module, nn.SyncBatchNorm) and module.training for module in modules)
        return synced or bool(ranks.sharded_in(self._modules))

    def _matrix(self, counts: list[list[Any]], order: list[int]) -> Tensor:
        flat = [row[index] for row in counts for index in order]
        if any(isinstance(value, Tensor) for value in flat):
            values = [torch.as_tensor(value, dtype=torch.float64, device=self._device) for value in flat]
            return torch.stack(values).view(len(counts), len(order))
        return torch.tensor(flat, dtype=torch.float64, device=self._device).view(len(counts), len(order))

    def _summed(self, tensor: Tensor) -> Tensor:
        for group in self._groups:
            torch.distributed.all_reduce(tensor, group=group)
        return tensor

    def _exchange(self, row: Row, own: Tensor) -> tuple[list[Row], list[float], list[list[float]]]:
        """Return all ranks' rows, the sums of their counts, and this rank's own counts as numbers."""
        bad = ~((own >= 0) & (own < math.inf))
        told = torch.tensor(row, dtype=torch.float64).to(self._device)
        told[Row._fields.index("refusal")] += bad.any() * (told[Row._fields.index("refusal")] == 0)  # a ValueError
        table = told.new_zeros(self._size, len(row) + SLOTS)
        table[self._rank, : len(row)] = told
        fit = own[:, :SLOTS].sum(0)
        table[self._rank, len(row) : len(row) + len(fit)] = fit
        table = self._summed(table)
        read = torch.cat([table.flatten(), own.flatten()]).tolist()
        numbers = read[table.numel() :]
        counts = [numbers[start : start + own.shape[1]] for start in range(0, len(numbers), own.shape[1])]
        if ranks.is_predicted(table):  # values are guesses: assume that the other ranks are like this one
            return [row] * self._size, [self._size * sum(column) for column in zip(*counts, strict=True)], counts
        lines = [read[start : start + table.shape[1]] for start in range(0, table.numel(), table.shape[1])]
        sums = [math.fsum(column) for column in zip(*(line[len(row) :] for line in lines), strict=True)]
        return [Row(*line[: len(row)]) for line in lines], sums[: own.shape[1]], counts

    def _refuse_together(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.refusal:
                raise ERRORS[int(row.refusal) - 1](f"Rank {row.rank:.0f} raised an error: see that rank.")
        for name, what in (
            ("keys", "count must return the same keys on all ranks"),
            ("divisor", "the engine must divide by the same factor on all ranks"),
            ("raises", "nonfinite must be the same on all ranks"),
        ):
            if other := next((row for row in rows if getattr(row, name) != getattr(rows[0], name)), None):
                raise ValueError(f"{what}, but ranks {rows[0].rank:.0f} and {other.rank:.0f} differ.")

    def begin(self) -> None:
        """Start to watch the engine's forwards."""
        for part in self._parts:
            part.begin()

    def forget(self) -> None:
        """Leave nothing of an unfinished window behind, but for `.grad`."""
        for part in self._parts:
            part.forget()

    def end(self) -> None:
        """Leave the engine as it was."""
        for part in self._parts:
            part.end()

    @contextmanager
    def during(self, number: int) -> Iterator[None]:
        """Send the gradients of this pass if it must, otherwise keep them; `number` counts from 0."""
        sends = self._each or number == self.passes - 1
        self._waits = sends or self._lockstep
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.passing(sends))
            yield

    def refuse_bypassed(self, loss: Any, number: int) -> None:
        """Raise if the engine's forward did not run, or if its backward will not, or will reach other parameters."""
        if not all(part.ran() for part in self._parts) and (self._waits or loss.requires_grad):
            raise RuntimeError(
                f"Pass {number} on rank {self.name} did not call the model given to accumulate (loss_sum may call "
                "model.module), so its gradient would not be averaged: call the wrapped model."
            )
        if isinstance(loss, Tensor) and not loss.requires_grad and self._waits:
            raise ValueError(
                f"loss_sum returned a loss without a graph in pass {number} on rank {self.name}, but the other ranks "
                "wait for its backward: compute it from the model's output, also if its count is 0."
            )
        if loss.requires_grad and refusals.is_new(self._modules):  # once per model, since a graph is long
            given = [each for module in self._modules for each in module.parameters()]
            ranks.refuse_strangers(loss, [*given, *(leaf for part in self._parts for leaf in part.leaves())])

    def fill_up(self, done: int, micro_batch: Any, loss_sum: Callable[[Any], Any], scaler: Any) -> None:
        """Run the passes that the other ranks wait for, with weight 0; raise if a gradient is still unsent."""
        for number in range(done, self.passes):
            with self.during(number):
                loss = loss_sum(micro_batch)
                if isinstance(loss, Mapping):
                    loss = torch.stack(list(loss.values())).sum()
                refusals.refuse_unless_scalar_with_graph(loss, f"pass {number}", graph=False)
                self.refuse_bypassed(loss, number)
                self._dtype = loss.dtype
                if scaler is not None:
                    loss = scaler.scale(loss)
                # Not a factor of 0, which turns inf into NaN.
                leaves = [leaf for part in self._parts for leaf in part.leaves()]
                handles = [leaf.register_hook(torch.zeros_like) for leaf in leaves]  # type: ignore[no-untyped-call]
                try:
                    loss.backward()
                finally:
                    for handle in handles:
                        handle.remove()
            del loss
        for part in self._parts:
            part.refuse_unsent()

    def means(self, losses: dict[Any, list[Tensor]], raises: bool) -> tuple[dict[Any, Tensor], list[int] | None]:
        """Return the global means by key, and with `raises` the non-finite micro-batches, None if there are none.

        `losses` are those of this rank's micro-batches, each divided by N / D. Takes one small collective, which blocks
        only with `raises`. The list is empty if only other ranks have non-finite micro-batches.
        """
        keys = sorted(losses, key=repr)
        rows = [torch.stack(losses[key]) if losses[key] else torch.zeros(0, dtype=self._dtype) for key in keys]
        values = torch.stack(rows).to(self._device, torch.float64)
        finite = values.isfinite().all(0)
        told = self._summed(torch.cat([values.sum(1), (~finite).sum().double().view(1)]))
        bad = None
        if raises:
            anywhere, *here = torch.cat([told[-1:], finite.double()]).tolist()
            bad = [index for index, good in enumerate(here) if not good] if anywhere else None
        means = (told[:-1] / self.divisor).to(torch.promote_types(rows[0].dtype, torch.float32))
        found = dict(zip(keys, means.unbind(), strict=True))
        return {key: found[key] for key in losses}, bad


@contextmanager
def _naming(rank: int) -> Iterator[None]:
    try:
        yield
    except ERRORS as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (f"On rank {rank}: {error.args[0]}",)
        raise


def together(modules: Sequence[nn.Module], *, alone: bool = False) -> Together | None:
    """Return a `Together` for the modules, None if one process trains alone."""
    parts = ranks.engines_of(modules, alone=alone)
    return Together(modules, parts) if parts else None


def refuse_unless_group(group: Any) -> None:
    """Raise TypeError unless `group` is None or a process group."""
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            "group must be a process group such as torch.distributed.group.WORLD, or the mesh's get_group(), but "
            f"{group!r} is of type {type(group).__name__}."
        )


def any_has_more(group: Group, more: bool, spare: bool, error: Exception | None) -> bool:
    """Return whether some rank has another window; raise on all ranks if one has failed or never had any.

    Takes one blocking collective, with one number per rank.
    """
    told = torch.zeros(group.size(), device=ranks.device_of(group))
    told[group.rank()] = 3 if error is not None else 1 if more else 0 if spare else 2
    torch.distributed.all_reduce(told, group=group)
    states = told.tolist()
    if error is not None:
        raise error
    if 3 in states:
        raise RuntimeError(f"Rank {states.index(3)} failed to read its micro-batches: see the error on that rank.")
    if 1 in states and 2 in states:
        raise ValueError(f"Rank {states.index(2)} has no micro-batch: give each rank at least one.")
    return 1 in states
