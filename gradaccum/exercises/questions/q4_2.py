"""4.2: one epoch, one update for each window, the shorter last one too."""

from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_04
from gradaccum.exercises.questions.lesson_04 import EPOCH, TRAIN, table  # noqa: F401 - EPOCH holds mistakes


def epochs_trained(answer, case):
    def train(model, optimizer, micro_batches, k):
        for _ in range(case["epochs"]):
            answer(model, optimizer, micro_batches, k)

    return material.trained(case, train)


def epoch_peak(answer, case):
    import torch

    model, micro_batches = material.classifier(case["seed"]), material.samples([64] * case["number"], case["seed"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return material.peak_beyond_start(lambda: answer(model, optimizer, micro_batches, case["k"]), model, micro_batches)


def one_at_a_time(case):
    """Twice what the plain loop holds beyond its start: a whole window's graph holds many times as much."""
    return 2 * epoch_peak(lesson_04.by_number(lesson_04.ends), case)


ONE = table("number k epochs", (3, 3, 1), (8, 4, 1), (6, 2, 1), (3, 1, 1))
PARTIAL = table("number k epochs", (2, 3, 1), (7, 3, 1), (3, 4, 1), (5, 2, 1), (9, 5, 1))
TWO = table("number k epochs", (3, 2, 2), (4, 2, 2), (7, 4, 2))
LARGE = table("number k epochs size", (5, 4, 1, 64))
FULL = "full windows train as their large batches would"
RIGHT = epochs_trained, lesson_04.large_batches, TRAIN
QUESTION = Question(
    "One epoch",
    (
        Property(FULL, 1, ONE, *RIGHT),
        Property(lesson_04.SHORTER, 1, PARTIAL, *RIGHT),
        Property("a second epoch starts afresh", 1, TWO, *RIGHT),
        Property(
            lesson_04.PEAK,
            1,
            LARGE,
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
    "The updates are right, but more than one micro-batch's activations are held at a time: by one backward for a "
    "window, by joining its micro-batches, by retain_graph=True, or by a list of losses or outputs that have their "
    "graphs; call backward for each micro-batch and keep nothing of it."
)
def joined_windows(model, optimizer, micro_batches, k):
    for inputs, targets in map(material.joined, lesson_04.right_lists(micro_batches, k)):
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
