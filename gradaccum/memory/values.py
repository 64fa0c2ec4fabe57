"""The values that a prediction knows: integers, booleans and a few floats that do not depend on random numbers."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor

# Private: known values are computed with data, outside of the modes that compute without data.
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

LIMIT: Final = 2**20  # elements; a larger tensor is not a mask or a length, and too expensive to compute
FEW: Final = 2**10  # floats: a schedule of rates or widths, from which a model is built
_aten = torch.ops.aten
_RANGES: Final = {_aten.arange, _aten.linspace, _aten.logspace}  # of floats; zeros may be placeholders for data
# Their values are known: the tensor argument only determines the size.
_FILLED: Final[dict[Any, int | None]] = {_aten.zeros_like: 0, _aten.new_zeros: 0, _aten.ones_like: 1, _aten.new_ones: 1}
_FILLED.update({_aten.full_like: None, _aten.new_full: None})  # the value is an argument
# Their numbers are the range: none is 0 to 1, one is its end, two are both ends.
_DRAWN: Final = {_aten.rand, _aten.rand_like, _aten.uniform_, _aten.randint, _aten.randint_like, _aten.random_}
_EMPTY: Final = {_aten.empty, _aten.empty_strided, _aten.empty_permuted, _aten.empty_like, _aten.new_empty}


class Values:
    """The known values of tensors without data.

    With a mask of ones, a length or a range of positions, branches are those of a real run. `note` is called after
    each operation, `number` when the program reads a value.
    """

    def __init__(self) -> None:
        self._real = WeakTensorKeyDictionary()
        self._drawn = weakref.WeakKeyDictionary[torch.UntypedStorage, float]()

    def number(self, tensor: Tensor) -> float | None:
        """Return the value of a tensor with one element, None if it is not known."""
        if tensor not in self._real:
            return None
        with _disable_current_modes():
            number: float = self._real[tensor].item()
            return number

    def guess(self, tensor: Tensor) -> bool | float:
        """Return what an unknown value is taken as: the middle of what it was drawn from, else 1; False for a truth."""
        if tensor.dtype == torch.bool:
            return _reader("torch.distributions") is None  # which asks whether its arguments are valid
        middle = self._drawn.get(tensor.untyped_storage(), 1)
        return float(middle) if tensor.is_floating_point() else math.floor(middle)

    def note(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """Compute an operation's result if it can be known, and forget overwritten values."""
        made = [result] if isinstance(result, Tensor) else list(_tensors([result]))
        is_exact = bool(made) and all(map(_is_exact, made))
        if func.overloadpacket in _DRAWN:
            numbers = [each for each in args if isinstance(each, int | float)]
            numbers += [1] * (len(numbers) < 1 + (func is _aten.uniform_.default))  # torch leaves a default out
            self._forget(made)
            whole = not made[0].is_floating_point()  # whose end is not drawn
            self._drawn[made[0].untyped_storage()] = (sum([0, *numbers][-2:]) - whole) / 2
            return
        if not is_exact and not self._real:
            return
        if func is _aten.lift_fresh.default:
            if is_exact:
                with _disable_current_modes():
                    self._real[made[0]] = args[0].clone()
        elif is_exact and func.overloadpacket in _FILLED and not made[0].is_floating_point():
            fill = _FILLED[func.overloadpacket]
            fill = args[-1] if fill is None else fill
            if isinstance(fill, int | float):
                with _disable_current_modes():
                    self._real[made[0]] = torch.full(made[0].shape, fill, dtype=made[0].dtype)
        elif is_exact and self._follows(func, list(_tensors([args, kwargs])), made[0].is_floating_point()):
            with _disable_current_modes():
                real = func(*self._of(args), **self._of(kwargs))
            self._real.update(zip(made, _tensors([real]), strict=True))
        elif func is _aten.native_batch_norm.default:  # whose schema does not say that it writes
            self._forget(args[3:5])
        elif func._schema.is_mutable:
            written = zip(func._schema.arguments, args, strict=False)
            for argument, value in [*written, *((each, kwargs.get(each.name)) for each in func._schema.arguments)]:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._forget(value)

    def _follows(self, func: Any, given: list[Tensor], is_float: bool) -> bool:
        """Return whether a result can be computed from known tensors, or without tensors from the given numbers."""
        if torch.Tag.nondeterministic_seeded in func.tags or func.overloadpacket in _EMPTY:
            return False
        if func.namespace != "aten":  # such as a collective, which only the program itself may run
            return False
        if not given and is_float:
            return func.overloadpacket in _RANGES
        return all(each in self._real for each in given)

    def shaped(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return a result whose size depends on values, as tensors with data, None if the values are not known."""
        if not all(each in self._real for each in _tensors([args, kwargs])):
            return None
        with _disable_current_modes():
            return func(*self._of(args), **self._of(kwargs))

    def places(self, indices: Any) -> list[Any] | None:
        """Return the indices of an `aten.index`, masks as positions of True; None if a mask is not known."""
        found: list[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
            elif index in self._real:
                with _disable_current_modes():
                    found += self._real[index].nonzero(as_tuple=True)
            else:
                return None
        return found

    def _of(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._real[tree]
        if isinstance(tree, list | tuple):
            return type(tree)(self._of(each) for each in tree)
        return {key: self._of(each) for key, each in tree.items()} if isinstance(tree, Mapping) else tree

    def _forget(self, tree: Any) -> None:
        for tensor in _tensors([tree]):
            self._drawn.pop(tensor.untyped_storage(), None)
            if not _is_exact(tensor):
                continue  # its values are not known
            storage = tensor.untyped_storage()
            for known in [each for each in self._real if each.untyped_storage() is storage]:
                del self._real[known]


def _is_exact(tensor: Tensor) -> bool:
    most = FEW if tensor.is_floating_point() else LIMIT
    return tensor.numel() <= most and not tensor.is_complex() and tensor.layout == torch.strided


def _tensors(tree: Any) -> Iterator[Tensor]:
    for each in tree.values() if isinstance(tree, Mapping) else tree:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple | Mapping):
            yield from _tensors(each)


def _reader(*unless: str) -> FrameType | None:
    """Return the innermost frame outside of torch and this package; None below a module of torch that is named."""
    frame = sys._getframe(1)
    while frame.f_back:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(unless):
            return None
        if name.partition(".")[0] not in ("torch", "gradaccum"):
            break
        frame = frame.f_back
    return frame


def _line_that_reads() -> str:
    """Return the file and line that read a value; nothing if torch did, to initialize or to check."""
    frame = _reader("torch.nn.init", "torch.distributions")
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""


def _unsized(operation: str) -> str:
    """Say that an operation returns a tensor whose size depends on values, and what to use instead."""
    module, other = getattr(_reader(), "f_locals", {}).get("self"), "use torch.where, or multiply by a mask"
    if getattr(getattr(module, "config", None), "_experts_implementation", None):  # of a model of transformers
        operation = f"{operation} in {type(module).__name__}"
        other = 'set config._experts_implementation = "grouped_mm"'
    return f"{operation} returns a tensor whose size depends on values, which a prediction does not have: {other}."
