"""2.3: one update by the sum of a window's gradients, at the memory of one micro-batch."""

from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_02
from gradaccum.exercises.questions.lesson_02 import MANY_SHAPES, MANY_TRIED, ONE_SHAPES, ONE_TRIED, ONE_WINDOW, moves


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


SEVERAL = "each of several calls makes the update of its own window alone"
QUESTION = Question(
    "The delayed step",
    (
        moves(ONE_WINDOW, 1, moved_by_steps, ONE_TRIED, *ONE_SHAPES, (1, 1, 4)),
        moves(SEVERAL, 1, moved_by_steps, MANY_TRIED, *MANY_SHAPES),
        Property(
            "one micro-batch's activations are held at a time",
            1,
            lesson_02.shaped((1, 8, 64)),
            step_peak,
            one_at_a_time,
            tried=f"{ONE_TRIED} of size {{size}}",
            judge=material.at_most_bytes,
            after=ONE_WINDOW,
            by_value=False,
        ),
    ),
)

of_a_window = lesson_02.OF_A_WINDOW


@mistake(
    "The step comes before backward(), so it moves the weights by the gradients of the window before; first backward() "
    "for each micro-batch, then the step."
)
def one_window_late(model, optimizer, micro_batches):
    optimizer.step()
    optimizer.zero_grad()
    lesson_02.collect(model, micro_batches)


@mistake(
    "More than one micro-batch's activations are held at a time: by one backward at the end, by joining the "
    "micro-batches, by retain_graph=True, or by a list of losses or outputs that have their graphs; call backward() "
    "for each micro-batch and keep nothing of it."
)
def one_backward(model, optimizer, micro_batches):
    sum(cross_entropy(model(inputs), targets) for inputs, targets in micro_batches).backward()
    optimizer.step()
    optimizer.zero_grad()
