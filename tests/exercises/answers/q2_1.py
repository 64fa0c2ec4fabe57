"""2.1: further right answers, which must get full points, and wrong ones, which must not."""

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


RIGHT = [asks_torch, looks_back, calls_itself]
WRONG = [
    lambda events: None,
    lambda events: events[0],
    lambda events: sum(abs(event) for event in events if event != "clear"),
    lambda events: [event for event in events if event != "clear"],
    lambda events: sum(events),
    lambda events: str(looks_back(events)),
    lambda events: looks_back(events[:6]),
]
