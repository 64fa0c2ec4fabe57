"""4.4: repair a loop that clips and moves the schedule inside the window, and logs something else than its loss."""

import math

from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_04
from gradaccum.exercises.weighing import Gradient, own_gradients


def epoch_seen(answer, case):
    return material.epoch_of_windows(case, answer)[case["what"]]


def on_large_batches(model, optimizer, schedule, windows, max_norm):
    for inputs, targets in map(material.joined, windows):
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


def parts(case, got):
    model, windows = material.linear_model_and_windows(case)
    for number, (window, held) in enumerate(zip(windows, got.values(), strict=False), start=1):
        means = own_gradients(model, dict(enumerate(window, start=1)))
        whole = [sum(each) / len(window) for each in zip(*means.values(), strict=True)]
        right = min(1.0, case["max_norm"] / (math.hypot(*whole) + 1e-6)) / len(window)  # as clip_grad_norm_ has it
        yield Gradient(held, means, dict.fromkeys(means, right), counts={}, name=f"In update {number}")
        material.shrink(model)


def windows_drawn(draw):
    """Draw windows with gradients longer than max_norm, or not; a shorter window's, clipped, would hide its divisor."""
    short = [3, 3, draw.randrange(1, 3)], [*draw.sample([16, 0.1], 2), 0.1]
    for lengths, times in (short, ([2, 2, 2], draw.sample([16, 16, 0.1], 3))):
        drawn = {"windows": lengths, "size": draw.randrange(1, 5), "seed": draw.randrange(10**6)}
        yield drawn | {"inputs times": times, "max_norm": draw.randrange(120, 180) / 100}


def about(what, name, lr=0.0):
    """Make a property of one of the things that are seen."""
    tried = "windows of {windows} micro-batches, each of size {size}, max_norm {max_norm}"

    def cases(draw):
        return [case | {"what": what, "lr": lr} for case in windows_drawn(draw)]

    made_of = parts if what == "gradients" else None
    return Property(name, 1, cases, epoch_seen, lambda case: epoch_seen(on_large_batches, case), tried, parts=made_of)


def updates_used(answer, case):
    """List which micro-batches each update uses, in two epochs: they may be cleared before a window or after it."""

    def train(model, optimizer, micro_batches):
        rest = iter(micro_batches)
        windows = [[next(rest) for _ in range(length)] for length in case["windows"]]
        for _ in range(2):
            material.scheduled(answer, model, optimizer, windows, 1.0)

    return material.used(sum(case["windows"]), train)


def right_updates(case):
    numbers = iter(range(1, sum(case["windows"]) + 1))
    return [[next(numbers) for _ in range(length)] for length in case["windows"]] * 2


