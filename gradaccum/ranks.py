"""How a data-parallel engine averages gradients: over which ranks, with which divisor, and in which pass it sends them.

The engines are torch's own: DistributedDataParallel (DDP) and `fully_shard` (FSDP2; HSDP if it also replicates).
Every private name of theirs that `accumulate` needs is used in this file, with the reason. The communication between
the ranks is in `collective`.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from gradaccum import refusals

Group: TypeAlias = Any  # torch.distributed.ProcessGroup, which a torch without distributed lacks
# Files of torch with communication hooks that do not send, average over other ranks, or step.
OTHER_HOOKS: Final = {"debugging_hooks", "post_localSGD_hook", "optimizer_overlap_hooks", "ddp_zero_hook"}
_AVERAGED: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()  # ids of parameters


class Replicated:
    """A DistributedDataParallel."""

    lockstep = False  # only a pass that sends needs the other ranks

    def __init__(self, module: nn.parallel.DistributedDataParallel, engines: Sequence[nn.Module]) -> None:
        self.module, self._engines, self.groups = module, engines, (module.process_group,)
        self.divisor = float(module.process_group.size())
        self.device, self._ran = module.device, False

    @property
    def sends_each(self) -> bool:
        """Return whether every pass of this window must send gradients."""
        # Private: a static graph is recorded in the first pass that sends; torch asserts that no pass ran before it.
        return self.module.static_graph and not self.module._static_graph_delay_allreduce_enqueued

    def refuse(self) -> set[int]:
        """Raise for what would be silently wrong; return the ids of the parameters that are averaged."""
        module = self.module
        if not module.require_backward_grad_sync:
            raise RuntimeError("accumulate was called inside no_sync(): call it outside, it synchronizes by itself.")
        # Private: each changes the divisor, or when it is applied.
        others: dict[str, Any] = {"join()": module._join_config.enable}
        others["delay_all_reduce_named_params"] = module._delay_all_reduce_params
        for hook, _ in module._comm_hooks:  # a wrapper such as fp16_compress_wrapper has another hook in its closure
            held = (hook, *(cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()))
            files = {str(getattr(each, "__module__", "")).rpartition(".")[2] for each in held}
            others[f"the communication hook {getattr(hook, '__name__', hook)}"] = files & OTHER_HOOKS
        if what := next((name for name, there in others.items() if there), None):
            raise NotImplementedError(f"DistributedDataParallel with {what} is not supported: leave it out.")
        inside = engines_in([module.module]) if len(self._engines) > 1 else []
        if inside:
            raise NotImplementedError(
                f"DistributedDataParallel contains {type(inside[0]).__name__}, which averages too: use one of them."
            )
        if module not in _AVERAGED:  # private, but only the reducer knows what was trainable when it was created
            try:
                buckets = module.reducer._get_zeros_like_grad_buckets()  # as large as the gradient, once per model
                _AVERAGED[module] = {id(each) for bucket in buckets for each in bucket.parameters()}
            except RuntimeError:  # sparse gradients have no bucket: what is trainable now, then
                _AVERAGED[module] = {id(each) for each in module.parameters() if each.requires_grad}
        frozen = _AVERAGED[module] - {id(each) for each in module.parameters() if each.requires_grad}
        if frozen and not module.find_unused_parameters:
            raise ValueError(
                f"{len(frozen)} parameters were frozen after DistributedDataParallel was created: freeze or unfreeze "
                "parameters before you wrap the model."
            )
        return _AVERAGED[module]

    def begin(self) -> None:
        """Start to watch the forwards of a window."""

        def note(*_: Any) -> None:
            self._ran = True

        self._handle = self.module.register_forward_pre_hook(note)

    @contextmanager
    def passing(self, sends: bool) -> Iterator[None]:
        """Send the gradients of the pass in this block, or keep them."""
        self._ran = False
        if sends:
            yield
        else:
            with self.module.no_sync():  # around the forward too, where DDP decides
                yield

    def ran(self) -> bool:
        """Return whether this pass went through the engine's own forward."""
        return self._ran

    def leaves(self) -> list[Tensor]:
        """Return the tensors that autograd accumulates gradients in."""
        return [each for each in self.module.parameters() if each.requires_grad]

    def end(self) -> None:
        """Leave the engine as it was."""
        self._handle.remove()

    def refuse_unsent(self) -> None:
        """Raise if the window's last pass has not sent everything."""
        try:  # private: torch itself checks in the next forward, after the step
            self.module._check_reducer_finalized()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise RuntimeError(
                "DistributedDataParallel has not averaged all gradients, since some parameters got none in the last "
                "pass: set find_unused_parameters=True, or freeze them before you wrap the model."
            ) from error

    def forget(self) -> None:
        """Leave nothing of an unfinished window behind, but for `.grad`."""


