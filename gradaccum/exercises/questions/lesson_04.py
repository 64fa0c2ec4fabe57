"""What the questions of lesson 4 share: cases from rows, right windows, loops of one epoch and what they do wrong."""

import math
from operator import attrgetter
from types import SimpleNamespace

from torch.nn.functional import cross_entropy

from gradaccum.accumulation import windows
from gradaccum.exercises import material
from gradaccum.exercises.question import FINISHED, mistake

BUT_WINDOWS = tuple(each for each in FINISHED if each is not windows)
TRAIN = "{number} micro-batches of size {size}, k = {k}, epochs: {epochs}"
SHORTER = "a shorter window trains as its large batch would"
PEAK = "one micro-batch's activations are held at a time"


def drawn(rows):
    """Make cases of the rows that a function draws: number, k and epochs; each gets a size and a seed too."""

    def cases(draw):
        fields = "number", "k", "epochs", "size", "seed"
        numbers = [(*row, 1 + i % 4, draw.randrange(10**6)) for i, row in enumerate(rows(draw))]
        return [dict(zip(fields, each, strict=True)) for each in numbers]

    return cases


def partial(draw, epochs=1):
    """Draw numbers that leave a shorter window: one alone, nearly a full one, and one that is less than k in all."""
    k = draw.randrange(4, 6)
    yield 2 * k + 1, k, epochs  # here windows as equal as can be would each be shorter than k
    yield draw.randrange(1, 3) * 3 + 2, 3, epochs
    yield draw.randrange(2, k), k, epochs


def right_lists(values, k):
    """Put each value into the last list, or into a new one where that is full."""
    lists = []
    for value in values:
        if not lists or len(lists[-1]) == k:
            lists.append([])
        lists[-1].append(value)
    return lists


def right_updates(case):
    return right_lists(range(1, case["number"] + 1), case["k"]) * case["epochs"]


def large_batches(case):
    """Train on the one large batch of each window."""

    def train(model, optimizer, micro_batches, k):
        for inputs, targets in map(material.joined, right_lists(micro_batches, k) * case["epochs"]):
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    return material.trained(case, train)


def places(micro_batches, k):
    """Say where a loop is at each micro-batch: its numbers from 1, its window's length, and whether that ends here."""
    last = len(micro_batches)
    for number, (_, targets) in enumerate(micro_batches, start=1):
        nth, is_last = (number - 1) % k + 1, number == last
        length = min(k, last - number + nth)
        numbers = {"number": number, "last": last, "k": k, "in_window": nth, "length": length, "size": len(targets)}
        yield SimpleNamespace(**numbers, first=nth == 1, full=nth == k, ends=nth == length, is_last=is_last)


full, first, ends, is_last = map(attrgetter, ["full", "first", "ends", "is_last"])
by_k, by_all, own_length, in_window = map(attrgetter, ["k", "last", "length", "in_window"])


def always(at):
    return True


def undivided(at):
    return 1


def by_number(steps=ends, clears=None, divisor=own_length):
    """Make the loop of lesson 3, which asks at each micro-batch by what to divide, whether to step and to clear."""

    def train_epoch(model, optimizer, micro_batches, k):
        for (inputs, targets), at in zip(micro_batches, places(micro_batches, k), strict=True):
            (cross_entropy(model(inputs), targets) / divisor(at)).backward()
            if steps(at):
                optimizer.step()
            if (clears or steps)(at):
                optimizer.zero_grad()

    return train_epoch


def each_epoch(train_epoch):
    def train(model, optimizer, micro_batches, k, epochs):
        for _ in range(epochs):
            train_epoch(model, optimizer, micro_batches, k)

    return train


