"""6.4: further right answers, which must get full points, and wrong ones, which must not."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint


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


def checkpointed(model, optimizer, window):
    losses, shares = [], []
    for inputs, targets in window:
        logits = checkpoint(model, inputs, use_reentrant=False)
        losses.append(cross_entropy(logits.flatten(0, 1), targets.flatten()))
        (losses[-1] / len(window)).backward()
        shares.append((logits.detach().argmax(-1).numpy() == targets.numpy()).mean())
    optimizer.step()
    optimizer.zero_grad()
    return np.mean([loss.item() for loss in losses]), np.mean(shares)


def retains_for_nothing(model, optimizer, window):
    """Lets each graph go before the next but one is made."""
    loss_sum, shares = 0.0, []
    for inputs, targets in window:
        logits = model(inputs).flatten(0, 1)
        loss = cross_entropy(logits, targets.flatten()) / len(window)
        loss.backward(retain_graph=True)
        loss_sum, shares = loss_sum + loss.detach(), [*shares, (logits.argmax(1) == targets.flatten()).tolist()]
    optimizer.step()
    optimizer.zero_grad()
    return loss_sum, np.mean(shares)


def keeps(convert, guesses=lambda kept: kept.argmax(1), divide=True):
    """Keep something of the logits of each micro-batch, and guess from it at the end."""

    def answer(model, optimizer, window):
        kept, loss_sum = [], 0.0
        for inputs, targets in window:
            logits, targets = model(inputs).flatten(0, 1), targets.flatten()
            loss = cross_entropy(logits, targets)
            (loss / (len(window) if divide else 1)).backward()
            kept.append((convert(logits.detach()), targets))
            loss_sum += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        right = np.concatenate([np.asarray(guesses(each)) == targets.numpy() for each, targets in kept])
        return loss_sum / len(window), right.mean()

    return answer


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


def joined_to_guess(model, optimizer, window):
    with torch.no_grad():
        logits = model(torch.cat([inputs for inputs, _ in window]))
        share = (logits.argmax(-1) == torch.cat([targets for _, targets in window])).double().mean()
        del logits
    return looks_first(model, optimizer, window)[0], share


def gradients_listed(model, optimizer, window):
    parameters, found, losses, shares = list(model.parameters()), [], [], []
    for inputs, targets in window:
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        loss = cross_entropy(logits, targets)
        found.append(torch.autograd.grad(loss, parameters))
        losses.append(loss.item())
        shares.append((logits.argmax(1) == targets).double().mean().item())
    for parameter, *gradients in zip(parameters, *found, strict=True):
        parameter.grad = sum(gradients) / len(window)
    optimizer.step()
    optimizer.zero_grad()
    return np.mean(losses), np.mean(shares)


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


def clears_before_the_step(model, optimizer, window):
    found = never_clears(model, SimpleNamespace(step=lambda: None), window)
    optimizer.zero_grad()
    optimizer.step()
    return found


def numbers(change):
    """Change the two numbers, by (the loss, the share, the number of micro-batches)."""
    return lambda model, optimizer, window: change(*looks_first(model, optimizer, window), len(window))


def guesses_at_the_end(model, optimizer, window):
    loss, _ = detached_losses_kept(model, optimizer, window)
    optimizer.zero_grad()
    return loss, np.mean([(model(inputs).argmax(-1) == targets).double().mean().item() for inputs, targets in window])


def leaves_eval_on(model, optimizer, window):
    model.eval()
    return looks_first(model, optimizer, window)


RIGHT = [
    detached_losses_kept,
    gradients_by_hand,
    looks_first,
    by_closure,
    checkpointed,
    retains_for_nothing,
    lambda *known: torch.stack(looks_first(*known)),
    keeps(lambda logits: logits.argmax(1), guesses=lambda kept: kept),
    keeps(lambda logits: logits.argmax(1).tolist(), guesses=lambda kept: kept),
]
WRONG = [
    leaves_eval_on,
    lambda *known: detached_losses_kept(*known)[0],
    numbers(lambda loss, share, k: (loss, 1 - share)),
]
NAMED = [
    (keeps(lambda logits: logits.softmax(1)), "logits_kept"),
    (keeps(lambda logits: logits.half()), "logits_kept"),
    (keeps(lambda logits: logits.numpy().astype(np.float16)), "logits_kept"),
    (keeps(lambda logits: logits.tolist(), lambda kept: np.argmax(kept, 1)), "logits_kept"),
    (
        keeps(lambda logits: logits == logits.max(1, keepdim=True).values, lambda kept: kept.int().argmax(1)),
        "logits_kept",
    ),
    (keeps(lambda logits: logits.argsort(1)[:, -1], guesses=lambda kept: kept), "logits_kept"),
    (keeps(lambda logits: logits, divide=False), "not_divided", "logits_kept"),
    (one_backward, "graphs_kept"),
    (joined_to_guess, "graphs_kept"),
    (gradients_listed, "graphs_kept"),
    (never_clears, "never_cleared"),
    (clears_before_the_step, "never_stepped"),
    (guesses_at_the_end, "guessed_late"),
    (numbers(lambda loss, share, k: (loss * k, share)), "loss_added_up"),
    (numbers(lambda loss, share, k: (loss / k, share)), "loss_divided_again"),
    (numbers(lambda loss, share, k: (loss, share * k)), "share_added_up"),
    (numbers(lambda loss, share, k: (share, loss)), "swapped"),
    (numbers(lambda loss, share, k: (loss * k, share * k)),),
]
# Mutants of the reference answer that are right too, and why.
EQUIVALENT = {
    "9: loss.item() -> loss": "a loss that has been through backward holds no activations, and is a number too",
    "10: (logits.argmax(1) == targets).sum().item() -> (logits.argmax(1) == targets).sum()": "a number too",
}
