"""The values that a prediction knows: integers, booleans and a few floats that no random number went into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

# Private: what is known is computed for real, outside of the modes that compute without data.
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

LIMIT: Final = 2**20  # elements; a larger tensor is no mask or length, and computing it would cost what it saves
FEW: Final = 2**10  # floats: a schedule of rates or widths, out of which a model is made
_RANGES: Final = {"arange", "linspace", "logspace"}  # whose floats are known; those of zeros may stand for data
_aten = torch.ops.aten
# Their values are known whatever those of their tensor argument are, which gives no more than a size.
_FILLED: Final = {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1, "full_like": None, "new_full": None}


class Values:
    """Tensors without data whose values are known, with these values.

    A mask of ones, a length, a range of positions: branches on them are the branches of a real run. `note` is called
    after each operation, `number` where a program reads a value.
    """

    def __init__(self) -> None:
        self._real = WeakTensorKeyDictionary()

    def number(self, tensor: Tensor) -> float | None:
        """Return the one value in a tensor, None where it is not known."""
        if tensor not in self._real:
            return None
        with _disable_current_modes():
            number: float = self._real[tensor].item()
            return number

    def note(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """Work out what is known of an operation's result, and forget what it wrote over."""
        made = list(_tensors([result]))
        given = list(_tensors([args, kwargs]))
        name = func.overloadpacket.__name__
        if func is _aten.lift_fresh.default:
            if made and _is_exact(made[0]):
                with _disable_current_modes():
                    self._real[made[0]] = args[0].clone()
            return
        is_known = all(each in self._real for each in given) and (given or not name.startswith("empty"))
        if torch.Tag.nondeterministic_seeded in func.tags or not all(map(_is_exact, made)):
            is_known = False
        is_float = bool(made) and made[0].is_floating_point()
        is_known = is_known and (bool(given) or not is_float or name in _RANGES)
        if made and _is_exact(made[0]) and name in _FILLED and not is_float:
            fill = _FILLED[name]
            fill = args[-1] if fill is None else fill
            if isinstance(fill, int | float):
                with _disable_current_modes():
                    self._real[made[0]] = torch.full(made[0].shape, fill, dtype=made[0].dtype)
        elif is_known and made:
            with _disable_current_modes():
                real = func(*self._of(args), **self._of(kwargs))
            self._real.update(zip(made, _tensors([real]), strict=True))
        elif func._schema.is_mutable:
            written = zip(func._schema.arguments, args, strict=False)
            for argument, value in [*written, *((each, kwargs.get(each.name)) for each in func._schema.arguments)]:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._forget(value)

    def shaped(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return real tensors for a result whose size depends on values, None where these are not known."""
        if not all(each in self._real for each in _tensors([args, kwargs])):
            return None
        with _disable_current_modes():
            return func(*self._of(args), **self._of(kwargs))

    def places(self, indices: Any) -> list[Any] | None:
        """Return the indices of an `aten.index` with each known mask as the places where it is True."""
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
            storage = tensor.untyped_storage()
            for known in [each for each in self._real if each.untyped_storage() is storage]:
                del self._real[known]


def _is_exact(tensor: Tensor) -> bool:
    exact = not tensor.is_complex() and tensor.layout == torch.strided
    return exact and tensor.numel() <= (FEW if tensor.is_floating_point() else LIMIT)


def _tensors(tree: Any) -> Iterator[Tensor]:
    for each in tree.values() if isinstance(tree, Mapping) else tree:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple | Mapping):
            yield from _tensors(each)
