"""4.5: how many updates a training makes, for the schedule."""

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_04


def answered(answer, case):
    return material.plain_number(answer(case["number"], case["k"], case["epochs"]))


def counted(case):
    return float(len(lesson_04.right_updates(case)))


def about(name, *rows):
    cases = lesson_04.table("number k epochs", *rows)
    return Property(name, 1, cases, answered, counted, "{number} micro-batches, k = {k}, epochs: {epochs}")


QUESTION = Question(
    "How many updates",
    (
        about("the updates, where the windows come out even", (8, 4, 3), (12, 3, 2), (5, 1, 4), (60, 20, 7), (6, 6, 1)),
        about(
            "the updates, where an epoch's last window is shorter",
            *[(7, 4, 3), (3, 4, 10), (11, 5, 6), (101, 10, 4), (2001, 1000, 1)],
        ),
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


@mistake("An update too many is counted where nothing is left over; round up instead of adding 1.")
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
