"""4.4: further right answers, which must get full points, and wrong ones, which must not."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def once(log, clip=nn.utils.clip_grad_norm_):
    """Train as the worked answer does; `log` makes of a window's undivided losses what is logged."""

    def train(model, optimizer, schedule, windows, max_norm):
        logs = []
        for window in windows:
            losses = []
            for inputs, targets in window:
                losses.append(cross_entropy(model(inputs), targets))
                (losses[-1] / len(window)).backward()
            logs.append(log(losses))
            clip(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return logs

    return train


def mean(losses):
    return sum(loss.item() for loss in losses) / len(losses)


def one_tensor(*arguments):
    return torch.stack(once(lambda losses: torch.stack(losses).detach().mean())(*arguments))


def clips_by_hand(parameters, max_norm):
    gradients = [parameter.grad for parameter in parameters]
    norm = torch.sqrt(sum((each**2).sum() for each in gradients))
    for each in gradients:
        each *= min(1.0, float(max_norm / (norm + 1e-6)))


def clips_each(parameters, max_norm):
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, max_norm)


def before_the_update(model, optimizer, schedule, windows, max_norm):
    for window in windows:
        with torch.no_grad():
            losses = [cross_entropy(model(inputs), targets) for inputs, targets in window]
        once(mean)(model, optimizer, schedule, [window], max_norm)
        yield sum(losses) / len(losses)


def after_the_update(model, optimizer, schedule, windows, max_norm):
    for window in windows:
        once(mean)(model, optimizer, schedule, [window], max_norm)
        yield sum(cross_entropy(model(inputs), targets).item() for inputs, targets in window) / len(window)


def backward_at_the_end(model, optimizer, schedule, windows, max_norm):
    for window in windows:
        loss = sum(cross_entropy(model(inputs), targets) for inputs, targets in window) / len(window)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


def schedule_first(model, optimizer, schedule, windows, max_norm):
    class Nothing:
        def step(self):
            pass

    for window in windows:
        schedule.step()
        yield once(mean)(model, optimizer, Nothing(), [window], max_norm)[0]


def trains_no_more(model, optimizer, schedule, windows, max_norm):
    return [sum(cross_entropy(model(x), y).item() for x, y in window) / len(window) for window in windows]


RIGHT = [
    once(mean),
    once(lambda losses: sum(loss.detach() for loss in losses) / len(losses), clip=clips_by_hand),
    one_tensor,
    before_the_update,
]
WRONG = [
    once(lambda losses: losses[0].item()),
    once(mean, clip=clips_each),
    once(mean, clip=nn.utils.clip_grad_value_),
    after_the_update,
    backward_at_the_end,
    schedule_first,
    lambda *arguments: list(map(str, before_the_update(*arguments))),
    trains_no_more,
    lambda model, optimizer, schedule, windows, max_norm: None,
]
NAMED = [(once(lambda losses: losses[-1] / len(losses)), "last_share", "keeps_the_graph")]
