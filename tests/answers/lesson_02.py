"""Lesson 2: further right answers, which must get full points, and wrong ones, which must not."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def asks_torch(events):
    weight = torch.tensor(3.0, requires_grad=True)
    for event in events:
        if event == "clear":
            weight.grad = None
        else:
            (event * weight).backward()
    return weight.grad


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


def clears_at_the_start_of_a_window(model, optimizer, micro_batches, accumulation_steps):
    for step, (inputs, targets) in enumerate(micro_batches):
        if step % accumulation_steps == 0:
            optimizer.zero_grad(set_to_none=False)
        cross_entropy(model(inputs), targets).backward()
        if step % accumulation_steps == accumulation_steps - 1:
            optimizer.step()


def cuts_into_windows(model, optimizer, micro_batches, accumulation_steps):
    while micro_batches:
        window, micro_batches = micro_batches[:accumulation_steps], micro_batches[accumulation_steps:]
        model.zero_grad()
        sum(cross_entropy(model(inputs), targets) for inputs, targets in window).backward()
        optimizer.step()


def collects_by_hand(model, optimizer, micro_batches):
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for inputs, targets in micro_batches:
        loss = nn.CrossEntropyLoss()(model(inputs), targets)
        for held, found in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            held += found
    for parameter, held in zip(parameters, total, strict=True):
        parameter.grad = held
    optimizer.step()


def sums_backwards_and_clears_first(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for inputs, targets in micro_batches[::-1]:
        (cross_entropy(model(inputs), targets, reduction="sum") / len(inputs)).backward()
    optimizer.step()


def zeroes_in_place(model, optimizer, micro_batches):
    losses = []
    for inputs, targets in micro_batches:
        losses.append(cross_entropy(model(inputs), targets))
        losses[-1].backward()
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad.zero_()


def gives_a_closure(model, optimizer, micro_batches):
    def closure():
        optimizer.zero_grad()
        total = 0.0
        for inputs, targets in micro_batches:
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            total += loss.item()
        return total

    optimizer.step(closure)


def spoils_its_data(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
        inputs.zero_()
    optimizer.step()
    optimizer.zero_grad()


def empties_the_list(model, optimizer, micro_batches):
    while micro_batches:
        inputs, targets = micro_batches.pop()
        cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def clears_before_the_loop(model, optimizer, micro_batches, accumulation_steps):
    optimizer.zero_grad()
    for step, (inputs, targets) in enumerate(micro_batches, start=1):
        cross_entropy(model(inputs), targets).backward()
        if step % accumulation_steps == 0:
            optimizer.step()


def clears_when_it_does_not_step(model, optimizer, micro_batches, accumulation_steps):
    for step, (inputs, targets) in enumerate(micro_batches, start=1):
        cross_entropy(model(inputs), targets).backward()
        if step % accumulation_steps == 0:
            optimizer.step()
        else:
            optimizer.zero_grad()


def steps_once_in_all(model, optimizer, micro_batches, accumulation_steps):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def steps_on_the_large_batch(model, optimizer, micro_batches):
    inputs, targets = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))
    cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def clears_some(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    model[0].zero_grad()


def keeps_all_graphs(model, optimizer, micro_batches):
    losses = []
    for inputs, targets in micro_batches:
        losses.append(cross_entropy(model(inputs), targets))
        losses[-1].backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()


def in_a_loop(model, optimizer, micro_batches, k):
    for start in range(0, len(micro_batches), k):
        collects_by_hand(model, optimizer, micro_batches[start : start + k])


RIGHT = {
    "2.1": [asks_torch, looks_back, calls_itself],
    "2.2": [clears_at_the_start_of_a_window, cuts_into_windows, in_a_loop],
    "2.3": [collects_by_hand, sums_backwards_and_clears_first, zeroes_in_place, gives_a_closure],
}
WRONG = {
    "2.1": [
        lambda events: None,
        lambda events: events[0],
        lambda events: sum(abs(event) for event in events if event != "clear"),
        lambda events: [event for event in events if event != "clear"],
        lambda events: sum(events),
        lambda events: str(looks_back(events)),
        lambda events: looks_back(events[:6]),
    ],
    "2.2": [clears_before_the_loop, clears_when_it_does_not_step, steps_once_in_all],
    "2.3": [
        steps_on_the_large_batch,
        clears_some,
        keeps_all_graphs,
        spoils_its_data,
        empties_the_list,
        lambda *_: None,
    ],
}
EQUIVALENT = {}
