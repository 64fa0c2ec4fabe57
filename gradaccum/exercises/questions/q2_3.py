"""2.3: one update by the sum of a window's gradients, at the memory of one micro-batch."""

from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_02
from gradaccum.exercises.questions.lesson_02 import moves


def moved_by_steps(answer, case):
    model, optimizer, windows = material.run_of_windows(case)
    before = material.weights(model)
    for window in windows:
        answer(model, optimizer, window)
    return material.moved(model, before)


def step_peak(answer, case):
    model, optimizer, [window] = material.run_of_windows(case)
    return material.peak_beyond_start(lambda: answer(model, optimizer, window), model, optimizer, window)


def one_at_a_time(case):
    """Twice what a plain loop holds beyond its start: the large batch's graph holds many times as much."""
    return 2 * step_peak(lesson_02.divided, case)


QUESTION = Question(
    "The delayed step",
    (
        moves(lesson_02.ONE_WINDOW, 1, moved_by_steps, lesson_02.ONE_TRIED, *lesson_02.ONE_SHAPES, (1, 1, 4)),
        moves(
            "each of several calls makes the update of its own window alone",
            1,
            moved_by_steps,
            lesson_02.MANY_TRIED,
            *lesson_02.MANY_SHAPES,
        ),
        Property(
            "one micro-batch's activations are held at a time",
            1,
            lesson_02.shaped((1, 8, 64)),
            step_peak,
            one_at_a_time,
            tried=f"{lesson_02.ONE_TRIED} of size {{size}}",
            judge=material.at_most_bytes,
            after=lesson_02.ONE_WINDOW,
            by_value=False,
        ),
    ),
)

of_a_window = lesson_02.OF_A_WINDOW


@mistake(
    "Each loss is a sum over its samples, so the update is as many times too large as a micro-batch has samples; take "
    "the mean of each micro-batch, as cross_entropy does by itself."
)
def summed_samples(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets, reduction="sum").backward()
    optimizer.step()
    optimizer.zero_grad()


@mistake(
    "More than one micro-batch's activations are held at a time: by one backward at the end, by joining the "
    "micro-batches, by retain_graph=True, or by a list of losses or outputs that have their graphs; call backward() "
    "for each micro-batch and keep nothing of it."
)
def one_backward(model, optimizer, micro_batches):
    sum(cross_entropy(model(inputs), targets) for inputs, targets in micro_batches).backward()
    optimizer.step()
    optimizer.zero_grad()