class Sharded:
    """All modules of one `fully_shard` model."""

    lockstep = True  # every pass gathers the parameters
    sends_each = False

    def __init__(self, modules: Sequence[Any]) -> None:
        self.modules = modules
        # Private, here and below: there is no public access to the group, the divisor and the unsent gradients.
        # Only the states, their parameter groups and the parameters of these groups are read.
        self._states = list({id(each): each for each in (one._get_fsdp_state() for one in modules)}.values())
        self._parts = [part for state in self._states for part in state._fsdp_param_groups]
        trained = [part for part in self._parts if any(each.sharded_param.requires_grad for each in part.fsdp_params)]
        self.kinds = {(self._groups(part), self._divisor(part)): part for part in trained}
        (self.groups, self.divisor), part = next(iter(self.kinds.items()))
        self.device = part.device
        inner = set[int]()
        self._outer = []
        for module in modules:  # the outer ones come first
            if id(module) not in inner:
                self._outer.append(module._get_fsdp_state())
                inner.update(map(id, module.modules()))
        self._before: list[int] = []

    @staticmethod
    def _groups(part: Any) -> tuple[Group, ...]:
        names = ("shard_process_group", "replicate_process_group")  # both: HSDP
        return tuple(getattr(part.mesh_info, name) for name in names if hasattr(part.mesh_info, name))

    @classmethod
    def _divisor(cls, part: Any) -> float:
        return float(part.gradient_divide_factor or math.prod(group.size() for group in cls._groups(part)))

    def refuse(self) -> set[int]:
        """Raise for what would be silently wrong; return the ids of the parameters that are averaged."""
        for module in self.modules:
            module.reshard()  # after an evaluation the root has its gathered parameters, not those that train
        if not all(part.reduce_grads and part.all_reduce_grads for part in self._parts):
            raise RuntimeError(
                "Synchronization is off, after set_requires_gradient_sync(False) or set_requires_all_reduce(False): "
                "set it to True before accumulate, which synchronizes by itself."
            )
        if self._hidden():
            raise ValueError(
                "fully_shard has gradients of earlier passes that were not sent: synchronize them and call "
                "optimizer.zero_grad() first, or create the model again."
            )
        if any(part._all_reduce_hook for part in self._parts):
            raise NotImplementedError("fully_shard with a hook of set_all_reduce_hook is not supported: leave it out.")
        if len(self.kinds) > 1:
            raise NotImplementedError(
                "fully_shard averages parts of the model over different groups or with different factors: use one."
            )
        infos = [each._module_info for part in self._parts for each in part.fsdp_params]
        return {id(getattr(info.module, info.param_name)) for info in infos}

    def _hidden(self) -> bool:
        return bool(unsent_in(self.modules))

    def begin(self) -> None:
        """Save what a window changes."""
        self._reshards = [part.reshard_after_backward for part in self._parts]

    def _set(self, sends: bool) -> None:
        for module in self.modules:
            module.set_requires_gradient_sync(sends, recurse=False)
            module.set_is_last_backward(sends)
        for part, reshards in zip(self._parts, self._reshards, strict=True):
            # Parameters that stay gathered after the forward may stay so until the next one.
            part.reshard_after_backward = reshards and (sends or part._reshard_after_forward)

    @contextmanager
    def passing(self, sends: bool) -> Iterator[None]:
        """Send the gradients of the pass in this block, or keep them."""
        self._set(sends)
        self._before = [self._forwards(state) for state in self._outer]
        yield

    @staticmethod
    def _forwards(state: Any) -> int:
        # Private; a hook on the module would not see a method that register_fsdp_forward_method names.
        return len(getattr(state._comm_ctx, "post_forward_order", ()))  # missing before the first forward

    def ran(self) -> bool:
        """Return whether this pass went through the forward of each outermost module."""
        return all(self._forwards(state) > before for state, before in zip(self._outer, self._before, strict=True))

    def leaves(self) -> list[Tensor]:
        """Return what autograd accumulates gradients in: the gathered parameters."""
        found = (getattr(each, "_unsharded_param", None) for part in self._parts for each in part.fsdp_params)
        return [each for each in found if each is not None and each.requires_grad]

    def end(self) -> None:
        """Leave the engine as it was."""
        self._set(True)

    def refuse_unsent(self) -> None:
        """Raise if the window's last pass has not sent everything."""
        if self._hidden():
            raise RuntimeError("fully_shard has not sent all gradients: let the last micro-batch use the whole model.")

    def forget(self) -> None:
        """Leave nothing of an unfinished window behind, but for `.grad`."""
        for state in self._states:
            if state._is_root and hasattr(state, "_reset_iter_state"):  # torch 2.13 has it
                state._reset_iter_state()
        for part in self._parts:  # unsent gradients, which neither zero_grad nor that reset clears
            part._partial_reduce_output = None
            for each in part.fsdp_params:
                each.unsharded_accumulated_grad = None
                if hasattr(each, "_unsharded_param"):
                    each._unsharded_param.grad = None
        for module in self.modules:
            module.reshard()


