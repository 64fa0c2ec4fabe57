"""Tensors without data: the same code runs on shapes alone, and allocates what it would allocate on the device."""

from __future__ import annotations

import copy
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn

# Private, but the only tensors with a device, a storage of the right size and a graph, and without memory.
from torch._subclasses import FakeTensor, FakeTensorMode, fake_tensor
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

# Private: the first as in follow.py; the second so that a measure_memory around a prediction does not count it.
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gradaccum.memory.allocator import CachingAllocator
from gradaccum.memory.attention import attention
from gradaccum.memory.libraries import LOW, Workspaces, corrected, refuse_quantized, rms_norm
from gradaccum.memory.measure import optimizers_in
from gradaccum.memory.values import Values, _line_that_reads, _unsized

_aten = torch.ops.aten
# On a CPU and on CUDA these reduce into the memory of the unreduced loss, and keep all of it.
_KEEP_ALL: Final = {
    _aten.mse_loss.default,
    _aten.smooth_l1_loss.default,
    _aten.soft_margin_loss.default,
    _aten.binary_cross_entropy.default,
}


# Fused kernels whose workspaces cannot be seen from outside, and one whose results are larger than torch reports.
_OUT_OF_SIGHT: Final = {"embedding_bag"} | {
    kind + cell for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")
}
# What autocast computes in float32 on CUDA but not on a CPU, by the names of functions and tensor methods.
# fmt: off
_FLOAT32: Final = {
    "layer_norm", "native_layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "softmin", "logsumexp",
    "softplus", "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div",
    "binary_cross_entropy_with_logits", "cosine_similarity", "exp", "expm1", "log", "log1p", "log2", "log10",
    "pow", "__pow__", "rsqrt", "reciprocal", "norm", "cumsum", "cumprod", "prod", "cdist",
}
# fmt: on


class DeviceFunctions(TorchFunctionMode):
    """For tensors without data: map device names, emulate what only CUDA keeps, copy, raise for untracked kernels."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._cuda = device == "cuda"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _OUT_OF_SIGHT:
            raise NotImplementedError(f"The memory of {name} cannot be predicted: its kernels use untracked memory.")
        if func is Tensor.__deepcopy__ and args[0].is_leaf:
            return _deepcopy(*args)
        if not self._cuda:
            return func(*args, **kwargs)
        if name in ("cuda", "pin_memory"):
            return args[0]
        if func is torch.device and _host(args[0], "device") == "cpu":
            return torch.device("cpu")  # without the number of a device
        place = "device" if name == "to" else ""  # x.to(0)
        args, kwargs = [_host(x, place) for x in args], {key: _host(x, key) for key, x in kwargs.items()}
        if name in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = [x.float() if isinstance(x, Tensor) and x.dtype in LOW else x for x in args]
        if func in (functional.rms_norm, torch.rms_norm):
            return rms_norm(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return attention(*args, **kwargs)
        if func is torch.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


_DROPOUT: Final = functional.dropout


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **named: Any) -> Tensor:
    """Keep a mask of bytes, as on CUDA; a CPU keeps one in the input's dtype."""
    if named.get("train", training) and 0 < p < 1 and not inplace:
        kept: Tensor = torch.native_dropout(input, p, True)[0]
        return kept
    return _DROPOUT(input, p, named.get("train", training), inplace)


def _deepcopy(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
    """Copy a leaf as `copy.deepcopy` does; torch's own also copies the mode of a tensor without data."""
    if id(tensor) not in memo:
        new = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, tensor.requires_grad)  # without its gradient
        elif tensor.grad is not None:
            new.grad = copy.deepcopy(tensor.grad, memo)
        memo[id(tensor)] = new
    return memo[id(tensor)]


def _host(value: Any, key: str = "") -> Any:
    named = (isinstance(value, str) and value.partition(":")[0] == "cuda") or (key == "device" and type(value) is int)
    return "cpu" if named or (isinstance(value, torch.device) and value.type == "cuda") else value


