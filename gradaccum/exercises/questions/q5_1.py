"""5.1: what the mean loss of each micro-batch is multiplied by."""

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.weighing import Gradient


def answered(answer, case):
    found = answer(list(case["counts"]))
    if not hasattr(found, "__iter__"):
        return material.plain_number(found)
    return list(map(material.plain_number, found))


def shares(case):
    """Count for each micro-batch which of all the targets are its own."""
    owners = [index for index, count in enumerate(case["counts"]) for _ in range(count)]
    return [owners.count(index) / len(owners) for index in range(len(case["counts"]))]


def parts(case, got):
    right, counts = (dict(enumerate(each, start=1)) for each in (shares(case), case["counts"]))
    yield Gradient(got, None, right, counts, len(counts))


def unequal_counts(draw):
    drawn = [draw.randrange(1, 10), draw.randrange(20, 90), draw.randrange(10, 20)]
    return [{"counts": counts} for counts in ([11, 214, 39, 58], [1, 64], [7], drawn)]


def counts_with_zeros(draw):
    return [{"counts": counts} for counts in ([3, 0, 5], [0, draw.randrange(2, 9)], [0, 1, 0, 6])]


UNEQUAL = "the weights turn the means of unequal micro-batches into the mean over all targets"
ZEROS = "a micro-batch without a target has the weight 0, and the others are right beside it"
QUESTION = Question(
    "Weights for means",
    (
        Property(UNEQUAL, 2, unequal_counts, answered, shares, tried="counts {counts}", parts=parts),
        Property(ZEROS, 1, counts_with_zeros, answered, shares, tried="counts {counts}", parts=parts),
    ),
)


@mistake("Weights of 1/k make the mean of means; a weight is a micro-batch's share of all targets.")
def equal_weights(counts):
    return [1 / len(counts) for _ in counts]


@mistake(equal_weights.sentence)
def equal_weights_but_zero(counts):
    return [bool(count) / sum(map(bool, counts)) for count in counts]


@mistake("The weights are k times too large: they add up to k, and those of a mean add up to 1.")
def times_k(counts):
    return [len(counts) * count / sum(counts) for count in counts]


@mistake("A mean times its count is the sum of its losses; divide by the count of all targets as well.")
def counts_alone(counts):
    return counts


@mistake("One over N is right for summed losses; a mean was divided by its own count, which has to be undone.")
def one_over_all(counts):
    return [1 / sum(counts) for _ in counts]


@mistake("The share is upside down: it is the micro-batch's count over the count of all.")
def inverse(counts):
    return [sum(counts) / count for count in counts]


@mistake("The counts are divided by the largest of them; divide by their sum, so that the weights add up to 1.")
def by_the_largest(counts):
    return [count / max(counts) for count in counts]


@mistake("A micro-batch with a count of 0 has no weight in the list; its weight is 0, and must be there too.")
def zeros_left_out(counts):
    return [count / sum(counts) for count in counts if count]


@mistake("A count of 0 is taken for 1; a micro-batch without a target has no part in the mean.")
def zero_as_one(counts):
    return [max(count, 1) / sum(max(each, 1) for each in counts) for count in counts]


@mistake("Each mean is divided by its own count, as it has been already; multiply it by its share of all targets.")
def own_counts(counts):
    return [1 / count for count in counts]


@mistake(own_counts.sentence)
def own_counts_but_zero(counts):
    return [1 / count if count else 0 for count in counts]


@mistake("The shares are divided by k as well; they add up to 1 without that, as the weights of a mean do.")
def divided_by_k_too(counts):
    return [count / sum(counts) / len(counts) for count in counts]


@mistake("The counts are divided by k; divide by their sum, so that the weights add up to 1.")
def divided_by_k(counts):
    return [count / len(counts) for count in counts]


@mistake("Each count is divided by the count so far; add all of them up first, and divide by that.")
def count_so_far(counts):
    return [count / max(sum(counts[: index + 1]), 1) for index, count in enumerate(counts)]
