"""5.2: further right answers, which must get full points, and wrong ones, which must not."""

import fills


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


RIGHT = [*map(clears_last, fills.RIGHT), clears_first, by_closure]
WRONG = [*map(clears_last, fills.WRONG), clears_before_the_step, smaller_learning_rate]
# Mutants of the reference answer that are right too, and why.
EQUIVALENT = {"11: loss.item() -> loss": "a number in a tensor is a number, and the graph was freed by backward"}
