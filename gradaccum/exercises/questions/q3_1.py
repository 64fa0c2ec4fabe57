"""3.1: fill .grad from a window of equal micro-batches that has no length, as the large batch would."""

import torch
from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_03
from gradaccum.exercises.questions.fills_03 import FILLS, READ_TWICE, divide, made
from gradaccum.exercises.weighing import Gradient, own_gradients


def gradients_of_two_calls(answer, case):
    model, window = material.classifier(case["seed"]), material.samples(case["sizes"], case["seed"], case["scale"])
    before = material.weights(model)
    answer(model, material.stream(window, case["source"]))
    found = {"gradient": material.gradient(model), "weights changed": material.weights(model) != before}
    model.zero_grad()
    answer(model, material.stream(window, case["source"]))  # as in a second epoch: an answer may not spoil its data
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


def in_words(k, size):
    return f"{k} micro-batch{'es' if k > 1 else ''} of {size} sample{'s' if size > 1 else ''}{' each' if k > 1 else ''}"


def equal_windows(draw):
    shapes = [(2, 3), (5, 1), (3, 4), (4, 2), (8, 64), (1, 5)]  # k and the size: no single number serves them all
    scales = [1, 1, 1, 30, 1, 30]  # some gradients are longer than 1, so that clipping shows
    return [
        {
            "sizes": [size] * k,
            "window": in_words(k, size),
            "scale": scale,
            "source": "list" if k == 3 else "generator",
            "seed": draw.randrange(10**6),
        }
        for (k, size), scale in zip(shapes, scales, strict=True)
    ]


def still_there(answer, case):
    """Count the earlier micro-batches that are still there, each time that the stream is asked for one more."""
    import weakref

    made, counted = [], [0]

    def fresh(inputs, targets):  # nothing here refers to it
        made.append(weakref.ref(own := inputs.clone()))
        return own, targets

    def stream():
        for each in material.samples(case["sizes"], case["seed"]):
            counted.append(sum(one() is not None for one in made))
            yield fresh(*each)
        counted.append(sum(one() is not None for one in made))

    answer(material.classifier(case["seed"]), stream())
    return max(counted)


def window_peak(answer, case):
    model, window = material.classifier(case["seed"]), material.samples(case["sizes"], case["seed"])
    return material.peak_beyond_start(lambda: answer(model, material.stream(window, "generator")), model, window)


def one_at_a_time(case):
    """Twice what the plain loop holds beyond its start: the full batch's graph holds many times as much."""
    return 2 * window_peak(lesson_03.not_divided, case)


def generated(k, size):
    window = {"sizes": [size] * k, "window": in_words(k, size)}
    return lambda draw: [window | {"source": "generator", "seed": draw.randrange(10**6)}]


EQUAL = "equal micro-batches give the gradient of the one large batch"
TRIED = "a {source} of {window}"
QUESTION = Question(
    "A window without a length",
    (
        Property(EQUAL, 2, equal_windows, gradients_of_two_calls, large_batch_gradient, TRIED, parts=parts),
        Property(
            "at most two earlier micro-batches are still there when the next is read",
            1,
            generated(7, 3),
            still_there,
            lambda case: 2,
            TRIED,
            judge=material.at_most("micro-batches still there"),
            after=EQUAL,
            by_value=False,
        ),
        Property(
            "one micro-batch's activations are held at a time",
            1,
            generated(8, 64),
            window_peak,
            one_at_a_time,
            TRIED,
            judge=material.at_most_bytes,
            after=EQUAL,
            by_value=False,
        ),
    ),
)

len_asked = mistake(
    "A generator has no length, and the number of micro-batches is known only after the last: count them in the "
    "loop, and divide each .grad at the end."
)(lesson_03.divided)


@mistake("A generator cannot be indexed; iterate over the micro-batches in a for loop.")
def indexed(model, micro_batches):
    cross_entropy(model(micro_batches[0][0]), micro_batches[0][1]).backward()


TWICE = mistake(
    "The micro-batches are read twice, to count them and to use them, but a generator is empty the second time; "
    "count them in the loop that uses them, and divide at the end."
)
twice = {f"read_twice_{number}".removesuffix("_1"): TWICE(each) for number, each in enumerate(READ_TWICE, start=1)}
fills = {name: mistake(sentence)(made(**options)) for name, sentence, options in FILLS}


@mistake("A list is not an iterator, which next() needs: call iter(micro_batches), which also takes a generator.")
def next_of_a_list(model, micro_batches):
    first, k = next(micro_batches), 1
    cross_entropy(model(first[0]), first[1]).backward()
    for k, (inputs, targets) in enumerate(micro_batches, start=2):  # noqa: B007
        cross_entropy(model(inputs), targets).backward()
    divide(model, k)


@mistake("The last micro-batch is never used: it was read ahead, and the loop ended before it was used.")
def last_forgotten(model, micro_batches):
    micro_batches, k = iter(micro_batches), 0
    inputs, targets = next(micro_batches)
    for following in micro_batches:
        cross_entropy(model(inputs), targets).backward()
        (inputs, targets), k = following, k + 1
    divide(model, k)


@mistake("The weights are divided, and the gradient is not; divide parameter.grad, and leave the parameter as it is.")
def weights_divided(model, micro_batches):
    losses = [cross_entropy(model(inputs), targets).backward() for inputs, targets in micro_batches]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter /= len(losses)


@mistake("The weights were changed; this function only fills .grad, and the caller makes the step.")
def stepped(model, micro_batches):
    made()(model, micro_batches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad


@mistake(
    "The micro-batches are collected, as by list(...), so all of them are in memory at once; use each as it "
    "comes, and keep nothing of it."
)
def listed(model, micro_batches):
    lesson_03.divided(model, list(micro_batches))


@mistake(
    "All micro-batches are held with their activations: by one backward at the end, by joining the micro-batches, by "
    "retain_graph=True, or by a list of losses or outputs; call backward for each and keep nothing of it."
)
def one_backward(model, micro_batches):
    losses = [cross_entropy(model(inputs), targets) for inputs, targets in micro_batches]
    (sum(losses) / len(losses)).backward()


@mistake(
    "More than one micro-batch's activations are held at a time, as by a list of outputs; call backward for each "
    "micro-batch and keep nothing of it."
)
def outputs_kept(model, micro_batches):
    outputs = []
    for inputs, targets in micro_batches:
        outputs.append(model(inputs))
        cross_entropy(outputs[-1], targets).backward()
    divide(model, len(outputs))
