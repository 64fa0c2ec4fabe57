"""Run a loss on a model, also in another dtype, and restore everything that it changes."""

from __future__ import annotations

import copy
import random
import sys
from collections import UserDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from gradaccum import refusals

_CONTAINERS = (dict, list, set, deque)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuse_to_borrow(modules: Sequence[nn.Module], dtype: Any) -> None:
    """Raise for an unsupported dtype, and for parameters that have no data or are spread over processes."""
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be None or a floating-point type such as torch.float64, but {dtype!r} was given.")
    refusals.refuse_several_processes(modules, wrapped_only=True)
    for name, parameter in refusals.named(modules, "parameters").items():
        if is_lazy(parameter) or parameter.is_meta:
            raise ValueError(f"Parameter {name!r} has no data yet: run one forward on real tensors first.")
    refusals.refuse_nothing_to_train(modules)


def gradient_of(modules: Sequence[nn.Module], batch: Any, loss: Callable[[Any], Tensor]) -> list[Tensor | None]:
    """Return the gradient of `loss(batch)`, one tensor or None per parameter; for borrowed modules only.

    It calls backward, as a training loop does: under torch.autograd.grad, reentrant checkpointing and parameter hooks
    do not work.
    """
    parameters = refusals.named(modules, "parameters").values()
    with torch.enable_grad():
        value = loss(batch)
    refusals.refuse_unless_scalar_with_graph(value, "the batch", name="loss")
    with (
        others_untouched(value, parameters),
        refusals.no_gradient_is_taken_away(
            [each for each in parameters if each.requires_grad], after="these weights are put back"
        ),
    ):
        value.backward()  # type: ignore[no-untyped-call]
    found = [parameter.grad for parameter in parameters]
    if all(gradient is None for gradient in found):
        raise ValueError("The loss depends on no trainable parameter of the model: pass the modules that it uses.")
    return found


