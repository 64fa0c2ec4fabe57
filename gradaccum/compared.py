"""Compare a batch and its pieces on the same model: gradients, final buffers, and modules that draw random numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradaccum import refusals
from gradaccum.accumulation import Counts, Sums, accumulate
from gradaccum.borrowed import borrowed, convert, dense, gradient_of, nudge, others_untouched, random_state
from gradaccum.gradients import relative_error


class Compared(NamedTuple):
    """The gradients of a batch and of its pieces, per parameter, and the names of buffers that differ."""

    names: list[str]
    whole: list[Tensor | None]
    pieces: list[Tensor | None]
    buffers: list[str]
    drew: bool

    @property
    def error(self) -> float:
        """The relative error of the pieces' gradient."""
        return relative_error(self.pieces, self.whole)

    @property
    def size(self) -> float:
        """The norm of the whole batch's gradient."""
        return norm(self.whole)

    @property
    def finite(self) -> bool:
        """Whether both gradients are finite."""
        return math.isfinite(self.size) and math.isfinite(norm(self.pieces))

    @property
    def factor(self) -> float:
        """The least-squares factor from the whole gradient to the pieces' gradient."""
        pairs = [
            pair for pair in zip(self.whole, self.pieces, strict=True) if pair[0] is not None and pair[1] is not None
        ]
        wide = [[dense(each) for each in pair] for pair in pairs]  # type: ignore[arg-type]
        return sum((one.conj() * other).sum().real.item() for one, other in wide) / self.size**2

    def apart(self, limit: float, single: Compared | None = None) -> dict[str, float]:
        """Return the errors of single parameters, if their gradient is larger than rounding.

        One norm over all parameters hides a tower whose loss has a small factor; for Adam it matters.
        """
        found = {}
        for index, name in enumerate(self.names):
            whole, pieces = self.whole[index], self.pieces[index]
            error = relative_error(pieces, whole)
            rounding = 0.0 if single is None else lost([single.whole[index]], [whole])
            if error > max(limit, rounding) and norm([whole, pieces]) > 1e-6 * self.size:
                found[name] = error
        return found


@dataclass
class Case:
    """A batch, its pieces, and the functions that run them."""

    modules: list[nn.Module]
    batch: Any
    loss: Callable[[Any], Tensor]
    pieces: list[Any]
    loss_sum: Callable[[Any], Sums]
    count: Callable[[Any], Counts]
    without_dropout: bool = False
    quiet: Sequence[nn.Module] = ()  # in eval mode, because they draw

    def lowest_dtype(self) -> torch.dtype:
        """Return the least precise dtype of the trainable parameters."""
        dtypes = {one.dtype for module in self.modules for one in module.parameters() if one.requires_grad}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def run(
        self,
        dtype: torch.dtype | None,
        eval_mode: Iterable[nn.Module] = (),
        pieces: Sequence[Any] | None = None,
        nudged: bool = False,
    ) -> Compared:
        """Run the whole batch, restore everything, run the pieces; with `nudged`, each parameter is one bit larger."""
        batch = convert(self.batch, dtype)
        pieces = [convert(piece, dtype) for piece in (self.pieces if pieces is None else pieces)]
        quiet, ends = [*self.quiet, *eval_mode], []
        with self._prepared(dtype) as restart:
            before = random_state(self.modules)
            for run, given in ((self._whole, batch), (self._cut, pieces)):
                restart()
                for module in quiet:
                    module.training = False  # not eval(): submodules keep their mode
                if nudged:
                    nudge(self.modules)
                gradients = run(given)
                ends.append((gradients, self._remembered(), random_state(self.modules) != before))
            names = list(refusals.named(self.modules, "parameters"))
        (whole, one, drew), (cut, other, drew_again) = ends
        limit = limit_of(dtype or self.lowest_dtype()) or 1e-5
        moved = [name for name in one | other if not same(one.get(name), other.get(name), limit)]
        return Compared(names, whole, cut, moved, drew or drew_again)

    @contextmanager
    def _prepared(self, dtype: torch.dtype | None) -> Iterator[Callable[[], None]]:
        with ExitStack() as stack:
            stack.enter_context(refusals.forgetting(self.modules))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "BatchNorm|Gradients of torch")  # the verdict says it
            yield stack.enter_context(borrowed(self.modules, dtype, without_dropout=self.without_dropout))

    def _whole(self, batch: Any) -> list[Tensor | None]:
        return gradient_of(self.modules, batch, self.loss)

    def _cut(self, pieces: Any) -> list[Tensor | None]:
        parameters = refusals.named(self.modules, "parameters").values()
        with ExitStack() as stack, torch.enable_grad():

            def loss_sum(piece: Any) -> Sums:
                sums = self.loss_sum(piece)
                for each in sums.values() if isinstance(sums, Mapping) else [sums]:
                    if isinstance(each, Tensor):
                        stack.enter_context(others_untouched(each, parameters))
                return sums

            accumulate(self.modules, pieces, loss_sum, self.count)
            return [parameter.grad for parameter in parameters]

    def _remembered(self) -> dict[str, Tensor]:
        frozen = {
            name: one for name, one in refusals.named(self.modules, "parameters").items() if not one.requires_grad
        }
        every = refusals.named(self.modules, "buffers") | frozen
        return {name: one.detach().clone() for name, one in every.items()}

    def watch(self, dtype: torch.dtype | None) -> tuple[set[nn.Module], list[nn.Module]]:
        """Run the whole batch's loss; return the modules whose forward runs, and those that draw random numbers."""
        ran: set[nn.Module] = set()
        drawing: set[nn.Module] = set()
        running: list[list[Any]] = []  # each running module, and the random state after its last own draw

        def enter(module: nn.Module, *_: Any) -> None:
            state = random_state(self.modules)
            if running and running[-1][1] != state:
                drawing.add(running[-1][0])
            running.append([module, state])
            ran.add(module)

        def leave(module: nn.Module, *_: Any) -> None:
            state = random_state(self.modules)
            if running.pop()[1] != state:
                drawing.add(module)
            if running:
                running[-1][1] = state

        with self._prepared(dtype), torch.enable_grad():
            for module in refusals.inner(self.modules):
                if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                    module.register_forward_pre_hook(enter)  # removed when everything is restored
                    module.register_forward_hook(leave)
            self.loss(convert(self.batch, dtype))
        return ran, list(drawing)


def norm(gradients: Iterable[Tensor | None]) -> float:
    """Return one L2 norm over all gradients."""
    return math.hypot(*(torch.linalg.vector_norm(dense(one)).item() for one in gradients if one is not None))


def limit_of(dtype: torch.dtype) -> float:
    """Return the error below which two gradients of this dtype are equal; 0 for 16 bits, which have no such limit."""
    bits = torch.finfo(dtype).bits
    return {64: 1e-9, 32: 1e-5}.get(bits, 0.0)


def lost(single: list[Tensor | None], exact: list[Tensor | None]) -> float:
    """Return the error that rounding alone may cause in float64, estimated from the error in float32.

    Float64 has a 2**29 times smaller error, and a hundred times that is more than splitting causes. If a large part of
    a gradient is lost (at an optimum, where items cancel), there is no verdict.
    """
    return 100 * 2.0**-29 * relative_error(single, exact)


def same(one: Tensor | None, other: Tensor | None, limit: float) -> bool:
    """Return whether the final values of a buffer in two runs are equal up to rounding."""
    if one is None or other is None or one.shape != other.shape:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    one, other = dense(one), dense(other)
    return (
        torch.allclose(one, other, rtol=limit, atol=1e-4 * limit, equal_nan=True) or relative_error(one, other) < limit
    )
