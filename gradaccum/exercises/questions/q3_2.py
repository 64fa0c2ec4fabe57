"""3.2: what a summed and a mean loss are divided by."""

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake


def answered(answer, case):
    found = material.plain_number(answer(case["reduction"], case["sizes"]))
    return found if found is None or isinstance(found, int | float) else f"{found!r:.80}"


def right_divisor(case):
    return float(len(case["sizes"]) if case["reduction"] == "mean" else sum(case["sizes"]))


def windows_for(reduction):
    def cases(draw):
        shapes = [(4, 8), (3, 5), (1, 6), (draw.randrange(5, 9), draw.randrange(10, 20))]
        return [{"reduction": reduction, "sizes": [size] * k} for k, size in shapes]

    return cases


def divisor_for(reduction):
    name = f'the divisor for reduction="{reduction}"'
    return Property(name, 1, windows_for(reduction), answered, right_divisor, "reduction {reduction}, sizes {sizes}")


QUESTION = Question("Sum or mean", (divisor_for("mean"), divisor_for("sum")))


@mistake("The function returned None each time: print only shows a value, so use return.")
def nothing_returned(reduction, sizes):
    print(len(sizes) if reduction == "mean" else sum(sizes))


@mistake("Sum and mean are the wrong way round: a mean has been divided by its own items already, a sum by nothing.")
def swapped(reduction, sizes):
    return sum(sizes) if reduction == "mean" else len(sizes)


@mistake(
    "The number of micro-batches is the divisor of a mean; a sum has not been divided yet, and needs the "
    "number of all items."
)
def always_steps(reduction, sizes):
    return len(sizes)


@mistake("The number of all items is the divisor of a sum; a mean has already been divided by its own items.")
def always_items(reduction, sizes):
    return sum(sizes)


@mistake("A sum is divided by the items of one micro-batch; that makes it a mean, and k means are still added up.")
def first_size(reduction, sizes):
    return len(sizes) if reduction == "mean" else sizes[0]


@mistake("A mean is divided by the items of one micro-batch; it has already been divided by those, so only k remains.")
def mean_by_its_size(reduction, sizes):
    return sizes[0] if reduction == "mean" else sum(sizes)


@mistake("A sum is not divided at all; the gradient of the mean over the window needs all its items as the divisor.")
def nothing_for_sum(reduction, sizes):
    return len(sizes) if reduction == "mean" else 1


@mistake("A mean is not divided at all; k of them are added up, so each needs the divisor k.")
def nothing_for_mean(reduction, sizes):
    return 1 if reduction == "mean" else sum(sizes)