def followed(built: object) -> list[Any]:
    """Return the objects that measure_memory accepts; others, such as a scaler or a function, are ignored.

    Example:
        >>> followed([torch.zeros(2), {"how many": 3}, len])
        [tensor([0., 0.])]
    """
    if isinstance(built, list | tuple | Mapping):
        items = built.values() if isinstance(built, Mapping) else built
        return [found for item in items for found in followed(item)]
    return [built] if isinstance(built, Tensor | nn.Module) else [*optimizers_in(built)]


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Return known or guessed values when a value is read, raise where neither is possible, and record host storages.

    Attributes:
        elsewhere: the storages that are not on the device.
        workspaces: the workspaces of libraries on the device.
        allocator: on CUDA, a model of the caching allocator for all tracked storages.
        guesses: how often a value was guessed, by the line that read it and the guess.
    """

    def __init__(self, device: str, fakes: FakeTensorMode, tick: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device, self._fakes, self._tick, self._stepping = device, fakes, tick, False
        self.elsewhere = weakref.WeakSet[torch.UntypedStorage]()
        self.workspaces, self._corrected = Workspaces(device), corrected(device)
        self.allocator = CachingAllocator() if device == "cuda" else None
        self.guesses: Counter[tuple[str, str]] = Counter()
        self._values = Values()
        self._overflows = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._tick()
        kwargs = kwargs or {}
        self.workspaces.made_for(func)  # also in `build`, where nothing is tracked yet
        if func is _aten._local_scalar_dense.default and (value := self._values.number(args[0])) is not None:
            return value
        try:
            result = self._corrected.get(func, func)(*args, **kwargs)
        except fake_tensor.DataDependentOutputException as error:
            return self._read(func, args, kwargs, error)
        except fake_tensor.DynamicOutputShapeException as error:
            result = self._sized(func, args, kwargs, error)
        except fake_tensor.UnsupportedOperatorException as error:
            raise NotImplementedError(f"torch cannot infer the result shapes of {func} without data.") from error
        except AssertionError as error:
            foreign = (x for x in followed([args, kwargs]) if getattr(x, "fake_mode", None) is not self._fakes)
            real = next(foreign, None)
            if real is None:
                raise
            shape = f"A tensor of shape {tuple(real.shape)} created outside of build was used in {func}"
            raise ValueError(f"{shape}: create the model, the optimizer and the data inside build.") from error
        if func is _aten.lift_fresh.default and (
            # Created in step() without a device: a step counter, which stays on the host with CUDA.
            self._stepping if self._device == "cuda" else not args[0].untyped_storage().resizable()  # NumPy's
        ):
            self.elsewhere.add(result.untyped_storage())
        elif func in _KEEP_ALL and not result.dim():
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
            result = result.new_empty(shape).resize_(())
        elif func is _aten._amp_foreach_non_finite_check_and_unscale_.default:
            self._overflows.add(args[1].untyped_storage())
        self._values.note(func, args, kwargs, result)
        return result

    def _read(self, func: Any, args: Any, kwargs: Any, error: Exception) -> Any:
        """Return the value that is read: the true value if it is known, otherwise a guess, which is recorded."""
        if func is not _aten._local_scalar_dense.default:
            known = self._values.shaped(func, args, kwargs)
            if known is None:
                raise NotImplementedError(f"{func} depends on values, which a prediction does not have.") from error
            return known
        if args[0].untyped_storage() in self._overflows:
            return 0.0  # so that a GradScaler steps
        answer = self._values.guess(args[0])
        # Neither an optimizer's step counter nor an initialization changes a shape.
        if not self._stepping and (line := _line_that_reads()):
            self.guesses[line, f"{str(args[0].dtype)[6:]} taken as {answer}"] += 1
        return answer

    def _sized(self, func: Any, args: Any, kwargs: Any, error: Exception) -> Any:
        """Return a result whose size depends on values, if these are known."""
        if func is _aten.index.Tensor and (places := self._values.places(args[1])) is not None:
            made = (x if x is None or hasattr(x, "fake_mode") else self._fakes.from_tensor(x) for x in places)
            return func(args[0], list(made))
        known = self._values.shaped(func, args, kwargs)
        if known is None:
            raise NotImplementedError(_unsized(str(func))) from error
        make = self._fakes.from_tensor
        return make(known) if isinstance(known, Tensor) else type(known)(make(each) for each in known)

    def before_step(self, optimizer: torch.optim.Optimizer, *call: object) -> None:
        """Let an optimizer use CUDA's default implementation; raise for an unsupported optimizer."""
        if isinstance(optimizer, torch.optim.LBFGS):
            raise NotImplementedError("LBFGS cannot be predicted: its evaluations and its state depend on values.")
        refuse_quantized(optimizer)
        self._stepping = True
        for group in optimizer.param_groups if self._device == "cuda" else ():
            alone = group.get("differentiable") or (isinstance(group["lr"], Tensor) and not group.get("capturable"))
            if "foreach" in group and group["foreach"] is group.get("fused") is None and not alone:
                group["foreach"] = not isinstance(optimizer, torch.optim.Adafactor)  # as the default is on CUDA

    def after_step(self, optimizer: torch.optim.Optimizer, *call: object) -> None:
        """Record that the step is over."""
        self._stepping = False


