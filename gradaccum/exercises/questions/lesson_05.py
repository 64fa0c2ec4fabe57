"""What the questions of lesson 5 share: windows of padded text, the loss over them, and a right way to fill `.grad`."""

import torch
from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.material import filled_with, target_count, token_loss
from gradaccum.exercises.weighing import Gradient, own_gradients

TRIED = "targets in the rows of each micro-batch: {counts}, and the rest ignored"


def window_of(*shapes, **rest):
    """Return the cases of windows whose rows have so many targets."""
    return lambda draw: [{"counts": counts, "seed": draw.randrange(10**6), **rest} for counts in shapes]


def unequal(draw, **rest):
    drawn = [[draw.randrange(1, 6) for _ in range(rows)] for rows in (2, 1, 3)]
    return window_of([[3, 1]], [[6, 4], [1], [2, 3, 1]], [[1], [9]], [*drawn, [12]], **rest)(draw)


def mean_over_targets(model, window):
    """Pick the targets that are not ignored, and take the mean of all their losses: the slow way, for oracles."""
    losses = []
    for inputs, targets in window:
        kept = targets != material.IGNORED
        losses.append(cross_entropy(model(inputs)[kept], targets[kept], reduction="none"))
    return torch.cat(losses).mean()


def parts(case, *held):
    """Give the gradients at the start, and what they should be made of; a micro-batch without a target has no mean."""
    window = material.padded_text(case["counts"], case["seed"])
    counts = {number: sum(rows) for number, rows in enumerate(case["counts"], start=1) if sum(rows)}
    some = {number: window[number - 1] for number in counts}
    means = own_gradients(material.steep_model(case["seed"]), some, lambda *given: token_loss(*given, "mean"))
    right = {number: count / sum(counts.values()) for number, count in counts.items()}
    for each, name in zip(held, ("", "In a second call"), strict=False):
        yield Gradient(each, means, right, counts, len(window), name)


@filled_with
def by_count(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / target_count(*micro_batches)
