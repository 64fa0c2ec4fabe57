"""2.2: a bug hunt: the gradients are cleared for each micro-batch."""

from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Question, mistake
from gradaccum.exercises.questions import lesson_02
from gradaccum.exercises.questions.lesson_02 import MANY_SHAPES, MANY_TRIED, ONE_SHAPES, ONE_TRIED, ONE_WINDOW, moves


def moved_by_loop(answer, case):
    model, optimizer, windows = material.run_of_windows(case)
    before = material.weights(model)
    answer(model, optimizer, [pair for window in windows for pair in window], case["accumulation_steps"])
    return material.moved(model, before)


def train(model, optimizer, micro_batches, accumulation_steps):
    """Make one update after every `accumulation_steps` micro-batches."""
    for step, (inputs, targets) in enumerate(micro_batches):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()


SEVERAL = "so does each of several windows, and nothing is left over from the one before"
OF_ONE = "with accumulation_steps=1, every micro-batch makes its own update"
OF_ONE_TRIED = "accumulation_steps=1 and {windows} micro-batches"
QUESTION = Question(
    "The gradients that got lost",
    (
        moves(ONE_WINDOW, 1, moved_by_loop, ONE_TRIED, *ONE_SHAPES),
        moves(SEVERAL, 2, moved_by_loop, MANY_TRIED, *MANY_SHAPES),
        moves(OF_ONE, 0, moved_by_loop, OF_ONE_TRIED, (5, 1, 3), (3, 1, 1)),
    ),
    given=train,
)


in_a_loop = {name: mistake(each.sentence)(lesson_02.loop(each.answer)) for name, each in lesson_02.OF_A_WINDOW.items()}


def step_where(due, start=0):
    """Make a loop that steps and clears where `due` says so, of the loop's count and accumulation_steps."""

    def train(model, optimizer, micro_batches, accumulation_steps):
        for step, (inputs, targets) in enumerate(micro_batches, start):
            cross_entropy(model(inputs), targets).backward()
            if due(step, accumulation_steps):
                optimizer.step()
                optimizer.zero_grad()

    return train


stepped_early = mistake(
    "The step comes after the first micro-batch of a window; the loop counts from 0, so the last one of a window is "
    "where step + 1 is a multiple of accumulation_steps."
)(step_where(lambda step, k: step % k == 0))

one_short = mistake(
    "Each step comes one micro-batch too early: where the loop counts from 1, the last of a window is where step, not "
    "step + 1, is a multiple of accumulation_steps."
)(step_where(lambda step, k: (step + 1) % k == 0, start=1))

one_more = mistake(
    "Each step comes one micro-batch too late, so it has the first gradient of the next window too; the loop counts "
    "from 0, so the last of a window is where step + 1 is a multiple of accumulation_steps."
)(step_where(lambda step, k: step > 0 and step % k == 0))


@mistake(
    "The last window never makes its step: either a step comes only when the next window begins, or the loop ends one "
    "window early; step right after each window's last backward()."
)
def stepped_late(model, optimizer, micro_batches, accumulation_steps):
    for step, (inputs, targets) in enumerate(micro_batches):
        if step % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()


@mistake(
    "The first gradient of each window is lost, as when zero_grad() comes after the window's first backward(); clear "
    "before that, or right after the step."
)
def first_lost(model, optimizer, micro_batches, accumulation_steps):
    for step, (inputs, targets) in enumerate(micro_batches):
        cross_entropy(model(inputs), targets).backward()
        if step % accumulation_steps == 0:
            optimizer.zero_grad()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()


@mistake(
    "After the first window, a backward() meets a graph that an earlier one has freed, as when a sum of losses goes on "
    "through the next window; call backward() for each loss at once, and keep nothing of it."
)
def total_goes_on(model, optimizer, micro_batches, accumulation_steps):
    total = 0.0
    for step, (inputs, targets) in enumerate(micro_batches):
        total = total + cross_entropy(model(inputs), targets)
        if (step + 1) % accumulation_steps == 0:
            total.backward()
            optimizer.step()
            optimizer.zero_grad()


@mistake("All micro-batches together make a single step; each window makes one, so the step belongs inside the loop.")
def one_step_in_all(model, optimizer, micro_batches, accumulation_steps):
    lesson_02.collect(model, micro_batches)
    optimizer.step()
    optimizer.zero_grad()