def engines_in(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return every DistributedDataParallel, FSDP1 and `fully_shard` module, outer modules first."""
    kinds = (nn.parallel.DistributedDataParallel, *_sharding("FSDPModule", "FullyShardedDataParallel"))
    found = [below for module in modules for below in module.modules() if isinstance(below, kinds)]
    return list({id(each): each for each in found}.values())


def sharded_in(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the modules that `fully_shard` was applied to, outer modules first."""
    kinds = _sharding("FSDPModule")  # none: then a window of DistributedDataParallel is spared a walk
    return [each for each in engines_in(modules) if isinstance(each, kinds)] if kinds else []


def _sharding(*names: str) -> tuple[type, ...]:
    sharding = sys.modules.get("torch.distributed.fsdp")  # slow to import, and already imported if a model is sharded
    return tuple(getattr(sharding, name) for name in names) if sharding else ()


def unsent_in(modules: Iterable[Any]) -> list[Tensor]:
    """Return the gradients that `fully_shard` has not sent yet: whole, or with HSDP a shard before its sum."""
    parts = [part for module in modules for part in module._get_fsdp_state()._fsdp_param_groups]
    found = [part._partial_reduce_output for part in parts]
    for each in (each for part in parts for each in part.fsdp_params):
        found += [getattr(getattr(each, "_unsharded_param", None), "grad", None), each.unsharded_accumulated_grad]
    return [gradient for gradient in found if gradient is not None]


def refuse_strangers(loss: Tensor, given: Iterable[Tensor]) -> None:
    """Raise if a backward reaches parameters that are not `given`; a reentrant checkpoint hides its own."""
    known, nodes, seen = set(map(id, given)), [loss.grad_fn], set[Any]()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [below for below, _ in node.next_functions]
        leaf = node.variable if type(node).__name__ == "AccumulateGrad" else None
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            raise ValueError(
                f"The loss trains a parameter of shape {tuple(leaf.shape)} that is in none of the modules passed, so "
                "it would be averaged otherwise or not at all: pass its module to accumulate too, or freeze it."
            )


def members(group: Group) -> list[int] | int:
    """Return what identifies a group: its ranks."""
    try:
        return list(torch.distributed.get_process_group_ranks(group))
    except KeyError:  # a group outside of any job, as ranks in threads have
        return id(group)


def device_of(group: Group) -> torch.device:
    """Return a device that the group can send from, preferably the CPU."""
    kinds = {each.type for each in group._device_types}  # private: there is no public access
    here = None if "cpu" in kinds else torch.accelerator.current_accelerator()
    return here or torch.device("cpu")


def is_predicted(tensor: Tensor) -> bool:
    """Return whether a tensor has no data, so that its values are guesses."""
    return type(tensor).__name__ == "FakeTensor"  # private, so only the name is compared and nothing is imported


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def engines_of(modules: Sequence[nn.Module], *, alone: bool = False) -> list[Replicated | Sharded]:
    """Return the engines among the modules and their submodules; an empty list if one process trains alone.

    Raises:
        NotImplementedError: FSDP1; a module without an engine among several processes, unless `alone`.
    """
    if not torch.distributed.is_available():
        return []
    found = engines_in(modules)
    several = refusals.ranks()
    if not found:
        if several > 1 and not alone:
            raise NotImplementedError(
                f"{several} processes train together and no engine averages this model, so each would count only its "
                "own items: pass the DistributedDataParallel or fully_shard model, not what it wraps, or alone=True "
                "for a model that only this process trains."
            )
        return []
    if any(isinstance(each, _sharding("FullyShardedDataParallel")) for each in found):
        raise NotImplementedError("FullyShardedDataParallel (FSDP1) is not supported: shard with fully_shard (FSDP2).")
    parts: list[Replicated | Sharded] = [
        Replicated(module, found)
        for module in found
        if isinstance(module, nn.parallel.DistributedDataParallel)
        and _trains(module)
        and module.process_group.size() > 1  # a group of 1 averages nothing
    ]
    sharded = [module for module in found if isinstance(module, _sharding("FSDPModule"))]
    try:
        return [*parts, *([Sharded(sharded)] if any(map(_trains, sharded)) else [])]
    except AttributeError as error:
        raise NotImplementedError(
            f"fully_shard in torch {torch.__version__} has other internals than in torch 2.13: use torch 2.13."
        ) from error
