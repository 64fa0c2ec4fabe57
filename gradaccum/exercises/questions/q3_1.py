"""3.1: fill .grad from one window of equal micro-batches, as the large batch would."""

import torch
from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_03
from gradaccum.exercises.weighing import Gradient, own_gradients


def gradients_of_two_calls(answer, case):
    model, window = material.classifier(case["seed"]), material.samples(case["sizes"], case["seed"], case["scale"])
    before = material.weights(model)
    answer(model, window)
    found = {"gradient": material.gradient(model), "weights changed": material.weights(model) != before}
    model.zero_grad()
    answer(model, window)  # as in a second epoch: an answer may not spoil its data or the model
    return found | {"gradient of a second call": material.gradient(model)}


def large_batch_gradient(case):
    model = material.classifier(case["seed"])
    inputs, targets = material.joined(material.samples(case["sizes"], case["seed"], case["scale"]))
    cross_entropy(model(inputs), targets).backward()
    gradient = material.gradient(model)
    return {"gradient": gradient, "weights changed": False, "gradient of a second call": gradient}


def parts(case, got):
    window = dict(enumerate(material.samples(case["sizes"], case["seed"], case["scale"]), start=1))
    means, counts = (
        own_gradients(material.classifier(case["seed"]), window),
        dict(zip(window, case["sizes"], strict=True)),
    )
    right = dict.fromkeys(window, 1 / len(window))
    yield Gradient(got["gradient"], means, right, counts, len(window))
    if not got["weights changed"]:
        yield Gradient(got["gradient of a second call"], means, right, counts, len(window), "In a second call")


def equal_windows(draw):
    shapes = [(2, 3), (5, 1), (3, 4), (4, 2), (8, 64), (1, 5)]  # k and the size: no single number serves them all
    scales = [1, 1, 1, 30, 1, 30]  # some gradients are longer than 1, so that clipping shows
    return [
        {"sizes": [size] * k, "scale": scale, "seed": draw.randrange(10**6)}
        for (k, size), scale in zip(shapes, scales, strict=True)
    ]


def window_peak(answer, case):
    model, window = material.classifier(case["seed"]), material.samples(case["sizes"], case["seed"])
    return material.peak_beyond_start(lambda: answer(model, window), model, window)


def one_at_a_time(case):
    """Twice what the plain loop holds beyond its start: the full batch's graph holds many times as much."""
    return 2 * window_peak(lesson_03.divided, case)


EQUAL = "equal micro-batches give the gradient of the one large batch"
TRIED = "micro-batches of {sizes} samples"
QUESTION = Question(
    "One normalized window",
    (
        Property(EQUAL, 3, equal_windows, gradients_of_two_calls, large_batch_gradient, TRIED, parts=parts),
        Property(
            "one micro-batch's activations are held at a time",
            1,
            lambda draw: [{"sizes": [64] * 8, "seed": draw.randrange(10**6)}],
            window_peak,
            one_at_a_time,
            TRIED,
            judge=material.at_most_bytes,
            after=EQUAL,
            by_value=False,
        ),
    ),
)

not_divided = mistake(
    "Each micro-batch contributed its whole mean, so the gradient is k times too large; divide each loss by k, the "
    "number of micro-batches."
)(lesson_03.not_divided)

divided_by_samples = mistake(
    "The mean over a micro-batch is divided by its number of samples once more; the mean has done that already, and "
    "what is left to divide by is the number of micro-batches."
)(lesson_03.divided_by_samples)


@mistake(
    "Each mean is divided by all the samples of the window, or by k and by its own samples, which is the same number; "
    "that is right for a sum, and a mean needs only k."
)
def divided_by_all_samples(model, micro_batches):
    total = sum(len(targets) for _, targets in micro_batches)
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / total).backward()


sum_divided_by_steps = mistake(
    "The summed loss is divided by the number of micro-batches; a sum needs the number of all samples."
)(lesson_03.sum_divided_by_steps)


@mistake("The divisor is always 4; it has to be the number of micro-batches in this window.")
def divided_by_four(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / 4).backward()


@mistake(
    "Each loss is divided by the micro-batches so far, i + 1, and only the last of these is k; divide by the number of "
    "micro-batches in the window."
)
def divided_by_those_so_far(model, micro_batches):
    for i, (inputs, targets) in enumerate(micro_batches):
        (cross_entropy(model(inputs), targets) / (i + 1)).backward()


cleared_inside = mistake(
    "Only the last micro-batch is left: the gradients are cleared or overwritten inside the loop, or backward is "
    "called for the last one alone; call it for each, and leave .grad alone in between."
)(lesson_03.cleared_inside)


@mistake("The collected gradient is divided after each backward, so the first micro-batches are divided many times.")
def divided_again_and_again(model, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
        for parameter in model.parameters():
            parameter.grad /= len(micro_batches)


def with_a_running_total(divisor):
    def fill(model, micro_batches):
        total = 0.0
        for inputs, targets in micro_batches:
            total = total + cross_entropy(model(inputs), targets) / divisor(micro_batches)
            total.backward(retain_graph=True)

    return fill


running_total = mistake(
    "backward() starts from a running total, so the first micro-batches are added again with each later one; call it "
    "on this micro-batch's own loss."
)(with_a_running_total(len))
running_total_undivided = mistake(
    f"{running_total.sentence} And one more: the losses are not divided by k, the number of micro-batches."
)(with_a_running_total(lambda micro_batches: 1))


@mistake("The weights were changed; this function only fills .grad, and the step is for the caller.")
def stepped(model, micro_batches):
    lesson_03.divided(model, micro_batches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad


@mistake(
    "More than one micro-batch's activations are held at a time: by one backward at the end, by joining the "
    "micro-batches, by retain_graph=True, or by a list of losses or outputs that have their graphs; call backward for "
    "each micro-batch and keep nothing of it."
)
def one_backward(model, micro_batches):
    losses = [cross_entropy(model(inputs), targets) for inputs, targets in micro_batches]
    (sum(losses) / len(losses)).backward()
