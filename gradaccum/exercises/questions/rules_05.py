"""Readings of weights by rules, for the mistakes of 5.6: each is the right one with something changed."""

from gradaccum.exercises.question import mistake
from gradaccum.exercises.questions.audits_05 import LOOPS, weights_of

# What weights are compared with, in this order: right, ones, counts, 1 / length, 1 / k, the last alone.
NAMES = [name for name, _ in LOOPS.values()]
LINES = dict(LOOPS.values())


def near(weight, value):
    return abs(weight - value) < 1e-3


def by_rules(change=lambda rules, *window: rules, near=near, lines=LINES, given=lambda name, line: (name, line)):
    """Make a reading: the first rule whose values are near all weights, or else clipping."""

    def read(weights, counts, k):
        rules = [(name, weights_of(loop, counts, k)) for loop, (name, _) in [*LOOPS.items()][:-1]]
        fits = (name for name, values in change(rules, weights, counts, k) if all(map(near, weights, values)))
        name = next(fits, NAMES[-1])
        return given(name, lines[name])

    return read


def reads(sentence, *change, **options):
    """Make the mistake that reads by other rules, nearness or lines."""
    return mistake(sentence)(by_rules(*change, **options))


def alone(weights):
    return NAMES[5], [0.0] * (len(weights) - 1) + weights[-1:]


def without(place):
    return lambda rules, *window: rules[:place] + rules[place + 1 :]


def first(place):
    return lambda rules, *window: [rules[place], *rules]


def shorter(change):
    return lambda rules, weights, counts, k: change(rules, weights) if len(counts) < k else rules


def as_mean(rules, *window):
    return [(NAMES[3] if name == NAMES[4] else name, values) for name, values in rules]


def by_sum(*places):
    """Let all weights fit some rules that add up to the same."""

    def change(rules, weights, *window):
        names = [NAMES[place] for place in places]
        same = [name in names and near(sum(weights), sum(values)) for name, values in rules]
        return [(name, weights if fits else values) for fits, (name, values) in zip(same, rules, strict=True)]

    return change
