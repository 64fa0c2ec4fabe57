"""Microseconds per micro-batch and per window, interleaved in one process on one thread."""

import gc
import random
import time
from statistics import median, quantiles
from typing import Any

import torch
from contenders import (
    ACCELERATE,
    CONTENDERS,
    FABRIC,
    HAND,
    OURS,
    Still,
    Task,
    installed,
    names,
    quiet,
    table,
    token_task,
)
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from gradaccum.models import GPT

K = 8
REACH = 1.05
AGAIN = "the same loop by hand, again"  # what the measurement itself makes of two equal loops


def mlp() -> tuple[Task, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    window = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(K)]

    def loss(reduction: str) -> Any:
        return lambda model, pair: functional.cross_entropy(model(pair[0]), pair[1], reduction=reduction)

    return Task(model, loss("sum"), loss("mean"), lambda pair: len(pair[1])), window


def gpt() -> tuple[Task, list[Any]]:
    torch.manual_seed(0)
    characters, lines = names()
    window = [characters.batch(lines[4 * i : 4 * i + 4]) for i in range(K)]
    return token_task(GPT(len(characters))), window


def measure(task: Task, window: list[Any], rounds: int, title: str) -> dict[str, list[float]]:
    """Time one window of each contender per round, in a new order each round: seconds, by contender."""
    epochs = {}
    for name in (HAND, AGAIN, OURS, ACCELERATE, FABRIC):
        if installed(name):
            contender = CONTENDERS[HAND if name == AGAIN else name]
            epochs[name] = contender(task, Still(task.model.parameters()), K)
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    order, shuffle = list(epochs), random.Random(0).shuffle
    task.model.zero_grad()
    gc.collect()
    gc.disable()
    try:
        for _ in tqdm(range(rounds), desc=title, leave=False):
            shuffle(order)
            for name in order:
                epochs[name](window)  # not timed: what ran before must not matter
                begin = time.perf_counter()
                epochs[name](window)
                seconds[name].append(time.perf_counter() - begin)
    finally:
        gc.enable()
    return seconds


def run(quick: bool) -> str:
    quiet()
    rows, reached = [], []
    for title, (task, window), rounds in (("tiny MLP", mlp(), 1200), ("small GPT", gpt(), 100)):
        seconds = measure(task, window, 3 if quick else rounds, title)
        size = sum(p.numel() for p in task.model.parameters())
        for name, times in seconds.items():
            low, ratio, high = quantiles([one / hand for one, hand in zip(times, seconds[HAND], strict=True)], n=4)
            micros = median(times) * 1e6
            cells = [f"{title} ({size:,} parameters)", name, f"{micros / K:,.0f}", f"{micros:,.0f}", f"{ratio:.3f}"]
            rows.append([*cells, f"{low:.3f} to {high:.3f}", len(times)])
            if name == OURS:
                reached.append(f"{title}: {ratio:.3f}, {'reached' if ratio <= REACH else 'MISSED'}")
    head = ["model", "loop", "µs per micro-batch", "µs per window", "ratio", "middle half", "rounds"]
    reach = f"Reach: `accumulate` at most {REACH} times the hand-written loop. " + "; ".join(reached) + "."
    return "\n".join([*table(head, rows), reach])
