"""Lesson 4, windows: the questions, their oracles and their known mistakes."""

from functools import partial, wraps
from itertools import islice

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum.accumulation import windows as finished_windows
from gradaccum.exercises.material import (
    at_most_bytes,
    classifier,
    gradient,
    joined,
    measure_memory,
    plain_number,
    samples,
    weights,
)
from gradaccum.exercises.question import FINISHED, Property, Question, agree


def known(*pairs):
    """Take "name: sentence" and the mistake itself, in turn, and give each mistake its name and its sentence."""
    for text, mistake in zip(pairs[::2], pairs[1::2], strict=True):
        mistake.__name__, _, mistake.__doc__ = text.partition(": ")
    return pairs[1::2]


def table(fields, *rows):
    """Make cases of rows; each gets a seed too, and the size of all its micro-batches unless the row has one."""

    def cases(draw):
        drawn = [{"size": 1 + i % 4, "seed": draw.randrange(10**6)} for i in range(len(rows))]
        return [each | dict(zip(fields.split(), row, strict=True)) for each, row in zip(drawn, rows, strict=True)]

    return cases


# --------------------------------------------------------------------- 4.1: a stream in windows


def stream(case):
    numbers = range(case["number"])  # the first is 0, which no truth test may take for the end
    return list(numbers) if case["source"] == "list" else (each for each in numbers)


def made(most):
    """Collect the lists before reading them: each has to be there for good. No more than `most`: it may never end."""

    def probe(answer, case):
        lists = list(islice(answer(stream(case), case["k"]), most(case)))
        return [list(each) if isinstance(each, list | tuple) else f"a {type(each).__name__}" for each in lists]

    return probe


def right_lists(case):
    """Put each number into the last list, or into a new one where that is full."""
    lists = []
    for number in range(case["number"]):
        if not lists or len(lists[-1]) == case["k"]:
            lists.append([])
        lists[-1].append(number)
    return lists


def full_lists(case):
    return [each for each in right_lists(case) if len(each) == case["k"]]


def numbers_read(answer, case):
    read = []
    source = (read.append(number) or number for number in stream(case))
    return [len(read) for _ in islice(answer(source, case["k"]), 3)]


def filled(micro_batches, k, begin=1, yield_rest=bool):
    window = []
    for number, micro_batch in enumerate(micro_batches, start=begin):
        window.append(micro_batch)
        if number % k == 0:
            yield window
            window = []
    if yield_rest(window):
        yield window


def never_ends(micro_batches, k):
    source = iter(micro_batches)
    while True:
        yield list(islice(source, k))


def looks_ahead(micro_batches, k):
    source = iter(micro_batches)
    ahead = list(islice(source, 1))
    while ahead:
        window, ahead = ahead + list(islice(source, k - 1)), list(islice(source, 1))
        yield window


def the_same_list(micro_batches, k):
    window = []
    for each in filled(micro_batches, k):
        window[:] = each
        yield window


def slices(micro_batches, k):
    return [micro_batches[start : start + k] for start in range(0, len(micro_batches), k)]


EVEN = table("number k source", (6, 3, "list"), (4, 2, "generator"), (5, 1, "generator"), (7000, 2, "generator"))
UNEVEN = table("number k source", (7, 3, "list"), (6, 3, "list"), (3, 4, "list"), (0, 2, "list"), (3, 1, "list"))
LONG = table("number k source", *((500, k, "generator") for k in (3, 1, 8)))  # long enough to stand for endless
STREAM = "{number} micro-batches, numbered from 0, given as {source}; k = {k}"
READ = "a generator of {number} micro-batches, k = {k}; how many had been read when each of the first lists came"
FULL_LISTS = "full lists hold k each, in order, from a list or a generator"
LAST_LIST = "what is left makes a last, shorter list, and no list is empty"
LAZY = "nothing is read beyond the list that is yielded"
GROUP = Question(
    "4.1",
    "A stream in windows",
    (
        Property(FULL_LISTS, 1, EVEN, made(lambda case: len(full_lists(case))), full_lists, STREAM),
        Property(LAST_LIST, 1, UNEVEN, made(lambda case: len(right_lists(case)) + 2), right_lists, STREAM),
        Property(LAZY, 1, LONG, numbers_read, lambda case: [n * case["k"] for n in (1, 2, 3)], READ),
    ),
    known(
        "drops_the_last: What is left over at the end is dropped; it makes one more list, a shorter one.",
        partial(filled, yield_rest=lambda window: False),
        "empty_at_the_end: Where nothing is left over, an empty list comes last; yield the rest only if there is one.",
        partial(filled, yield_rest=lambda window: True),
        "never_ends: Empty lists follow without end; stop when there is nothing left to read.",
        never_ends,
        "first_alone: The first list is one micro-batch, as with `step % k == 0`; a list is full when it holds k.",
        partial(filled, begin=0),
        "slices: Slices and `len` need a list, and a generator has neither; take from `iter` instead.",
        slices,
        "the_same_list: The same list comes each time, with new contents; make a new one each time.",
        the_same_list,
        "reads_everything: The whole stream is read before the first list comes; read k of it, yield them, go on.",
        lambda micro_batches, k: slices(list(micro_batches), k),
        "looks_ahead: One more than the list holds has been read; yield the list as soon as it is full.",
        looks_ahead,
    ),
)