def epoch_peak(answer, case):
    import torch

    model, windows = material.classifier(case["seed"]), [material.samples([64] * k, case["seed"]) for k in (8, 1)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return material.peak_beyond_start(
        lambda: material.scheduled(answer, model, optimizer, windows, 1.0), model, windows
    )


def one_at_a_time(case):
    return 2 * epoch_peak(trains(), case)


def train_windows(model, optimizer, schedule, windows, max_norm):
    """Train for one epoch, and return the mean loss of each window."""
    losses = []
    for window in windows:
        for inputs, targets in window:
            loss = cross_entropy(model(inputs), targets) / len(window)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


QUESTION = Question(
    "Repair: once per update",
    (
        about("gradients", "each step gets the window's whole gradient, clipped once"),
        about("rates", "the schedule moves on once for each update", lr=0.5),
        about("losses", "what is logged is the mean loss over each window"),
        about("graphs", "nothing that is logged holds a graph"),
        Property(
            "there is one step for each window, and the gradients are cleared",
            0,
            lambda draw: [{"windows": [2, 2, 1]}, {"windows": [draw.randrange(1, 4), 3]}],
            updates_used,
            right_updates,
            "windows of {windows} micro-batches, two epochs; which micro-batches each update used",
        ),
        Property(
            lesson_04.PEAK,
            0,
            lambda draw: [{"seed": draw.randrange(10**6)}],
            epoch_peak,
            one_at_a_time,
            "windows of 8 and 1 micro-batches, each of size 64",
            judge=material.at_most_bytes,
            by_value=False,
        ),
    ),
    given=train_windows,
)


def clip_to_norm(model, max_norm):
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def trains(
    write=lambda shares, _: sum(shares).item(),
    divisor=len,
    clip=clip_to_norm,
    inside="",
    after="clip step clear schedule",
    last="",
):
    """Make the loop with one thing changed; `write` makes of a window's divided losses what is logged."""

    def train(model, optimizer, schedule, windows, max_norm):
        losses, steps = [], {"step": optimizer.step, "clear": optimizer.zero_grad, "schedule": schedule.step}

        def do(names):
            for name in names.split():
                clip(model, max_norm) if name == "clip" else steps[name]()

        for window in windows:
            shares = []
            for inputs, targets in window:
                shares.append(cross_entropy(model(inputs), targets) / divisor(window))
                shares[-1].backward()
                do(inside)
            do(after)
            losses.append(write(shares, losses))
        do(last)
        return losses

    return train


clipped_inside = mistake(
    "Clipping after each micro-batch cuts the sum again and again, so its direction is wrong even where its norm is "
    "right; clip once, when the window's gradient is complete."
)(trains(inside="clip", after="step clear schedule"))
not_clipped = mistake(
    "The step gets a gradient that was not clipped; clip after the last backward() of the window, and before the step."
)(trains(after="step clear schedule"))
clipped_to_one = mistake("Each gradient is clipped to 1.0, whatever max_norm is; pass max_norm to clip_grad_norm_.")(
    trains(clip=lambda model, _: clip_to_norm(model, 1.0))
)
clipped_by_value = mistake(
    "Each number of the gradient is clipped separately; clip_grad_norm_ scales the whole gradient."
)(trains(clip=lambda model, max_norm: nn.utils.clip_grad_value_(model.parameters(), max_norm)))
schedule_inside = mistake("The schedule moves on with each micro-batch, so it runs too fast; step it once per update.")(
    trains(inside="schedule", after="clip step clear")
)
schedule_before = mistake(
    "The schedule moves on before the update, so the first update has the second rate; step it after optimizer.step()."
)(trains(after="clip schedule step clear"))
schedule_at_the_end = mistake("The schedule moves on once for the whole epoch; step it once for each update.")(
    trains(after="clip step clear", last="schedule")
)
schedule_stands = mistake("The schedule never moves on; step it once for each update.")(trains(after="clip step clear"))
logged_as_given = mistake(
    "What is logged is still the last micro-batch's share alone, with its graph; add up `.item()` of all."
)(trains(lambda shares, _: shares[-1]))
last_share = mistake("This is only the last micro-batch's loss, divided by the window's length; add up those of all.")(
    trains(lambda shares, _: shares[-1].item())
)
last_loss = mistake("This is the loss of the last micro-batch alone; the window's is the mean over all of them.")(
    trains(lambda shares, _: shares[-1].item() * len(shares))
)
divided_again = mistake("The losses are divided by the window's length twice; they have been divided, so add them up.")(
    trains(lambda shares, _: sum(shares).item() / len(shares))
)
never_divided = mistake("This is the sum of the micro-batches' mean losses instead of their mean; divide once.")(
    trains(lambda shares, _: sum(shares).item() * len(shares))
)
keeps_the_graph = mistake("The loss is right, but it keeps its graph alive; log `.item()` or `.detach()`.")(
    trains(lambda shares, _: sum(shares))
)
added_on = mistake("The sum is never reset, so each window's loss contains those before; start each window at 0.")(
    trains(lambda shares, losses: sum(shares).item() + sum(losses[-1:]))
)
division_removed = mistake("The gradients are not divided any more, so they are too large; that part was right.")(
    trains(lambda shares, _: sum(shares).item() / len(shares), divisor=lambda window: 1)
)
clearing_removed = mistake(
    "The gradients are not cleared any more, so each update contains those before it; that part was right."
)(trains(after="clip step schedule"))


@mistake("There is a number for each micro-batch; return one for each window, the mean over it.")
def one_for_each(*given):
    return [share.item() for shares in trains(lambda shares, _: shares)(*given) for share in shares]


@mistake("One number is returned; return a list with one for each window.")
def mean_of_all(*given):
    losses = trains()(*given)
    return sum(losses) / len(losses)
