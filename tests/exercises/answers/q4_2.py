"""4.2: further right answers, which must get full points, and wrong ones, which must not."""

import torch
from torch.nn.functional import cross_entropy


def windows_of(micro_batches, k):
    return [micro_batches[start : start + k] for start in range(0, len(micro_batches), k)]


def with_parity(model, optimizer, micro_batches, k):
    optimizer.zero_grad()
    last = len(micro_batches)
    for step, (inputs, targets) in enumerate(micro_batches):
        length = k if step < last - last % k else last % k
        (cross_entropy(model(inputs), targets) * (1 / length)).backward()
        if (step + 1) % k == 0 or step + 1 == last:
            optimizer.step()
            optimizer.zero_grad()


def summed_and_cleared_first(model, optimizer, micro_batches, accumulation_steps):
    for window in windows_of(micro_batches, accumulation_steps):
        optimizer.zero_grad(set_to_none=False)
        items = sum(len(targets) for _, targets in window)
        for inputs, targets in reversed(window):
            (cross_entropy(model(inputs), targets, reduction="sum") / items).backward()
        optimizer.step()


def by_hand(model, optimizer, micro_batches, accumulation_steps):
    parameters = list(model.parameters())
    for window in windows_of(micro_batches, accumulation_steps):
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for inputs, targets in window:
            found = torch.autograd.grad(cross_entropy(model(inputs), targets), parameters)
            total = [held + each for held, each in zip(total, found, strict=True)]
        for parameter, held in zip(parameters, total, strict=True):
            parameter.grad = held / len(window)
        optimizer.step()


def by_closure(model, optimizer, micro_batches, accumulation_steps):
    for window in windows_of(micro_batches, accumulation_steps):

        def closure(window=window):
            optimizer.zero_grad()
            for inputs, targets in window:
                (cross_entropy(model(inputs), targets) / len(window)).backward()

        optimizer.step(closure)


def smaller_learning_rate(model, optimizer, micro_batches, k):
    """Right for plain SGD only."""
    for window in windows_of(micro_batches, k):
        for inputs, targets in window:
            cross_entropy(model(inputs), targets).backward()
        optimizer.param_groups[0]["lr"] /= len(window)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= len(window)
        optimizer.zero_grad()


def one_step_too_many(model, optimizer, micro_batches, k):
    with_parity(model, optimizer, micro_batches, k)
    optimizer.step()


def divided_by_all(model, optimizer, micro_batches, k):
    for window in windows_of(micro_batches, k):
        for inputs, targets in window:
            (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()
        optimizer.step()
        optimizer.zero_grad()


def one_backward(model, optimizer, micro_batches, k):
    for window in windows_of(micro_batches, k):
        sum(cross_entropy(model(inputs), targets) / len(window) for inputs, targets in window).backward()
        optimizer.step()
        optimizer.zero_grad()


def does_nothing(model, optimizer, micro_batches, k):
    pass


RIGHT = [with_parity, summed_and_cleared_first, by_hand, by_closure]
WRONG = [one_step_too_many, divided_by_all, one_backward, smaller_learning_rate, does_nothing]
NAMED = [(one_backward, "joined_windows")]
