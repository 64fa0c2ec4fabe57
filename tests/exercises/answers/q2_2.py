"""2.2: further right answers, which must get full points, and wrong ones, which must not."""

import torch
from torch.nn.functional import cross_entropy


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


def collects_by_hand(model, optimizer, micro_batches, k):
    for start in range(0, len(micro_batches), k):
        total = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for inputs, targets in micro_batches[start : start + k]:
            loss = cross_entropy(model(inputs), targets)
            found = torch.autograd.grad(loss, list(model.parameters()))
            total = [one + other for one, other in zip(total, found, strict=True)]
        for parameter, gradient in zip(model.parameters(), total, strict=True):
            parameter.grad = gradient
        optimizer.step()


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


RIGHT = [clears_at_the_start_of_a_window, cuts_into_windows, collects_by_hand]
WRONG = [clears_before_the_loop, clears_when_it_does_not_step, steps_once_in_all]
