"""4.4: further right answers, which must get full points, and wrong ones, which must not."""

from fractions import Fraction

import numpy
import torch
from torch import nn
from torch.nn.functional import cross_entropy

clip_grad_norm = nn.utils.clip_grad_norm_


def mean(losses):
    return sum(loss.item() for loss in losses) / len(losses)


def once(log=mean, clip=clip_grad_norm, after="clip step schedule clear", inside="", before="", divisor=len):
    """Train as the worked answer does, but in another order; `log` makes of a window's losses what is logged."""

    def train(model, optimizer, schedule, windows, max_norm):
        logs = []
        steps = {"step": optimizer.step, "schedule": schedule.step, "clear": optimizer.zero_grad}

        def do(names):
            for name in names.split():
                clip(model.parameters(), max_norm) if name == "clip" else steps[name]()

        for window in windows:
            do(before)
            losses = []
            for inputs, targets in window:
                losses.append(cross_entropy(model(inputs), targets))
                (losses[-1] / divisor(window)).backward()
                do(inside)
            do(after)
            logs.append(log(losses))
        return logs

    return train


def one_tensor(*given):
    return torch.stack(once(lambda losses: torch.stack(losses).detach().mean())(*given))


def clips_by_hand(parameters, max_norm):
    gradients = [parameter.grad for parameter in parameters]
    norm = torch.sqrt(sum((each**2).sum() for each in gradients))
    if norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)


def clips_in_two_calls(parameters, max_norm):
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def clips_each(parameters, max_norm):
    for parameter in parameters:
        clip_grad_norm(parameter, max_norm)


def by_closure(model, optimizer, schedule, windows, max_norm):
    losses = []
    for window in windows:

        def closure(window=window):
            optimizer.zero_grad()
            shares = [torch.zeros(())]
            for inputs, targets in window:
                share = cross_entropy(model(inputs), targets) / len(window)
                share.backward()
                shares.append(share.detach())
            clip_grad_norm(model.parameters(), max_norm)
            return sum(shares)

        losses.append(optimizer.step(closure))
        schedule.step()
    return losses


def by_autograd(model, optimizer, schedule, windows, max_norm):
    parameters = list(model.parameters())
    for window in windows:
        losses, total = [], [torch.zeros_like(parameter) for parameter in parameters]
        for inputs, targets in window:
            losses.append(cross_entropy(model(inputs), targets))
            torch._foreach_add_(total, torch.autograd.grad(losses[-1], parameters), alpha=1 / len(window))
        for parameter, held in zip(parameters, total, strict=True):
            parameter.grad = held
        clip_grad_norm(parameters, max_norm)
        optimizer.step()
        schedule.step()
        yield mean(losses)


def before_the_update(model, optimizer, schedule, windows, max_norm):
    for window in windows:
        with torch.no_grad():
            losses = [cross_entropy(model(inputs), targets) for inputs, targets in window]
        once()(model, optimizer, schedule, [window], max_norm)
        yield mean(losses)


def after_the_update(model, optimizer, schedule, windows, max_norm):
    for window in windows:
        once()(model, optimizer, schedule, [window], max_norm)
        yield mean([cross_entropy(model(inputs), targets) for inputs, targets in window])


def before_the_epoch(model, optimizer, schedule, windows, max_norm):
    losses = [mean([cross_entropy(model(inputs), targets) for inputs, targets in window]) for window in windows]
    once()(model, optimizer, schedule, windows, max_norm)
    return losses


def backward_at_the_end(model, optimizer, schedule, windows, max_norm):
    for window in windows:
        loss = sum(cross_entropy(model(inputs), targets) for inputs, targets in window) / len(window)
        loss.backward()
        clip_grad_norm(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


def last_not_cleared(model, optimizer, schedule, windows, max_norm):
    for window in windows:
        yield from once(after="clip step schedule")(model, optimizer, schedule, [window], max_norm)
        if window is not windows[-1]:
            optimizer.zero_grad()


def trains_no_more(model, optimizer, schedule, windows, max_norm):
    return [mean([cross_entropy(model(x), y) for x, y in window]) for window in windows]


def keeps_outputs(model, optimizer, schedule, windows, max_norm):
    kept = []
    hook = model.register_forward_hook(lambda _, given, found: kept.append(found))
    losses = once()(model, optimizer, schedule, windows, max_norm)
    hook.remove()
    return losses


def as_given(losses):
    return losses[-1] / len(losses)


RIGHT = [
    once(after="clip step schedule", before="clear"),
    once(after="clip step clear schedule", before="clear"),
    once(lambda losses: sum(losses).detach() / len(losses), clip=clips_by_hand),
    once(lambda losses: numpy.mean([loss.item() for loss in losses]), clip=clips_in_two_calls),
    once(lambda losses: Fraction(sum(loss.item() for loss in losses)) / len(losses)),
    one_tensor,
    by_closure,
    by_autograd,
    before_the_update,
]


def by_the_longest(model, optimizer, schedule, windows, max_norm):
    most = max(map(len, windows))
    return once(divisor=lambda window: most)(model, optimizer, schedule, windows, max_norm)


def twice_for_a_shorter(model, optimizer, schedule, windows, max_norm):
    full = len(windows[0])
    divisor = lambda window: len(window) * (1 if len(window) == full else 2)  # noqa: E731
    return once(divisor=divisor)(model, optimizer, schedule, windows, max_norm)


WRONG = [
    by_the_longest,
    twice_for_a_shorter,
    once(lambda losses: losses[0].item()),
    once(lambda losses: str(mean(losses))),
    once(lambda losses: round(mean(losses), 3)),
    once(clip=clips_each),
    once(clip=lambda parameters, max_norm: clip_grad_norm(parameters, max_norm, norm_type=1)),
    once(clip=lambda parameters, max_norm: clip_grad_norm(parameters, 0.1)),
    once(inside="schedule"),
    once(after="clip clear step schedule"),
    after_the_update,
    before_the_epoch,
    backward_at_the_end,
    last_not_cleared,
    trains_no_more,
    keeps_outputs,
    lambda model, *given: model.eval() and once()(model, *given),
    lambda model, optimizer, schedule, windows, max_norm: None,
]
NAMED = [
    (once(clip=lambda parameters, max_norm: clip_grad_norm(parameters, min(1.0, max_norm))), "clipped_to_one"),
    (once(inside="clip"), "clipped_inside"),
    (once(after="step clip schedule clear"), "not_clipped"),
    (once(as_given, inside="schedule", after="clip step clear"), "schedule_inside", "logged_as_given"),
    (once(as_given, inside="clip", after="step schedule clear"), "clipped_inside", "logged_as_given"),
    (once(inside="clip schedule", after="step clear"), "clipped_inside", "schedule_inside"),
    (once(lambda losses: sum(losses) / len(losses) ** 2), "divided_again", "keeps_the_graph"),
    (once(sum, after="clip schedule step clear"), "schedule_before", ...),
    (once(divisor=lambda window: 1), "division_removed"),
    (once(clip=clips_each),),
    (before_the_epoch,),
]
WEIGHED = [
    (once(inside="clip", after="step schedule clear"), "s 0.0253, 0.0666, 0.156 and should have 0.0809 each.", ""),
    (once(clip=lambda parameters, max_norm: clip_grad_norm(parameters, max_norm / 2)), "s ", ""),
    (once(divisor=lambda window: len(window) + 1), "s 1/4 each and should have 1/3 each", ""),
    (once(clip=clips_each), "", "of this gradient is not a weighted sum"),
    (once(inside="schedule"), "", ""),
]
