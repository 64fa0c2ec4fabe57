"""2.3: further right answers, which must get full points, and wrong ones, which must not."""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def splits(model, optimizer, inputs, targets, most_rows):
    for piece, wanted in zip(inputs.split(most_rows), targets.split(most_rows), strict=True):
        nn.CrossEntropyLoss(reduction="sum")(model(piece), wanted).backward()
    optimizer.step()
    optimizer.zero_grad()


def chunks_by_a_number_rounded_up(model, optimizer, inputs, targets, most_rows):
    optimizer.zero_grad()
    number = math.ceil(len(inputs) / most_rows)
    for piece, wanted in zip(inputs.chunk(number), targets.chunk(number), strict=True):
        cross_entropy(model(piece), wanted, reduction="sum").backward()
    optimizer.step()


def row_by_row(model, optimizer, inputs, targets, most_rows):
    for row, wanted in zip(inputs, targets, strict=True):
        cross_entropy(model(row), wanted).backward()
    optimizer.step()
    model.zero_grad()


def means_times_their_rows(model, optimizer, inputs, targets, most_rows):
    start = 0
    while start < len(inputs):
        end = min(start + most_rows, len(inputs))
        loss = cross_entropy(model(inputs[start:end]), targets[start:end]) * (end - start)
        loss.backward()
        start = end
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad.zero_()


def collects_by_hand_from_the_end(model, optimizer, inputs, targets, most_rows):
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for end in range(len(inputs), 0, -most_rows):
        rows = slice(max(0, end - most_rows), end)
        loss = cross_entropy(model(inputs[rows]), targets[rows], reduction="none").sum()
        for held, found in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            held += found
    for parameter, held in zip(parameters, total, strict=True):
        parameter.grad = held
    optimizer.step()


def draws_from_a_loader(model, optimizer, inputs, targets, most_rows):
    losses = []
    for piece, wanted in DataLoader(TensorDataset(inputs, targets), batch_size=most_rows, shuffle=True):
        losses.append(cross_entropy(model(piece), wanted, reduction="sum"))
        losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()


def gives_a_closure(model, optimizer, inputs, targets, most_rows):
    def closure():
        optimizer.zero_grad()
        total = 0.0
        for start in range(0, len(inputs), most_rows):
            rows = range(start, min(start + most_rows, len(inputs)))
            loss = cross_entropy(model(inputs[list(rows)]), targets[list(rows)], reduction="sum")
            loss.backward()
            total += loss.item()
        return total

    optimizer.step(closure)


def differentiates_a_function(model, optimizer, inputs, targets, most_rows):
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss_of(at, x, y):
        return cross_entropy(torch.func.functional_call(model, at, (x,)), y, reduction="sum")

    pieces = zip(inputs.split(most_rows), targets.split(most_rows), strict=True)
    gradients = [torch.func.grad(loss_of)(weights, *piece) for piece in pieces]
    for name, parameter in model.named_parameters():
        parameter.grad = sum(each[name] for each in gradients)
    optimizer.step()


