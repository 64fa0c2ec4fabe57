"""Exercises 5.5 and 5.6: the losses that are checked are the notebook's, and its weights are those of real loops."""

import ast
import inspect
import itertools
import re
from functools import cache

import build
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from gradaccum import audit, exercises, windows
from gradaccum.exercises.questions import audits_05, losses_05

SOURCES = build.sources()
CELLS = {cell.id: cell.source for cell in build.read_source(SOURCES["exercises/05_exercises"]).cells}


def test_the_losses_are_the_notebooks():
    shown = ast.parse(CELLS["losses-5-5"]).body
    checked = [ast.parse(inspect.getsource(loss)).body[0] for loss in losses_05.WHOLE.values()]
    assert [*map(ast.unparse, shown)] == [*map(ast.unparse, checked)]


LOOP = """
for window in windows(loader, accumulation_steps):
    count = sum(len(targets) for _, targets in window)
    for inputs, targets in window:
        mean_loss, loss_sum = (cross_entropy(model(inputs), targets, reduction=each) for each in ("mean", "sum"))
        loss = loss_sum / count
        optimizer.zero_grad() if clears else None
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.2) if clips else None
    clip_grad_norm_(model.parameters(), 100.0) if clips_once else None
    optimizer.step()
    optimizer.zero_grad()
"""
DIVIDED = "loss = loss_sum / count"
FAULTS = {  # what differs from the loop above
    audits_05.RIGHT: {},
    "adds means": {"loss": "loss = mean_loss"},
    "adds sums": {"loss": "loss = loss_sum"},
    "divides means by the length": {"loss": "loss = mean_loss / len(window)"},
    "divides means by k": {"loss": "loss = mean_loss / accumulation_steps"},
    "clears before backward": {"clears": True},
    "clips after backward": {"clips": True},
}
LINES = dict(re.findall(r"^\| ([A-F]) \| (.*?) \|$", CELLS["exercise-5-6"], re.M))
LINES_OF = {loop: line for loop, (_, line) in audits_05.LOOPS.items()}
MENDS = {letter: {"loss": re.match("`(.*?)`", LINES[letter])[1]} for letter in "ABC"} | {
    "D": {"clears": False},
    "E": {"clips": False, "clips_once": True},
    "F": {},
}


@cache
def audited(loop, counts, k, line="F"):
    """Run a loop with a line in it; return its windows as the audit finds them, and the norms before each clipping."""
    changed = {"loss": DIVIDED, "clears": False, "clips": False, "clips_once": False} | FAULTS[loop] | MENDS[line]
    torch.manual_seed(0)
    model, norms = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = [(torch.randn(n, 6).double(), torch.randint(3, (n,))) for n in counts]
    names = {"model": model, "optimizer": optimizer, "windows": windows, "cross_entropy": cross_entropy, **changed}
    names["clip_grad_norm_"] = lambda *given: norms.append(clip_grad_norm_(*given).item())

    def loss_sum(batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="sum")

    with audit(model, optimizer, loss_sum, lambda batch: len(batch[1]), accumulation_steps=k) as seen:
        exec(LOOP.replace(DIVIDED, changed["loss"]), names | {"loader": seen(loader), "accumulation_steps": k})
    return seen.updates, norms


def test_each_shown_window_is_a_real_loops():
    rows = re.findall(r"^\| (\d) \| ([\d, ]+) \| ([\d., ]+) \|$", CELLS["exercise-5-6"], re.M)
    order = ["divides means by the length", "clips after backward", "adds means"]
    order += ["clears before backward", "divides means by k"]
    assert len(rows) == len(order)
    for loop, (_, counts, weights) in zip(order, rows, strict=True):
        (full, shorter), _ = audited(loop, (2, 6, 1, 3, 3, 3), 4)
        update, given = (shorter, [3, 3]) if loop == "divides means by k" else (full, [2, 6, 1, 3])
        assert counts == ", ".join(map(str, given))
        assert weights == ", ".join(f"{round(abs(weight), 3):g}" for weight in update.weights)
        assert f"([{weights}], [{counts}])" in CELLS["try-5-6"]


@pytest.mark.parametrize("loop", audits_05.LOOPS)
def test_the_weights_are_those_of_a_real_loop(loop):
    """Those that the check computes are what the audit finds, and so are the names."""
    for counts, k in [((2, 6, 1, 3, 3, 4), 4), ((5, 5, 5, 5, 5), 3), ((7, 2, 4), 2)]:
        updates, norms = audited(loop, counts, k)
        for update in updates:
            sizes = [counts[index] for index in update.micro_batches]
            kept = [min(1, 0.2 / norms.pop(0)) if norms else 1 for _ in sizes]
            expected = audits_05.weights_of(loop, sizes, k, kept)
            assert update.weights == pytest.approx(expected, rel=1e-4, abs=1e-7)
            assert max(abs(each) for each in update.weights) > 0
            name = audits_05.LOOPS[loop][0]
            if loop == "divides means by k" and len(sizes) == k:
                name = "each mean over k"
            if expected == pytest.approx(update.right):
                name = "right"
            if name != "clipped or divided inside" or len(sizes) > 1:
                assert update.kind == name


@pytest.mark.parametrize("loop", audits_05.LOOPS)
def test_one_line_mends_the_loop_and_no_other(loop):
    mending = {LINES_OF[loop]} | ({"A", "D", "E", "F"} if loop == audits_05.RIGHT else set())
    for line in MENDS:
        updates, _ = audited(loop, (2, 6, 1, 3, 5, 4), 4, line)
        assert ({update.kind for update in updates} == {"right"}) == (line in mending), line


def test_every_window_drawn_fits_the_text():
    for seed in range(20):
        for case in itertools.chain(*exercises.find("5.6").cases(seed)):
            sizes, k, weights = case["counts"], case["k"], case["weights"]
            assert len(sizes) <= k
            if case["loop"] == "clips after backward":
                continue
            every = [audits_05.weights_of(each, sizes, k, [1] * len(sizes)) for each in [*audits_05.LOOPS][:-1]]
            for others in every:
                assert all(
                    not 1e-5 <= abs(one - other) < 0.01 - 1e-5 for one, other in zip(weights, others, strict=True)
                )
            wanted = audits_05.weights_of(case["loop"], sizes, k)
            assert weights == pytest.approx(wanted, rel=2e-6, abs=1e-8)
            assert weights != wanted or 0 in sizes
