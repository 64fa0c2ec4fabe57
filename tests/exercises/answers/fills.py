"""Ways to fill `.grad` from a window of padded text, right and wrong: answers to 5.3, and in a step to 5.2."""

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from gradaccum import data


def loss_sum(model, micro_batch):
    return cross_entropy(model(micro_batch[0]).transpose(1, 2), micro_batch[1], reduction="sum")


def count_of(micro_batches):
    return sum(map(data.count_targets, micro_batches))


def means_in_float32_without_the_empty(model, micro_batches):
    mean = torch.zeros(())
    for inputs, targets in micro_batches:
        share = (data.count_targets((inputs, targets)) / count_of(micro_batches)).float()
        if share > 0:
            loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) * share
            loss.backward()
            mean += loss.detach()
    return mean


def collects_by_hand(model, micro_batches):
    parameters = list(model.parameters())
    held, mean = [torch.zeros_like(parameter) for parameter in parameters], 0
    for micro_batch in micro_batches[::-1]:
        loss = loss_sum(model, micro_batch) / count_of(micro_batches)
        held = [one + other for one, other in zip(held, torch.autograd.grad(loss, parameters), strict=True)]
        mean = mean + loss.detach()
    for parameter, found in zip(parameters, held, strict=True):
        parameter.grad = found
    return mean


def divides_at_the_end(model, micro_batches):
    model.zero_grad()
    losses = []
    for micro_batch in micro_batches:
        losses.append(loss_sum(model, micro_batch))  # kept, but its graph is gone after backward
        losses[-1].backward()
    for parameter in model.parameters():
        parameter.grad.div_(count_of(micro_batches))
    return sum(losses).item() / count_of(micro_batches)


def row_by_row(model, micro_batches):
    count, total = sum((targets >= 0).sum().item() for _, targets in micro_batches), 0.0
    for inputs, targets in micro_batches:
        for row, wanted in zip(inputs, targets, strict=True):
            kept = wanted != -100
            loss = cross_entropy(model(row[None])[0][kept], wanted[kept], reduction="none").sum()
            loss.backward(torch.full_like(loss, 1 / count))
            total += float(loss)
    return total / count


def by_functions(model, micro_batches):
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    count, mean = count_of(micro_batches), 0.0

    def loss_of(parameters, inputs, targets):
        logits = torch.func.functional_call(model, parameters, (inputs,))
        return cross_entropy(logits.permute(0, 2, 1), targets, reduction="none").sum() / count

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for inputs, targets in micro_batches:
        found, loss = torch.func.grad_and_value(loss_of)(parameters, inputs, targets)
        torch._foreach_add_([parameter.grad for parameter in model.parameters()], list(found.values()))
        mean += loss.numpy()
    return mean


def scales_by_hooks(model, micro_batches):
    count = count_of(micro_batches)
    hooks = [parameter.register_hook(lambda gradient: gradient / count) for parameter in model.parameters()]
    total = 0.0
    for micro_batch in iter(micro_batches):
        loss = loss_sum(model, micro_batch)
        loss.backward(retain_graph=True)  # its own graph alone, which the next one replaces
        total += loss.item()
    for hook in hooks:
        hook.remove()
    return total / count


def checkpoints_each(model, micro_batches):
    """One backward at the end, but each micro-batch is computed anew in it."""
    losses = [checkpoint(loss_sum, model, each, use_reentrant=False) for each in micro_batches]
    mean = sum(losses) / count_of(micro_batches)
    mean.backward()
    return mean.item()


def means_of_those_with_targets(model, micro_batches):
    some = [each for each in micro_batches if data.count_targets(each)]
    losses = [loss_sum(model, each) / data.count_targets(each) / len(some) for each in some]
    for loss in losses:
        loss.backward()
    return sum(losses)


def above_zero(model, micro_batches):
    count, total = sum((targets > 0).sum() for _, targets in micro_batches), 0.0
    for micro_batch in micro_batches:
        loss = loss_sum(model, micro_batch) / count
        loss.backward()
        total += loss.item()
    return total


def retains_the_running_sum(model, micro_batches):
    total = 0.0
    for micro_batch in micro_batches:
        total = total + loss_sum(model, micro_batch) / count_of(micro_batches)
        total.backward(retain_graph=True)
    return total.item()


def backward_twice(model, micro_batches):
    for micro_batch in micro_batches:
        loss = loss_sum(model, micro_batch) / count_of(micro_batches)
        loss.backward()
        loss.backward()
    return loss.item()


def keeps_the_logits(model, micro_batches):
    kept, total = [], 0.0
    for inputs, targets in micro_batches:
        logits = model(inputs)
        kept.append(logits.detach())
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / count_of(micro_batches)
        loss.backward()
        total += loss.item()
    return total


def returns_its_graph(model, micro_batches):
    mean = 0.0
    for micro_batch in micro_batches:
        loss = loss_sum(model, micro_batch) / count_of(micro_batches)
        loss.backward()
        mean += loss
    return mean


def means_in_one_backward(model, micro_batches):
    losses = [loss_sum(model, each) / data.count_targets(each) for each in micro_batches]
    mean = sum(losses) / len(losses)
    mean.backward()
    return mean.item()


def divides_what_it_returns(model, micro_batches):
    losses = [loss_sum(model, each) for each in micro_batches]
    for loss in losses:
        loss.backward()
    return sum(losses).item() / count_of(micro_batches)


def backward_for_the_last(model, micro_batches):
    total = 0.0
    for micro_batch in micro_batches:
        loss = loss_sum(model, micro_batch) / count_of(micro_batches)
        total += loss.item()
    loss.backward()
    return total


