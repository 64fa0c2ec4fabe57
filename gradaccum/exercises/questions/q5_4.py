"""5.4: write the test that tells the mean over all targets from the mean of means, and from other wrong steps."""

import copy
from functools import cache

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
def one_left_out(model, micro_batches):
    for each in micro_batches[:-1] or micro_batches:
        yield token_loss(model, each) / target_count(*micro_batches)


@filled_with
def slightly_too_long(model, micro_batches):
    for each in micro_batches:
        yield 1.008 * token_loss(model, each) / target_count(*micro_batches)


@filled_with
def turned_round(model, micro_batches):
    for each in micro_batches:
        yield -token_loss(model, each) / target_count(*micro_batches)


@filled_with
def first_not_moved(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / target_count(*micro_batches)
    next(model.parameters()).grad.zero_()


@filled_with
def middle_doubled(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / target_count(*micro_batches)
    parameters = list(model.parameters())
    parameters[len(parameters) // 2].grad *= 2


@filled_with
def last_doubled(model, micro_batches):
    for each in micro_batches:
        yield token_loss(model, each) / target_count(*micro_batches)
    list(model.parameters())[-1].grad *= 2


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
    "doubles the gradient of one parameter in the middle": middle_doubled,
    "doubles the gradient of the last parameter": last_doubled,
    "makes each gradient 0.8 % too long": slightly_too_long,
    "moves the weights the wrong way": turned_round,
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


def close(atol=1e-7, some=slice(None)):
    return lambda ours, theirs: all(torch.allclose(*each, 0, atol) for each in [*zip(ours, theirs, strict=True)][some])


@cache  # not at import: it sets the seed
def start():
    return material.token_model(1)


def update_by(step, optimizer, lr):
    model = copy.deepcopy(start())
    step(model, optimizer(model.parameters(), lr=lr))
    return [*map(torch.sub, model.parameters(), start().parameters())]


def trial(window, optimizer=torch.optim.SGD, lr=0.5, mean=lesson_05.mean_over_targets, agree=None):
    """Make a test like the reference one, with one thing changed; it compares the updates."""

    def full_batch(model, optimizer):
        mean(model, window).backward()
        optimizer.step()

    expected = cache(lambda: update_by(full_batch, optimizer, lr))
    return lambda step: (agree or close())(
        update_by(lambda model, optimizer: step(model, optimizer, window), optimizer, lr), expected()
    )


class Clipped(torch.optim.SGD):
    def step(self):
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.1)
        super().step()


def mean_of_means(model, window):
    return sum(lesson_05.mean_over_targets(model, [each]) for each in window) / len(window)


UNLIKE = material.padded_text([[5, 2], [2]], seed=1)  # 7 of 9 is rounded in float32

with_equal_counts = mistake(
    "The mean of means passes, since the micro-batches of your test have equally many targets; let them differ."
)(trial(material.padded_text([[3, 1], [2, 2]], seed=1)))

with_equal_lengths = mistake(
    "The mean of means passes, and so does a step that counts the ignored targets: your micro-batches have equally "
    "many targets, and none is ignored; let the rows have unequal lengths."
)(trial([(inputs[:1, :3], torch.ones_like(inputs[:1, :3])) for inputs, _ in UNLIKE]))

with_one_micro_batch = mistake(
    "Steps that use only one micro-batch, or take the mean of means, pass; a window of a single micro-batch "
    "cannot show either fault, so use several."
)(trial(material.padded_text([[5, 2]], seed=1)))

without_padding = mistake(
    "A step that also counts the ignored targets passes, since your text has none; let rows have padding."
)(trial([(inputs[:, :3], torch.ones_like(inputs[:, :3])) for inputs, _ in UNLIKE]))

with_adam = mistake(
    "Steps that scale the gradient pass, including the one without the division; Adam and clipping hide a "
    "factor, and so does comparing directions: use SGD without clipping, and compare the new weights."
)(trial(UNLIKE, torch.optim.Adam, lr=1e-3, agree=close(1e-6)))

with_clipping = mistake(with_adam.sentence)(trial(UNLIKE, Clipped))

to_the_last_bit = mistake(
    "Right steps that add in another order, or compute their weights in float32, are called wrong; they differ "
    "by rounding, so allow a relative error of 1e-5."
)(trial(UNLIKE, agree=lambda ours, theirs: all(map(torch.equal, ours, theirs))))

closer_than_float32 = mistake(
    "A right step that computes its weights in float32, with an error of 1e-7, is called wrong; allow a relative "
    "error of 1e-5."
)(trial(UNLIKE, agree=close(1e-12)))

means_expected = mistake(
    "Right steps are called wrong and the mean of means right: compare with one batch of all rows, not with that mean."
)(trial(UNLIKE, mean=mean_of_means))

rather_tolerant = mistake(
    "A step that does not divide is detected, but steps with a smaller error pass, including the mean of means; "
    "compare the new weights more closely: right steps agree to 1e-5."
)(trial(UNLIKE, agree=close(0.5)))

a_little_tolerant = mistake(
    "A step whose gradients are all 0.8 % too large passes; right steps agree to 1e-5, so compare more closely, "
    "or make the update larger relative to the weights."
)(trial(UNLIKE, agree=close(5e-3)))

lengths_compared = mistake(
    "A step that moves the weights in the wrong direction passes; compare the updates number by number, not only "
    "their norms."
)(trial(UNLIKE, agree=lambda ours, theirs: close()([each.norm() for each in ours], [each.norm() for each in theirs])))

SOME = {"first": slice(1), "middle": slice(1, 2), "last": slice(2, 3), "but_first": slice(1, 3), "but_last": slice(2)}
in_some_parameters = {
    f"{which}_parameter_alone": mistake(
        "Steps that are wrong in only some of the parameters pass; compare every number of every parameter."
    )(trial(UNLIKE, agree=close(some=some)))
    for which, some in SOME.items()
}


@mistake(
    "Right and wrong are swapped: return True for a step that does what the full batch does, so for a small difference."
)
def exchanged(step):
    return not trial(UNLIKE)(step)


CLEARED = "A step clears .grad in the end, so compare the weights that it leaves."


@mistake(f"Every step passes, the wrong ones too: does your test compare at all, with what, and how closely? {CLEARED}")
def always_right(step):
    return True


@mistake(f"All right steps are rejected: what does your test compare with, and does it allow for rounding? {CLEARED}")
def always_wrong(step):
    return False
