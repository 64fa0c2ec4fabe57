"""5.6: name the fault of a loop by the weights of one window, and the line that mends it."""

from math import isclose

from gradaccum.exercises.question import FINISHED, Property, Question
from gradaccum.exercises.questions.audits_05 import LOOPS, RIGHT, audited
from gradaccum.exercises.questions.rules_05 import LINES, NAMES, alone, as_mean, by_sum, first, reads, shorter, without
from gradaccum.verdicts import kind_of


def read(answer, case):
    return answer(case["weights"], case["counts"], case["k"])


def about(name, loop, *windows):
    rows = [each if len(each) == 3 else (loop, *each) for each in windows]
    return Property(
        f"{name}, and right windows beside it",
        1,
        lambda draw: [audited(draw, *row) for row in [*rows, (RIGHT, "all", "unequal")]],
        read,
        lambda case: list(LOOPS[case["loop"]]),
        "weights {weights}, counts {counts}, k = {k}",
    )


ALL, FEWER, SAME, SAME_FEWER = [(many, alike) for alike in ("unequal", "equal") for many in ("all", "fewer")]
SUMS, ONE = "adds sums", ("one", "equal")
QUESTION = Question(
    "Read the weights",
    (
        about(NAMES[1], "adds means", ALL, (SUMS, *ALL), FEWER, SAME, (SUMS, *SAME), (RIGHT, *ONE)),
        about(
            *(NAMES[3], "divides means by the length", ALL, FEWER, ("all", "nearly")),
            *((RIGHT, *SAME), (RIGHT, *SAME_FEWER)),
        ),
        about(NAMES[4], "divides means by k", SAME_FEWER, FEWER, ONE, (RIGHT, *FEWER)),
        about(NAMES[5], "clears before backward", ALL, FEWER, SAME, (RIGHT, "fewer", "empty")),
        about(NAMES[6], "clips after backward", ALL, FEWER, SAME),
    ),
    forbidden=(*FINISHED, kind_of),
)

EXACTLY = (
    'Nearly every window is called "clipped or divided inside": measured weights are never exactly what a rule '
    "says, so a rule with == or the default 1e-9 of math.isclose never fits."
)
NEAR = {
    "compared_exactly": reads(EXACTLY, near=lambda weight, value: weight == value),
    "compared_exactly_but_one": reads(
        EXACTLY,
        lambda rules, weights, *window: [*rules, alone(weights)],
        near=lambda weight, value: weight == value,
    ),
    "zero_exactly": reads(
        "Windows that have lost all but the last micro-batch are not recognized: a measured 0 is about 1e-8, so "
        "compare it with an absolute tolerance; math.isclose has abs_tol.",
        near=lambda weight, value: isclose(weight, value, rel_tol=1e-4),
    ),
}
LOOSE = {
    f"loose_{100 * most:.0f}": reads(
        "Weights that are off by 0.01 or more are taken for right, or for another fault: allow 1e-3.",
        near=lambda weight, value, most=most: abs(weight - value) < most,
    )
    for most in (0.02, 0.03, 0.05, 0.1)
}
EQUAL = "Equal weights are called right for unequal counts; the right weight is the count over the total count."
FEWER_IS = "Every window with fewer than k{} is called a partial window over k: look at its weights."
BELOW = "All weights that add up to less than 1 are called clipped; other faults have such sums too."
SUM = "Clipped weights may add up to what those of another fault do: compare each weight, not their sum."
ZEROS = "A weight of 0 is right for a micro-batch with count 0: check first whether all weights are right."
NONE = "And a window of one micro-batch has lost none."
RULES = [  # name, sentence, and how the rules are changed
    ("right_by_k", EQUAL, lambda rules, *window: [(NAMES[0], rules[4][1]), *rules[1:]]),
    ("right_by_length", EQUAL, lambda rules, *window: [(NAMES[0], rules[3][1]), *rules[1:]]),
    ("right_by_length_too", EQUAL, lambda rules, *window: [rules[0], (NAMES[0], rules[3][1]), *rules[1:]]),
    ("no_sums", "A loop that adds sums is not recognized: a sum's gradient is the mean's times the count.", without(2)),
    ("no_means", "A loop that adds means is not recognized: the gradient of each mean is in it once.", without(1)),
    ("ones_first", "A window of one micro-batch is called not divided, but the weight 1 is right there.", first(1)),
    ("length_first", "If counts are equal, equal weights are right: check first whether all are right.", first(3)),
    ("length_is_k", "In a window with fewer, a mean of means is 1 over its length, not 1/k.", shorter(without(3))),
    ("partial_as_mean", "Weights of 1/k in a window with fewer are not a mean: they do not add up to 1.", as_mean),
    ("fewer_is_partial", FEWER_IS.format(""), shorter(lambda rules, weights: [(NAMES[4], weights)])),
    (
        "partial_or_right",
        FEWER_IS.format(" if not right"),
        shorter(lambda rules, weights: [rules[0], (NAMES[4], weights)]),
    ),
    ("zeros_first", ZEROS, lambda rules, weights, *window: [alone(weights), *rules][len(weights) < 2 :]),
    ("zeros_first_or_one", f"{ZEROS} {NONE}", lambda rules, weights, *window: [alone(weights), *rules]),
    ("by_sum", SUM, by_sum(4)),
    ("by_sums", SUM, by_sum(4, 5)),
    ("below_one", BELOW, lambda rules, weights, *window: rules if sum(weights) > 0.999 else []),
]
READ = {name: reads(sentence, change) for name, sentence, change in RULES}
TO_K = "Line B gives each mean the weight 1/k, which is right only if counts are equal and windows full."
ALIKE = "Line C gives the means of a window equal weights, which is right only if its counts are equal."
LINE = {  # a sentence, and the lines that are not the right ones
    "to_k": (TO_K, dict.fromkeys(NAMES[1:5], "B")),
    "alike": (ALIKE, dict.fromkeys(NAMES[1:5], "C")),
    **{f"to_k_{at}": (TO_K, {NAMES[at]: "B"}) for at in (1, 3, 4)},
    **{f"alike_{at}": (ALIKE, {NAMES[at]: "C"}) for at in (1, 3, 4)},
    "right_changed": ("A right window gets a line that changes the loop; there is nothing to repair.", {NAMES[0]: "A"}),
    "right_none": ("The line of a right window is F: there is nothing to repair.", {NAMES[0]: None}),
    "clipping_left": ("Clipping after each backward is a fault; line F leaves it there.", {NAMES[6]: "F"}),
    "confused": ("Lines D and E are the wrong way round.", {NAMES[5]: "E", NAMES[6]: "D"}),
}
LINE = {f"line_{name}": reads(sentence, lines=LINES | lines) for name, (sentence, lines) in LINE.items()}
ALONE = "{} is returned alone; return a pair, the name of the fault and the letter of the line."
PAIR = {
    "name_alone": reads(ALONE.format("The name"), given=lambda name, line: name),
    "line_alone": reads(ALONE.format("The line"), given=lambda name, line: line),
    "line_first": reads("The line is first in your pair, where the name belongs.", given=lambda *pair: pair[::-1]),
}
