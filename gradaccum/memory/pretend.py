"""Tensors without data: the same code runs on shapes alone, and holds what it would hold on the device."""

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

# Private, but the only tensors that have a device, a storage of the right size and a graph, and no memory.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

# Private: the one as in follow.py; the other so that a measure_memory around a prediction counts none of it.
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gradaccum.memory.allocator import CachingAllocator
from gradaccum.memory.attention import attention
from gradaccum.memory.libraries import CORRECTED, Workspaces, refuse_quantized
from gradaccum.memory.measure import optimizers_in
from gradaccum.memory.values import Values

_aten = torch.ops.aten
# On a CPU and on CUDA these reduce into the memory of the loss of each element, and keep all of it.
_KEEP_ALL: Final = {
    _aten.mse_loss.default,
    _aten.smooth_l1_loss.default,
    _aten.soft_margin_loss.default,
    _aten.binary_cross_entropy.default,
}


# Fused kernels with workspaces that nothing outside of them can see, and one whose results are larger than torch says.
_OUT_OF_SIGHT: Final = {"embedding_bag"} | {
    kind + cell for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")
}
# What autocast computes in float32 on CUDA and not on a CPU; the names of functions, tensor methods too.
# fmt: off
_FLOAT32: Final = {
    "layer_norm", "native_layer_norm", "group_norm", "softmax", "log_softmax", "softmin", "logsumexp",
    "softplus", "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div",
    "binary_cross_entropy_with_logits", "cosine_similarity", "exp", "expm1", "log", "log1p", "log2", "log10",
    "pow", "__pow__", "rsqrt", "reciprocal", "norm", "cumsum", "cumprod", "prod", "cdist",
}
# fmt: on


class DeviceFunctions(TorchFunctionMode):
    """For tensors without data: map the names of devices and what is kept on CUDA alone, copy, refuse the unseen."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._cuda = device == "cuda"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _OUT_OF_SIGHT:
            raise NotImplementedError(f"The memory of {name} is not predicted: its kernels hold some out of sight.")
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
            low = torch.bfloat16, torch.float16
            args = [x.float() if isinstance(x, Tensor) and x.dtype in low else x for x in args]
        elif name == "scaled_dot_product_attention":
            return attention(*args, **kwargs)
        elif func is torch.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


_DROPOUT: Final = functional.dropout


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **named: Any) -> Tensor:
    """Keep a mask of bytes, as on CUDA, where a CPU keeps one in the input's dtype."""
    if named.get("train", training) and 0 < p < 1 and not inplace:
        kept: Tensor = torch.native_dropout(input, p, True)[0]
        return kept
    return _DROPOUT(input, p, named.get("train", training), inplace)


