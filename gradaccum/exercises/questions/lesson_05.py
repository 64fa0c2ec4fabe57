"""What the questions of lesson 5 share: ways to fill `.grad` from a window of padded text, right and wrong.

Each is whole as a text, but for what `material` has: a learner's test is given some of them so.
"""

import torch
from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.material import filled_with, target_count, token_loss
from gradaccum.exercises.question import mistake

TRIED = "targets in the rows of each micro-batch: {counts}, and the rest ignored"


def window_of(*shapes, **rest):
    """Return the cases of windows whose rows have so many targets."""
    return lambda draw: [{"counts": counts, "seed": draw.randrange(10**6), **rest} for counts in shapes]


def unequal(draw, **rest):
    drawn = [[draw.randrange(1, 6) for _ in range(rows)] for rows in (2, 1, 3)]
    return window_of([[6, 4], [1], [2, 3, 1]], [[1], [9]], [[3, 1]], [*drawn, [12]], **rest)(draw)


def mean_over_targets(model, window):
    """Pick the targets that are not ignored, and take the mean of all their losses: the slow way, for oracles."""
    losses = []
    for inputs, targets in window:
        kept = targets != material.IGNORED
        losses.append(cross_entropy(model(inputs)[kept], targets[kept], reduction="none"))
    return torch.cat(losses).mean()


@filled_with
def by_count(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / target_count(*micro_batches)


@mistake(
    "The gradient is right, but more than one micro-batch's activations are held at a time: by one backward at the "
    "end, by joining the micro-batches, by retain_graph=True, or by a list of losses or outputs that have their "
    "graphs; call backward for each micro-batch, before the next one runs, and keep nothing of it."
)
@filled_with
def one_backward(model, micro_batches):
    yield sum(token_loss(model, each) for each in micro_batches) / target_count(*micro_batches)


@mistake(
    "This is the mean of means: a micro-batch with one target counts for as much as one with many; count the "
    "window's targets first, then divide each summed loss by that count."
)
@filled_with
def mean_of_means(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each, "mean") / len(micro_batches)


@mistake("The divisor counts the ignored targets too; count those that are not -100.")
@filled_with
def padding_counted(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / sum(targets.numel() for _, targets in micro_batches)


@mistake("The summed losses are not divided at all; divide each by the count of the window's targets.")
@filled_with
def not_divided(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each)


@mistake("The gradients are cleared inside the loop, so only the last micro-batch is left; clear once per window.")
@filled_with
def cleared_inside(model, micro_batches):
    for each in micro_batches:
        model.zero_grad()
        yield token_loss(model, each) / target_count(*micro_batches)


@mistake(
    "The mean over no target is nan, and a weight of 0 does not change that; a sum over no target is 0: take sums."
)
@filled_with
def weighted_means(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each, "mean") * target_count(each) / target_count(*micro_batches)


@mistake("Each mean is weighted by its number of rows, but rows have unequal numbers of targets; count targets.")
@filled_with
def rows_counted(model, micro_batches):
    rows = sum(len(targets) for _, targets in micro_batches)
    for each in micro_batches:
        yield token_loss(model, each, "mean") * len(each[1]) / rows


@mistake("The divisor counts inputs; count the targets that are not -100, which is another number.")
@filled_with
def inputs_counted(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / sum((inputs != 0).sum() for inputs, _ in micro_batches)


@mistake("The divisor is the count so far, too small but for the last; count the window before the first backward.")
@filled_with
def count_so_far(model, micro_batches):
    for index, each in enumerate(micro_batches, start=1):
        yield token_loss(model, each) / max(target_count(*micro_batches[:index]), 1)


@mistake("Ignored targets are overwritten, and in the next epoch they count; leave the window's tensors as they are.")
@filled_with
def ignored_overwritten(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / target_count(*micro_batches)
    for _, targets in micro_batches:
        targets.clamp_(min=0)


@mistake("The gradient is right, but what is returned is the sum of the losses; divide that by the count, too.")
def summed_loss(model, micro_batches):
    return by_count(model, micro_batches) * target_count(*micro_batches)


@mistake("The gradient is right, but what is returned is the last micro-batch's part of the loss; add up all parts.")
def last_loss(model, micro_batches):
    by_count(model, micro_batches)
    return token_loss(model, micro_batches[-1]).item() / target_count(*micro_batches)
