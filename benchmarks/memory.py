"""What a prediction, a plan and following an update cost on the CPU, and what others say of the same models."""

import gc
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from contenders import installed, quiet, table
from gpu_memory import Configuration, Cpu, build, make_model, update
from tqdm import tqdm

from gradaccum.memory import measure_memory, plan_micro_batches, predict_memory

REACH_MB = 600
PLANS = [  # 512 samples, for CUDA
    (Configuration("embedding_linear", 512, 1, "adamw"), "20 MB"),
    (Configuration("GPT-2 small", 512, 1, "adamw"), "24 GiB"),
    (Configuration("7 billion", 512, 1, "adamw", "bf16"), "80 GB"),
]
FOLLOWED = {"embedding_linear": (8, 100), "mlp": (4, 15), "small GPT": (2, 30)}  # micro-batch, rounds
ESTIMATED = ("embedding_linear", "small GPT", "GPT-2 small", "7 billion")
FOUND = [("embedding_linear", 256, 48 * 10**6), ("small GPT", 64, 350 * 10**6)]  # effective batch, budget


def cpu(action: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    """Give the CPU seconds that a call takes, and its result."""
    start = time.process_time()
    result = action(*arguments, **options)
    return time.process_time() - start, result


def plan_of(one: Configuration, budget: int | str, device: str) -> tuple[float, Any, int]:
    """Give the CPU seconds of a plan, the plan, and how many predictions, of two updates each, it took."""
    updates = []

    def step(*built: Any) -> None:
        updates.append(1)
        update(one, device, *built)

    make = partial(build, one, device)
    options = {"effective_batch": one.micro_batch, "budget": budget, "device": device}
    return *cpu(plan_micro_batches, make, step, **options), len(updates) // 2


def costs(one: Configuration, budget: str, repeats: int) -> tuple[list[float], tuple[float, Any, int], float]:
    """Measure predictions and a plan; called in a fresh process, whose peak in MB comes last."""
    torch.set_num_threads(1)
    functions = partial(build, one, "cuda", [4, 4]), partial(update, one, "cuda")
    seconds = [cpu(predict_memory, *functions)[0] for _ in range(1 + repeats)]
    plan, status = plan_of(one, budget, "cuda"), Path("/proc/self/status")
    high = [line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line] if status.exists() else []
    return seconds, plan, int(high[0]) * 1024 / 1e6 if high else float("nan")


def on_meta(model: str) -> Any:
    with torch.device("meta"):
        return make_model(model)


def predictions(quick: bool) -> list[str]:
    rows, peaks = [], []
    for one, budget in tqdm(PLANS[: 1 if quick else None], desc="predictions", leave=False):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            (first, *later), (seconds, plan, count), peak = fresh.submit(costs, one, budget, 1 if quick else 3).result()
        parameters = sum(parameter.numel() for parameter in on_meta(one.model).parameters())
        name, peaks = f"{one.model} ({parameters:,} parameters, {one.precision})", [*peaks, peak]
        what = f"{budget}: {plan.micro_batch} x {plan.accumulation_steps}"
        rows.append([name, f"{first:.2f}", f"{median(later):.2f}", what, f"{seconds:.1f}", count, f"{peak:.0f}"])
    head = ["model", "first prediction, s", "later, s", "plan", "plan, s", "its predictions", "process, MB (VmHWM)"]
    word = "reached" if max(peaks) <= REACH_MB else "MISSED"
    return [*table(head, rows), f"Reach: a process of at most {REACH_MB} MB: {word}.", ""]


def following(quick: bool) -> list[str]:
    """Time an update, the same again, and the same followed, in turns in one process."""
    rows = []
    for model, (micro_batch, rounds) in FOLLOWED.items():
        one = Configuration(model, micro_batch, 4, "adamw")
        built = build(one, "cpu")

        def run(followed: bool, one: Configuration = one, built: Any = built) -> None:
            if followed:
                with measure_memory(*built):
                    update(one, "cpu", *built)
            else:
                update(one, "cpu", *built)

        times = []
        for _ in tqdm(range(3 if quick else rounds), desc=model, leave=False):
            gc.collect()
            run(False)  # not timed: what ran before must not matter
            times.append([cpu(run, followed)[0] for followed in (False, False, True)])
        for column, what in ((1, "again"), (2, "followed")):
            ratios = [row[column] / row[0] for row in times]
            low, ratio, high = quantiles(ratios, n=4)
            rows.append([f"{model} {micro_batch} x 4", what, f"{ratio:.2f}", f"{low:.2f} to {high:.2f}", len(ratios)])
    return table(["update", "run", "ratio to the plain one", "middle half", "rounds"], rows)


def estimates(quick: bool) -> list[str]:
    """Set beside predictions what `accelerate estimate-memory` computes; the command itself takes models of the hub."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    rows = []
    for model, micro_batch in product(ESTIMATED[: 1 if quick else None], (1, 16)):
        one = Configuration(model, micro_batch, 1, "adamw")
        said = max(estimate_training_usage(calculate_maximum_sizes(on_meta(model))[0], "float32").values())
        peak = predict_memory(partial(build, one, "cpu"), partial(update, one, "cpu"), device="cpu").peak_bytes
        cells = [model, micro_batch, f"{said / 1e6:,.1f}", f"{peak / 1e6:,.1f}", "not run: too large"]
        if peak <= Cpu.room:
            cells[-1] = f"{max(Cpu().updates(one)['allocated_bytes']) / 1e6:,.1f}"
        rows.append(cells)
    return table(["model", "micro-batch", "accelerate, MB", "predict_memory, MB", "measured, MB"], rows)


def finders(quick: bool) -> list[str]:
    """Set beside plans what a finder reaches that tries real updates, under a limit that `Cpu` keeps."""
    from accelerate.utils import find_executable_batch_size

    rows = []
    for model, batch, budget in FOUND[: 1 if quick else None]:
        one, meter, tried = Configuration(model, batch, 1, "adamw"), Cpu(), []
        meter.limit = budget

        def train(size: int, one: Any = one, meter: Any = meter, tried: Any = tried) -> None:
            tried.append(size)
            meter.updates(one, [size])

        seconds, _ = cpu(find_executable_batch_size(train, starting_batch_size=batch))
        name, trail = f"{model}, {batch} in {budget / 1e6:.0f} MB", ", ".join(map(str, tried))
        cells = [tried[-1], tried[-1], f"{len(tried)} trials: {trail}", f"{seconds:.1f}"]
        rows.append([name, "accelerate, `find_executable_batch_size`", *cells])
        seconds, plan, count = plan_of(one, budget, "cpu")
        cells = [plan.micro_batch, sum(plan.sizes), f"{count} predictions, nothing is run", f"{seconds:.1f}"]
        rows.append([name, "plan_micro_batches", *cells])
    return table(["model, batch and budget", "way", "micro-batch", "effective batch", "took", "CPU, s"], rows)


def run(quick: bool) -> str:
    quiet()
    lines = predictions(quick) + following(quick)
    if installed("accelerate"):
        lines += estimates(quick) + finders(quick)
    return "\n".join(lines).strip()
