"""Lesson 4: further right answers, which must get full points, and wrong ones, which must not."""

import math
from fractions import Fraction
from itertools import chain, islice, zip_longest

import numpy
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradaccum


def collects(micro_batches, accumulation_steps):
    window = []
    for micro_batch in micro_batches:
        window.append(micro_batch)
        if len(window) == accumulation_steps:
            yield tuple(window)
            window = []
    if window:
        yield tuple(window)


def until_empty(micro_batches, accumulation_steps):
    stream = iter(micro_batches)
    return iter(lambda: list(islice(stream, accumulation_steps)), [])


def first_and_rest(micro_batches, accumulation_steps):
    stream = iter(micro_batches)
    for first in stream:
        yield [first, *islice(stream, accumulation_steps - 1)]


def fills_up(micro_batches, accumulation_steps):
    nothing = object()
    for filled in zip_longest(*[iter(micro_batches)] * accumulation_steps, fillvalue=nothing):
        yield [each for each in filled if each is not nothing]


def until_falsy(micro_batches, k):
    stream = iter(micro_batches)
    while first := next(stream, None):
        yield [first, *islice(stream, k - 1)]


def calls_itself(micro_batches, k):
    stream = iter(micro_batches)
    if window := list(islice(stream, k)):
        yield window
        yield from calls_itself(stream, k)


def slices_of_the_stream(micro_batches, k):
    stream = iter(micro_batches)
    return (islice(stream, k) for _ in range(100))


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
    for window in collects(micro_batches, accumulation_steps):
        optimizer.zero_grad(set_to_none=False)
        items = sum(len(targets) for _, targets in window)
        for inputs, targets in reversed(window):
            (cross_entropy(model(inputs), targets, reduction="sum") / items).backward()
        optimizer.step()


def by_hand(model, optimizer, micro_batches, accumulation_steps):
    parameters = list(model.parameters())
    for window in until_empty(micro_batches, accumulation_steps):
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for inputs, targets in window:
            found = torch.autograd.grad(cross_entropy(model(inputs), targets), parameters)
            total = [held + each for held, each in zip(total, found, strict=True)]
        for parameter, held in zip(parameters, total, strict=True):
            parameter.grad = held / len(window)
        optimizer.step()


def by_closure(model, optimizer, micro_batches, accumulation_steps):
    for window in collects(micro_batches, accumulation_steps):

        def closure(window=window):
            optimizer.zero_grad()
            for inputs, targets in window:
                (cross_entropy(model(inputs), targets) / len(window)).backward()

        optimizer.step(closure)


