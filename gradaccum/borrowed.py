"""Let a loss run on a model, in another dtype too, and put back whatever it changes."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradaccum import refusals


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