@contextmanager
def others_untouched(loss: Tensor, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Restore the `.grad` of every other tensor that this loss is computed from."""
    known, nodes, others = set(parameters), [loss.grad_fn], []
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)  # the tensor that accumulates a gradient
        if isinstance(leaf, Tensor) and leaf not in known:
            others.append((leaf, leaf.grad))
            leaf.grad = None  # otherwise backward adds to it in place
        for after, _ in node.next_functions if node is not None else ():
            if after is not None and after not in seen:
                seen.add(after)
                nodes.append(after)
    try:
        yield
    finally:
        for leaf, gradient in others:
            leaf.grad = gradient


@contextmanager
def borrowed(
    modules: Sequence[nn.Module], dtype: torch.dtype | None = None, *, without_dropout: bool = False
) -> Iterator[Callable[[], None]]:
    """Let the modules run on copies of their tensors, converted to `dtype`; yield a function that resets them.

    Afterwards tensors, `.grad`, modes, the random states (of torch, Python and NumPy) and replaced plain attributes are
    restored.
    """
    parameters = list(refusals.named(modules, "parameters").values())
    saved = {tensor: tensor.data for tensor in [*parameters, *refusals.named(modules, "buffers").values()]}
    # Modes, buffers and parameters, also if a forward replaces them, and caches, one level deep.
    attributes = [vars(module) for module in refusals.inner(modules)]
    holders = [
        *attributes,
        *(value for each in attributes for value in each.values() if isinstance(value, _CONTAINERS)),
    ]
    contents = [(holder, copy.copy(holder)) for holder in holders]
    grads = [(each, each.grad, each.requires_grad, getattr(each, "grad_dtype", None)) for each in parameters]
    states = [(write, read()) for read, write in _random_sources(saved)]
    modes = [*([_InOneDtype(dtype)] if dtype else []), *([WithoutDropout()] if without_dropout else [])]

    def restart(convert_to: Callable[[Tensor], Tensor]) -> None:
        for holder, content in contents:
            holder.clear()
            holder.update(content) if hasattr(holder, "update") else holder.extend(content)
        for tensor, data in saved.items():
            tensor.data = convert_to(data)
        for parameter, _, required, _ in grads:
            parameter.grad = None
            parameter.requires_grad_(required)
        for write, state in states:
            write(state)

    def copied(data: Tensor) -> Tensor:
        return data.clone() if dtype is None or (other := _in(dtype, data.dtype)) is None else data.to(other, copy=True)

    with ExitStack() as stack:
        stack.callback(_put_back, grads)
        stack.callback(restart, lambda data: data)
        if dtype:
            for parameter, _, _, grad_dtype in grads:
                if grad_dtype not in (None, parameter.dtype):
                    parameter.grad_dtype = None  # would round the gradient
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)  # for tensors that the loss creates
        for mode in modes:
            stack.enter_context(mode)

        def afresh() -> None:
            restart(copied)
            for mode in modes:
                mode.reach_into_backward(modules)

        afresh()
        yield afresh


def nudge(modules: Sequence[nn.Module]) -> None:
    """Make each parameter one bit larger, to see the effect of rounding; for borrowed modules only."""
    for parameter in refusals.named(modules, "parameters").values():
        parameter.data.mul_(1 + torch.finfo(parameter.dtype).eps)


def dense(tensor: Tensor) -> Tensor:
    """Return the tensor for a norm: dense, in 64 bits, on the CPU, since not every device has 64 bits."""
    strided = tensor.detach().cpu()
    strided = strided.to_dense() if strided.layout != torch.strided else strided
    return strided.to(torch.promote_types(strided.dtype, torch.float64))


def _put_back(grads: Sequence[tuple[Any, Any, bool, Any]]) -> None:
    for parameter, gradient, _, grad_dtype in grads:
        if grad_dtype is not None and parameter.grad_dtype != grad_dtype:
            parameter.grad_dtype = grad_dtype
        parameter.grad = gradient


def _random_sources(tensors: Iterable[Tensor]) -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Return a getter and a setter of the state of each generator that a forward may use."""
    sources: list[Any] = [(torch.get_rng_state, torch.set_rng_state), (random.getstate, random.setstate)]
    if numpy := sys.modules.get("numpy"):
        sources.append((numpy.random.get_state, numpy.random.set_state))
    for device in {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}:
        api = torch.get_device_module(device)
        where = {} if device.type == "mps" else {"device": device}  # MPS has one state for all devices
        sources.append((partial(api.get_rng_state, **where), partial(api.set_rng_state, **where)))
    return sources


def random_state(modules: Sequence[nn.Module]) -> list[Any]:
    """Return the random states in a comparable form: they differ if and only if something was drawn."""
    found = []
    for read, _ in _random_sources(tensor for module in modules for tensor in module.parameters()):
        state = read()
        parts = state if isinstance(state, tuple) else (state,)
        found.append([part.tolist() if hasattr(part, "tolist") else part for part in parts])
    return found


@contextmanager
def random_state_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the random states."""
    states = [(write, read()) for read, write in _random_sources(each for one in modules for each in one.parameters())]
    try:
        yield
    finally:
        for write, state in states:
            write(state)


def _in(dtype: torch.dtype | None, given: torch.dtype) -> torch.dtype | None:
    """Return the dtype of a tensor of the `given` dtype in a run in `dtype`, None if it does not change."""
    if given.is_complex:
        return {torch.float64: torch.complex128, torch.float32: torch.complex64}.get(dtype or given)
    return dtype if given.is_floating_point and given.itemsize > 1 else None  # 8-bit tensors round on purpose


_CASTS = {Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}


class _Reaching(TorchFunctionMode):
    """A mode that stays active when backward runs a module again (checkpointing), which autograd does without modes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = True
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a torch function, or a replacement."""
        raise NotImplementedError

    def reach_into_backward(self, modules: Sequence[nn.Module]) -> None:
        """Enter this mode again in each module's forward in which it is not active."""
        entered: list[bool] = []

        def enter(*_: Any) -> None:
            self.seen = False
            torch.empty(0)  # any torch function
            entered.append(not self.seen)
            if entered[-1]:
                self.__enter__()  # type: ignore[no-untyped-call]

        def leave(*_: Any) -> None:
            if entered.pop():
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        for module in refusals.inner(modules):
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                module.register_forward_pre_hook(enter)  # removed when attributes are restored
                module.register_forward_hook(leave, always_call=True)


class _InOneDtype(_Reaching):
    """Compute in one floating dtype, whatever dtypes a loss uses.

    Otherwise a target, a weight or a mask in a closure would raise an error (Float against Double), and a norm that
    casts to float32, as in Llama, would round the values to compare.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Convert the arguments, except those that the function changes in place."""
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):  # attributes
            return func(*args, **kwargs)
        if func in _CASTS:
            return args[0] if args[0].is_complex() else args[0].to(self.dtype)
        kept = 1 if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else 0  # changed in place
        args = (*args[:kept], *convert(tuple(args[kept:]), self.dtype))
        kwargs = {key: value if key == "out" else convert(value, self.dtype) for key, value in kwargs.items()}
        return func(*args, **kwargs)


_DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


class WithoutDropout(_Reaching):
    """Disable dropout in any mode of a module, without changing the mode."""

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the input of a dropout; disable dropout in attention and recurrent layers."""
        name, kwargs = getattr(func, "__name__", "").rstrip("_"), dict(kwargs)
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name == "rrelu":
            kwargs["training"] = False
        elif name in _RECURRENT:  # dropout is their only argument that is a Python float
            args = tuple(0.0 if type(value) is float else value for value in args)
        elif "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        elif name == "scaled_dot_product_attention" and len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        elif name == "multi_head_attention_forward":
            args = tuple(0.0 if type(value) is float else value for value in args)
        return func(*args, **kwargs)


def convert(given: Any, dtype: torch.dtype | None) -> Any:
    """Return `given` with floating-point tensors and dtypes converted to `dtype`, also in lists, tuples and dicts.

    Containers are copied also for None, since a loss may pop labels from its batch.
    """
    if isinstance(given, Tensor | torch.dtype) and dtype is None:
        return given
    if isinstance(given, Tensor):
        other = _in(dtype, given.dtype)
        return given if other is None else given.to(other)
    if isinstance(given, torch.dtype):
        return _in(dtype, given) or given
    if isinstance(given, dict | UserDict):
        converted = copy.copy(given)  # keeps the type, such as BatchEncoding
        for key, value in given.items():
            converted[key] = convert(value, dtype)
        return converted
    if isinstance(given, tuple) and hasattr(given, "_fields"):  # a named tuple
        return type(given)(*(convert(value, dtype) for value in given))
    if type(given) in (list, tuple):
        return type(given)(convert(value, dtype) for value in given)
    return given
