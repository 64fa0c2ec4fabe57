"""6.4: further right answers, which must get full points, and wrong ones, which must not."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def detached_losses_kept(model, optimizer, window):
    optimizer.zero_grad()
    losses, guesses = [], []
    for inputs, targets in window:
        logits = model(inputs)
        loss = nn.CrossEntropyLoss()(logits.transpose(1, 2), targets)
        (loss / len(window)).backward()
        losses.append(loss.detach())
        guesses.append(logits.argmax(-1) == targets)
        del logits, loss
    optimizer.step()
    return torch.stack(losses).mean(), torch.cat(guesses).double().mean()


def gradients_by_hand(model, optimizer, window):
    parameters, total, losses, right = list(model.parameters()), None, [], []
    for inputs, targets in reversed(window):
        logits = model(inputs).flatten(0, 1)
        losses.append(cross_entropy(logits, targets.flatten()))  # a loss after its backward holds four or eight bytes
        right.append((logits.argmax(1) == targets.flatten()).double().mean())
        found = torch.autograd.grad(losses[-1], parameters)
        total = found if total is None else [one.add_(other) for one, other in zip(total, found, strict=True)]
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient / len(window)
    optimizer.step()
    return sum(losses).item() / len(window), sum(right) / len(window)


def looks_first(model, optimizer, window):
    """Reads both numbers without gradients, before it trains: slower, and right."""
    items = sum(targets.numel() for _, targets in window)
    with torch.no_grad():
        right = sum((model(inputs).argmax(-1) == targets).sum() for inputs, targets in window) / items
    summed = 0
    for inputs, targets in window:
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum") / items
        loss.backward()
        summed += loss.detach()
    optimizer.step()
    model.zero_grad()
    return summed, right


def by_closure(model, optimizer, window):
    found = []

    def closure():
        optimizer.zero_grad()
        for inputs, targets in window:
            logits = model(inputs)
            loss = cross_entropy(logits.transpose(1, 2), targets) / len(window)
            loss.backward()
            found.append([loss.item(), (logits.argmax(-1) == targets).double().mean().item() / len(window)])

    optimizer.step(closure)
    return [sum(each) for each in zip(*found, strict=True)]


def keeps_probabilities(model, optimizer, window):
    kept = []
    for inputs, targets in window:
        logits = model(inputs).flatten(0, 1)
        kept.append((logits.softmax(1).detach(), targets.flatten(), cross_entropy(logits, targets.flatten())))
        (kept[-1][2] / len(window)).backward()
    optimizer.step()
    optimizer.zero_grad()
    share = torch.cat([each.argmax(1) == targets for each, targets, _ in kept]).double().mean()
    return sum(loss for _, _, loss in kept) / len(window), share


def never_clears(model, optimizer, window):
    loss, right, items = 0.0, 0, 0
    for inputs, targets in window:
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        each = cross_entropy(logits, targets) / len(window)
        each.backward()
        loss, right = loss + each.item(), right + (logits.argmax(1) == targets).sum().item()
        items += len(targets)
    optimizer.step()
    return loss, right / items


def returns_sums(model, optimizer, window):
    loss, share = detached_losses_kept(model, optimizer, window)
    return loss * len(window), share


def one_backward(model, optimizer, window):
    def forward(inputs, targets):
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        guesses = logits.argmax(1) == targets
        return cross_entropy(logits, targets) / len(window), guesses.sum().item() / len(targets) / len(window)

    losses, shares = zip(*(forward(*batch) for batch in window), strict=True)
    sum(losses).backward()
    optimizer.step()
    optimizer.zero_grad()
    return sum(losses).item(), sum(shares)


RIGHT = [
    detached_losses_kept,
    gradients_by_hand,
    looks_first,
    by_closure,
    lambda *known: torch.stack(looks_first(*known)),
]
WRONG = [keeps_probabilities, never_clears, returns_sums, lambda *known: detached_losses_kept(*known)[0]]
NAMED = [(one_backward, "only_logits_dropped")]
# Mutants of the reference answer that are right too, and why.
EQUIVALENT = {
    "9: loss.item() -> loss": "a loss that has been through backward holds no activations, and is a number too",
    "10: (logits.argmax(1) == targets).sum().item() -> (logits.argmax(1) == targets).sum()": "a number too",
}
