"""The errors and warnings of `accumulate`, each with a one-sentence message that says what to do."""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Model: TypeAlias = nn.Module | Sequence[nn.Module]


def modules_of(model: Model) -> list[nn.Module]:
    """Return `model` as a list of modules; raise TypeError for any other type, ValueError for an empty list."""
    modules: list[Any] = list(model) if isinstance(model, list | tuple) else [model]
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"model must be a module, or a list or tuple of modules, but {type(module).__name__} was given."
            )
    if not modules:
        raise ValueError("model is an empty list: give at least one module.")
    return modules


def inner(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules and all their submodules."""
    return [module for outer in modules for module in outer.modules()]


def ranks() -> int:
    """Return the number of processes that train together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def named(modules: Sequence[nn.Module], members: str) -> dict[str, Tensor]:
    """Return the modules' "parameters" or "buffers" by name, each tensor once; as `0.weight` for several modules."""
    found, seen = {}, set()
    for index, module in enumerate(modules):
        for name, tensor in getattr(module, f"named_{members}")():
            if tensor not in seen:  # by identity: a tensor's hash
                seen.add(tensor)
                found[name if len(modules) == 1 else f"{index}.{name}"] = tensor
    return found


def trainable_and_clear(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the trainable parameters; raise ValueError if there are none, or if a parameter has a `.grad`."""
    trainable: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                raise ValueError(
                    f"Parameter {name!r} of {type(module).__name__} has a .grad, left by an earlier window, by "
                    "another loss or model whose backward reaches it, or by a validation: "
                    "call optimizer.zero_grad(set_to_none=True) first."
                )
            if parameter.requires_grad:
                trainable[id(parameter)] = parameter  # towers may share it
    if not trainable:
        refuse_nothing_to_train(modules)
    return list(trainable.values())


def refuse_nothing_to_train(modules: Sequence[nn.Module]) -> None:
    """Raise ValueError if no parameter is trainable."""
    if not any(parameter.requires_grad for module in modules for parameter in module.parameters()):
        kinds = ", ".join(type(module).__name__ for module in modules)
        raise ValueError(f"The model ({kinds}) has no trainable parameter: set requires_grad on some.")


def refuse_several_processes(modules: Sequence[nn.Module], *, wrapped_only: bool = False) -> None:
    """Raise NotImplementedError for DDP, FSDP and FSDP2; on several ranks for any model, unless `wrapped_only`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if ranks() == 1 and not wrapped_only:
        return
    sharded: tuple[type, ...] = ()
    if sharding := sys.modules.get("torch.distributed.fsdp"):  # slow to import; imported if a model is sharded
        sharded = (sharding.FullyShardedDataParallel, sharding.FSDPModule)
    for module in inner(modules):
        if isinstance(module, nn.parallel.DistributedDataParallel):
            if module.process_group.size() == 1:
                return
        elif not isinstance(module, sharded):
            continue
        kinds = (nn.parallel.DistributedDataParallel, *sharded)
        kind = next(wrapper.__name__ for wrapper in kinds if isinstance(module, wrapper))
        raise NotImplementedError(
            f"The model is wrapped in {kind}, which averages gradients over {ranks()} processes, but this function is "
            "for one: count over all of them and scale the losses in a loop of your own."
        )
    if not wrapped_only:
        raise NotImplementedError(
            f"{ranks()} processes train together, but this function is for one: it would see only this process's items."
        )


SEEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that have completed a window


def is_new(modules: Sequence[nn.Module]) -> bool:
    """Return whether some module has not completed a window yet."""
    return any(module not in SEEN for module in modules)


@contextmanager
def no_gradient_is_taken_away(
    parameters: Sequence[Any], after: str = "its weights have made one step already"
) -> Iterator[None]:
    """Raise if a hook clears a `.grad` during this backward, as an optimizer that steps in the backward must."""
    arrived: set[Any] = set()
    trained = [each for each in parameters if each.requires_grad]  # now: a loss may freeze what it does not train
    handles = [each.register_post_accumulate_grad_hook(arrived.add) for each in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    # At the end, not in our hook: LOMO takes a gradient when the next one arrives.
    if taken := [parameter for parameter in arrived if parameter.grad is None]:
        raise RuntimeError(
            f"A hook cleared {len(taken)} gradients during the first backward, as an optimizer that steps in the "
            f"backward pass does; {after}: remove these hooks and step after accumulate."
        )


@contextmanager
def forgetting(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let the block count neither as a first window nor as a warning that was shown."""
    sets = (SEEN, _WARNED, _WARNED_OF_BITS)
    fresh = [[module for module in modules if module not in one] for one in sets]
    try:
        yield
    finally:
        for one, news in zip(sets, fresh, strict=True):
            one.difference_update(news)


MANY = 64  # micro-batches from which bfloat16 loses contributions: half of 1 / eps
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_WARNED_OF_BITS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def batch_norms(modules: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Return, by name, each BatchNorm that currently normalizes by the statistics of its input."""
    return {
        name: module
        for outer in modules
        for name, module in outer.named_modules()
        if isinstance(module, BATCH_NORMS) and (module.training or not module.track_running_stats)
    }


def warn_of_batch_statistics(modules: Sequence[nn.Module], micro_batches: int, level: int) -> None:
    """Warn, once per model, that BatchNorm normalizes micro-batches."""
    fresh = [module for module in modules if module not in _WARNED]
    if not fresh:
        return
    if not (found := batch_norms(fresh)):
        # A model without BatchNorm is not searched again; a model with frozen ones is.
        _WARNED.update(one for one in fresh if not any(isinstance(each, BATCH_NORMS) for each in one.modules()))
        return
    _WARNED.update(fresh)
    warnings.warn(
        f"BatchNorm ({next(iter(found))!r}) normalizes each micro-batch by its own statistics, so the gradient differs "
        f"from that of one batch, and its running statistics are updated {micro_batches} times: gradaccum.check_split "
        "measures the difference. To accept it: warnings.filterwarnings('ignore', 'BatchNorm').",
        stacklevel=level,
    )


def warn_of_sixteen_bits(
    modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter], micro_batches: int, level: int
) -> None:
    """Warn, once per model, if the last micro-batches are lost in the rounding of the sum."""
    if all(module in _WARNED_OF_BITS for module in modules):
        return
    for parameter in parameters:
        dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
        if micro_batches * torch.finfo(dtype).eps >= 0.5:  # the last micro-batch is only 4 times the rounding error
            _WARNED_OF_BITS.update(modules)
            warnings.warn(
                f"Gradients of {dtype} lose small contributions in a sum over {micro_batches} micro-batches: set "
                "parameter.grad_dtype = torch.float32 on each parameter (DistributedDataParallel does not accept it), "
                "or use fewer micro-batches.",
                stacklevel=level,
            )
            return


def counts_and_totals(counts: Sequence[Any]) -> tuple[list[dict[Any, Any]], dict[Any, int | float]]:
    """Return the counts of each micro-batch and of the window, by key; with a single loss the key is None.

    All tensors among the counts are read in one transfer.
    """
    if all(type(value) is int and value > 0 for value in counts):  # the usual case, without the slower checks
        return [{None: value} for value in counts], {None: int(sum(counts))}
    keys, table = checked_counts(counts)
    of_each = counts_of_each(keys, table, _read(table))
    totals = {key: sum(each[key] for each in of_each) for key in keys}
    if not any(totals.values()):
        raise ValueError(
            f"count returned 0 for all {len(counts)} micro-batches: skip this window, its mean has no gradient."
        )
    return of_each, totals


def checked_counts(counts: Sequence[Any]) -> tuple[list[Any], list[list[Any]]]:
    """Return the keys and a row of values per micro-batch; raise if a value is not a number, without reading it."""
    keys = list(counts[0]) if isinstance(counts[0], Mapping) else [None]
    if not keys:
        raise ValueError("count returned an empty dict: give each loss a key.")
    table: list[list[Any]] = []  # micro-batch by key
    for index, value in enumerate(counts):
        if isinstance(value, Mapping) != isinstance(counts[0], Mapping):
            raise TypeError(f"count must return a dict for every micro-batch or for none, but 0 and {index} differ.")
        if isinstance(value, Mapping) and value.keys() != counts[0].keys():
            raise ValueError(
                f"count must return the same keys for every micro-batch, but for {index} it returned "
                f"{list(value)} and for 0 {keys}: return 0 for a loss without items."
            )
        table.append([value[key] for key in keys] if isinstance(value, Mapping) else [value])
    for index, row in enumerate(table):
        for value in row:
            if not _is_number(value):
                given = f"{value!r} ({type(value).__name__})"
                if isinstance(value, Tensor):
                    given = f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
                raise TypeError(
                    "count must return the number of items as an int or a tensor of shape (), "
                    f"but for micro-batch {index} it returned {given}; for several losses, return dicts."
                )
    return keys, table


def counts_of_each(keys: list[Any], table: list[list[Any]], read: list[list[Any]]) -> list[dict[Any, int | float]]:
    """Return the counts of each micro-batch by key; raise if one is negative or not finite."""
    whole = [
        [isinstance(value, Integral) or (isinstance(value, Tensor) and not value.is_floating_point()) for value in row]
        for row in table
    ]
    for index, row in enumerate(read):
        for number in row:
            if not 0 <= number < math.inf:  # a NaN fails this too
                raise ValueError(
                    "count must return a finite number of at least 0, "
                    f"but for micro-batch {index} it returned {number}."
                )
    return [
        {key: int(number) if is_whole else float(number) for key, number, is_whole in zip(keys, *both, strict=True)}
        for both in zip(read, whole, strict=True)  # NumPy integers would overflow
    ]


def _read(table: list[list[Any]]) -> list[list[Any]]:
    """Return all numbers as Python numbers, unrounded, with one transfer for all tensors."""
    tensors = [value for row in table for value in row if isinstance(value, Tensor)]
    if len({tensor.dtype for tensor in tensors}) > 1:  # stack needs one dtype
        if any(tensor.device.type == "mps" for tensor in tensors):  # which has no float64
            tensors = [tensor.cpu() for tensor in tensors]
        tensors = [tensor.double() for tensor in tensors]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    return [[next(read) if isinstance(value, Tensor) else value for value in row] for row in table]


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def sums_of(given: Any, counted: Mapping[Any, Any], index: int) -> dict[Any, Tensor]:
    """Return a micro-batch's dict of losses; raise if it is not such a dict, or a value is not a loss."""
    if None in counted and not isinstance(given, Mapping):
        refuse_unless_scalar_with_graph(given, f"micro-batch {index}")
        return {None: given}
    if None in counted or not isinstance(given, Mapping):
        raise TypeError(
            f"loss_sum and count must both return dicts or neither, but for micro-batch {index} loss_sum returned "
            f"a {type(given).__name__}."
        )
    if given.keys() != counted.keys():
        raise ValueError(
            f"loss_sum and count must return the same keys, but for micro-batch {index} they returned "
            f"{list(given)} and {list(counted)}."
        )
    for key, value in given.items():
        refuse_unless_scalar_with_graph(value, f"micro-batch {index}, {key!r}", graph=counted[key] > 0)
    return dict(given)


def refuse_unless_scalar_with_graph(loss: Any, where: str, *, name: str = "loss_sum", graph: bool = True) -> None:
    """Raise TypeError or ValueError unless `loss` is a tensor of shape () with a graph."""
    if not isinstance(loss, Tensor):
        given = f"the {type(loss).__name__} {loss!r}"
        raise TypeError(f"{name} must return a scalar tensor, but for {where} it returned {given}.")
    if loss.is_complex():
        raise TypeError(f"{name} must return a real number, but for {where} it returned {loss.dtype}.")
    if loss.ndim != 0:
        raise ValueError(
            f"{name} must return a tensor of shape (), but for {where} it returned shape {tuple(loss.shape)}: "
            "use a reduction or .sum()."
        )
    if graph and not loss.requires_grad:
        raise ValueError(
            f"{name} returned a loss without a graph for {where}: compute it from the model's output, "
            "without torch.no_grad(), .detach() or .item()."
        )
