"""What "equal" means: the gradient of the whole batch, computed as one graph, and the distance from it."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Never, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradaccum import refusals
from gradaccum.refusals import Model

Batch = TypeVar("Batch")
Gradients = Tensor | None | Iterable[Tensor | None]


def relative_error(actual: Gradients, expected: Gradients) -> float:
    """Measure how far `actual` is from `expected`: |actual - expected| / |expected|, one L2 norm over all tensors.

    Computed in float64 on the CPU. 0 is equal, 1 means as far off as no gradient at all; 0/0 is 0 and x/0 is inf.

    Args:
        actual: a tensor, or tensors in some order, such as `[p.grad for p in model.parameters()]`; None counts as 0.
        expected: as many tensors, of the same shapes in the same order.

    Raises:
        ValueError: the numbers of tensors or two shapes differ; nothing is broadcast.
        TypeError: something is neither a tensor nor None.

    Example:
        >>> relative_error([torch.tensor([3.0, 8.0]), None], [torch.tensor([3.0, 4.0]), torch.zeros(2)])
        0.8
    """
    ours, theirs = _tensors(actual, "actual"), _tensors(expected, "expected")
    if len(ours) != len(theirs):
        raise ValueError(f"actual holds {len(ours)} tensors and expected {len(theirs)}: give both in the same order.")
    differences, norms = [], []
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one is not None and other is not None and one.shape != other.shape:
            raise ValueError(
                f"Tensor {index} has shape {tuple(one.shape)} in actual and {tuple(other.shape)} in expected: "
                "compare tensors of the same shape."
            )
        if one is None and other is None:
            continue
        left = torch.zeros_like(_float64(other)) if one is None else _float64(one)  # type: ignore[arg-type]
        right = torch.zeros_like(left) if other is None else _float64(other)
        differences.append(torch.linalg.vector_norm(left - right).item())
        norms.append(torch.linalg.vector_norm(right).item())
    difference, norm = math.hypot(*differences), math.hypot(*norms)
    if norm == 0:
        return 0.0 if difference == 0 else math.nan if math.isnan(difference) else math.inf
    return difference / norm


def full_batch_gradient(
    model: Model,
    batch: Batch,
    loss: Callable[[Batch], Tensor],
    *removed: Never,
    dtype: torch.dtype | None = None,
    **removed_names: Never,
) -> list[Tensor | None]:
    """Compute the gradient of your own loss of one batch, as one graph: what every cut of that batch is compared with.

    It shares nothing with `accumulate`, no sum and no count, so it sees whatever a cut changes. Parameters, buffers,
    modes, `.grad` and the random state are afterwards what they were before.

    Args:
        model: the module whose parameters the loss trains, or a list or tuple of modules.
        batch: all the items at once, whatever `loss` takes.
        loss: returns the loss that you mean, of the whole batch, a tensor of shape ().
        dtype: computes in this dtype instead of the model's own, `torch.float64` say: parameters, buffers, the batch's
            floating-point tensors (also inside lists, tuples and dicts) and every other one that an operation meets.
        *removed: refused; version 0.1 took a window, its sums and its counts.
        **removed_names: refused likewise.

    Returns:
        One tensor per parameter, in the order of `model.parameters()`; None where the loss does not depend on it.

    Raises:
        TypeError, ValueError: the loss is no scalar tensor with a graph, or depends on no parameter of the model.
        NotImplementedError: the model is wrapped to train on several processes.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> full_batch_gradient(model, torch.tensor([[1.0], [2.0], [6.0]]), lambda x: model(x).mean())
        [tensor([[3.]])]
    """
    if removed or removed_names:
        raise TypeError(
            "full_batch_gradient takes one batch and your own loss of it, not a window with its sums and counts: "
            "call full_batch_gradient(model, batch, loss), where loss(batch) returns the mean that you mean."
        )
    modules = refusals.modules_of(model)
    refusals.refuse_several_processes(modules, wrapped_only=True)
    with borrowed(modules, dtype):
        return gradient_of(modules, batch if dtype is None else convert(batch, dtype), loss)


def gradient_of(modules: Sequence[nn.Module], batch: Any, loss: Callable[[Any], Tensor]) -> list[Tensor | None]:
    """Return the gradient of `loss(batch)`, one tensor or None per parameter."""
    with torch.enable_grad():
        value = loss(batch)
        refusals.refuse_unless_scalar_with_graph(value, "the batch", name="loss")
        parameters = list(refusals.named(modules, "parameters").values())
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        found = torch.autograd.grad(value, trainable, allow_unused=True) if trainable else ()
    if all(gradient is None for gradient in found):
        raise ValueError("The loss depends on no trainable parameter of the model: give the modules that it uses.")
    each = iter(found)
    return [next(each) if parameter.requires_grad else None for parameter in parameters]


@contextmanager
def borrowed(modules: Sequence[nn.Module], dtype: torch.dtype | None) -> Iterator[Callable[[], None]]:
    """Let the modules run on copies of their tensors, converted to `dtype`; give a function that starts afresh.

    Afterwards tensors, `.grad`, modes and the random states (torch's, Python's, NumPy's) are what they were.
    """
    parameters = list(refusals.named(modules, "parameters").values())
    saved = {tensor: tensor.data for tensor in [*parameters, *refusals.named(modules, "buffers").values()]}
    inner = [module for outer in modules for module in outer.modules()]
    slots = [(module, name, tensor) for module in inner for name, tensor in module.named_buffers(recurse=False)]
    modes = [(module, module.training) for module in inner]
    grads = [(parameter, parameter.grad) for parameter in parameters]
    chosen = [(one, one.grad_dtype) for one in parameters if getattr(one, "grad_dtype", one.dtype) != one.dtype]
    states = [(write, read()) for read, write in _random_sources(saved)]

    def restart(copies: bool = True) -> None:
        for module, name, tensor in slots:  # a forward may have put another tensor in a buffer's place
            setattr(module, name, tensor)
        for tensor, data in saved.items():
            if copies:
                tensor.data = data.to(dtype, copy=True) if dtype and data.is_floating_point() else data.clone()
            else:
                tensor.data = data
        for module, training in modes:
            module.training = training
        for parameter, _ in grads:
            parameter.grad = None
        for write, state in states:
            write(state)

    with ExitStack() as stack:
        stack.callback(_put_back, grads, chosen)
        stack.callback(restart, copies=False)
        for parameter, _ in chosen if dtype else ():
            parameter.grad_dtype = None  # it would round the gradient
        restart()
        if dtype:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)  # for what the loss makes on its way
            stack.enter_context(_InOneDtype(dtype))
        yield restart


def _put_back(grads: Sequence[tuple[Tensor, Any]], chosen: Sequence[tuple[Any, Any]]) -> None:
    for parameter, grad_dtype in chosen:
        parameter.grad_dtype = grad_dtype
    for parameter, gradient in grads:
        parameter.grad = gradient


def _random_sources(tensors: Iterable[Tensor]) -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Return how each generator that a forward may draw from is read, and written."""
    sources: list[Any] = [(torch.get_rng_state, torch.set_rng_state), (random.getstate, random.setstate)]
    if numpy := sys.modules.get("numpy"):
        sources.append((numpy.random.get_state, numpy.random.set_state))
    for device in {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}:
        api = torch.get_device_module(device)
        where = {} if device.type == "mps" else {"device": device}  # MPS keeps one state for all
        sources.append((partial(api.get_rng_state, **where), partial(api.set_rng_state, **where)))
    return sources


def random_state(modules: Sequence[nn.Module]) -> list[Any]:
    """Return what can be compared of the random states: they differ if and only if something was drawn."""
    found = []
    for read, _ in _random_sources(tensor for module in modules for tensor in module.parameters()):
        state = read()
        parts = state if isinstance(state, tuple) else (state,)
        found.append([part.tolist() if hasattr(part, "tolist") else part for part in parts])
    return found


_SHORTER = {Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}


class _InOneDtype(TorchFunctionMode):
    """Compute in one floating dtype whatever dtype a loss brings along or asks for.

    A target, a weight or a mask that a closure holds would else be refused (Float against Double), and a norm that
    goes to float32 by itself, as in Llama, would round what is to be compared.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("__get__", "__set__"):  # attributes
            return func(*args, **kwargs)
        if func in _SHORTER:
            return args[0].to(self.dtype)
        kept = 1 if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else 0  # changed in place
        args = (*args[:kept], *convert(tuple(args[kept:]), self.dtype))
        return func(
            *args, **{key: value if key == "out" else convert(value, self.dtype) for key, value in kwargs.items()}
        )


def _tensors(given: Gradients, name: str) -> Sequence[Tensor | None]:
    tensors = [given] if given is None or isinstance(given, Tensor) else list(given)
    for tensor in tensors:
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must hold tensors or None, but {tensor!r} is a {type(tensor).__name__}.")
    return tensors


def _float64(tensor: Tensor) -> Tensor:
    dense = tensor.detach().cpu()
    dense = dense.to_dense() if dense.layout != torch.strided else dense
    return dense.to(torch.promote_types(dense.dtype, torch.float64))


def convert(given: Any, dtype: torch.dtype) -> Any:
    """Return `given` with floating-point tensors, and dtypes, in `dtype`, also inside lists, tuples and dicts."""
    if isinstance(given, Tensor):
        return given.to(dtype) if given.is_floating_point() else given
    if isinstance(given, torch.dtype):
        return dtype if given.is_floating_point else given
    if isinstance(given, MutableMapping):
        converted = copy.copy(given)  # its own kind, a BatchEncoding say
        for key, value in given.items():
            converted[key] = convert(value, dtype)
        return converted
    if isinstance(given, tuple) and hasattr(given, "_fields"):  # a named tuple
        return type(given)(*(convert(value, dtype) for value in given))
    if type(given) in (list, tuple):
        return type(given)(convert(value, dtype) for value in given)
    return given
