"""Relative gradient error against a float64 full batch, however the batch is cut."""

import copy
import random
from functools import partial
from statistics import fmean
from typing import Any

import torch
from contenders import (
    ACCELERATE,
    ACCELERATE_TOKENS,
    CONTENDERS,
    FABRIC,
    HAND,
    OURS,
    OVER_K,
    Still,
    Task,
    installed,
    loader,
    names,
    quiet,
    table,
    token_task,
)
from torch import Tensor
from tqdm import tqdm

from gradaccum import full_batch_gradient, relative_error
from gradaccum.models import GPT

STEPS = (1, 4, 16, 64, 256)
LINES = 256
SEEDS = (0, 1)
LENGTH = 16  # of every line, where counts are to be equal
PRECISIONS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16, float32 gradients": (torch.bfloat16, torch.float32),
}
REACHES = {"float64": 2.0, "float32": 1.1, "bf16, float32 gradients": 1.1}
FULL = "the full batch, one backward"
PERMUTED = "the full batch, permuted"
KINDS = ("Linear", "Embedding", "LayerNorm")


def lines_of(cut: str, seed: int, count: int) -> list[str]:
    """Give lines of one length; or all lengths, sorted, so that micro-batches cut from them hold unequal counts."""
    known = list(names()[1])
    random.Random(seed).shuffle(known)
    if cut == "equal":
        return [line[:LENGTH] for line in known if len(line) >= LENGTH][:count]
    return sorted(known[:count], key=len)


def gradient(name: str, task: Task, window: list[Any]) -> list[Tensor]:
    """Run one window of a contender and give the gradient that its optimizer's step saw."""
    seen: list[list[Tensor]] = []
    optimizer = Still(task.model.parameters(), lambda gradients: seen.append([g.clone() for g in gradients]))
    contender = CONTENDERS[HAND if name in (FULL, PERMUTED) else name]
    contender(task, optimizer, len(window))(loader(window))
    if len(seen) != 1:
        raise RuntimeError(f"{name} stepped {len(seen)} times in one window of {len(window)}.")
    return seen[0]


def measure(
    cut: str, precision: str, seed: int, loops: list[str], steps: tuple[int, ...], count: int
) -> dict[tuple[str, int], float]:
    """Give the error of each contender at each k, for one draw of lines and weights."""
    characters = names()[0]
    lines = lines_of(cut, seed, count)
    dtype, grad_dtype = PRECISIONS[precision]
    torch.manual_seed(seed)
    original = GPT(len(characters), width=32, layers=2, heads=4).to(dtype)

    def fresh() -> Task:
        model = copy.deepcopy(original)
        for parameter in model.parameters():
            if grad_dtype is not None:
                parameter.grad_dtype = grad_dtype
        return token_task(model)

    reference = fresh()
    whole = [characters.batch(lines)]
    expected = full_batch_gradient(
        reference.model, whole[0], partial(reference.loss_mean, reference.model), dtype=torch.float64
    )
    orders = [random.Random(number).sample(lines, count) for number in range(3)]
    permuted = [relative_error(gradient(PERMUTED, fresh(), [characters.batch(order)]), expected) for order in orders]
    full = gradient(FULL, fresh(), whole)
    errors = {(FULL, 1): relative_error(full, expected), (PERMUTED, 1): sum(permuted) / len(permuted)}
    layer = {name: type(module).__name__ for name, module in original.named_modules()}
    of = [layer[name.rpartition(".")[0]] for name, _ in original.named_parameters()]
    for kind in KINDS:
        both = [(one, right) for one, right, its in zip(full, expected, of, strict=True) if its == kind]
        errors[kind, 1] = relative_error(*zip(*both, strict=True))
    for k in steps:
        size = count // k
        window = [characters.batch(lines[i * size : (i + 1) * size]) for i in range(k)]
        for name in loops:
            errors[name, k] = relative_error(gradient(name, fresh(), window), expected)
    return errors


def run(quick: bool) -> str:
    quiet()
    steps, count, seeds = ((1, 4), 16, SEEDS[:1]) if quick else (STEPS, LINES, SEEDS)
    loops = [name for name in (OURS, OVER_K, ACCELERATE, ACCELERATE_TOKENS, FABRIC) if installed(name)]
    rows, kinds, reached = [], [], []
    cases = [(cut, precision) for precision in PRECISIONS for cut in ("equal", "unequal")]
    for cut, precision in tqdm(cases, desc="accuracy", leave=False):
        runs = [measure(cut, precision, seed, loops, steps, count) for seed in seeds]

        def mean(name: str, k: int, runs: list[dict[tuple[str, int], float]] = runs) -> str:
            return f"{fmean(errors[name, k] for errors in runs):.1e}" if (name, k) in runs[0] else ""

        alike: dict[tuple[str, ...], list[str]] = {}  # loops with equal errors share a row
        for name in (FULL, PERMUTED, *loops):
            alike.setdefault(tuple(mean(name, k) for k in steps), []).append(name)
        rows += [[precision, cut, "; ".join(which), *cells] for cells, which in alike.items()]
        kinds.append([precision, cut, *(mean(kind, 1) for kind in KINDS)])
        if precision in REACHES:
            base, reach = PERMUTED if precision == "float64" else FULL, REACHES[precision]
            ratio, k = max((errors[OURS, k] / errors[base, 1], k) for errors in runs for k in steps)
            word = "reached" if ratio <= reach else "MISSED"
            reached.append(
                f"- {precision}, {cut} counts: {ratio:.2f} times *{base}* (k = {k}); at most {reach}: {word}"
            )
    lines = table(["precision", "counts", "loop", *(f"k = {k}" for k in steps)], rows)
    lines += ["Reach of `accumulate`, the worst k and draw:", "", *reached, ""]
    lines += ["The full batch's own error, by the kind of layer whose parameters it is in:", ""]
    return "\n".join(lines + table(["precision", "counts", *KINDS], kinds)).rstrip()