@contextmanager
def _replaced(device: str) -> Iterator[None]:
    """Patch what neither mode sees: autocast, GradScaler, Module.to, backward and compilation."""
    autocast, scaler = torch.autocast.__init__, torch.amp.GradScaler.__init__
    engine = vars(torch.autograd)["_engine_run_backward"]

    def autocast_on_host(self: Any, device_type: str, dtype: Any = None, *rest: Any, **options: Any) -> None:
        if device == "cuda" and device_type in ("cpu", "cuda"):  # here a tensor's device is "cpu"
            device_type, dtype = "cpu", dtype or torch.get_autocast_dtype("cuda")
        autocast(self, device_type, dtype, *rest, **options)

    def scaler_on_host(self: Any, device_type: str = "cuda", *rest: Any, **options: Any) -> None:
        scaler(self, "cpu" if device == "cuda" else device_type, *rest, **options)

    def apply(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # torch's own replaces parameters, which fails for those without data.
        for module in self.modules() if recurse else [self]:
            for parameter in module._parameters.values():
                for old in () if parameter is None else (parameter, parameter.grad):
                    if old is not None and (new := change(old.detach())).dtype != old.dtype:
                        old.data = new
            module._buffers.update({name: x if x is None else change(x) for name, x in module._buffers.items()})
        return self

    def run_backward(*args: Any, **options: Any) -> Any:
        # A checkpoint runs again in backward, where the mode is not active.
        with DeviceFunctions(device) if device == "cuda" else nullcontext():
            return engine(*args, **options)

    def compiled(*args: Any, **options: Any) -> None:
        raise NotImplementedError("Compiled code cannot be predicted: leave torch.compile out of build and step.")

    def replicated(*args: Any, **options: Any) -> None:
        given = "DistributedDataParallel cannot be predicted, since its buckets cannot be tracked"
        raise NotImplementedError(f"{given}: predict the wrapped model, and add the bytes of the gradients once.")

    places: list[tuple[Any, str, Any]] = [
        (torch.autocast, "__init__", autocast_on_host),
        (torch.amp.GradScaler, "__init__", scaler_on_host),
        (nn.Module, "_apply", apply),  # private: used by to(), cuda(), half() ...
        (nn.Module, "compile", compiled),
        (nn.parallel.DistributedDataParallel, "__init__", replicated),
        (torch, "compile", compiled),
        (torch.autograd, "_engine_run_backward", run_backward),  # private: used by both backward() and grad()
        (torch._subclasses, "FakeTensor", _NotFake),  # the name that libraries use; torch itself uses another
    ]
    if device == "cuda":  # by name too: torch's own functions call them where the mode is not active
        places += [(functional, "dropout", _dropout), (functional, "scaled_dot_product_attention", attention)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, new in places:
            setattr(owner, name, new)
        with torch.compiler.set_stance("fail_on_recompile"):  # for code compiled before
            yield
    except RuntimeError as error:
        if "fail_on_recompile" in str(error):
            compiled()
        raise
    finally:
        for owner, name, old in before:
            setattr(owner, name, old)


class _Asked(type):
    """Let isinstance return False outside of torch, where libraries treat tensors without data differently."""

    def __instancecheck__(cls, thing: object) -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return bool(caller.partition(".")[0] == "torch" and isinstance(thing, FakeTensor))


class _NotFake(metaclass=_Asked):
    pass


@contextmanager
def without_data(device: str, tick: Callable[[], None]) -> Iterator[Operations]:
    """Run the block on tensors without data, with the operations of `device`; yield the `Operations`.

    Example:
        >>> with without_data("cpu", lambda: None):
        ...     torch.zeros(10**12).shape
        torch.Size([1000000000000])
    """
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.random.fork_rng(devices=[]))  # a seed set in `build` has no effect afterwards
        stack.enter_context(_replaced(device))
        fakes = stack.enter_context(FakeTensorMode())
        stack.enter_context(DeviceFunctions(device))
        operations = stack.enter_context(Operations(device, fakes, tick))
        stack.callback(register_optimizer_step_pre_hook(operations.before_step).remove)
        stack.callback(register_optimizer_step_post_hook(operations.after_step).remove)
        yield operations