def smaller_learning_rate(model, optimizer, micro_batches, k):
    """Right for plain SGD only."""
    for window in collects(micro_batches, k):
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
    for window in collects(micro_batches, k):
        for inputs, targets in window:
            (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()
        optimizer.step()
        optimizer.zero_grad()


def one_backward(model, optimizer, micro_batches, k):
    for window in collects(micro_batches, k):
        sum(cross_entropy(model(inputs), targets) / len(window) for inputs, targets in window).backward()
        optimizer.step()
        optimizer.zero_grad()


def does_nothing(*_):
    return None


def each_epoch(train_epoch):
    def train(model, optimizer, micro_batches, k, epochs):
        for _ in range(epochs):
            train_epoch(model, optimizer, micro_batches, k)

    return train


def module_windows(model, optimizer, micro_batches, accumulation_steps, epochs):
    for window in chain.from_iterable(gradaccum.windows(micro_batches, accumulation_steps) for _ in range(epochs)):
        for inputs, targets in window:
            (cross_entropy(model(inputs), targets) / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()


def cleared_at_the_start(model, optimizer, micro_batches, k, epochs):
    """Does not leak any more, but drops what is left over."""
    for _ in range(epochs):
        optimizer.zero_grad()
        for step, (inputs, targets) in enumerate(micro_batches):
            (cross_entropy(model(inputs), targets) / k).backward()
            if step % k == 0:
                optimizer.step()
                optimizer.zero_grad()


def once(log, clip=nn.utils.clip_grad_norm_):
    """Train as the worked answer does; `log` is told the undivided losses of a window."""

    def train(model, optimizer, schedule, windows, max_norm):
        logs = []
        for window in windows:
            losses = []
            for inputs, targets in window:
                losses.append(cross_entropy(model(inputs), targets))
                (losses[-1] / len(window)).backward()
            logs.append(log(losses))
            clip(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return logs

    return train


def one_tensor(*arguments):
    return torch.stack(once(lambda losses: torch.stack(losses).detach().mean())(*arguments))


def clips_by_hand(parameters, max_norm):
    gradients = [parameter.grad for parameter in parameters]
    norm = torch.sqrt(sum((each**2).sum() for each in gradients))
    for each in gradients:
        each *= min(1.0, float(max_norm / (norm + 1e-6)))


def clips_each(parameters, max_norm):
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, max_norm)


def before_the_update(model, optimizer, schedule, windows, max_norm):
    for window in windows:
        with torch.no_grad():
            losses = [cross_entropy(model(inputs), targets) for inputs, targets in window]
        once(lambda losses: 0)(model, optimizer, schedule, [window], max_norm)
        yield sum(losses) / len(losses)


def after_the_update(model, optimizer, schedule, windows, max_norm):
    for window in windows:
        once(lambda losses: 0)(model, optimizer, schedule, [window], max_norm)
        yield sum(cross_entropy(model(inputs), targets).item() for inputs, targets in window) / len(window)


def backward_at_the_end(model, optimizer, schedule, windows, max_norm):
    for window in windows:
        loss = sum(cross_entropy(model(inputs), targets) for inputs, targets in window) / len(window)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


def schedule_first(model, optimizer, schedule, windows, max_norm):
    for window in windows:
        schedule.step()
        loss = sum(cross_entropy(model(x), y).item() for x, y in window) / len(window)
        once(lambda losses: 0)(model, optimizer, type("", (), {"step": lambda self: None})(), [window], max_norm)
        yield loss


def trains_no_more(model, optimizer, schedule, windows, max_norm):
    return [sum(cross_entropy(model(x), y).item() for x, y in window) / len(window) for window in windows]


RIGHT = {
    "4.1": [collects, until_empty, first_and_rest, fills_up],
    "4.2": [with_parity, summed_and_cleared_first, by_hand, by_closure],
    "4.3": [*map(each_epoch, (with_parity, summed_and_cleared_first, by_hand, by_closure)), module_windows],
    "4.4": [
        once(lambda losses: sum(loss.item() for loss in losses) / len(losses)),
        once(lambda losses: sum(loss.detach() for loss in losses) / len(losses), clip=clips_by_hand),
        one_tensor,
        before_the_update,
    ],
    "4.5": [
        lambda n, k, epochs: math.ceil(n / k) * epochs,
        lambda n, k, epochs: float((n + k - 1) // k * epochs),
        lambda n, k, epochs: torch.tensor(len(range(0, n, k)) * epochs),
        lambda n, k, epochs: epochs * len(gradaccum.windows(range(n), k)),
        lambda n, k, epochs: Fraction(-(-n // k)) * epochs,
        lambda n, k, epochs: numpy.int64(-(-n // k) * epochs),
    ],
}
WRONG = {
    "4.1": [
        slices_of_the_stream,
        until_falsy,
        calls_itself,
        does_nothing,
        lambda micro_batches, k: [list(micro_batches)],
        lambda micro_batches, k: [list(micro_batches)[start::k] for start in range(k)],
    ],
    "4.2": [one_step_too_many, divided_by_all, one_backward, smaller_learning_rate, does_nothing],
    "4.3": [
        *map(each_epoch, (divided_by_all, one_step_too_many, smaller_learning_rate)),
        cleared_at_the_start,
        does_nothing,
    ],
    "4.4": [
        once(lambda losses: losses[0].item()),
        once(lambda losses: sum(loss.item() for loss in losses) / len(losses), clip=clips_each),
        once(lambda losses: sum(loss.item() for loss in losses) / len(losses), clip=nn.utils.clip_grad_value_),
        after_the_update,
        backward_at_the_end,
        schedule_first,
        lambda *arguments: list(map(str, before_the_update(*arguments))),
        trains_no_more,
        does_nothing,
    ],
    "4.5": [
        lambda n, k, epochs: round(n / k) * epochs,
        lambda n, k, epochs: n * k * epochs,
        lambda n, k, epochs: -(-n // k) + epochs,
        lambda n, k, epochs: int(n / k + 0.99) * epochs,
        lambda n, k, epochs: str(-(-n // k) * epochs),
        does_nothing,
    ],
}
EQUIVALENT = {}
