"""4.3: further right answers, which must get full points, and wrong ones, which must not."""

from itertools import chain

from torch.nn.functional import cross_entropy

import gradaccum


def module_windows(model, optimizer, micro_batches, accumulation_steps, epochs):
    for window in chain.from_iterable(gradaccum.windows(micro_batches, accumulation_steps) for _ in range(epochs)):
        for inputs, targets in window:
            (cross_entropy(model(inputs), targets) / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_parity(model, optimizer, micro_batches, k, epochs):
    last = len(micro_batches)
    for _ in range(epochs):
        for step, (inputs, targets) in enumerate(micro_batches):
            length = k if step < last - last % k else last % k
            (cross_entropy(model(inputs), targets) / length).backward()
            if (step + 1) % k == 0 or step + 1 == last:
                optimizer.step()
                optimizer.zero_grad()


def by_closure(model, optimizer, micro_batches, k, epochs):
    for _ in range(epochs):
        for start in range(0, len(micro_batches), k):

            def closure(window=micro_batches[start : start + k]):
                model.zero_grad()
                for inputs, targets in window:
                    (cross_entropy(model(inputs), targets) / len(window)).backward()

            optimizer.step(closure)


def divided_by_all(model, optimizer, micro_batches, k, epochs):
    for _ in range(epochs):
        for window in gradaccum.windows(micro_batches, k):
            for inputs, targets in window:
                (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()
            optimizer.step()
            optimizer.zero_grad()


def one_step_too_many(model, optimizer, micro_batches, k, epochs):
    for _ in range(epochs):
        with_parity(model, optimizer, micro_batches, k, 1)
        optimizer.step()


def smaller_learning_rate(model, optimizer, micro_batches, k, epochs):
    for window in [*gradaccum.windows(micro_batches, k)] * epochs:
        for inputs, targets in window:
            cross_entropy(model(inputs), targets).backward()
        optimizer.param_groups[0]["lr"] /= len(window)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= len(window)
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


def does_nothing(model, optimizer, micro_batches, k, epochs):
    pass


RIGHT = [module_windows, with_parity, by_closure]
WRONG = [divided_by_all, one_step_too_many, smaller_learning_rate, cleared_at_the_start, does_nothing]
