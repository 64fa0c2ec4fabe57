"""5.3: further right answers, which must get full points, and wrong ones, which must not."""

import fills


def empties_last(model, micro_batches):
    mean = fills.divides_at_the_end(model, micro_batches)
    model.zero_grad(set_to_none=False)
    return mean


def no_graph_at_all(model, micro_batches):
    mean = sum(fills.loss_sum(model, each).detach() for each in micro_batches) / fills.count_of(micro_batches)
    mean.requires_grad_().backward()
    return mean.item()


def divides_by_those_so_far(model, micro_batches):
    total, count = 0.0, 0
    for micro_batch in micro_batches:
        loss, count = fills.loss_sum(model, micro_batch), count + fills.count_of([micro_batch])
        total += loss.item()
        (loss / count).backward()
    return total / count


def equal_counts_once(model, micro_batches):
    count, total = sum({int(fills.count_of([each])) for each in micro_batches}), 0.0
    for micro_batch in micro_batches:
        loss = fills.loss_sum(model, micro_batch) / count
        loss.backward()
        total += loss.item()
    return total


RIGHT = fills.RIGHT
WRONG = [*fills.WRONG, equal_counts_once]
NAMED = [
    *fills.NAMED,
    (empties_last, "cleared_at_the_end"),
    (no_graph_at_all, "cleared_at_the_end"),
    (divides_by_those_so_far, "count_so_far"),
]
WEIGHED = fills.WEIGHED