EACH_BY_ITS_OWN = "divide each window by its own length."
BY_K = f"The shorter window is divided by k, so its gradient is too small; {EACH_BY_ITS_OWN}"
UNDIVIDED = f"The losses are not divided, so a window's gradient is too large; {EACH_BY_ITS_OWN}"
REMAINDER = f"Every window is divided by len % k, the last one's length, or 0 if nothing is left; {EACH_BY_ITS_OWN}"
SO_FAR = (
    "Each loss is divided by the number of micro-batches so far, i + 1, which is the window's length only for the "
    "last one; divide all losses of a window by its length."
)
EACH_SAMPLE = f"The mean over a micro-batch is divided by its number of samples once more; {EACH_BY_ITS_OWN}"
RUNNING_TOTAL = (
    "backward() starts from a running total, so the first micro-batches of a window are added again with each later "
    "one; call it on this micro-batch's own loss."
)
FIRST_LONGER = (
    "An epoch's first update is made from k + 1 micro-batches; step counts from 0, so an update comes where "
    "(step + 1) % k is 0, and the first step needs no exception."
)
DIVISORS = [  # name, sentence, what each loss is divided by
    ("divided_by_k", BY_K, by_k),
    ("not_divided", UNDIVIDED, undivided),
    ("remainder_for_all", REMAINDER, lambda at: at.last % at.k),
    ("remainder_or_k_for_all", REMAINDER, lambda at: at.last % at.k or at.k),
    (
        "shorter_of_epoch_and_k",
        f"All windows are divided by min(k, len), which is too much for a shorter one after others; {EACH_BY_ITS_OWN}",
        lambda at: min(at.k, at.last),
    ),
    ("divided_by_those_so_far", SO_FAR, in_window),
    ("divided_by_all_so_far", SO_FAR, lambda at: at.number),
    ("divided_by_all", f"Each loss is divided by the micro-batches of the whole epoch; {EACH_BY_ITS_OWN}", by_all),
    ("divided_by_samples", EACH_SAMPLE, lambda at: at.size),
    ("divided_by_samples_too", EACH_SAMPLE, lambda at: at.size * at.length),
    # The first is added as often as there are.
    ("running_total", RUNNING_TOTAL, lambda at: at.length / (at.length - at.in_window + 1)),
    (
        "running_total_undivided",
        f"{RUNNING_TOTAL} And one more: {UNDIVIDED}",
        lambda at: 1 / (at.length - at.in_window + 1),
    ),
    (
        "cleared_before_the_step",
        "The steps find no gradients: they are cleared between backward and step, or nothing leads from backward to "
        "the weights; the order is backward, step, clear.",
        lambda at: math.inf,
    ),
]
# The divisors that a loop may have besides; with some of them it has one more fault.
ANY = [("", by_k, ""), ("_divided", own_length, ""), ("_undivided", undivided, f" And one more: {UNDIVIDED}")]
ENDING = [("", own_length, ""), ("_by_k", by_k, f" And one more: {BY_K}"), ANY[-1]]
LOOPS = [  # name, sentence, when it steps, when it clears, and such divisors
    (
        "leftover_leaks",
        "What is left over at the end of an epoch leaks into the next; it makes an update of its own.",
        *(full, full, ANY),
    ),
    (
        "leftover_dropped",
        "What is left over at the end of an epoch is dropped; it makes an update of its own.",
        *(full, ends, [ANY[0], ANY[2]]),
    ),
    (
        "off_by_one",
        "An epoch's first update uses only one micro-batch; update after every k.",
        *(first, first, ANY),
    ),
    (
        "first_or_last",
        "The end is right, but each epoch's first update uses only one micro-batch; update after every k.",
        *(lambda at: at.first or at.is_last, None, ANY),
    ),
    ("first_longer", FIRST_LONGER, lambda at: at.first and at.number > 1, None, ANY[:1]),
    ("first_longer_to_the_end", FIRST_LONGER, lambda at: (at.first and at.number > 1) or at.is_last, None, ANY[:2]),
    (
        "stepped_each_time",
        "There is an update after every micro-batch; it belongs after each window of k.",
        *(always, always, ANY),
    ),
    (
        "never_cleared",
        "The gradients are never cleared, so each update contains those before it; clear once per window.",
        *(ends, lambda at: False, ENDING),
    ),
    (
        "last_not_cleared",
        "After a shorter window .grad is not cleared, and is still there in the next epoch; clear it there too.",
        *(ends, full, ENDING),
    ),
    (
        "cleared_inside",
        "Only the last micro-batch of a window is left: the gradients are cleared or overwritten inside the window, or "
        "backward is called for the last one alone; call it for each, and clear after the update.",
        *(ends, always, ENDING),
    ),
    (
        "one_update",
        "There is one update for the whole epoch; it belongs after each window of k.",
        *(is_last, is_last, [("", by_all, ""), ("_by_k", by_k, "")]),
    ),
    (
        "wrong_precedence",
        "There is no update, or only one where k is 1: `step + 1 % k` is `step + (1 % k)`; write `(step + 1) % k`.",
        *(lambda at: at.number - 1 + 1 % at.k == 0, None, ANY[:1]),
    ),
    ("no_update", "No update is made: optimizer.step() belongs after each window.", lambda at: False, None, ANY[:1]),
]
EPOCH = {name: mistake(sentence)(by_number(divisor=divisor)) for name, sentence, divisor in DIVISORS} | {
    f"{name}{label}": mistake(f"{sentence}{more}")(by_number(steps, clears, divisor))
    for name, sentence, steps, clears, divisors in LOOPS
    for label, divisor, more in divisors
}


def a_step_more(model, optimizer, micro_batches, k):
    by_number(full)(model, optimizer, micro_batches, k)
    optimizer.step()
    optimizer.zero_grad()


EPOCH["a_step_more"] = mistake(
    "After the loop there is one more step, even if nothing is left over; step there only if something is."
)(a_step_more)
