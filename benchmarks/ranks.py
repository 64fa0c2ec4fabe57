"""Two ranks: the time, the gradient's error and what is sent, beside a hand-written loop and other libraries.

`run` starts two processes that meet in a file and talk over the loopback; each of them runs `main`.
"""

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from contenders import Still, Task, installed, names, quiet, table, token_task
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum import accumulate, full_batch_gradient, relative_error
from gradaccum.memory import measure_memory
from gradaccum.models import GPT

K, REACH = 4, 1.05
HAND, AGAIN = "by hand: counts summed, sent once", "by hand, again"
LAST, EACH = "gradaccum.accumulate", 'gradaccum.accumulate, sync="each"'
ACCELERATE, GUIDE = "accelerate, `accumulate()`", "accelerate, the guide's token loop"
FABRIC = "Lightning Fabric, `no_backward_sync`, loss / k"
SIZES = {"tiny GPT": {"width": 32, "layers": 1, "heads": 2}, "small GPT": {"width": 128, "layers": 4, "heads": 4}}


def window_of(rank: int) -> tuple[int, list[Any]]:
    """Give the vocabulary's size and four micro-batches, the longest last; rank 0 has the long lines."""
    characters, lines = names()
    chosen = sorted(lines[: 2 * 4 * K], key=len, reverse=True)[rank * 4 * K : (rank + 1) * 4 * K]
    chosen.reverse()  # a window's peak is then in a pass that has gradients of others beside it
    return len(characters), [characters.batch(chosen[4 * index : 4 * index + 4]) for index in range(K)]


def by_hand(model: Any, task: Task, window: list[Any]) -> None:
    total = torch.tensor([float(sum(task.count(micro_batch) for micro_batch in window))])
    torch.distributed.all_reduce(total)
    scale, logged = torch.distributed.get_world_size() / total.item(), torch.zeros(())
    for index, micro_batch in enumerate(window):
        last = index == len(window) - 1
        if not isinstance(model, DistributedDataParallel):
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            loss = task.loss_sum(model, micro_batch) * scale
            loss.backward()
            logged += loss.detach()
    torch.distributed.all_reduce(logged)


def ours(sync: str, model: Any, task: Task, window: list[Any]) -> None:
    accumulate(model, window, partial(task.loss_sum, model), task.count, sync=sync)


def of_accelerate(task: Task, guide: bool) -> Callable[..., None]:
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=K, cpu=True)
    model = accelerator.prepare(task.model)

    def documented(_: Any, task: Task, window: list[Any]) -> None:
        for micro_batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(task.loss_mean(model, micro_batch))

    def with_tokens(_: Any, task: Task, window: list[Any]) -> None:
        items = accelerator.gather(torch.tensor(float(sum(map(task.count, window))))).sum().item()
        for index, micro_batch in enumerate(window):
            with accelerator.no_sync(model) if index < len(window) - 1 else nullcontext():
                loss = task.loss_sum(model, micro_batch)
                accelerator.backward(loss * K * accelerator.num_processes / items)

    return with_tokens if guide else documented


def of_fabric(task: Task) -> Callable[..., None]:
    from lightning.fabric import Fabric

    engine = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    engine.launch()
    model, _ = engine.setup(task.model, Still(task.model.parameters()))

    def loop(_: Any, task: Task, window: list[Any]) -> None:
        for index, micro_batch in enumerate(window):
            with engine.no_backward_sync(model, enabled=index < len(window) - 1):
                engine.backward(task.loss_mean(model, micro_batch) / K)

    return loop


class Sent(TorchDispatchMode):
    """Count collectives, and the bytes that this rank gives to them."""

    calls = nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            given = args[1] if "scatter" in func._opname or "gather" in func._opname else args[0]
            tensors = given if isinstance(given, list) else [given]
            self.calls += 1
            self.nbytes += sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))
        return func(*args, **(kwargs or {}))


