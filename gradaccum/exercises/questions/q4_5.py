"""4.5: how many updates a training makes, for the schedule."""

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_04


def answered(answer, case):
    return material.plain_number(answer(case["number"], case["k"], case["epochs"]))


def counted(case):
    return float(len(lesson_04.right_updates(case)))


def even(draw):
    for k in (draw.randrange(2, 6), draw.randrange(10, 30)):
        yield k * draw.randrange(2, 9), k, draw.randrange(2, 9)
    yield draw.randrange(5, 9), 1, 4
    yield 6, 6, 1


def shorter(draw):
    """Let one be left, all but one, about half, and less than a window in all."""
    k = draw.randrange(4, 9)
    yield draw.randrange(2, 6) * k + 1, k, draw.randrange(2, 9)
    yield draw.randrange(2, 6) * k - 1, k, draw.randrange(2, 9)
    yield 2 * k + k // 2, k, 3
    yield k - 1, k, draw.randrange(5, 20)
    yield 1000 * draw.randrange(2, 9) + 1, 1000, 1


def about(name, rows):
    tried = "{number} micro-batches, k = {k}, epochs: {epochs}"
    return Property(name, 1, lesson_04.drawn(rows), answered, counted, tried)


QUESTION = Question(
    "How many updates",
    (
        about("the updates, where the windows come out even", even),
        about("the updates, where an epoch's last window is shorter", shorter),
    ),
    forbidden=lesson_04.BUT_WINDOWS,
)


@mistake("Each epoch's shorter window makes an update too; round up.")
def floor(n, k, epochs):
    return n // k * epochs


@mistake("Windows are cut from all epochs together, and rounded down; round up for each epoch by itself.")
def floor_of_all(n, k, epochs):
    return n * epochs // k


@mistake("Windows are cut from all epochs together, so some mix two; round up for each epoch by itself.")
def ceil_of_all(n, k, epochs):
    return -(-n * epochs // k)


@mistake("One update too many is counted if nothing is left over; round up instead of adding 1.")
def always_one_more(n, k, epochs):
    return (n // k + 1) * epochs


@mistake("The shorter window is counted once; there is one at the end of every epoch.")
def one_more_at_the_end(n, k, epochs):
    return n // k * epochs + (n % k > 0)


@mistake("These are micro-batches; an update takes k of them.")
def in_micro_batches(n, k, epochs):
    return n * epochs


@mistake("These are the updates of one epoch; there are as many in each.")
def one_epoch(n, k, epochs):
    return -(-n // k)


@mistake("Updates are whole; round up, for each epoch.")
def not_rounded(n, k, epochs):
    return n / k * epochs


@mistake(
    "Rounding to the nearest integer drops a shorter window of less than half; every window makes an update: round up."
)
def to_the_nearest(n, k, epochs):
    return round(n / k) * epochs


@mistake("A shorter window is counted only if it is an epoch's only window; every window makes an update: round up.")
def at_least_one(n, k, epochs):
    return max(1, n // k) * epochs


@mistake("The shorter window is counted by its micro-batches; it makes one update.")
def remainder_added(n, k, epochs):
    return (n // k + n % k) * epochs


@mistake("The epochs are added; each makes as many updates as the first, so multiply.")
def epochs_added(n, k, epochs):
    return -(-n // k) + epochs
