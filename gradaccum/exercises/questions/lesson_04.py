"""What the questions of lesson 4 share: cases from rows, right windows, loops of one epoch and what they do wrong."""

from torch.nn.functional import cross_entropy

from gradaccum.accumulation import windows
from gradaccum.exercises import material
from gradaccum.exercises.question import FINISHED, mistake

BUT_WINDOWS = tuple(each for each in FINISHED if each is not windows)
TRAIN = "{number} micro-batches of size {size}, k = {k}, epochs: {epochs}"
SHORTER = "a shorter window trains as its large batch would"
PEAK = "one micro-batch's activations are held at a time"


def table(fields, *rows):
    """Make cases of rows; each gets a seed too, and the size of all its micro-batches unless the row has one."""

    def cases(draw):
        drawn = [{"size": 1 + i % 4, "seed": draw.randrange(10**6)} for i in range(len(rows))]
        return [each | dict(zip(fields.split(), row, strict=True)) for each, row in zip(drawn, rows, strict=True)]

    return cases


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


def by_number(is_update, divisor=lambda k, length: length, clears=None):
    """Make the loop of lesson 3: after each micro-batch, numbered from 1, it asks whether to step and to clear."""

    def train_epoch(model, optimizer, micro_batches, k):
        last = len(micro_batches)
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            length = min(k, last - (number - 1) // k * k)
            (cross_entropy(model(inputs), targets) / divisor(k, length)).backward()
            if is_update(number, k, last):
                optimizer.step()
            if (clears or is_update)(number, k, last):
                optimizer.zero_grad()

    return train_epoch


def each_epoch(train_epoch):
    def train(model, optimizer, micro_batches, k, epochs):
        for _ in range(epochs):
            train_epoch(model, optimizer, micro_batches, k)

    return train


def full(number, k, last):
    return number % k == 0


def ends(number, k, last):
    return number % k == 0 or number == last


def first(number, k, last):
    return (number - 1) % k == 0


def first_or_last(number, k, last):
    return (number - 1) % k == 0 or number == last


def always(number, k, last):
    return True


def never(number, k, last):
    return False


def by_k(k, length):
    return k


def undivided(k, length):
    return 1


EPOCH = {
    "leftover_leaks": mistake(
        "What is left over at the end of an epoch leaks into the next; it makes an update of its own."
    )(by_number(full, by_k)),
    "leftover_dropped": mistake("What is left over at the end of an epoch is dropped; it makes an update of its own.")(
        by_number(full, by_k, clears=ends)
    ),
    "divided_by_k": mistake(
        "The shorter window is divided by k, so its gradient is too small; divide by its own length."
    )(by_number(ends, by_k)),
    "off_by_one": mistake(
        "An epoch's first update is made from one micro-batch alone; an update comes after each k of them."
    )(by_number(first, by_k)),
    "first_or_last": mistake(
        "The end is right, but each epoch's first update has one micro-batch; update after each k."
    )(by_number(first_or_last, by_k)),
    "stepped_each_time": mistake("There is an update after every micro-batch; it belongs after each window of k.")(
        by_number(always, by_k)
    ),
    "not_divided": mistake(
        "The losses are not divided, so a window's gradient is too large; divide by the window's length."
    )(by_number(ends, undivided)),
    "never_cleared": mistake(
        "The gradients are never cleared, so each update contains those before it; clear once per window."
    )(by_number(ends, clears=never)),
    "last_not_cleared": mistake(
        "After a shorter window .grad is not cleared, and the next epoch finds it; clear it there too."
    )(by_number(ends, clears=full)),
    "cleared_inside": mistake(
        "Clearing at each micro-batch leaves only the last one of a window; clear once per window."
    )(by_number(ends, clears=always)),
}
