"""5.2: further right answers, which must get full points, and wrong ones, which must not."""

import fills
import torch


def clears_last(fill):
    def step(model, optimizer, micro_batches):
        mean = fill(model, micro_batches)
        optimizer.step()
        model.zero_grad()
        return mean

    return step


def clears_first(model, optimizer, micro_batches):
    optimizer.zero_grad(set_to_none=False)
    mean = fills.row_by_row(model, micro_batches)
    optimizer.step()
    return mean


def by_closure(model, optimizer, micro_batches):
    def closure():
        optimizer.zero_grad()
        return fills.collects_by_hand(model, micro_batches)

    return optimizer.step(closure)


def smaller_learning_rate(model, optimizer, micro_batches):
    """Right for plain SGD only."""
    total, count = 0.0, fills.count_of(micro_batches)
    for micro_batch in micro_batches:
        loss = fills.loss_sum(model, micro_batch)
        loss.backward()
        total += loss.item()
    optimizer.param_groups[0]["lr"] /= count
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= count
    optimizer.zero_grad()
    return total / count


def clears_before_the_step(model, optimizer, micro_batches):
    mean = fills.divides_at_the_end(model, micro_batches)
    optimizer.zero_grad()
    optimizer.step()
    return mean


def clips(model, optimizer, micro_batches):
    optimizer.zero_grad()
    mean = fills.row_by_row(model, micro_batches)
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    return mean


def never_clears_and_returns_nothing(model, optimizer, micro_batches):
    fills.row_by_row(model, micro_batches)
    optimizer.step()


def steps_at_each_mean(model, optimizer, micro_batches):
    for micro_batch in micro_batches:
        optimizer.zero_grad()
        fills.divides_at_the_end(model, [micro_batch])
        optimizer.step()


def moves_the_weights_itself(model, optimizer, micro_batches):
    mean = fills.divides_at_the_end(model, micro_batches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= optimizer.param_groups[0]["lr"] * parameter.grad
    return mean


def means_and_never_clears(model, optimizer, micro_batches):
    total = 0.0
    for each in micro_batches:
        loss = fills.mean_of(model, each) / len(micro_batches)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


RIGHT = [*map(clears_last, fills.RIGHT), clears_first, by_closure]
WRONG = [*map(clears_last, fills.WRONG), smaller_learning_rate, steps_at_each_mean, moves_the_weights_itself]
NAMED = [
    *((clears_last(fill), *names) for fill, *names in fills.NAMED),
    (clears_before_the_step, "cleared_before_the_step"),
    (clips, "clipped"),
    (never_clears_and_returns_nothing, "nothing_returned", "not_cleared"),
    (means_and_never_clears, "mean_of_means_but_empty_and_not_cleared"),
]
WEIGHED = [(clears_last(fill), *rest) for fill, *rest in fills.WEIGHED]
