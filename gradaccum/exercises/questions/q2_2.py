"""2.2: a bug hunt: the gradients are cleared for each micro-batch."""

from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Question, mistake
from gradaccum.exercises.questions import lesson_02
from gradaccum.exercises.questions.lesson_02 import moves


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


QUESTION = Question(
    "The gradients that got lost",
    (
        moves(lesson_02.ONE_WINDOW, 1, moved_by_loop, lesson_02.ONE_TRIED, *lesson_02.ONE_SHAPES),
        moves(
            "so does each of several windows, and nothing is left over from the one before",
            2,
            moved_by_loop,
            lesson_02.MANY_TRIED,
            *lesson_02.MANY_SHAPES,
        ),
        moves(
            "with accumulation_steps=1, every micro-batch makes its own update",
            0,
            moved_by_loop,
            "accumulation_steps=1 and {windows} micro-batches",
            (5, 1, 3),
            (3, 1, 1),
        ),
    ),
    given=train,
)


def loop(delayed_step):
    """Make a loop over many windows from the step of one."""

    def train(model, optimizer, micro_batches, accumulation_steps):
        for start in range(0, len(micro_batches), accumulation_steps):
            delayed_step(model, optimizer, micro_batches[start : start + accumulation_steps])

    return train


in_a_loop = {name: mistake(each.sentence)(loop(each.answer)) for name, each in lesson_02.OF_A_WINDOW.items()}


@mistake(
    "The step comes after the first micro-batch of a window; the loop counts from 0, so the last one of a window is "
    "where step + 1 is a multiple of accumulation_steps."
)
def stepped_early(model, optimizer, micro_batches, accumulation_steps):
    for step, (inputs, targets) in enumerate(micro_batches):
        cross_entropy(model(inputs), targets).backward()
        if step % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()


@mistake(
    "The step of a window comes only when the next window begins, so the last window never makes one; step right after "
    "a window's last backward()."
)
def stepped_late(model, optimizer, micro_batches, accumulation_steps):
    for step, (inputs, targets) in enumerate(micro_batches):
        if step % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
