"""What the questions of lesson 3 share: ways to fill `.grad` from a window, each a whole function of its own."""

from torch.nn.functional import cross_entropy


def divided(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()


def not_divided(model, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()


def divided_by_samples(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(targets)).backward()


def sum_divided_by_steps(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets, reduction="sum") / len(micro_batches)).backward()


def cleared_inside(model, micro_batches):
    for inputs, targets in micro_batches:
        model.zero_grad()
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()