def _deepcopy(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
    """Copy a leaf as `copy.deepcopy` does; torch's own would copy the mode of a tensor without data too."""
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
    """Pick what measure_memory takes; a scaler or a function is passed over.

    Example:
        >>> followed([torch.zeros(2), {"how many": 3}, len])
        [tensor([0., 0.])]
    """
    if isinstance(built, list | tuple | Mapping):
        items = built.values() if isinstance(built, Mapping) else built
        return [found for item in items for found in followed(item)]
    return [built] if isinstance(built, Tensor | nn.Module) else [*optimizers_in(built)]


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answer reads of values, refuse what has no answer, and note what is not on the device.

    Attributes:
        elsewhere: the storages that are not on the device.
        workspaces: what libraries hold there.
        allocator: what it reserves for all that is followed, on CUDA.
        guesses: how often a value was guessed, by the line that read it and what it was taken as.
    """

    def __init__(self, device: str, fakes: FakeTensorMode, tick: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device, self._fakes, self._tick, self._stepping = device, fakes, tick, False
        self.elsewhere = weakref.WeakSet[torch.UntypedStorage]()
        self.workspaces = Workspaces(device)
        self.allocator = CachingAllocator() if device == "cuda" else None
        self.guesses: Counter[tuple[str, str]] = Counter()
        self._values = Values()
        self._overflows = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._tick()
        kwargs = kwargs or {}
        self.workspaces.made_for(func)  # in `build`, where nothing is followed yet
        if func is _aten._local_scalar_dense.default and (value := self._values.number(args[0])) is not None:
            return value
        try:
            result = CORRECTED.get(func, func)(*args, **kwargs)
        except DataDependentOutputException as error:
            return self._read(func, args, kwargs, error)
        except DynamicOutputShapeException as error:
            result = self._sized(func, args, kwargs, error)
        except UnsupportedOperatorException as error:
            raise NotImplementedError(f"torch does not know the shapes that {func} makes.") from error
        except AssertionError as error:
            foreign = (x for x in followed([args, kwargs]) if getattr(x, "fake_mode", None) is not self._fakes)
            real = next(foreign, None)
            if real is None:
                raise
            shape = f"A tensor of shape {tuple(real.shape)} made outside of build was used in {func}"
            raise ValueError(f"{shape}: make the model, the optimizer and the data inside build.") from error
        if func is _aten.lift_fresh.default and (
            # Made in step() without a device: a step counter, which stays on the host beside CUDA.
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
        """Answer what reads a value: truly where it is known, else by a guess that is noted."""
        if func is not _aten._local_scalar_dense.default:
            known = self._values.shaped(func, args, kwargs)
            if known is None:
                raise NotImplementedError(f"{func} depends on values, which a prediction has none of.") from error
            return known
        if args[0].untyped_storage() in self._overflows:
            return 0.0  # so that a GradScaler steps
        kind = args[0].dtype
        answer: Any = kind != torch.bool and (1.0 if kind.is_floating_point else 1)
        # An optimizer's step counter changes no shape, nor does what an initialization draws.
        if not self._stepping and (line := _line_that_reads()):
            self.guesses[line, f"{str(kind)[6:]} taken as {answer}"] += 1
        return answer

    def _sized(self, func: Any, args: Any, kwargs: Any, error: Exception) -> Any:
        """Make a result whose size depends on values, where these are known."""
        if func is _aten.index.Tensor and (places := self._values.places(args[1])) is not None:
            made = (x if x is None or hasattr(x, "fake_mode") else self._fakes.from_tensor(x) for x in places)
            return func(args[0], list(made))
        known = self._values.shaped(func, args, kwargs)
        if known is None:
            given = f"{func} makes a tensor whose size depends on values, which a prediction has none of"
            raise NotImplementedError(f"{given}: use torch.where or a mask that is multiplied.") from error
        make = self._fakes.from_tensor
        return make(known) if isinstance(known, Tensor) else type(known)(make(each) for each in known)

    def before_step(self, optimizer: torch.optim.Optimizer, *call: object) -> None:
        """Let an optimizer take the path that is CUDA's default, or refuse it."""
        if isinstance(optimizer, torch.optim.LBFGS):
            raise NotImplementedError(
                "LBFGS is not predicted: how often it evaluates and what it keeps is up to values."
            )
        refuse_quantized(optimizer)
        self._stepping = True
        for group in optimizer.param_groups if self._device == "cuda" else ():
            alone = group.get("differentiable") or (isinstance(group["lr"], Tensor) and not group.get("capturable"))
            if "foreach" in group and group["foreach"] is group.get("fused") is None and not alone:
                group["foreach"] = not isinstance(optimizer, torch.optim.Adafactor)  # as the default is on CUDA

    def after_step(self, optimizer: torch.optim.Optimizer, *call: object) -> None:
        """Note that the step is over."""
        self._stepping = False


@contextmanager
def _replaced(device: str) -> Iterator[None]:
    """Patch what neither mode sees: autocast, GradScaler, Module.to, backward, and compiling."""
    autocast, scaler = torch.autocast.__init__, torch.amp.GradScaler.__init__
    engine = vars(torch.autograd)["_engine_run_backward"]

    def autocast_on_host(self: Any, device_type: str, dtype: Any = None, *rest: Any, **options: Any) -> None:
        if device == "cuda" and device_type in ("cpu", "cuda"):  # "cpu" is what a tensor's device says here
            device_type, dtype = "cpu", dtype or torch.get_autocast_dtype("cuda")
        autocast(self, device_type, dtype, *rest, **options)

    def scaler_on_host(self: Any, device_type: str = "cuda", *rest: Any, **options: Any) -> None:
        scaler(self, "cpu" if device == "cuda" else device_type, *rest, **options)

    def apply(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # torch's own swaps parameters for new ones, which fails for those without data.
        for module in self.modules() if recurse else [self]:
            for parameter in module._parameters.values():
                for old in () if parameter is None else (parameter, parameter.grad):
                    if old is not None and (new := change(old.detach())).dtype != old.dtype:
                        old.data = new
            buffers = module._buffers.items()
            module._buffers.update({name: x if x is None else change(x) for name, x in buffers})
        return self

    def run_backward(*args: Any, **options: Any) -> Any:
        # What a checkpoint runs again is run in backward, which hides the mode that it was called under.
        with DeviceFunctions(device) if device == "cuda" else nullcontext():
            return engine(*args, **options)

    def compiled(*args: Any, **options: Any) -> None:
        raise NotImplementedError("Compiled code is not predicted: leave torch.compile out of build and step.")

    def replicated(*args: Any, **options: Any) -> None:
        raise NotImplementedError(
            "DistributedDataParallel is not predicted, since its buckets are made out of sight: predict the model that "
            "it wraps, and add the bytes of the gradients once."
        )

    places: list[tuple[Any, str, Any]] = [
        (torch.autocast, "__init__", autocast_on_host),
        (torch.amp.GradScaler, "__init__", scaler_on_host),
        (nn.Module, "_apply", apply),  # private: all of to(), cuda(), half() ... are made of it
        (nn.Module, "compile", compiled),
        (nn.parallel.DistributedDataParallel, "__init__", replicated),
        (torch, "compile", compiled),
        (torch.autograd, "_engine_run_backward", run_backward),  # private: both backward() and grad() come to it
        (torch._subclasses, "FakeTensor", _NotFake),  # what libraries ask for; torch itself has it from elsewhere
    ]
    if device == "cuda":  # by name too: torch's own functions call them where the mode does not see it
        places += [(functional, "dropout", _dropout), (functional, "scaled_dot_product_attention", attention)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, new in places:
            setattr(owner, name, new)
        with torch.compiler.set_stance("fail_on_recompile"):  # for what was compiled before
            yield
    except RuntimeError as error:
        if "fail_on_recompile" in str(error):
            compiled()
        raise
    finally:
        for owner, name, old in before:
            setattr(owner, name, old)


def _line_that_reads() -> str:
    """Return the file and line that asked for a value, the innermost that is neither torch's nor this package's.

    Nothing, where it was `torch.nn.init`.
    """
    frame = sys._getframe(1)
    while frame.f_back:
        if frame.f_globals.get("__name__") == "torch.nn.init":
            return ""
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "gradaccum"):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class _Asked(type):
    """Libraries ask whether a tensor is without data, and then do what a real run does not: their answer is no."""

    def __instancecheck__(cls, thing: object) -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return bool(caller.partition(".")[0] == "torch" and isinstance(thing, FakeTensor))


class _NotFake(metaclass=_Asked):
    pass


@contextmanager
def without_data(device: str, tick: Callable[[], None]) -> Iterator[Operations]:
    """Let the block's tensors have no data, and operations do what they do on `device`; give what is noted of them.

    Example:
        >>> with without_data("cpu", lambda: None):
        ...     torch.zeros(10**12).shape
        torch.Size([1000000000000])
    """
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.random.fork_rng(devices=[]))  # a seed set in `build` is not left behind
        stack.enter_context(_replaced(device))
        fakes = stack.enter_context(FakeTensorMode())
        stack.enter_context(DeviceFunctions(device))
        operations = stack.enter_context(Operations(device, fakes, tick))
        stack.callback(register_optimizer_step_pre_hook(operations.before_step).remove)
        stack.callback(register_optimizer_step_post_hook(operations.after_step).remove)
        yield operations
