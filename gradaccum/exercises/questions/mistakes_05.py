"""The known mistakes of filling `.grad` from a window of padded text, for 5.2 and 5.3.

Each is whole as a text, but for what `material` has: 5.4 gives some of them to a learner's test so.
"""

import torch

from gradaccum.exercises.material import filled_with, target_count, token_loss
from gradaccum.exercises.question import known_mistakes, mistake
from gradaccum.exercises.questions import more_05
from gradaccum.exercises.questions.lesson_05 import by_count

more = known_mistakes(vars(more_05))


@mistake(
    "This is the mean of means: a micro-batch with one target counts for as much as one with many; count the "
    "window's targets first, then divide each summed loss by that count."
)
@filled_with
def mean_of_means(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each, "mean") / len(micro_batches)


@mistake(mean_of_means.sentence)
@filled_with
def mean_of_means_but_empty(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / max(target_count(each), 1) / len(micro_batches)


@mistake(mean_of_means.sentence)
@filled_with
def mean_of_means_of_some(model, micro_batches):
    some = [each for each in micro_batches if target_count(each)]
    for each in some:
        yield token_loss(model, each, "mean") / len(some)


@mistake(
    "Each mean is divided by the micro-batches so far, i + 1, and even k would make a mean of means; divide each "
    "summed loss by the count of the window's targets."
)
@filled_with
def means_so_far(model, micro_batches):
    for i, each in enumerate(micro_batches):
        yield token_loss(model, each, "mean") / (i + 1)


@mistake("Each mean is weighted by its number of rows, but rows have unequal numbers of targets; count targets.")
@filled_with
def rows_counted(model, micro_batches):
    rows = sum(len(targets) for _, targets in micro_batches)
    for each in micro_batches:
        yield token_loss(model, each, "mean") * len(each[1]) / rows


@mistake("backward() starts from summed losses; divide each by the count of the window's targets before.")
@filled_with
def not_divided(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each)


def divided(divisor, reduction="sum"):
    """Make what fills `.grad` from losses that are divided by what is made of the window."""
    return filled_with(lambda model, window: (token_loss(model, each, reduction) / divisor(window) for each in window))


own_counts = mistake(
    "Each micro-batch's loss is divided by its own count alone, as its mean is; divide each summed loss by the "
    "count of the window's targets."
)(divided(lambda window: 1, "mean"))


@mistake(own_counts.sentence)
@filled_with
def own_counts_but_empty(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / max(target_count(each), 1)


means_by_count = mistake(
    "Each mean is divided by the count of the window, but it has been divided by its own count before; take the sum, "
    'with reduction="sum".'
)(divided(lambda window: target_count(*window), "mean"))
divided_by_k_too = mistake(
    "The losses are divided by k as well; each summed loss needs the count of the window's targets, and that alone."
)(divided(lambda window: len(window) * target_count(*window)))
sum_by_k = mistake(
    "The summed losses are divided by k, the number of micro-batches; a sum needs the count of the window's targets."
)(divided(len))
sum_by_rows = mistake(
    "The summed losses are divided by the number of rows, and a row has many targets; divide by the count of these."
)(divided(lambda window: sum(len(targets) for _, targets in window)))
inputs_counted = mistake("The divisor counts inputs; count the targets that are not -100, which is another number.")(
    divided(lambda window: sum((inputs != 0).sum() for inputs, _ in window))
)
above_zero_counted = mistake(
    "The divisor leaves targets of 0 out, but 0 is a token like any other; count the targets that are not -100."
)(divided(lambda window: sum((targets > 0).sum() for _, targets in window)))
not_zero_counted = mistake(
    "The divisor leaves targets of 0 out and counts the ignored ones, which are -100; count those that are not -100."
)(divided(lambda window: sum((targets != 0).sum() for _, targets in window)))


@mistake(
    "The divisor is the count so far, which is too small except for the last; count the window before the "
    "first backward."
)
@filled_with
def count_so_far(model, micro_batches):
    for index, each in enumerate(micro_batches, start=1):
        yield token_loss(model, each) / max(target_count(*micro_batches[:index]), 1)


@mistake("The divisor counts the ignored targets too; count those that are not -100.")
@filled_with
def padding_counted(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / sum(targets.numel() for _, targets in micro_batches)


def with_the_right_loss(fill):
    def filled(model, micro_batches):
        with torch.no_grad():
            mean = sum(token_loss(model, each).item() for each in micro_batches) / target_count(*micro_batches)
        fill(model, micro_batches)
        return mean

    return filled


# So far the loss is wrong as well as the gradient. An answer may have the one right and the other not.
in_the_gradient_alone = {
    f"{name}_but_the_loss": mistake(each.sentence)(with_the_right_loss(each.answer))
    for name, each in known_mistakes(globals()).items()
}


@mistake(
    "Only the last micro-batch is left: clear the gradients once per window, not inside the loop, and call backward "
    "for each micro-batch, not after the loop."
)
@filled_with
def cleared_inside(model, micro_batches):
    for each in micro_batches:
        model.zero_grad()
        yield token_loss(model, each) / target_count(*micro_batches)


running_sum = mistake(
    "The running sum holds the earlier micro-batches' graphs too; call backward on this micro-batch's own loss."
)(more_05.with_a_running_sum(target_count))
graphs_retained = mistake(more_05.RETAINED)(more_05.with_a_running_sum(target_count, retain_graph=True))


@mistake("Ignored targets are overwritten, and in the next epoch they count; leave the window's tensors as they are.")
def ignored_overwritten(model, micro_batches):
    mean = by_count(model, micro_batches)
    for _, targets in micro_batches:
        targets.clamp_(min=0)
    return mean


@mistake(
    "The mean over no target is nan, and a weight of 0 does not change that; a sum over no target is 0: take sums."
)
@filled_with
def weighted_means(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each, "mean") * target_count(each) / target_count(*micro_batches)


@mistake("What is returned is the sum of the losses; divide that by the count, too.")
def summed_loss(model, micro_batches):
    return by_count(model, micro_batches) * target_count(*micro_batches)


@mistake("What is returned is the last micro-batch's part of the loss; add up all parts.")
def last_loss(model, micro_batches):
    by_count(model, micro_batches)
    return token_loss(model, micro_batches[-1]).item() / target_count(*micro_batches)


@mistake("What is returned is the mean of the micro-batches' means; add up the weighted parts.")
def mean_of_means_returned(model, micro_batches):
    by_count(model, micro_batches)
    return sum(token_loss(model, each, "mean").item() for each in micro_batches) / len(micro_batches)


@mistake("Nothing is returned; return the mean loss over all targets too.")
def nothing_returned(model, micro_batches):
    by_count(model, micro_batches)


@mistake("What is returned still has its graph; return the number alone: add up with loss.item() or loss.detach().")
def graph_returned(model, micro_batches):
    return torch.tensor(by_count(model, micro_batches), requires_grad=True)


@mistake(
    "More than one micro-batch's activations are held at a time: by one backward at the end, by joining the "
    "micro-batches, by retain_graph=True, or by a list of outputs, or of losses that have their graphs; call backward "
    "for each micro-batch, before the next one runs, and keep nothing of it."
)
@filled_with
def one_backward(model, micro_batches):
    yield sum(token_loss(model, each) for each in micro_batches) / target_count(*micro_batches)
