"""2.1: further right answers, which must get full points, and wrong ones, which must not."""

from fractions import Fraction
from functools import reduce

import numpy as np
import torch


def asks_torch(events):
    weight = torch.tensor(3.0, requires_grad=True)
    for event in events:
        if event == "clear":
            weight.grad = None
        else:
            (event * weight).backward()
    return 0 if weight.grad is None else weight.grad


def looks_back(events):
    total = 0
    for event in reversed(events):
        if event == "clear":
            break
        total = event + total
    return total


def calls_itself(events):
    if not events or events[-1] == "clear":
        return 0
    return calls_itself(events[:-1]) + torch.tensor(events[-1], dtype=torch.float32)


def starts_with_nothing(events):
    grad = None
    for event in events:
        grad = None if event == "clear" else (grad or 0) + event
    return grad or 0


def sums_the_rest(events):
    last = max((i for i, event in enumerate(events) if event == "clear"), default=-1)
    return np.array(events[last + 1 :], dtype=float).sum()


def folds(events):
    return reduce(lambda total, event: Fraction(0) if event == "clear" else total + Fraction(event), events, 0)


def as_torch_holds_it(events):
    weight = torch.tensor(1.0, requires_grad=True)
    for event in events:
        if event == "clear":
            weight.grad = None
        else:
            (event * weight).backward()
    return weight.grad


def empties_the_list(events):
    total = 0
    while events and (event := events.pop()) != "clear":
        total += event
    return total


RIGHT = [asks_torch, looks_back, calls_itself, starts_with_nothing, sums_the_rest, folds]
WRONG = [
    lambda events: None,
    lambda events: events[0],
    lambda events: sum(abs(event) for event in events if event != "clear"),
    lambda events: [event for event in events if event != "clear"],
    lambda events: sum(events),
    lambda events: str(looks_back(events)),
    lambda events: looks_back(events[:6]),
    empties_the_list,
    lambda events: looks_back(events) or False,
]
NAMED = [
    (as_torch_holds_it, "none_if_empty"),
    (lambda events: None, "nothing_returned"),
    (lambda events: 0 if events[-1] == "clear" else events[-1], "the_last"),
    (lambda events: looks_back(events[: events.index("clear")] if "clear" in events else events), "up_to_the_clear"),
    (lambda events: max((event for event in events if event != "clear"), default=0),),
    (lambda events: looks_back(events) / len(events),),
]
