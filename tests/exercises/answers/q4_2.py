"""4.2: further right answers, which must get full points, and wrong ones, which must not."""

import torch
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy, log_softmax, nll_loss


def windows_of(micro_batches, k):
    return [micro_batches[start : start + k] for start in range(0, len(micro_batches), k)]


def update(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def on_windows(fill, cut=windows_of):
    """Make an answer of what fills `.grad` from a window."""

    def train_epoch(model, optimizer, micro_batches, k):
        for window in cut(micro_batches, k):
            fill(model, window)
            update(optimizer)

    return train_epoch


def fill(model, window):
    for inputs, targets in window:
        (cross_entropy(model(inputs), targets) / len(window)).backward()


def fill_undivided(model, window):
    for inputs, targets in window:
        cross_entropy(model(inputs), targets).backward()


def summed_in_reverse(model, window):
    items = sum(targets.numel() for _, targets in window)
    for inputs, targets in reversed(window):
        (cross_entropy(model(inputs), targets, reduction="sum") / items).backward()


def scaled_at_once(model, window):
    fill_undivided(model, window)
    torch._foreach_div_([parameter.grad for parameter in model.parameters()], len(window))


def passes_the_gradient_in(model, window):
    for inputs, targets in window:
        loss = nll_loss(log_softmax(model(inputs), -1), targets)
        loss.backward(torch.full_like(loss, 1 / len(window)))


def by_hand(model, window):
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for inputs, targets in window:
        for held, found in zip(
            total, torch.autograd.grad(cross_entropy(model(inputs), targets), parameters), strict=True
        ):
            held += found
    for parameter, held in zip(parameters, total, strict=True):
        parameter.grad = held / len(window)


def functional(model, window):
    held = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for inputs, targets in window:
        found = grad(lambda given, x=inputs, y=targets: cross_entropy(functional_call(model, given, (x,)), y))(held)
        for name, parameter in model.named_parameters():
            share = found[name] / len(window)
            parameter.grad = share if parameter.grad is None else parameter.grad + share


def with_hooks(model, window):
    hooks = [each.register_hook(lambda gradient: gradient / len(window)) for each in model.parameters()]
    fill_undivided(model, window)
    for hook in hooks:
        hook.remove()


def with_parity(model, optimizer, micro_batches, k):
    last = len(micro_batches)
    for step, (inputs, targets) in enumerate(micro_batches):
        if step % k == 0:
            model.zero_grad()
        length = k if step < last - last % k else last % k
        (cross_entropy(model(inputs), targets) * (1 / length)).backward()
        if (step + 1) % k == 0 or step + 1 == last:
            optimizer.step()


def cleared_first(model, optimizer, micro_batches, k):
    for window in windows_of(micro_batches, k):
        optimizer.zero_grad(set_to_none=False)
        fill(model, window)
        optimizer.step()


def by_closure(model, optimizer, micro_batches, k):
    for window in windows_of(micro_batches, k):

        def closure(window=window):
            optimizer.zero_grad()
            fill(model, window)

        optimizer.step(closure)


def smaller_learning_rate(model, optimizer, micro_batches, k):
    """Right for plain SGD only."""
    for window in windows_of(micro_batches, k):
        fill_undivided(model, window)
        optimizer.param_groups[0]["lr"] /= len(window)
        update(optimizer)
        optimizer.param_groups[0]["lr"] *= len(window)


def one_step_too_many(model, optimizer, micro_batches, k):
    with_parity(model, optimizer, micro_batches, k)
    optimizer.step()


def step_at_the_end(divisor, clears=True):
    """Step once more after the loop, whatever is left over."""

    def train_epoch(model, optimizer, micro_batches, k):
        for step, (inputs, targets) in enumerate(micro_batches):
            (cross_entropy(model(inputs), targets) / divisor(step, k, len(micro_batches))).backward()
            if (step + 1) % k == 0:
                update(optimizer)
        optimizer.step()
        if clears:
            optimizer.zero_grad()

    return train_epoch


def own_length(step, k, last):
    return min(k, last - step // k * k)


def as_equal_as_can_be(micro_batches, k):
    windows = -(-len(micro_batches) // k)
    return windows_of(micro_batches, -(-len(micro_batches) // windows))


def rest_joins_the_last(micro_batches, k):
    *windows, last = windows_of(micro_batches, k)
    return [*windows[:-1], windows[-1] + last] if windows and len(last) < k else [*windows, last]


def with_backward_after_the_loop(model, window):
    for inputs, targets in window:
        loss = cross_entropy(model(inputs), targets) / len(window)
    loss.backward()


def divided_by_k_in_one_backward(model, optimizer, micro_batches, k):
    for window in windows_of(micro_batches, k):
        sum(cross_entropy(model(inputs), targets) / k for inputs, targets in window).backward()
        update(optimizer)


def one_backward(model, window):
    sum(cross_entropy(model(inputs), targets) / len(window) for inputs, targets in window).backward()


def keeps_outputs(model, window):
    kept = []
    for inputs, targets in window:
        kept.append(model(inputs))
        (cross_entropy(kept[-1], targets) / len(window)).backward()


def keeps_graphs(model, window):
    kept = []
    for inputs, targets in window:
        kept.append(cross_entropy(model(inputs), targets) / len(window))
        kept[-1].backward(retain_graph=True)


def detached(model, window):
    loss = sum(cross_entropy(model(inputs), targets).item() for inputs, targets in window) / len(window)
    torch.tensor(loss, requires_grad=True).backward()


def leaves_eval_on(model, optimizer, micro_batches, k):
    model.eval()
    with_parity(model, optimizer, micro_batches, k)


def pops(model, optimizer, micro_batches, k):
    while micro_batches:
        fill(model, [micro_batches.pop(0) for _ in range(min(k, len(micro_batches)))])
        update(optimizer)


def backward_from_the_total(model, window):
    total = 0
    for inputs, targets in window:
        total += cross_entropy(model(inputs), targets)
        total.backward(retain_graph=True)


def rest_by_one_more(step, k, last):
    return k if step < last - last % k else last % k + 1


def by_number(divisor):
    """Divide as `divisor` says."""

    def train_epoch(model, optimizer, micro_batches, k):
        last = len(micro_batches)
        for step, (inputs, targets) in enumerate(micro_batches):
            (cross_entropy(model(inputs), targets) / divisor(step, k, last)).backward()
            if (step + 1) % k == 0 or step + 1 == last:
                update(optimizer)

    return train_epoch


def with_the_last_of_before(micro_batches, k):
    return [micro_batches[max(start - 1, 0) : start + k] for start in range(0, len(micro_batches), k)]


RIGHT_FILLS = [summed_in_reverse, scaled_at_once, passes_the_gradient_in, by_hand, functional, with_hooks]
RIGHT = [*map(on_windows, RIGHT_FILLS), with_parity, cleared_first, by_closure]
WRONG = [
    one_step_too_many,
    smaller_learning_rate,
    leaves_eval_on,
    pops,
    on_windows(fill, rest_joins_the_last),
    lambda model, optimizer, micro_batches, k: with_parity(model, optimizer, micro_batches[:-1] or micro_batches, k),
]
NAMED = [
    *[(on_windows(each), "joined_windows") for each in (one_backward, keeps_outputs, keeps_graphs)],
    (divided_by_k_in_one_backward, "divided_by_k", "joined_windows"),
    (on_windows(with_backward_after_the_loop), "cleared_inside"),
    (on_windows(detached), "cleared_before_the_step"),
    (step_at_the_end(own_length), "a_step_more"),
    (step_at_the_end(lambda step, k, last: k), "a_step_more", "divided_by_k"),
    (step_at_the_end(own_length, clears=False), "a_step_more", "last_not_cleared"),
    (on_windows(backward_from_the_total), "running_total_undivided", "joined_windows"),
    (on_windows(fill, as_equal_as_can_be),),
    (smaller_learning_rate,),
]
WEIGHED = [
    (on_windows(fill_undivided), "s 1 each and should have 1/3 each", "In update 1: Each micro-batch got the weight 1"),
    (on_windows(backward_from_the_total), "s 3, 2, 1 and should have 1/3 each", ""),
    (by_number(rest_by_one_more), " 1/2 and should have 1.", ""),
    (by_number(lambda step, k, last: k if step < k else 1), "s 1 each and should have 1/3 each", ""),
    (on_windows(fill, with_the_last_of_before), "s 1/4 each and should have 0, 1/3, 1/3, 1/3.", ""),
    (on_windows(lambda model, window: fill(model, [*window, window[-1]])), "s 1/4, 1/4, 1/2 and should", ""),
    (smaller_learning_rate, "s 1 each and should", "In update 1: Each micro-batch got the weight 1: the gradient is 3"),
]
