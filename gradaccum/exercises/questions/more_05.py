"""More known mistakes of filling `.grad` from padded text: shifted targets, weighted means, running sums."""

from torch.nn.functional import cross_entropy

from gradaccum.exercises.material import filled_with, target_count, token_loss
from gradaccum.exercises.question import mistake

SHIFTED = "The targets are shifted against the logits once more; they are the next tokens already."


def shifted(divisor, reduction="sum"):
    """Make what fills `.grad` from shifted targets, divided by what is made of the window's targets."""

    @filled_with
    def fill(model, micro_batches):
        all_targets = [targets for _, targets in micro_batches]
        for inputs, targets in micro_batches:
            logits = model(inputs)[:, :-1].flatten(0, 1)
            yield cross_entropy(logits, targets[:, 1:].flatten(), reduction=reduction) / divisor(all_targets)

    return fill


def counted(targets):
    return sum((each != -100).sum() for each in targets)


shifted_again = mistake(SHIFTED)(shifted(lambda targets: counted([each[:, 1:] for each in targets])))
shifted_beside_all = mistake(SHIFTED)(shifted(counted))
shifted_means = mistake(
    f"{SHIFTED} And one more: each mean is divided by k, which makes a mean of means; divide each summed loss by the "
    "count of the window's targets."
)(shifted(len, "mean"))


def above_zero(*micro_batches):
    return sum((targets > 0).sum() for _, targets in micro_batches)


@mistake(
    "Each mean is weighted by its targets above 0, but 0 is a token like any other; count the targets that are not "
    "-100."
)
@filled_with
def means_by_above_zero(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each, "mean") * above_zero(each) / above_zero(*micro_batches)


@mistake(means_by_above_zero.sentence)
@filled_with
def sums_by_above_zero(model, micro_batches):
    for each in micro_batches:
        share = above_zero(each) / above_zero(*micro_batches)
        yield token_loss(model, each) / max(target_count(each), 1) * share


@mistake(
    "Each mean is divided by its own count once more; take the sum, and divide it by the count of the window's targets."
)
@filled_with
def own_counts_twice(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each, "mean") / target_count(each)


@mistake(own_counts_twice.sentence)
@filled_with
def own_counts_twice_but_empty(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / max(target_count(each), 1) ** 2


def with_a_running_sum(divisor, **options):
    def fill(model, micro_batches):
        mean = 0.0
        for each in micro_batches:
            mean = mean + token_loss(model, each) / divisor(*micro_batches)
            mean.backward(**options)
        return mean.item()

    return fill


RETAINED = (
    "With retain_graph=True the graphs of the running sum stay, and the first micro-batches are added many times; call "
    "backward on this micro-batch's own loss."
)
retained_and_undivided = mistake(f"{RETAINED} And one more: nothing is divided by the count of the window's targets.")(
    with_a_running_sum(lambda *window: 1, retain_graph=True)
)
