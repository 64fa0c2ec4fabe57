"""3.3: write the test that tells a right training step from a wrong one."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum.exercises.question import Question, mistake
from gradaccum.exercises.questions import lesson_03
from gradaccum.exercises.questions.verdicts import asking


def summed_in_reverse(model, micro_batches):
    total = sum(len(targets) for _, targets in micro_batches)
    for inputs, targets in reversed(micro_batches):
        (cross_entropy(model(inputs), targets, reduction="sum") / total).backward()


def scaled_afterwards(model, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
    for parameter in model.parameters():
        parameter.grad /= len(micro_batches)


def joined_again(model, micro_batches):
    inputs, targets = (torch.cat(part) for part in zip(*micro_batches, strict=True))
    cross_entropy(model(inputs), targets).backward()


def divided_twice(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches) ** 2).backward()


def one_left_out(model, micro_batches):
    for inputs, targets in micro_batches[:-1] or micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()


def last_undivided(model, micro_batches):
    inputs, targets = micro_batches[-1]
    cross_entropy(model(inputs), targets).backward()


def slightly_too_long(model, micro_batches):
    for inputs, targets in micro_batches:
        (1.003 * cross_entropy(model(inputs), targets) / len(micro_batches)).backward()


def turned_round(model, micro_batches):
    for inputs, targets in micro_batches:
        (-cross_entropy(model(inputs), targets) / len(micro_batches)).backward()


def last_weight_undivided(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()
    list(model.parameters())[-1].grad *= len(micro_batches)


def first_weight_undivided(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()
    next(iter(model.parameters())).grad *= len(micro_batches)


RIGHT = {
    "divides each mean by k": lesson_03.divided,
    "divides each sum by all samples, last micro-batch first": summed_in_reverse,
    "divides the gradient at the end": scaled_afterwards,
    "joins the micro-batches": joined_again,
}
UNDIVIDED = {"does not divide": lesson_03.not_divided}
WRONG = {
    "clears inside the window": lesson_03.cleared_inside,
    "divides by k twice": divided_twice,
    "leaves the last micro-batch out": one_left_out,
    "divides each mean by its samples": lesson_03.divided_by_samples,
    "divides each sum by k": lesson_03.sum_divided_by_steps,
    "uses the last micro-batch alone": last_undivided,
    "makes each gradient 0.3 % too long": slightly_too_long,
    "moves the weights the wrong way": turned_round,
    "does not divide the gradient of the last parameter": last_weight_undivided,
    "does not divide the gradient of the first parameter": first_weight_undivided,
}
EVERY, NOTICES = "every right step is called right", "a step without the division is called wrong"
calls = asking(RIGHT, UNDIVIDED | WRONG)
QUESTION = Question(
    "A test that notices",
    (
        calls(EVERY, 2, RIGHT, "several right steps", NOTICES),
        calls(NOTICES, 2, UNDIVIDED, "a step that does not divide", EVERY),
        calls("other wrong steps are called wrong", 1, WRONG, "several wrong steps", EVERY),
    ),
    forbidden=(),
)


def checks_with(
    make_optimizer, sizes=(4, 4, 4), same=False, lr=0.5, agree=torch.allclose, kept=slice(None), first=None
):
    """Make a test like the reference one, with one thing changed."""

    def is_right(step):
        torch.manual_seed(1)
        model = nn.Linear(3, 3)
        for parameter in model.parameters() if first is not None else ():
            nn.init.constant_(parameter, first)
        twin = copy.deepcopy(model)
        micro_batches = [(torch.randn(size, 3), torch.randint(3, (size,))) for size in sizes]
        if same:
            micro_batches = micro_batches[:1] * len(sizes)
        step(model, make_optimizer(model.parameters(), lr=lr), micro_batches)
        joined_again(twin, micro_batches)
        make_optimizer(twin.parameters(), lr=lr).step()
        pairs = [*zip(model.parameters(), twin.parameters(), strict=True)]
        return all(agree(one, other) for one, other in pairs[kept])

    return is_right


def close(atol):
    return lambda one, other: torch.allclose(one, other, atol=atol)


SGD = torch.optim.SGD

with_adam = mistake(
    "Steps that scale the gradient pass, including the one without the division; Adam and clipping hide a "
    "factor, and so does comparing directions: use SGD without clipping, and compare the new weights."
)(checks_with(torch.optim.Adam, lr=1e-3))

with_one_micro_batch = mistake(
    "Steps that use only one micro-batch, or do not divide, pass; a window of a single micro-batch cannot show "
    "either fault, so use several."
)(checks_with(SGD, sizes=(4,)))

to_the_last_bit = mistake(
    "Of the right steps only the one that joins the micro-batches passes: do you compare without a tolerance for "
    "rounding, or does your model look at the whole batch, as BatchNorm does?"
)(checks_with(SGD, agree=torch.equal))

on_unequal_sizes = mistake(
    "Right steps that divide by k are called wrong; they give the large batch's gradient only for micro-batches "
    "of equal sizes, so use equal sizes."
)(checks_with(SGD, sizes=(5, 1, 2)))

rather_tolerant = mistake(
    "A step that does not divide is detected, but steps with a smaller error pass; compare the new weights more "
    "closely: right steps agree to 1e-6."
)(checks_with(SGD, agree=close(0.1)))

a_little_tolerant = mistake(
    "A step whose gradients are all 0.3 % too large passes; right steps agree to 1e-6, so compare more closely."
)(checks_with(SGD, agree=close(1e-3)))

one_parameter_alone = mistake(
    "A step that is wrong only in its last parameter passes; compare all parameters of the model."
)(checks_with(SGD, kept=slice(1)))

last_parameter_alone = mistake(
    "A step that is wrong only in its first parameter passes; compare all parameters of the model."
)(checks_with(SGD, kept=slice(-1, None)))

lengths_compared = mistake(
    "A step that moves the weights in the wrong direction passes; compare the weights number by number, not only "
    "their norms."
)(checks_with(SGD, first=0.0, agree=lambda one, other: torch.allclose(one.norm(), other.norm())))

as_many_samples_as_steps = mistake(
    "A step that divides by the samples passes: there are as many samples in a micro-batch as micro-batches in your "
    "window, so give each micro-batch more."
)(checks_with(SGD, sizes=(3, 3, 3)))

with_one_sample_each = mistake(
    "A step that divides each summed loss by k passes: a micro-batch of one sample has the same sum and mean, so give "
    "each several."
)(checks_with(SGD, sizes=(1, 1, 1)))

with_one_repeated = mistake(
    "A step that uses only one micro-batch passes, since all of yours are the same; draw a different one each time."
)(checks_with(SGD, same=True))


@mistake(
    "Right and wrong are swapped: return True for a step that does what the large batch does, so for a small "
    "difference."
)
def exchanged(step):
    return not checks_with(SGD)(step)


CLEARED = "A step clears .grad in the end, so compare the weights that it leaves."


@mistake(f"Every step passes, the wrong ones too: does your test compare at all, with what, and how closely? {CLEARED}")
def always_right(step):
    return True


@mistake(f"Every step is rejected, the right ones too: what does your test compare with? {CLEARED}")
def always_wrong(step):
    return False
