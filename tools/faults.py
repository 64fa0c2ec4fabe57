"""Make the sheet of faults: each wrong line is run under `audit`, and what the weights show is written beside it.

python tools/faults.py
"""

import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum import audit, windows

PAGE = Path(__file__).resolve().parents[1] / "notebooks" / "FAULTS.md"
K = 4
SIZES = [3, 3, 3, 3, 2, 6, 1, 3, 3, 3]  # equal, unequal, and two left over
TUTORIAL = """
for step, (inputs, targets) in enumerate(loader):
    loss = cross_entropy(model(inputs), targets) / k
    loss.backward()
    if (step + 1) % k == 0:
        optimizer.step()
        optimizer.zero_grad()
"""
BY_WINDOW = """
for window in windows(loader, k):
    window_loss, count = 0, sum(len(targets) for _, targets in window)
    for inputs, targets in window:
        loss = cross_entropy(model(inputs), targets, reduction="sum") / count
        loss.backward()
        window_loss += loss.item()
    clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    logged.append(window_loss)
"""


class Fault(NamedTuple):
    """A wrong line in place of a right one.

    Attributes:
        name: what it is called.
        loop: the loop that it is in.
        line: the line of that loop that is replaced.
        wrong: what is written instead.
        right: what to write.
        update: the update that shows it.
        note: the number where the weights are right.
    """

    name: str
    loop: str
    line: str
    wrong: str
    right: str
    update: int = 0
    note: str = ""


SUM = 'loss = cross_entropy(model(inputs), targets, reduction="sum") / count'
MEAN = "loss = cross_entropy(model(inputs), targets) / k"
IF, CLEAR = "if (step + 1) % k == 0:", "optimizer.zero_grad()"
PER_WINDOW = "for window in windows(loader, k):"
FAULTS = [
    Fault("the leftover waits", TUTORIAL, IF, IF, PER_WINDOW, 2),
    Fault("off by one", TUTORIAL, IF, "if step % k == 0:", PER_WINDOW),
    Fault("the last window over k", TUTORIAL, IF, "if (step + 1) % k == 0 or step + 1 == len(loader):", SUM, 2),
    Fault("cleared in the window", TUTORIAL, "loss.backward()", "optimizer.zero_grad(); loss.backward()", CLEAR),
    Fault(
        "clipped in the window",
        BY_WINDOW,
        "loss.backward()",
        "loss.backward(); clip_grad_norm_(model.parameters(), 0.1)",
        "clip_grad_norm_(...) after the window",
    ),
    Fault(
        "scheduled in the window",
        BY_WINDOW,
        "loss.backward()",
        "loss.backward(); scheduler.step()",
        "scheduler.step() after optimizer.step()",
        note="rate",
    ),
    Fault(
        "the last loss is logged",
        BY_WINDOW,
        "logged.append(window_loss)",
        "logged.append(loss.item())",
        "logged.append(window_loss)",
        note="logged",
    ),
    Fault("no division", TUTORIAL, MEAN, "loss = cross_entropy(model(inputs), targets)", SUM),
    Fault("sums, not divided", BY_WINDOW, SUM, 'loss = cross_entropy(model(inputs), targets, reduction="sum")', SUM),
    Fault("a mean of means", TUTORIAL, MEAN, MEAN, SUM, 1),
    Fault(
        "counted before the shift",
        BY_WINDOW,
        "sum(len(targets) for _, targets in window)",
        "sum(len(targets) + 1 for _, targets in window)",
        "count what the sum runs over",
    ),
    Fault("never cleared", BY_WINDOW, CLEAR, "pass", CLEAR, 1),
    Fault("the scale is left in", BY_WINDOW, SUM, SUM + " * 1024", "scaler.unscale_(optimizer), then clip and step"),
    Fault(
        "a penalty each time",
        BY_WINDOW,
        SUM,
        SUM + " + 0.1 * l2(model)",
        "... + 0.1 * l2(model) * len(targets) / count",
    ),
]


@cache
def run(fault):
    """Return the updates of two epochs of the loop with its wrong line, the rates and what was logged."""
    epochs = []
    for seed in range(2):  # another one's micro-batches are others: twins could not be told apart
        generator = torch.Generator().manual_seed(seed)
        epochs.append(
            [(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in SIZES]
        )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rates = [0.5]

    def total(batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="sum")

    names = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        "k": K,
        "max_norm": 1000.0,
        "l2": lambda model: model[0].weight.square().sum(),
        "windows": windows,
        "cross_entropy": cross_entropy,
        "clip_grad_norm_": nn.utils.clip_grad_norm_,
        "logged": [],
    }
    assert fault.loop.count(fault.line) == 1, fault.name
    code = fault.loop.replace(fault.line, fault.wrong)
    with (
        warnings.catch_warnings(),
        audit(model, optimizer, total, lambda batch: len(batch[1]), accumulation_steps=K) as seen,
    ):
        warnings.filterwarnings("ignore", "Detected call of")  # torch warns of one of the faults
        for epoch in epochs:
            exec(code, names | {"loader": seen(epoch)})
            rates.append(optimizer.param_groups[0]["lr"])
    return seen.updates, rates, names["logged"]


def shown(values):
    """Return weights in two digits, as .25 for a quarter."""
    return " ".join(f"{round(value, 2) + 0:g}".replace("0.", ".") for value in values)


def row(fault):
    """Return the table row of a fault."""
    (updates, rates, logged), (_, right_rates, right) = (run(fault), run(fault._replace(wrong=fault.line)))
    update = updates[fault.update]
    weights = f"{shown(update.weights)} for {shown(update.right)}"
    weights = {"right": shown(update.weights), "no weighted sum": "of no use"}.get(update.kind, weights)
    number = f"{100 * update.error:.0f} % off"
    if fault.note == "rate":
        number = f"rate {rates[1]:.1g} after an epoch, not {right_rates[1]:.1g}"
    if fault.note == "logged":
        number = f"{logged[0]:.2f}, not {right[0]:.2f}"
    return f"| {fault.name} | `{fault.wrong}` | {weights} | {update.kind} | {number} | `{fault.right}` |"


def page():
    """Return the page as text."""
    head = f"""# Fourteen faults of an accumulation loop, by their weights

Each wrong line was put into one of two loops with k = {K} and run under `gradaccum.audit`: micro-batches of \
{SIZES} items.
A weight is the factor that a micro-batch's own mean gradient got; after *for* are the right weights, 0 for a \
micro-batch of another window.
Generated by `python tools/faults.py`. [Lesson 4](04_windows.ipynb) and \
[lesson 5](05_unequal_micro_batches.ipynb) explain the faults.

| fault | wrong line | weights | the audit says | number | right |
|---|---|---|---|---|---|
"""
    return head + "\n".join(map(row, FAULTS)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE.name}.")
