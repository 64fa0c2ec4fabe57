"""4.3: repair a loop that updates after the wrong micro-batches, and lets the last of them leak."""

from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.compare import agree
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_04, weights_04
from gradaccum.exercises.questions.lesson_04 import TRAIN, by_k, by_number, drawn, each_epoch, full, right_updates


def updates_used(answer, case):
    return material.used(case["number"], lambda *given: answer(*given, case["k"], case["epochs"]))


def all_trained(answer, case):
    return material.trained(case, lambda *given: answer(*given, case["epochs"]))


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


PARITY = "each update is made from k micro-batches, where they divide evenly"
KEPT = "the updates of an epoch use all its micro-batches, and none is left for the next epoch"


def evenly(draw):
    for k in (3, draw.randrange(2, 6), 1):
        yield k * draw.randrange(2, 4), k, 1


def left_over(draw):
    for k in (2, draw.randrange(3, 6)):
        yield k * draw.randrange(1, 3) + k - 1, k, 2  # where the code as it is keeps some, unless k is 2


def again(draw):
    yield from lesson_04.partial(draw, epochs=2)
    yield 3, 2, 3


USED = "{number} micro-batches, k = {k}, epochs: {epochs}; which micro-batches each update used"
QUESTION = Question(
    "Repair: the parity and the leak",
    (
        Property(PARITY, 2, drawn(evenly), updates_used, right_updates, USED),
        Property(KEPT, 1, drawn(left_over), updates_used, right_updates, USED, judge=none_kept),
        Property(
            lesson_04.SHORTER, 1, drawn(again), all_trained, lesson_04.large_batches, TRAIN, parts=weights_04.parts
        ),
    ),
    given=train,
    forbidden=lesson_04.BUT_WINDOWS,
)

EPOCHS = {name: mistake(each.sentence)(each_epoch(each.answer)) for name, each in lesson_04.EPOCH.items()}
MIXED = "The count goes on from one epoch to the next, so some windows mix two epochs; each epoch begins a new window."


@mistake(MIXED)
def counted_on(model, optimizer, micro_batches, k, epochs):
    by_number(full, full, by_k)(model, optimizer, micro_batches * epochs, k)


@mistake(MIXED)
def counted_to_the_end(model, optimizer, micro_batches, k, epochs):
    by_number(divisor=by_k)(model, optimizer, micro_batches * epochs, k)


@mistake(MIXED)
def windows_of_all_epochs(model, optimizer, micro_batches, k, epochs):
    by_number()(model, optimizer, micro_batches * epochs, k)


@mistake("What is left over leaks in all epochs but the last; every epoch ends with an update.")
def stepped_at_the_very_end(model, optimizer, micro_batches, k, epochs):
    each_epoch(by_number(full, full, by_k))(model, optimizer, micro_batches, k, epochs)
    if len(micro_batches) % k:
        optimizer.step()


@mistake("There is one epoch, whatever `epochs` is; go through the micro-batches as often as it says.")
def one_epoch(model, optimizer, micro_batches, k, epochs):
    by_number()(model, optimizer, micro_batches, k)