# --------------------------------------------------------------------- 4.2 and 4.3: epochs


def batches(case):
    return samples([case["size"]] * case["number"], case["seed"])


def trained(train, case):
    """Say how often train(model, optimizer, micro_batches, k, epochs) updates, and how far it takes the weights."""
    model, updates = classifier(case["seed"]), []
    # With momentum, no other learning rate makes up for a window's divisor.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    optimizer.register_step_post_hook(lambda *_: updates.append(1))
    start = weights(model)
    train(model, optimizer, batches(case), case["k"], case["epochs"])
    moved = [after - before for after, before in zip(weights(model), start, strict=True)]
    return {"updates": len(updates), "change of the weights": moved}


def on_large_batches(model, optimizer, windows):
    """Train on the one large batch of each window, and return their losses."""
    losses = []
    for inputs, targets in map(joined, windows):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def large_batches(case):
    def train(model, optimizer, micro_batches, k, epochs):
        windows = [[micro_batches[number] for number in each] for each in right_lists(case)]
        on_large_batches(model, optimizer, windows * epochs)

    return trained(train, case)


def each_epoch(train_epoch):
    @wraps(train_epoch)
    def train(model, optimizer, micro_batches, k, epochs):
        for _ in range(epochs):
            train_epoch(model, optimizer, micro_batches, k)

    return train


def epochs_trained(answer, case):
    return trained(each_epoch(answer), case)


def epoch_peak(answer, case):
    model, micro_batches = classifier(case["seed"]), batches(case)
    with measure_memory(model, micro_batches) as memory:
        answer(model, torch.optim.SGD(model.parameters(), lr=0.5), micro_batches, case["k"])
    return memory.peak_bytes - memory.start_bytes


def one_at_a_time(case):
    """Twice what the plain loop holds beyond its start: a whole window's graph holds many times as much."""
    return 2 * epoch_peak(by_number(ends), case)


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


def by_k(k, length):
    return k


def joined_windows(model, optimizer, micro_batches, k):
    """The updates are right, but a whole window's graph is held at once; call backward for each micro-batch."""
    on_large_batches(model, optimizer, slices(micro_batches, k))
    optimizer.zero_grad()


EPOCH_MISTAKES = known(
    "leftover_leaks: What is left over at the end of an epoch leaks into the next; it makes an update of its own.",
    by_number(full, by_k),
    "leftover_dropped: What is left over at the end of an epoch is dropped; it makes an update of its own.",
    by_number(full, by_k, clears=ends),
    "divided_by_k: The shorter window is divided by k, so its gradient is too small; divide by its own length.",
    by_number(ends, by_k),
    "off_by_one: An epoch's first update is made from one micro-batch alone; an update comes after each k of them.",
    by_number(first, by_k),
    "first_or_last: The end is right, but each epoch's first update has one micro-batch; update after each k.",
    by_number(first_or_last, by_k),
    "stepped_each_time: There is an update after every micro-batch; it belongs after each window of k.",
    by_number(always, by_k),
    "not_divided: The losses are not divided, so a window's gradient is too large; divide by the window's length.",
    by_number(ends, lambda k, length: 1),
    "never_cleared: The gradients are never cleared, so each update contains those before it; clear once per window.",
    by_number(ends, clears=lambda number, k, last: False),
    "last_not_cleared: After a shorter window .grad is not cleared, and the next epoch finds it; clear it there too.",
    by_number(ends, clears=full),
    "cleared_inside: Clearing at each micro-batch leaves only the last one of a window; clear once per window.",
    by_number(ends, clears=always),
)
ONE = table("number k epochs", (3, 3, 1), (8, 4, 1), (6, 2, 1), (3, 1, 1))
PARTIAL = table("number k epochs", (2, 3, 1), (7, 3, 1), (3, 4, 1), (5, 2, 1), (9, 5, 1))
TWO = table("number k epochs", (3, 2, 2), (4, 2, 2), (7, 4, 2))
LARGE = table("number k epochs size", (5, 4, 1, 64))
TRAIN = "{number} micro-batches of size {size}, k = {k}, epochs: {epochs}"
FULL, SHORTER = "full windows train as their large batches would", "a shorter window trains as its large batch would"
AFRESH, PEAK = "a second epoch starts afresh", "one micro-batch's activations are held at a time"
EPOCH = Question(
    "4.2",
    "One epoch",
    (
        Property(FULL, 1, ONE, epochs_trained, large_batches, TRAIN),
        Property(SHORTER, 1, PARTIAL, epochs_trained, large_batches, TRAIN),
        Property(AFRESH, 1, TWO, epochs_trained, large_batches, TRAIN),
        Property(PEAK, 1, LARGE, epoch_peak, one_at_a_time, TRAIN, at_most_bytes, after=FULL, by_value=False),
    ),
    (*EPOCH_MISTAKES, joined_windows),
)


