"""Ways to fill `.grad` from a window of padded text, right and wrong: answers to 5.3, and in a step to 5.2."""

import torch
from torch.nn.functional import cross_entropy

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
    return sum(losses) / count_of(micro_batches)


def row_by_row(model, micro_batches):
    count, total = sum((targets >= 0).sum().item() for _, targets in micro_batches), 0.0
    for inputs, targets in micro_batches:
        for row, wanted in zip(inputs, targets, strict=True):
            kept = wanted != -100
            loss = cross_entropy(model(row[None])[0][kept], wanted[kept], reduction="none").sum()
            loss.backward(torch.full_like(loss, 1 / count))
            total += float(loss)
    return total / count


def means_of_those_with_targets(model, micro_batches):
    some = [each for each in micro_batches if data.count_targets(each)]
    losses = [loss_sum(model, each) / data.count_targets(each) / len(some) for each in some]
    for loss in losses:
        loss.backward()
    return sum(losses)


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


RIGHT = [means_in_float32_without_the_empty, collects_by_hand, divides_at_the_end, row_by_row]
WRONG = [
    means_of_those_with_targets,
    zero_over_zero,
    stops_at_the_empty,
    keeps_all_graphs,
    padding_at_the_edges_only,
    returns_nothing,
    lambda model, micro_batches: None,
]
