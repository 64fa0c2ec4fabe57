"""4.3: further right answers, which must get full points, and wrong ones, which must not."""

from itertools import chain

from torch.nn.functional import cross_entropy

import gradaccum


def on_windows(windows, divisor=len):
    """Make an answer of the windows of all epochs."""

    def train(model, optimizer, micro_batches, k, epochs):
        for window in windows(micro_batches, k, epochs):
            for inputs, targets in window:
                (cross_entropy(model(inputs), targets) / divisor(window)).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def module_windows(micro_batches, k, epochs):
    return chain.from_iterable(gradaccum.windows(micro_batches, k) for _ in range(epochs))


def slices(micro_batches, k, epochs):
    return [micro_batches[start : start + k] for start in range(0, len(micro_batches), k)] * epochs


def as_equal_as_can_be(micro_batches, k, epochs):
    windows = -(-len(micro_batches) // k)
    return slices(micro_batches, -(-len(micro_batches) // windows), epochs)


def rest_joins_the_last(micro_batches, k, epochs):
    *windows, last = slices(micro_batches, k, 1)
    return ([*windows[:-1], windows[-1] + last] if windows and len(last) < k else [*windows, last]) * epochs


def with_parity(model, optimizer, micro_batches, k, epochs):
    last = len(micro_batches)
    for _ in range(epochs):
        for step, (inputs, targets) in enumerate(micro_batches):
            if step % k == 0:
                optimizer.zero_grad()
            length = k if step < last - last % k else last % k
            (cross_entropy(model(inputs), targets) / length).backward()
            if (step + 1) % k == 0 or step + 1 == last:
                optimizer.step()


def rest_after_the_loop(model, optimizer, micro_batches, k, epochs):
    for _ in range(epochs):
        for step, (inputs, targets) in enumerate(micro_batches):
            cross_entropy(model(inputs), targets).backward()
            if (step + 1) % k == 0:
                scaled_step(model, optimizer, k)
        if len(micro_batches) % k:
            scaled_step(model, optimizer, len(micro_batches) % k)


def scaled_step(model, optimizer, length):
    for parameter in model.parameters():
        parameter.grad /= length
    optimizer.step()
    optimizer.zero_grad()


def by_closure(model, optimizer, micro_batches, k, epochs):
    for window in slices(micro_batches, k, epochs):

        def closure(window=window):
            model.zero_grad()
            for inputs, targets in window:
                (cross_entropy(model(inputs), targets) / len(window)).backward()

        optimizer.step(closure)


def one_step_too_many(model, optimizer, micro_batches, k, epochs):
    for _ in range(epochs):
        with_parity(model, optimizer, micro_batches, k, 1)
        optimizer.step()


def smaller_learning_rate(model, optimizer, micro_batches, k, epochs):
    for window in slices(micro_batches, k, epochs):
        for inputs, targets in window:
            cross_entropy(model(inputs), targets).backward()
        optimizer.param_groups[0]["lr"] /= len(window)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= len(window)
        optimizer.zero_grad()


def loops(steps, length=lambda step, k, last: k, clears_first=False):
    """Make the loop as it is given, with another condition and another divisor."""

    def train(model, optimizer, micro_batches, k, epochs):
        last = len(micro_batches)
        for epoch in range(epochs):
            if clears_first:
                optimizer.zero_grad()
            for step, (inputs, targets) in enumerate(micro_batches):
                (cross_entropy(model(inputs), targets) / length(step, k, last)).backward()
                if steps(step, k, last, epoch == epochs - 1):
                    optimizer.step()
                    optimizer.zero_grad()

    return train


def full(step, k, last, _):
    return (step + 1) % k == 0


def ends(step, k, last, _):
    return (step + 1) % k == 0 or step == last - 1


def own_length(step, k, last):
    return min(k, last - step // k * k)


RIGHT = [
    *map(on_windows, [module_windows, slices]),
    loops(ends, own_length),
    with_parity,
    rest_after_the_loop,
    by_closure,
]
WRONG = [
    one_step_too_many,
    smaller_learning_rate,
    on_windows(rest_joins_the_last),
    on_windows(slices, lambda window: len(window) + 1),
    lambda model, optimizer, micro_batches, k, epochs: (
        model.eval() and with_parity(model, optimizer, micro_batches, k, epochs)
    ),
]
NAMED = [
    (on_windows(as_equal_as_can_be),),
    (smaller_learning_rate,),
    (loops(full), "leftover_leaks"),
    (loops(full, own_length), "leftover_leaks"),
    (loops(full, clears_first=True), "leftover_dropped"),
    (loops(lambda step, k, last, _: step % k == 0, own_length), "off_by_one"),
    (loops(lambda step, k, last, _: step and step % k == 0), "first_longer"),
    (loops(lambda step, k, last, _: step + 1 % k == 0), "wrong_precedence"),
    (loops(lambda step, k, last, _: (step + 1) % k == 0 or step == last), "leftover_leaks"),
    (loops(lambda *at: full(*at) or (at[-1] and ends(*at))), "stepped_at_the_very_end"),
    (loops(ends, lambda step, k, last: min(k, last)), "shorter_of_epoch_and_k"),
    (loops(ends, lambda step, k, last: last % k), "remainder_for_all"),
    (loops(ends, lambda step, k, last: step + 1), "divided_by_all_so_far"),
    (on_windows(lambda *of: slices(of[0] * of[2], of[1], 1)), "counted_on"),
]
