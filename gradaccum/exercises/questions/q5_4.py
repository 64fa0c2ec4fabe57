"""5.4: write the test that tells the mean over all targets from the mean of means, and from other wrong steps."""

import copy

import torch

from gradaccum.exercises import material
from gradaccum.exercises.material import filled_with, target_count, token_loss
from gradaccum.exercises.question import Question, mistake
from gradaccum.exercises.questions import lesson_05, mistakes_05
from gradaccum.exercises.questions.verdicts import asking


@filled_with
def float32_shares(model, micro_batches):
    total = torch.tensor(target_count(*micro_batches), dtype=torch.float32)
    for each in [each for each in micro_batches if target_count(each)]:
        yield token_loss(model, each, "mean") * (target_count(each) / total)


@filled_with
def scaled_afterwards(model, micro_batches):
    for each in micro_batches[::-1]:
        yield token_loss(model, each)
    for parameter in model.parameters():
        parameter.grad /= target_count(*micro_batches)


@filled_with
def first_not_moved(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / target_count(*micro_batches)
    next(model.parameters()).grad.zero_()


@filled_with
def one_left_out(model, micro_batches):
    for each in micro_batches[:-1] or micro_batches:
        yield token_loss(model, each) / target_count(*micro_batches)


RIGHT = {
    "divides each sum by the count of all targets": lesson_05.by_count,
    "weights each mean by its share of the targets": float32_shares,
    "divides the gradient at the end": scaled_afterwards,
    "calls backward once, at the end": mistakes_05.one_backward.answer,
}
MEANS = {"takes the mean of means": mistakes_05.mean_of_means.answer}
WRONG = {
    "counts the padding too": mistakes_05.padding_counted.answer,
    "does not divide": mistakes_05.not_divided.answer,
    "clears inside the window": mistakes_05.cleared_inside.answer,
    "leaves the last micro-batch out": one_left_out,
    "moves only some of the weights": first_not_moved,
}
EVERY, NOTICES = "every right step is called right", "a step that takes the mean of means is called wrong"
calls = asking(RIGHT, MEANS | WRONG)
QUESTION = Question(
    "A test that notices",
    (
        calls(EVERY, 1, RIGHT, "several right steps", NOTICES),
        calls(NOTICES, 2, MEANS, "a step that takes the mean of means", EVERY),
        calls("other wrong steps are called wrong", 1, WRONG, "several wrong steps", EVERY),
    ),
    forbidden=(),
)


def trial(window, optimizer=torch.optim.SGD, lr=0.5, rtol=1e-5, mean=lesson_05.mean_over_targets):
    """Make a test like the reference one, with one thing changed."""

    def is_right(step):
        model = material.token_model(1)
        twin = copy.deepcopy(model)
        step(model, optimizer(model.parameters(), lr=lr), window)
        mean(twin, window).backward()
        optimizer(twin.parameters(), lr=lr).step()
        return all(
            torch.allclose(one, other, rtol=rtol, atol=rtol / 100)
            for one, other in zip(model.parameters(), twin.parameters(), strict=True)
        )

    return is_right


def without_ignored(window):
    kept = [targets != material.IGNORED for _, targets in window]
    return [tuple(part[here].view(len(part), -1) for part in each) for each, here in zip(window, kept, strict=True)]


def mean_of_means(model, window):
    return sum(lesson_05.mean_over_targets(model, [each]) for each in window) / len(window)


UNLIKE = material.padded_text([[5, 2], [2]], seed=1)  # 7 of 9 is rounded in float32

with_equal_counts = mistake(
    "The micro-batches of the test have equally many targets, and there a mean of means is right; let them differ."
)(trial(without_ignored(material.padded_text([[3, 3], [3, 3]], seed=1))))

without_padding = mistake(
    "No target of the test is ignored, so a step that counts those too is called right; let rows have padding."
)(trial(without_ignored(material.padded_text([[5, 5], [1]], seed=1))))

with_adam = mistake(
    "The test trains with Adam, which shows a mean of means but hides a constant factor; use SGD without clipping."
)(trial(UNLIKE, optimizer=torch.optim.Adam, lr=1e-3))

to_the_last_bit = mistake(
    "The test asks for equality to the last bit, which right steps miss by rounding; allow a small tolerance."
)(trial(UNLIKE, rtol=0))

means_expected = mistake(
    "The test expects the mean of means itself, and calls right steps wrong; compare with one batch of all rows."
)(trial(UNLIKE, mean=mean_of_means))


@mistake("The test accepts every step, the wrong ones too: does it compare weights or gradients, and how closely?")
def always_right(step):
    return True


@mistake("The test rejects every step, the right ones too: what does it compare with?")
def always_wrong(step):
    return False