def used(answer, case):
    """List the micro-batches whose gradients each update uses: number i alone gives gradients to column i."""
    last, updates = case["number"], []
    model = nn.Linear(last, 3, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def note(*_):
        held = torch.zeros_like(model.weight) if model.weight.grad is None else model.weight.grad
        updates.append([column + 1 for column in range(last) if held[:, column].any()])

    optimizer.register_step_post_hook(note)  # not before it: a closure makes the gradients in the step
    inputs, targets = torch.eye(last, dtype=torch.float64).split(1), torch.arange(last).remainder(3).split(1)
    answer(model, optimizer, list(zip(inputs, targets, strict=True)), case["k"], case["epochs"])
    return updates


def right_updates(case):
    return [[number + 1 for number in each] for each in right_lists(case)] * case["epochs"]


def none_kept(got, expected):
    """Compare what each epoch used; how that was cut is another property's, if it was cut at all."""
    last = max(map(max, expected))

    def by_epoch(updates):
        epochs = [[]]
        for each in updates:
            epochs[-1] = sorted(epochs[-1] + each)
            if len(epochs[-1]) >= last:
                epochs.append([])
        return epochs, max(map(len, updates), default=0)

    return None if by_epoch(got) == by_epoch(expected) else agree(got, expected)


def train(model, optimizer, micro_batches, accumulation_steps, epochs):
    """Train for some epochs, with one update for each window."""
    for _epoch in range(epochs):
        for step, (inputs, targets) in enumerate(micro_batches):
            loss = cross_entropy(model(inputs), targets) / accumulation_steps
            loss.backward()
            if step % accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad()


def counted_on(model, optimizer, micro_batches, k, epochs):
    """The count goes on from one epoch to the next, so some windows mix two epochs; each epoch begins a new window."""
    by_number(full, by_k)(model, optimizer, micro_batches * epochs, k)


def stepped_at_the_very_end(model, optimizer, micro_batches, k, epochs):
    """What is left over leaks in all epochs but the last; every epoch ends with an update."""
    each_epoch(by_number(full, by_k))(model, optimizer, micro_batches, k, epochs)
    if len(micro_batches) % k:
        optimizer.step()


PARITY = "each update is made from k micro-batches, where they divide evenly"
KEPT = "the updates of an epoch use all its micro-batches, and none is left for the next epoch"
EVENLY = table("number k epochs", (6, 3, 1), (4, 2, 1), (3, 1, 1))
LEFT = table("number k epochs", (5, 2, 2), (8, 3, 2))
AGAIN = table("number k epochs", (3, 4, 1), (7, 3, 2), (5, 2, 3))
USED = "{number} micro-batches, k = {k}, epochs: {epochs}; which micro-batches each update used"
BUT_WINDOWS = tuple(each for each in FINISHED if each is not finished_windows)
REPAIR = Question(
    "4.3",
    "Repair: the parity and the leak",
    (
        Property(PARITY, 2, EVENLY, used, right_updates, USED),
        Property(KEPT, 1, LEFT, used, right_updates, USED, none_kept),
        Property(SHORTER, 1, AGAIN, trained, large_batches, TRAIN),
    ),
    (*map(each_epoch, EPOCH_MISTAKES), counted_on, stepped_at_the_very_end),
    given=train,
    forbidden=BUT_WINDOWS,
)

# --------------------------------------------------------------------- 4.4: once per update


def epoch_seen(answer, case):
    """An epoch, as the optimizer and the caller see it: what each step gets, and what comes back."""
    model, cut = classifier(case["seed"]), windows_of(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=case["lr"])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    gradients, rates = {}, []

    def note(*_):  # after the step and not before it: a closure makes the gradients in the step
        gradients[f"at update {len(rates) + 1} the gradient"] = gradient(model)
        rates.append(optimizer.param_groups[0]["lr"])

    optimizer.register_step_post_hook(note)
    found = answer(model, optimizer, schedule, cut, case["max_norm"])
    found = list(found) if hasattr(found, "__iter__") else found
    one_by_one = found if isinstance(found, list) else []
    return {
        "gradients": gradients,
        # The next rate too: it shows whether the schedule went on after the last update.
        "rates": {"learning rates": [*rates, optimizer.param_groups[0]["lr"]]},
        "losses": {
            "logged": [plain_number(each) for each in found] if isinstance(found, list) else plain_number(found)
        },
        "graphs": ["graph" if getattr(each, "requires_grad", False) else "no graph" for each in one_by_one],
        "updates": {"updates": len(rates), "gradients left": any(gradient(model))},
    }


def windows_of(case):
    return [samples([case["size"]] * length, case["seed"] + i) for i, length in enumerate(case["windows"])]


def on_large_batches_once(model, optimizer, schedule, windows, max_norm):
    """Train on the one large batch of each window, and return their losses."""
    for inputs, targets in map(joined, windows):
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


# Where the rate is 0, and in a single window, no fault of one window reaches the next.
STILL = ([3, 3], 4, 0.05, 0.0), ([4, 4, 1], 2, 100.0, 0.0), ([2, 2, 2, 1], 1, 0.1, 0.0), ([1, 1], 3, 0.2, 0.0)
ALONE = ([3], 4, 0.2, 0.5), ([1], 3, 0.1, 0.5)
MOVING = ([3, 3], 4, 0.05, 0.5), ([4, 4, 1], 2, 100.0, 0.5), ([1, 1], 3, 0.2, 0.5)


def about(what, points, name, *rows):
    """Make a property of one of the things that are seen."""

    def probe(answer, case):
        return epoch_seen(answer, case)[what]

    def expected(case):
        return epoch_seen(on_large_batches_once, case)[what]

    cases = table("windows size max_norm lr", *rows)
    tried = "windows of {windows} micro-batches, each of size {size}, max_norm {max_norm}"
    return Property(name, points, cases, probe, expected, tried)


def epoch_of_one(answer, case):
    def train(model, optimizer, micro_batches, k):
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        found = answer(model, optimizer, schedule, slices(micro_batches, k), 1.0)
        if hasattr(found, "__iter__"):
            list(found)  # it may be a generator

    return epoch_peak(train, case)


def train_windows(model, optimizer, schedule, windows, max_norm):
    """Train for one epoch, and return the mean loss of each window."""
    losses = []
    for window in windows:
        for inputs, targets in window:
            loss = cross_entropy(model(inputs), targets) / len(window)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


def trains(write=lambda shares, _: sum(shares).item(), divisor=len, clips="window", moves="window"):
    """Make the loop with one thing changed; `write` makes of a window's divided losses what is logged."""

    def train(model, optimizer, schedule, windows, max_norm):
        losses = []
        for window in windows:
            shares = []
            for inputs, targets in window:
                shares.append(cross_entropy(model(inputs), targets) / divisor(window))
                shares[-1].backward()
                if clips == "micro-batch":
                    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                if moves == "micro-batch":
                    schedule.step()
            if clips == "window":
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            if moves == "window":
                schedule.step()
            losses.append(write(shares, losses))
        if moves == "epoch":
            schedule.step()
        return losses

    return train


UPDATE = Question(
    "4.4",
    "Repair: once per update",
    (
        about("gradients", 1, "each step gets the window's whole gradient, clipped once", *STILL),
        about("rates", 1, "the schedule moves on once for each update", *MOVING),
        about("losses", 1, "what is logged is the mean loss over each window", *STILL, *ALONE),
        about("graphs", 1, "nothing that is logged holds a graph", *STILL),
        about("updates", 0, "there is one step for each window, and the gradients are cleared", *MOVING),
        Property(PEAK, 0, LARGE, epoch_of_one, one_at_a_time, TRAIN, at_most_bytes, by_value=False),
    ),
    known(
        "clipped_inside: Clipping after each micro-batch cuts the sum again and again, so its direction is wrong even "
        "where its norm is right; clip once, when the window's gradient is complete.",
        trains(clips="micro-batch"),
        "not_clipped: The step gets a gradient that was not clipped; clip after the last backward() of the window, and "
        "before the step.",
        trains(clips="never"),
        "schedule_inside: The schedule moves on with each micro-batch, so it runs too fast; step it once per update.",
        trains(moves="micro-batch"),
        "schedule_at_the_end: The schedule moves on once for the whole epoch; step it once for each update.",
        trains(moves="epoch"),
        "schedule_stands: The schedule never moves on; step it once for each update.",
        trains(moves="never"),
        "last_share: This is only the last micro-batch's loss, divided by the window's length; add up those of all.",
        trains(lambda shares, _: shares[-1].item()),
        "last_loss: This is the loss of the last micro-batch alone; the window's is the mean over all of them.",
        trains(lambda shares, _: shares[-1].item() * len(shares)),
        "divided_again: The losses are divided by the window's length twice; they have been divided, so add them up.",
        trains(lambda shares, _: sum(shares).item() / len(shares)),
        "never_divided: This is the sum of the micro-batches' mean losses instead of their mean; divide once.",
        trains(lambda shares, _: sum(shares).item() * len(shares)),
        "keeps_the_graph: The loss is right, but holds its graph as long as it is kept; log `.item()` or `.detach()`.",
        trains(lambda shares, _: sum(shares)),
        "added_on: The sum is never set back, so each window's loss contains those before; start each window at 0.",
        trains(lambda shares, losses: sum(shares).item() + sum(losses[-1:])),
        "division_removed: The gradients are not divided any more, so they are too large; that part was right.",
        trains(lambda shares, _: sum(shares).item() / len(shares), divisor=lambda window: 1),
    ),
    given=train_windows,
)


# --------------------------------------------------------------------- 4.5: the schedule's number of updates


def number(answer, case):
    return plain_number(answer(case["number"], case["k"], case["epochs"]))


WHOLE = table("number k epochs", (8, 4, 3), (12, 3, 2), (5, 1, 4), (60, 20, 7), (6, 6, 1))
BROKEN = table("number k epochs", (7, 4, 3), (3, 4, 10), (11, 5, 6), (101, 10, 4), (2001, 1000, 1))
NUMBERS = "{number} micro-batches, k = {k}, epochs: {epochs}"
SCHEDULE = Question(
    "4.5",
    "How many updates",
    (
        Property(
            "the updates, where the windows come out even",
            1,
            WHOLE,
            number,
            lambda case: len(right_updates(case)),
            NUMBERS,
        ),
        Property(
            "the updates, where an epoch's last window is shorter",
            1,
            BROKEN,
            number,
            lambda case: len(right_updates(case)),
            NUMBERS,
        ),
    ),
    known(
        "floor: Each epoch's shorter window makes an update too; round up.",
        lambda n, k, epochs: n // k * epochs,
        "floor_of_all: Windows are cut from all epochs together, and rounded down; round up for each epoch by itself.",
        lambda n, k, epochs: n * epochs // k,
        "ceil_of_all: Windows are cut from all epochs together, so some mix two; round up for each epoch by itself.",
        lambda n, k, epochs: -(-n * epochs // k),
        "always_one_more: An update too many is counted where nothing is left over; round up instead of adding 1.",
        lambda n, k, epochs: (n // k + 1) * epochs,
        "one_more_at_the_end: The shorter window is counted once; there is one at the end of every epoch.",
        lambda n, k, epochs: n // k * epochs + (n % k > 0),
        "in_micro_batches: These are micro-batches; an update takes k of them.",
        lambda n, k, epochs: n * epochs,
        "one_epoch: These are the updates of one epoch; there are as many in each.",
        lambda n, k, epochs: -(-n // k),
        "not_rounded: Updates are whole; round up, for each epoch.",
        lambda n, k, epochs: n / k * epochs,
    ),
    forbidden=BUT_WINDOWS,
)

QUESTIONS = (GROUP, EPOCH, REPAIR, UPDATE, SCHEDULE)