def pads_and_returns_nothing(model, micro_batches):
    for micro_batch in micro_batches:
        (loss_sum(model, micro_batch) / sum(targets.numel() for _, targets in micro_batches)).backward()


def leaves_eval_on(model, micro_batches):
    model.eval()
    return divides_at_the_end(model, micro_batches)


def ignored_become_zeros(model, micro_batches):
    mean = divides_at_the_end(model, micro_batches)
    for _, targets in micro_batches:
        targets[targets == data.IGNORED] = 0
    return mean


def zero_over_zero(model, micro_batches):
    total = 0.0
    for micro_batch in micro_batches:
        count = data.count_targets(micro_batch)
        loss = loss_sum(model, micro_batch) / count * (count / count_of(micro_batches))
        loss.backward()
        total += loss.item()
    return total


def stops_at_the_empty(model, micro_batches):
    empty = [not data.count_targets(each) for each in micro_batches]
    return divides_at_the_end(model, micro_batches[: [*empty, True].index(True)] or micro_batches)


def padding_at_the_edges_only(model, micro_batches):
    """Takes a row's targets to be those that follow its first place."""
    count, total = count_of(micro_batches), 0.0
    for inputs, targets in micro_batches:
        for row, wanted in zip(inputs, targets, strict=True):
            here = slice(1, 1 + int((wanted != data.IGNORED).sum()))
            loss = cross_entropy(model(row[None])[0][here], wanted[here], reduction="sum") / count
            loss.backward()
            total += loss.item()
    return total


def keeps_all_graphs(model, micro_batches):
    kept = [loss_sum(model, micro_batch) / count_of(micro_batches) for micro_batch in micro_batches]
    for loss in kept:
        loss.backward(retain_graph=True)
    return sum(kept)


def returns_nothing(model, micro_batches):
    divides_at_the_end(model, micro_batches)


RIGHT = [
    means_in_float32_without_the_empty,
    collects_by_hand,
    divides_at_the_end,
    row_by_row,
    by_functions,
    scales_by_hooks,
    checkpoints_each,
]
WRONG = [
    zero_over_zero,
    stops_at_the_empty,
    padding_at_the_edges_only,
    leaves_eval_on,
    lambda model, micro_batches: None,
    lambda model, micro_batches: round(row_by_row(model, micro_batches), 3),
]
NAMED = [
    (means_of_those_with_targets, "mean_of_means", ...),
    (above_zero, "above_zero_counted"),
    (retains_the_running_sum, "graphs_retained"),
    (backward_twice,),
    (keeps_all_graphs, "graph_returned", "one_backward"),
    (keeps_the_logits, "one_backward"),
    (returns_its_graph, "graph_returned"),
    (returns_nothing, "nothing_returned"),
    (means_in_one_backward, "mean_of_means", "one_backward"),
    (divides_what_it_returns, "not_divided", "one_backward"),
    (backward_for_the_last, "cleared_inside"),
    (pads_and_returns_nothing, "padding_counted", "nothing_returned"),
    (ignored_become_zeros, "ignored_overwritten"),
]


def by_losses(losses):
    """Make a fill of what gives each micro-batch's loss, of the model, the micro-batch and the window."""

    def fill(model, micro_batches):
        total = 0.0
        for micro_batch in micro_batches:
            loss = losses(model, micro_batch, micro_batches)
            loss.backward()
            total += loss.item()
        return total

    return fill


def shifted_sum(model, micro_batch, reduction="sum"):
    logits = model(micro_batch[0])[:, :-1]
    return cross_entropy(logits.flatten(0, 1), micro_batch[1][:, 1:].flatten(), reduction=reduction)


def mean_of(model, micro_batch):
    return loss_sum(model, micro_batch) / max(count_of([micro_batch]), 1)


def above(*micro_batches):
    return sum((targets > 0).sum() for _, targets in micro_batches)


def retains_the_undivided_sum(model, micro_batches):
    total = 0.0
    for micro_batch in micro_batches:
        total = total + loss_sum(model, micro_batch)
        total.backward(retain_graph=True)
    return total.item()


SHIFTED = [
    (by_losses(lambda model, each, window: shifted_sum(model, each) / count_of(window)), "shifted_beside_all"),
    (by_losses(lambda model, each, window: shifted_sum(model, each, "mean") / len(window)), "shifted_means"),
    (retains_the_undivided_sum, "retained_and_undivided"),
    (by_losses(lambda model, each, window: mean_of(model, each) * above(each) / above(*window)), "sums_by_above_zero"),
    (by_losses(lambda model, each, window: mean_of(model, each) / max(count_of([each]), 1)), "own_counts_twice"),
]
WEIGHED = [
    (
        by_losses(lambda model, each, window: loss_sum(model, each) / (count_of(window) + 1)),
        " 4/5 and",
        "where 4 items",
    ),
    (
        by_losses(
            lambda model, each, window: mean_of(model, each) * each[1].numel() / sum(y.numel() for _, y in window)
        ),
        "s 0.471, 0.0882, 0.441 and should have 0.588, 0.0588, 0.353.",
        "",
    ),
    (
        by_losses(
            lambda model, each, window: (
                loss_sum(model, each) / count_of(window) * (each is not window[-1] or len(window) == 1)
            )
        ),
        "s 0.588, 0.0588, 0 and should have 0.588, 0.0588, 0.353.",
        "",
    ),
    (
        by_losses(
            lambda model, each, window: (
                loss_sum(model, each) / count_of(window) + 0.01 * sum(p.square().sum() for p in model.parameters())
            )
        ),
        "",
        "of this gradient is not a weighted sum",
    ),
    (retains_the_running_sum, "s 1.76, 0.118, 0.353 and should have 0.588, 0.0588, 0.353.", ""),
]
NAMED += SHIFTED
