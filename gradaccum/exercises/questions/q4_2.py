"""4.2: one epoch, one update for each window, the shorter last one too."""

from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_04, weights_04
from gradaccum.exercises.questions.lesson_04 import EPOCH, TRAIN, drawn  # noqa: F401 - EPOCH holds mistakes


def epochs_trained(answer, case):
    def train(model, optimizer, micro_batches, k):
        for _ in range(case["epochs"]):
            answer(model, optimizer, micro_batches, k)

    return material.trained(case, train)


def epoch_peak(answer, case):
    import torch

    model = material.classifier(case["seed"])
    micro_batches = material.samples([case["size"]] * case["number"], case["seed"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return material.peak_beyond_start(lambda: answer(model, optimizer, micro_batches, case["k"]), model, micro_batches)


def one_at_a_time(case):
    """Twice what the plain loop holds beyond its start: a whole window's graph holds many times as much."""
    return 2 * epoch_peak(lesson_04.by_number(), case)


def even(draw):
    for k, windows in (3, 2), (draw.randrange(4, 7), 1), (2, draw.randrange(2, 4)), (1, 2):
        yield k * windows, k, 1


def twice(draw):
    yield from lesson_04.partial(draw, epochs=2)


FULL = "full windows train as their large batches would"
RIGHT = {"probe": epochs_trained, "expected": lesson_04.large_batches, "tried": TRAIN, "parts": weights_04.parts}
QUESTION = Question(
    "One epoch",
    (
        Property(FULL, 1, drawn(even), **RIGHT),
        Property(lesson_04.SHORTER, 1, drawn(lesson_04.partial), **RIGHT),
        Property("a second epoch starts afresh", 1, drawn(twice), **RIGHT),
        Property(
            lesson_04.PEAK,
            1,
            lambda draw: [{"number": 9, "k": 8, "epochs": 1, "size": 64, "seed": draw.randrange(10**6)}],
            epoch_peak,
            one_at_a_time,
            TRAIN,
            judge=material.at_most_bytes,
            after=FULL,
            by_value=False,
        ),
    ),
)


@mistake(
    "More than one micro-batch's activations are held at a time: by one backward for a window, by joining its "
    "micro-batches, by retain_graph=True, or by a list of losses or outputs that have their graphs; call backward for "
    "each micro-batch and keep nothing of it."
)
def joined_windows(model, optimizer, micro_batches, k):
    for inputs, targets in map(material.joined, lesson_04.right_lists(micro_batches, k)):
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