def by_losses(loss, cut=None):
    """Make a step of what gives a piece's loss, of model, inputs, targets, most_rows and all rows."""

    def delayed_step(model, optimizer, inputs, targets, most_rows):
        pieces = cut(inputs, targets, most_rows) if cut else None
        for x, y in pieces or zip(inputs.split(most_rows), targets.split(most_rows), strict=True):
            loss(model, x, y, most_rows, len(inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return delayed_step


def summed(model, x, y, most_rows=None, rows=None):
    return cross_entropy(model(x), y, reduction="sum")


def spoils_its_data(model, optimizer, inputs, targets, most_rows):
    splits(model, optimizer, inputs, targets, most_rows)
    inputs.zero_()


def leaves_eval_on(model, optimizer, inputs, targets, most_rows):
    model.eval()
    splits(model, optimizer, inputs, targets, most_rows)


def clears_some(model, optimizer, inputs, targets, most_rows):
    for piece, wanted in zip(inputs.split(most_rows), targets.split(most_rows), strict=True):
        summed(model, piece, wanted).backward()
    optimizer.step()
    model[0].zero_grad()


def whole_batch(model, optimizer, inputs, targets, most_rows):
    summed(model, inputs, targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def whole_batch_of_the_mean(model, optimizer, inputs, targets, most_rows):
    cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def cuts_the_logits(model, optimizer, inputs, targets, most_rows):
    logits = model(inputs)
    for piece, wanted in zip(logits.split(most_rows), targets.split(most_rows), strict=True):
        cross_entropy(piece, wanted, reduction="sum").backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()


def makes_so_many_pieces(model, optimizer, inputs, targets, most_rows):
    for x, y in zip(inputs.tensor_split(most_rows), targets.tensor_split(most_rows), strict=True):
        if len(x):
            summed(model, x, y).backward()
    optimizer.step()
    optimizer.zero_grad()


def drops_the_shorter_and_means(model, optimizer, inputs, targets, most_rows):
    for number in range(len(inputs) // most_rows):
        rows = slice(number * most_rows, (number + 1) * most_rows)
        cross_entropy(model(inputs[rows]), targets[rows]).backward()
    optimizer.step()
    optimizer.zero_grad()


def one_backward_of_means(model, optimizer, inputs, targets, most_rows):
    pieces = zip(inputs.split(most_rows), targets.split(most_rows), strict=True)
    sum(cross_entropy(model(x), y) for x, y in pieces).backward()
    optimizer.step()
    optimizer.zero_grad()


def keeps_all_graphs(model, optimizer, inputs, targets, most_rows):
    losses = []
    for x, y in zip(inputs.split(most_rows), targets.split(most_rows), strict=True):
        losses.append(summed(model, x, y))
        losses[-1].backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()


def keeps_the_outputs(model, optimizer, inputs, targets, most_rows):
    outputs = []
    for x, y in zip(inputs.split(most_rows), targets.split(most_rows), strict=True):
        outputs.append(model(x))
        cross_entropy(outputs[-1], y, reduction="sum").backward()
    optimizer.step()
    optimizer.zero_grad()


def shuffles_a_copy(model, optimizer, inputs, targets, most_rows):
    order = torch.randperm(len(inputs))
    splits(model, optimizer, inputs[order], targets[order], most_rows)


def guesses_without_a_graph(model, optimizer, inputs, targets, most_rows):
    with torch.no_grad():
        model(inputs)
    splits(model, optimizer, inputs, targets, most_rows)


def one_row_more(model, optimizer, inputs, targets, most_rows):
    splits(model, optimizer, inputs, targets, most_rows + 1)


def four_at_a_time(model, optimizer, inputs, targets, most_rows):
    splits(model, optimizer, inputs, targets, 4)


def rounds_to_the_nearest(model, optimizer, inputs, targets, most_rows):
    number = max(1, round(len(inputs) / most_rows))
    for piece, wanted in zip(inputs.tensor_split(number), targets.tensor_split(number), strict=True):
        summed(model, piece, wanted).backward()
    optimizer.step()
    optimizer.zero_grad()


def never_clears_and_means(model, optimizer, inputs, targets, most_rows):
    for x, y in zip(inputs.split(most_rows), targets.split(most_rows), strict=True):
        cross_entropy(model(x), y).backward()
    optimizer.step()


def clears_after_each(model, optimizer, inputs, targets, most_rows):
    for x, y in zip(inputs.split(most_rows), targets.split(most_rows), strict=True):
        summed(model, x, y).backward()
        optimizer.zero_grad()
    optimizer.step()


def backward_after_the_loop(model, optimizer, inputs, targets, most_rows):
    for x, y in zip(inputs.split(most_rows), targets.split(most_rows), strict=True):
        loss = summed(model, x, y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def total_without_retaining(model, optimizer, inputs, targets, most_rows):
    total = 0
    for x, y in zip(inputs.split(most_rows), targets.split(most_rows), strict=True):
        total += summed(model, x, y)
        total.backward()
    optimizer.step()
    optimizer.zero_grad()


def counts_the_last_twice(model, optimizer, inputs, targets, most_rows):
    rest = (len(inputs) - 1) // most_rows * most_rows
    summed(model, inputs[rest:], targets[rest:]).backward()
    splits(model, optimizer, inputs, targets, most_rows)


def steps_twice(model, optimizer, inputs, targets, most_rows):
    collects_by_hand_from_the_end(model, optimizer, inputs, targets, most_rows)
    optimizer.step()


def repeats_the_first_piece(model, optimizer, inputs, targets, most_rows):
    for _ in range(0, len(inputs), most_rows):
        summed(model, inputs[:most_rows], targets[:most_rows]).backward()
    optimizer.step()
    optimizer.zero_grad()


def means_from_the_end(model, optimizer, inputs, targets, most_rows):
    for end in range(len(inputs), 0, -most_rows):
        rows = slice(max(0, end - most_rows), end)
        cross_entropy(model(inputs[rows]), targets[rows]).backward()
    optimizer.step()
    optimizer.zero_grad()


def means_of_equal_pieces(model, optimizer, inputs, targets, most_rows):
    number = math.ceil(len(inputs) / most_rows)
    for x, y in zip(inputs.tensor_split(number), targets.tensor_split(number), strict=True):
        cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


RIGHT = [
    splits,
    chunks_by_a_number_rounded_up,
    row_by_row,
    means_times_their_rows,
    collects_by_hand_from_the_end,
    draws_from_a_loader,
    gives_a_closure,
    differentiates_a_function,
]
WRONG = [
    spoils_its_data,
    leaves_eval_on,
    clears_some,
    one_row_more,
    four_at_a_time,
    guesses_without_a_graph,
    repeats_the_first_piece,
    lambda *_: None,
]
NAMED = [
    (by_losses(lambda model, x, y, most, rows: cross_entropy(model(x), y)), "mean_of_each"),
    (by_losses(lambda model, x, y, most, rows: cross_entropy(model(x), y) * most), "mean_times_most_rows"),
    (by_losses(lambda model, x, y, most, rows: summed(model, x, y) / rows), "mean_over_all"),
    (by_losses(lambda model, x, y, most, rows: summed(model, x, y) / most), "sum_over_most_rows"),
    (whole_batch, "whole_batch"),
    (whole_batch_of_the_mean, "mean_over_all", "whole_batch"),
    (cuts_the_logits, "whole_batch"),
    (guesses_without_a_graph, "whole_batch"),
    (rounds_to_the_nearest,),
    (makes_so_many_pieces, "as_many_pieces"),
    (one_row_more,),
    (four_at_a_time,),
    (drops_the_shorter_and_means, "last_dropped_and_mean"),
    (one_backward_of_means, "mean_of_each", "one_backward"),
    (keeps_all_graphs, "one_backward"),
    (keeps_the_outputs, "one_backward"),
    (shuffles_a_copy, "one_backward"),
    (never_clears_and_means, "not_cleared_and_mean"),
    (clears_after_each, "cleared_before_step"),
    (backward_after_the_loop, "cleared_inside"),
    (total_without_retaining, "freed_graph"),
    (clears_some,),
    (counts_the_last_twice,),
    (repeats_the_first_piece,),
    (means_from_the_end,),
    (means_of_equal_pieces,),
]
WEIGHED = [
    (
        by_losses(lambda model, x, y, most, rows: cross_entropy(model(x), y)),
        "s 1/4, 1/4, 1/2 and should have 1 each",
        "",
    ),
    (
        by_losses(lambda model, x, y, most, rows: cross_entropy(model(x), y) * most),
        "s 1, 1, 2 and should have 1 each",
        "",
    ),
    (by_losses(lambda model, x, y, most, rows: summed(model, x, y) / rows), "s 1/10 each and should have 1 each", ""),
    (drops_the_shorter_and_means, "s 1/4, 1/4, 0 and should have 1 each", ""),
    (counts_the_last_twice, "s 1, 1, 2 and should have 1 each", ""),
    (steps_twice, "s 2 each and should have 1 each", ""),
    (backward_after_the_loop, "s 0, 0, 1 and should have 1 each", ""),
    (means_of_equal_pieces, "s 1/4, 1/3, 1/3 and should have 1 each", ""),
    (means_from_the_end, "", ""),  # the weights are of other pieces, and none of theirs give this sum
    (clears_some, "", ""),
]