def main(rank: int, rounds: int) -> None:
    """Print a JSON line a loop on rank 0: engine, model, parameters, name, seconds, error, collectives, bytes, peak."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    vocabulary, window = window_of(rank)
    for (title, options), engine in ((size, engine) for size in SIZES.items() for engine in ("DDP", "fully_shard")):

        def task() -> Task:
            torch.manual_seed(0)
            return token_task(GPT(vocabulary, **options))  # noqa: B023

        right = whole(task(), [micro_batch for each in (0, 1) for micro_batch in window_of(each)[1]])
        loops: dict[str, tuple[Task, nn.Module, Callable[..., None]]] = {}
        for name in (HAND, AGAIN, LAST, EACH, *((ACCELERATE, GUIDE, FABRIC) if engine == "DDP" else ())):
            if not installed(name):
                continue
            own = task()
            if engine == "DDP":
                model: Any = own.model if name in (ACCELERATE, GUIDE, FABRIC) else DistributedDataParallel(own.model)
            else:
                for block in own.model.blocks:
                    fully_shard(block, mesh=mesh)
                model = fully_shard(own.model, mesh=mesh)
            if name in (ACCELERATE, GUIDE):
                loop = of_accelerate(own, name == GUIDE)
            else:
                ours_too = {LAST: partial(ours, "last"), EACH: partial(ours, "each")}
                loop = of_fabric(own) if name == FABRIC else ours_too.get(name, by_hand)
            loops[name] = own, model, loop
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        order, shuffle = list(loops), random.Random(0).shuffle
        gc.disable()
        for _ in range(2 + (rounds if title == "tiny GPT" else max(rounds // 3, 1))):  # the first two are not kept
            shuffle(order)
            for name in order:
                own, model, loop = loops[name]
                own.model.zero_grad()
                torch.distributed.barrier()
                begin = time.perf_counter()
                loop(model, own, window)
                seconds[name].append(time.perf_counter() - begin)
        gc.enable()
        for name, (own, model, loop) in loops.items():
            found = [each.grad for each in own.model.parameters()]
            error = relative_error([each.full_tensor() if engine != "DDP" else each for each in found], right)
            own.model.zero_grad()
            with Sent() as sent:
                loop(model, own, window)
            own.model.zero_grad()
            with measure_memory(own.model) as memory:
                loop(model, own, window)
            row = [engine, title, sum(each.numel() for each in right), name, seconds[name][2:], error]
            if rank == 0:  # a pipe that nobody reads fills up, and a rank that waits for it stops the other one
                print(json.dumps([*row, sent.calls, sent.nbytes, memory.peak_bytes]), flush=True)
        torch.distributed.barrier()


def whole(task: Task, micro_batches: list[Any]) -> list[torch.Tensor | None]:
    """Give the gradient of the mean over the targets of all ranks, in one process."""
    total = sum(int(task.count(micro_batch)) for micro_batch in micro_batches)
    return full_batch_gradient(
        task.model, micro_batches, lambda each: sum(task.loss_sum(task.model, one) for one in each) / total
    )


def run(quick: bool) -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, str(Path(folder) / "store"), "1" if quick else "200"]
        # What torchrun sets, by which the libraries know that two processes run.
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "ranks", "GROUP_RANK": "0"}
        shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        processes = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]
        try:
            outputs = [process.communicate(timeout=1500)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    found = [json.loads(line) for line in outputs[0].splitlines() if line.startswith("[")]
    if not found or any(process.returncode for process in processes):
        raise SystemExit("A rank failed, as told above.")
    rows, reached = [], []
    for engine, title, size, name, seconds, error, calls, nbytes, peak in found:
        hand = next(row[4] for row in found if (row[0], row[1], row[3]) == (engine, title, HAND))
        ratios = [one / other for one, other in zip(seconds, hand, strict=True)]
        low, ratio, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        cells = [f"{title} ({size:,} parameters)", engine, name, f"{median(seconds) * 1e3:.1f}", f"{ratio:.3f}"]
        rows.append([*cells, f"{low:.3f} to {high:.3f}", f"{error:.1e}", calls, f"{nbytes:,}", f"{peak:,}"])
        if name == LAST:
            reached.append(f"{engine}, {title}: {ratio:.3f}, {'reached' if ratio <= REACH else 'MISSED'}")
    head = ["model", "engine", "loop", "ms per window", "ratio", "middle half", "gradient's error", "collectives"]
    head += ["bytes given to them", "peak bytes, without DDP's buckets"]
    reach = f"Reach: `accumulate` at most {REACH} times the hand-written loop. " + "; ".join(reached) + "."
    return "\n".join([*table(head, rows), reach])


if __name__ == "__main__":
    quiet()
    its = int(os.environ["RANK"])
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(sys.argv[1], 2), rank=its, world_size=2
    )
    main(its, int(sys.argv[2]))
    torch.distributed.destroy_process_group()
