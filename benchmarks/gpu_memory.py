"""Compare predicted memory with what a GPU's own counters say, and write both as JSON; needs torch and gradaccum alone.

python benchmarks/gpu_memory.py --out record.json       on a GPU; meant to take less than 5 minutes
python benchmarks/gpu_memory.py --device cpu            what fits a small machine must be equal to the byte; minutes
python benchmarks/gpu_memory.py --device cpu --quick    seconds, a smoke test
"""

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import gradaccum
from gradaccum.memory import measure_memory, plan_micro_batches, predict_memory
from gradaccum.memory.libraries import WORKSPACE
from gradaccum.models import GPT, embedding_linear

SEED, HALVES = 20, ("calibration", "held-out")  # the prediction may be mended on the first; the claim is the second's
LARGE = 100 * 2**20  # errors are summed up from here
GPTS = {  # vocabulary, context, width, layers, heads
    "small GPT": (4096, 64, 256, 4, 4),
    "GPT-2 small": (50257, 512, 768, 12, 12),
    "GPT-2 medium": (50257, 1024, 1024, 24, 16),
    "GPT-2 large": (50257, 1024, 1280, 36, 20),
    "7 billion": (32000, 512, 4096, 32, 32),  # for memory.py
}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamw for-loop": partial(torch.optim.AdamW, foreach=False),
    "adamw foreach": partial(torch.optim.AdamW, foreach=True),
    "adamw fused": partial(torch.optim.AdamW, fused=True),
}
TIMED = {"embedding_linear": 64, "mlp": 64, "small GPT": 32, "GPT-2 small": 32}  # effective batch
SEARCHES = {  # model, effective batch, optimizer, precision, and bytes, in which no more than half of the batch fits
    "cpu": [
        ("embedding_linear", 100, "sgd", "float32", 12 * 10**6),
        ("small GPT", 20, "adamw", "autocast", 11 * 10**7),
    ],
    "cuda": [
        ("embedding_linear", 10_000, "sgd", "float32", 10**9),
        ("mlp", 10_000, "adam", "float32", 2 * 10**9),
        ("small GPT", 1000, "adamw", "autocast", 2 * 10**9),
        ("GPT-2 small", 32, "adamw", "float32", 8 * 10**9),
        ("GPT-2 small", 50, "adamw fused", "bf16", 8 * 10**9),
    ],
}


class Configuration(NamedTuple):
    model: str
    micro_batch: int
    accumulation_steps: int
    optimizer: str
    precision: str = "float32"  # "bf16": the weights too; "autocast": to bf16
    checkpointing: str = "no"


def grid() -> list[Configuration]:
    """Give all configurations; those of the first three models fit a small machine."""
    loops, low = ("adamw for-loop", "adamw foreach", "adamw fused"), ("bf16", "autocast")
    axes: list[tuple[Any, ...]] = [
        (["embedding_linear"], (64, 512), (1, 4), ("sgd", "momentum", "adam", *loops)),
        (["embedding_linear", "mlp"], (128,), (1, 4), ("adamw",), low),
        (["mlp"], (4, 64), (1, 4), ("sgd", "momentum", "adam", *loops)),
        (["small GPT"], (2, 16), (1, 4), ("sgd", "adam", *loops)),
        (["small GPT"], (16,), (1, 4), ("adamw", "adamw fused"), low),
        (["small GPT"], (16,), (1, 4), ("sgd", "adamw"), ("float32", "autocast"), ("checkpointing",)),
        (["GPT-2 small"], (2, 8), (1, 2), ("sgd", "adam", "adamw for-loop", "adamw fused")),
        (["GPT-2 small"], (8,), (1, 2), ("adamw",), low, ("no", "checkpointing")),
        (["GPT-2 medium"], (8,), (1,), ("adamw",), ("float32", *low)),
        (["GPT-2 large"], (8, 16), (1,), ("adamw",), ("bf16",)),
        (["GPT-2 large"], (8, 32), (1, 2), ("adamw fused",), ("autocast",), ("checkpointing",)),
    ]
    return [Configuration(*values) for axis in axes for values in product(*axis)]


def halves(configurations: list[Configuration]) -> dict[Configuration, str]:
    """Say which half each is in: the seed alone decides, and as many of each model are in both."""
    found = {}
    for model in sorted({one.model for one in configurations}):
        mine = sorted(one for one in configurations if one.model == model)
        random.Random(f"{SEED} {model}").shuffle(mine)
        found |= {one: HALVES[number % 2] for number, one in enumerate(mine)}
    return found


def make_model(name: str) -> Any:
    if name == "mlp":
        return nn.Sequential(nn.Embedding(1000, 2048), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 1000))
    return GPT(*GPTS[name]) if name in GPTS else embedding_linear()


