"""Models that accelerate and Lightning Fabric have prepared, on two ranks: `python peers_job.py rank 2 store two`."""

import copy
import os
import sys
from functools import partial

import pytest
import torch
from ranks_job import START, Job, X, Y, full, main, whole
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.functional import mse_loss

from gradaccum import accumulate, relative_error

SINGLE = nn.Sequential(copy.deepcopy(START).float())  # accelerate wants no parameter at the root


def squares(model, rows):
    return mse_loss(model(X[list(rows)].float()).float(), Y[list(rows)].float(), reduction="sum")


def mixed_squares(model, rows):
    with torch.autocast("cpu", torch.bfloat16):
        return squares(model, rows)


class Prepared(Job):
    def near(self, model, loss_sum=squares, limit=1e-6):
        right, mean = whole(SINGLE, self.rows, squares)
        for sync in ("last", "each"):
            result = accumulate(model, self.mine, lambda rows: loss_sum(model, rows), len, sync=sync)
            assert relative_error(full(model), right) < limit
            assert result.loss.item() == pytest.approx(mean, rel=limit)
            model.zero_grad()

    def two_accelerate(self):
        from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState, PartialState

        for precision, limit in (("no", 1e-6), ("bf16", 2e-2)):
            for shards in (False, True):
                AcceleratorState._reset_state(reset_partial_state=True)
                accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=4)
                if shards:  # on a CPU accelerate itself would leave the plugin out, and take DDP
                    plugin = FullyShardedDataParallelPlugin(
                        fsdp_version=2,
                        auto_wrap_policy=partial(transformer_auto_wrap_policy, transformer_layer_cls={nn.Linear}),
                        cpu_ram_efficient_loading=False,
                    )
                    if precision != "no":
                        plugin.set_mixed_precision(precision)
                    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
                    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
                own = copy.deepcopy(SINGLE)
                model, optimizer = accelerator.prepare(own, torch.optim.SGD(own.parameters(), 1.0))
                assert ("FSDP" if shards else "DistributedData") in type(model).__name__
                self.near(model, limit=limit)
                with accelerator.accumulate(model):
                    self.refused(model, RuntimeError, "set_requires_gradient_sync" if shards else "inside no_sync()")
                before = [each.detach().clone() for each in model.parameters()]
                accumulate(model, self.mine, lambda rows, model=model: squares(model, rows), len)
                accelerator.clip_grad_norm_(model.parameters(), 1e9)
                expected = [old - each.grad for old, each in zip(before, model.parameters(), strict=True)]
                optimizer.optimizer.step()
                assert all(map(torch.equal, expected, model.parameters()))

    def two_lightning(self):
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import ModelParallelStrategy

        def shard(model, mesh):
            for block in model[0].blocks:
                fully_shard(block, mesh=mesh["data_parallel"])
            return fully_shard(model, mesh=mesh["data_parallel"])

        for kind in ("ddp", "fully_shard"):
            for precision, limit in (("32-true", 1e-6), ("bf16-true", 2e-2), ("bf16-mixed", None)):
                strategy = "ddp" if kind == "ddp" else ModelParallelStrategy(shard, 2, 1)
                fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision=precision)
                fabric.launch()
                model = fabric.setup(copy.deepcopy(SINGLE))
                if limit:
                    self.near(model, limit=limit)
                else:  # its own sentence
                    with pytest.raises(RuntimeError, match=r"call `fabric\.backward"):
                        self.near(model)
                if precision == "32-true":
                    self.near(model, mixed_squares, 2e-2)


if __name__ == "__main__":
    # What torchrun sets, by which the libraries know how many processes there are; they take the group that is there.
    rank = sys.argv[1]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "peers", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    main(Prepared, int(rank), int(sys.argv[2]), *sys.argv[3:])
