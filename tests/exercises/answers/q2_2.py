"""2.2: further right answers, which must get full points, and wrong ones, which must not."""

import itertools

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


def takes_from_an_iterator(model, optimizer, micro_batches, accumulation_steps):
    rest = iter(micro_batches)
    while window := list(itertools.islice(rest, accumulation_steps)):
        for inputs, targets in reversed(window):
            (cross_entropy(model(inputs), targets, reduction="sum") / len(targets)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def moves_by_hand(model, optimizer, micro_batches, accumulation_steps):
    for step, (inputs, targets) in enumerate(micro_batches, start=1):
        cross_entropy(model(inputs), targets).backward()
        if not step % accumulation_steps:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= optimizer.param_groups[0]["lr"] * parameter.grad
                    parameter.grad = None


def gives_a_closure(model, optimizer, micro_batches, accumulation_steps):
    for window in zip(*[iter(micro_batches)] * accumulation_steps, strict=True):

        def closure(window=window):
            optimizer.zero_grad()
            for inputs, targets in window:
                cross_entropy(model(inputs), targets).backward()

        optimizer.step(closure)


def pops_the_list(model, optimizer, micro_batches, accumulation_steps):
    step = 0
    while micro_batches:
        inputs, targets = micro_batches.pop(0)
        cross_entropy(model(inputs), targets).backward()
        step += 1
        if step % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()


def leaves_eval_on(model, optimizer, micro_batches, accumulation_steps):
    model.eval()
    cuts_into_windows(model, optimizer, micro_batches, accumulation_steps)


def goes_backwards(model, optimizer, micro_batches, accumulation_steps):
    cuts_into_windows(model, optimizer, micro_batches[::-1], accumulation_steps)


def drops_the_last_window(model, optimizer, micro_batches, accumulation_steps):
    cuts_into_windows(model, optimizer, micro_batches[:-accumulation_steps], accumulation_steps)


def divides_and_never_clears(model, optimizer, micro_batches, accumulation_steps):
    for step, (inputs, targets) in enumerate(micro_batches):
        (cross_entropy(model(inputs), targets) / accumulation_steps).backward()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()


def repairs_nothing_and_divides(model, optimizer, micro_batches, accumulation_steps):
    for step, (inputs, targets) in enumerate(micro_batches):
        optimizer.zero_grad()
        (cross_entropy(model(inputs), targets) / accumulation_steps).backward()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()


def goes_backward_from_the_total(model, optimizer, micro_batches, accumulation_steps):
    total = 0
    for step, (inputs, targets) in enumerate(micro_batches):
        total += cross_entropy(model(inputs), targets)
        total.backward()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
            total = 0


def steps_from_the_first_full_window_on(model, optimizer, micro_batches, accumulation_steps):
    for step, (inputs, targets) in enumerate(micro_batches):
        cross_entropy(model(inputs), targets).backward()
        if step + 1 >= accumulation_steps:
            optimizer.step()
            optimizer.zero_grad()


def steps_in_the_middle(model, optimizer, micro_batches, accumulation_steps):
    for step, (inputs, targets) in enumerate(micro_batches):
        cross_entropy(model(inputs), targets).backward()
        if step % accumulation_steps == accumulation_steps // 2:
            optimizer.step()
            optimizer.zero_grad()


def goes_on_with_the_total(model, optimizer, micro_batches, accumulation_steps):
    losses = []
    for step, (inputs, targets) in enumerate(micro_batches, start=1):
        losses.append(cross_entropy(model(inputs), targets))
        if step % accumulation_steps == 0:
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()


def clears_before_the_last_backward(model, optimizer, micro_batches, accumulation_steps):
    for step, (inputs, targets) in enumerate(micro_batches):
        loss = cross_entropy(model(inputs), targets)
        if (step + 1) % accumulation_steps == 0:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            loss.backward()


RIGHT = [
    clears_at_the_start_of_a_window,
    cuts_into_windows,
    collects_by_hand,
    takes_from_an_iterator,
    moves_by_hand,
    gives_a_closure,
]
WRONG = [pops_the_list, leaves_eval_on, goes_backwards]
NAMED = [
    (clears_before_the_loop, "not_cleared"),
    (clears_when_it_does_not_step, "cleared_inside", ...),
    (steps_once_in_all, "one_step_in_all"),
    (drops_the_last_window, "stepped_late"),
    (divides_and_never_clears, "not_cleared_and_divided"),
    (repairs_nothing_and_divides, "cleared_inside_and_divided"),
    (goes_backward_from_the_total, "freed_graph"),
    (goes_on_with_the_total, "total_goes_on"),
    (clears_before_the_last_backward, "cleared_inside"),
    (steps_from_the_first_full_window_on,),
]
WEIGHED = [
    (repairs_nothing_and_divides, "s 0, 0, 0, 1/4 and should have 1 each", ""),
    (steps_in_the_middle, "s 1, 1, 1, 0 and should have 1 each", ""),
    (drops_the_last_window, "", ""),
]