def build(one: Configuration, device: str, sizes: list[int] | None = None) -> tuple[Any, ...]:
    """Make the model, the optimizer and a window, of micro-batches of these sizes if they are given."""
    torch.manual_seed(0)
    vocabulary, length, *_ = GPTS.get(one.model, (1000, 20))
    with torch.device(device):
        model = make_model(one.model).to(torch.bfloat16 if one.precision == "bf16" else torch.float32)
        sizes = sizes or [one.micro_batch] * one.accumulation_steps
        window = [torch.randint(vocabulary, (2, size, length)) for size in sizes]
    for block in model.blocks if one.checkpointing == "checkpointing" else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model, OPTIMIZERS[one.optimizer](model.parameters()), window


def update(one: Configuration, device: str, model: Any, optimizer: Any, window: Any) -> None:
    for inputs, targets in window:
        with torch.autocast(device, torch.bfloat16, enabled=one.precision == "autocast"):
            loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) / len(window)
        loss.backward()
        del loss
    optimizer.step()
    optimizer.zero_grad()


class Cpu:
    """Measures. An update that holds more than `limit`, if there is one, counts as out of memory afterwards."""

    kind, baseline, room, clock = "cpu", 0, 600 * 2**20, staticmethod(time.process_time)

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.limit: int | None = None
        self.about = {"device": f"{platform.processor() or platform.machine()}, one thread"}

    def updates(self, one: Configuration, sizes: list[int] | None = None) -> dict[str, Any]:
        built, peaks = build(one, "cpu", sizes), []
        for _ in range(2):
            with measure_memory(*built) as memory:
                update(one, "cpu", *built)
            peaks.append(memory.peak_bytes)
            if self.limit is not None and memory.peak_bytes > self.limit:
                raise torch.OutOfMemoryError(f"CPU out of memory. {memory.peak_bytes:,} bytes of {self.limit:,}.")
        return {"allocated_bytes": peaks}


