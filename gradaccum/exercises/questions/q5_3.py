"""5.3, find the bug: the gradient is right, and all graphs of the window are held for it."""

from torch.nn.functional import cross_entropy

from gradaccum import data
from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, known_mistakes, mistake
from gradaccum.exercises.questions import lesson_05, mistakes_05
from gradaccum.exercises.questions.lesson_05 import TRIED, window_of


def window_gradient(model, micro_batches):
    """Leave in .grad the gradient of the mean loss over all targets; return the loss."""
    loss_sum, count = 0.0, 0
    for inputs, targets in micro_batches:
        logits = model(inputs)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss_sum = loss_sum + loss
        count = count + (targets != data.IGNORED).sum()
    mean = loss_sum / count
    mean.backward()
    return mean.item()


def gradients_of_two_calls(answer, case):
    model, window = material.steep_model(case["seed"]), material.padded_text(case["counts"], case["seed"])
    before, found = material.weights(model), {}
    for call in ("", " of a second call"):  # as in a second epoch: an answer may not spoil the window
        model.zero_grad()
        answer(model, window)
        gradient = material.gradient(model)
        # As a word, a nan is equal to another one, so that a mistake can be recognized by it.
        found[f"gradient{call}"] = "not a number" if "nan" in str(gradient) else gradient
    return found | {"weights changed": material.weights(model) != before}


def full_batch_gradient(case):
    model = material.steep_model(case["seed"])
    lesson_05.mean_over_targets(model, material.padded_text(case["counts"], case["seed"])).backward()
    gradient = material.gradient(model)
    return {"gradient": gradient, "gradient of a second call": gradient, "weights changed": False}


def parts(case, got):
    second = [] if got["weights changed"] else [got["gradient of a second call"]]
    return lesson_05.parts(case, got["gradient"], *second)


def returned(answer, case):
    model, window = material.steep_model(case["seed"]), material.padded_text(case["counts"], case["seed"])
    return material.returned_mean(answer(model, window))


def mean_loss(case):
    model, window = material.steep_model(case["seed"]), material.padded_text(case["counts"], case["seed"])
    return lesson_05.mean_over_targets(model, window).item()


def window_peak(answer, case):
    """Measure what a call holds at most, with so large a vocabulary that activations are much more than the text."""
    model, window = material.token_model(case["seed"], 40), material.padded_text(case["counts"], case["seed"], 40)
    return material.peak_beyond_start(lambda: answer(model, window), model, window)


def one_at_a_time(case):
    """Twice what the plain loop holds beyond its start: the whole window's graphs hold several times as much."""
    return 2 * window_peak(lesson_05.by_count, case)


def windows(draw):
    return lesson_05.unequal(draw) + window_of([[3, 1], [0, 0], [2]], [[2, 1], [3], [4, 1]])(draw)


KEPT = "the gradient is that of the mean loss over all targets of the window, in the next epoch too"
QUESTION = Question(
    "The fix that lost the point",
    (
        Property(KEPT, 0, windows, gradients_of_two_calls, full_batch_gradient, TRIED, parts=parts),
        Property("the mean loss over all targets is returned", 0, windows, returned, mean_loss, TRIED),
        Property(
            "one micro-batch's activations are held at a time",
            3,
            window_of([[20] * 4] * 8),
            window_peak,
            one_at_a_time,
            "8 micro-batches of 4 rows with 20 targets each",
            judge=material.at_most_bytes,
            after=KEPT,
            by_value=False,
        ),
    ),
    given=window_gradient,
)

as_in_the_step = known_mistakes(vars(mistakes_05))


@mistake(
    "Nothing is left in .grad: it is cleared at the end, or no backward reaches the weights; leave the gradient there."
)
def cleared_at_the_end(model, micro_batches):
    mean = lesson_05.by_count(model, micro_batches)
    model.zero_grad()
    return mean