class Cuda:
    """Reads the GPU's counters. `limit` is what may be held, the workspaces that a prediction counts included."""

    kind = "cuda"

    def __init__(self) -> None:
        # The first products make workspaces for cuBLAS, in each thread (forward, backward), and these stay.
        for precision in ("float32", "autocast", "bf16"):
            one = Configuration("small GPT", 2, 2, "adamw", precision)
            update(one, "cuda", *build(one, "cuda"))
        self.limit, self.baseline = None, max(0, self.settled() - 2 * WORKSPACE)  # what no prediction counts
        self.room, self.total = torch.cuda.mem_get_info()
        driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
        settings = {name: value for name, value in os.environ.items() if "ALLOC_CONF" in name}
        self.about = {"device": torch.cuda.get_device_name(), "driver": driver, "CUDA": torch.version.cuda}
        self.about |= {"total_bytes": self.total, "free_bytes": self.room, "settings": settings}

    def clock(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def settled(self) -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    def updates(self, one: Configuration, sizes: list[int] | None = None) -> dict[str, Any]:
        found = {"before_bytes": [self.settled()]}  # workspaces alone, if nothing was left behind
        limit = self.total if self.limit is None else self.limit + self.baseline
        torch.cuda.set_per_process_memory_fraction(limit / self.total)
        built = build(one, "cuda", sizes)
        torch.cuda.empty_cache()  # what only building needed
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            update(one, "cuda", *built)
            torch.cuda.synchronize()
            for counter in ("allocated_bytes", "reserved_bytes", "requested_bytes"):
                found.setdefault(counter, []).append(torch.cuda.memory_stats()[f"{counter}.all.peak"])
        return found


def attempt(action: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Add to what an action gives how it ended; what goes wrong in one does not stop the others."""
    try:
        return {"outcome": "ran"} | action(*arguments)
    except Exception as error:
        return {"outcome": "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"failed: {error!r}"}


def predicted(one: Configuration, half: str, device: str) -> dict[str, Any]:
    report = predict_memory(partial(build, one, device), partial(update, one, device), device=device)
    both = [report.first.peak_bytes, report.peak_bytes]
    return {"half": half, **one._asdict(), "predicted_bytes": both, "predicted_roles": report.at_peak}


def run(meter: Any, one: Configuration, needed: int) -> dict[str, Any]:
    if needed > meter.room:
        return {"outcome": f"skipped: predicted {needed:,} bytes, and {meter.room:,} are there"}
    found = meter.updates(one)
    held = max(found["allocated_bytes"])
    return found | {"ratio": needed / held, "ratio_with_baseline": (needed + meter.baseline) / held}


def times(meter: Any, one: Configuration, rounds: int) -> dict[str, Any]:
    """Time k micro-batches over one full batch: each k once per round, after a round that does not count."""
    ratios: dict[int, list[float]] = {k: [] for k in (1, 2, 4, 8, 16, 32)}
    model, optimizer, (whole,) = build(one, meter.kind)
    for counts in range(rounds + 1):
        seconds = {}
        for k in ratios:
            start = meter.clock()
            update(one, meter.kind, model, optimizer, whole.split(one.micro_batch // k, dim=1))
            seconds[k] = meter.clock() - start
            ratios[k] += [seconds[k] / seconds[1]] * bool(counts)
    return {"quartiles": {k: quantiles(found, n=4) for k, found in ratios.items()}}


def largest(meter: Any, one: Configuration, limit: int) -> dict[str, Any]:
    """Plan the largest micro-batch, and find it by trying which sizes run out of memory."""
    batch, functions = one.micro_batch, [partial(build, one, meter.kind), partial(update, one, meter.kind)]
    plan = plan_micro_batches(*functions, effective_batch=batch, budget=limit, device=meter.kind)

    def fails(size: int) -> bool:
        sizes = [size] * (batch // size) + [batch % size] * (batch % size > 0)
        return attempt(meter.updates, one, sizes)["outcome"] != "ran"

    meter.limit = limit
    found = bisect_left(range(1, batch // 2 + 1), True, key=fails)
    row = {"planned": plan.micro_batch, "planned_ran": not fails(plan.micro_batch), "found": found}
    meter.limit = None
    return row


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Sum up the outcomes, the errors in both halves, the plans, and what must not be."""
    records, plans = result["configurations"], [one for one in result["largest"] if one["outcome"] == "ran"]
    found: dict[str, Any] = {"outcomes": Counter(one["outcome"].partition(":")[0] for one in records)}
    for half, ratio in product(HALVES, ("ratio", "ratio_with_baseline")):
        mine = [one for one in records if one["half"] == half and max(one.get("allocated_bytes", [0])) >= LARGE]
        if errors := [abs(one[ratio] - 1) for one in mine]:
            worst = {"configurations": len(mine), "median_error": median(errors), "worst_error": max(errors)}
            found[f"{half}, {ratio}"] = worst
    found["planned minus found"] = [one["planned"] - one["found"] for one in plans]
    every = records + result["times"] + result["largest"]
    bad = [one for one in every if not one["outcome"].startswith(("ran", "skipped"))]
    bad += [one for one in plans if not one["planned_ran"]]
    if result["provenance"]["kind"] == "cpu":
        bad += [one for one in records if one.get("allocated_bytes", one["predicted_bytes"]) != one["predicted_bytes"]]
        bad += [one for one in plans if one["planned"] != one["found"]]
    return found | {"problems": bad}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few configurations")
    parser.add_argument("--out", type=Path, help="where the JSON goes; without it, only the summary is printed")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("No CUDA device is there: try --device cpu.")
    split, start = halves(grid()), time.perf_counter()  # the halves before anything runs
    if options.quick:  # of each half the smallest of a model
        falling = sorted(split, key=lambda one: -one.micro_batch * one.accumulation_steps)
        few = {(one.model, split[one]): one for one in falling if one.model in TIMED}.values()
        split = {one: split[one] for one in few}
    meter: Any = Cuda() if options.device == "cuda" else Cpu()
    provenance = {"date": date.today().isoformat(), "kind": meter.kind, **meter.about, "baseline_bytes": meter.baseline}
    provenance |= {"torch": torch.__version__, "gradaccum": gradaccum.__version__, "Python": platform.python_version()}
    provenance["command"] = " ".join(["python benchmarks/gpu_memory.py", *(arguments or sys.argv[1:])])
    records = [predicted(one, half, meter.kind) for one, half in split.items()]  # all, before the first is run
    for number, (one, record) in enumerate(zip(split, records, strict=True), start=1):
        record |= attempt(run, meter, one, max(record["predicted_bytes"]))
        print(f"{number}/{len(records)}", *one, record["outcome"], record.get("ratio", ""), flush=True)
    result = {"provenance": provenance, "seed": SEED, "configurations": records, "times": [], "largest": []}
    most, rounds = (1, 3) if options.quick else (3, 3) if meter.kind == "cpu" else (None, 15)
    for one in [Configuration(model, batch, 1, "adamw") for model, batch in TIMED.items()][:most]:
        result["times"].append({**one._asdict(), "rounds": rounds} | attempt(times, meter, one, rounds))
    for model, batch, *how, limit in SEARCHES[meter.kind][:most]:
        one = Configuration(model, batch, 1, *how)
        result["largest"].append({**one._asdict(), "limit_bytes": limit} | attempt(largest, meter, one, limit))
    result["summary"] = summary(result)
    provenance["seconds"] = round(time.perf_counter() - start)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["summary"], indent=1))
    return 1 if result["summary"]["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
