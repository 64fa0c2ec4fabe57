"""Lesson 1: further right answers, which must get full points, and wrong ones, which must not."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, nll_loss


def flat(model, inputs, targets):
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def update(model, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def clears_first(model, optimizer, inputs, targets):
    model.zero_grad()
    loss = nn.CrossEntropyLoss()(model(inputs).transpose(1, 2), targets)
    loss.backward()
    optimizer.step()
    return float(loss)


def row_by_row_cleared_to_zeros(model, optimizer, inputs, targets):
    optimizer.zero_grad(set_to_none=False)
    before = 0.0
    for one, other in zip(inputs, targets, strict=True):
        loss = nll_loss(model(one).log_softmax(-1), other, reduction="sum") / targets.numel()
        loss.backward()
        before += loss.item()
    optimizer.step()
    return before


def assigns_the_gradient(model, optimizer, inputs, targets):
    parameters = list(model.parameters())
    loss = -model(inputs).log_softmax(-1).gather(2, targets[..., None]).mean()
    for parameter, found in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = found
    optimizer.step()
    return loss.detach().numpy()[()]


def gives_a_closure(model, optimizer, inputs, targets):
    def closure():
        optimizer.zero_grad()
        loss = flat(model, inputs, targets)
        loss.backward()
        return loss

    return optimizer.step(closure).tolist()


def one_gradient_per_token(model, optimizer, inputs, targets):
    before = 0.0
    for token, target in zip(inputs.flatten(), targets.flatten(), strict=True):
        loss = cross_entropy(model(token[None]), target[None]) / inputs.numel()
        loss.backward()
        before += loss.item()
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return before


def spoils_the_batch(model, optimizer, inputs, targets):
    before = clears_first(model, optimizer, inputs, targets)
    inputs.zero_()
    return before


def makes_its_own_optimizer(model, optimizer, inputs, targets):
    own = type(optimizer)(model.parameters(), lr=optimizer.param_groups[0]["lr"])
    return clears_first(model, own, inputs, targets)


def steps_twice(model, optimizer, inputs, targets):
    before = update(model, optimizer, flat(model, inputs, targets))
    optimizer.step()
    return before


def last_position_alone(model, optimizer, inputs, targets):
    return update(model, optimizer, cross_entropy(model(inputs)[:, -1], targets[:, -1]))


def moves_by_its_own_rule(model, optimizer, inputs, targets):
    loss = flat(model, inputs, targets)
    found = torch.autograd.grad(loss, list(model.parameters()))
    for parameter, one in zip(model.parameters(), found, strict=True):
        parameter.data -= 0.5 * one
    return loss.item()


def floats_in_a_list(model, batches):
    return float(np.mean([flat(model, *batch).item() for batch in batches]))


def without_gradients(model, batches):
    with torch.no_grad():
        return (sum(flat(model, *batch) for batch in batches) / len(batches)).item()


def inferred(model, batches):
    with torch.inference_mode():
        return torch.stack([flat(model, *batch) for batch in batches]).mean().item()


def detached_and_weighted(model, batches):
    total, tokens = torch.zeros(()), 0
    for inputs, targets in reversed(batches):
        total += flat(model, inputs, targets).detach() * targets.numel()
        tokens += targets.numel()
    return total.item() / tokens


def restores_the_gradients(model, batches):
    held = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    total = 0.0
    for batch in batches:
        loss = flat(model, *batch)
        loss.backward()
        total += loss.item()
    for parameter, gradient in zip(model.parameters(), held, strict=True):
        parameter.grad = gradient
    return total / len(batches)


def clears_the_gradients(model, batches):
    total = 0.0
    for batch in batches:
        loss = flat(model, *batch)
        loss.backward()
        total += loss.item()
        model.zero_grad()
    return total / len(batches)


def stays_frozen(model, batches):
    model.requires_grad_(False)
    return floats_in_a_list(model, batches)


def empties_the_list(model, batches):
    count, total = len(batches), 0.0
    while batches:
        total += flat(model, *batches.pop()).item()
    return total / count


def joins_them_all(model, batches):
    with torch.no_grad():
        inputs, targets = zip(*batches, strict=True)
        return flat(model, torch.cat(inputs), torch.cat(targets)).item()


def keeps_the_logits(model, batches):
    kept = [(model(inputs), targets) for inputs, targets in batches]
    return sum(cross_entropy(scores.flatten(0, 1), targets.flatten()).item() for scores, targets in kept) / len(kept)


def moves_the_weights(model, batches):
    before = without_gradients(model, batches)
    for parameter in model.parameters():
        parameter.data -= 0.1
    return before


RIGHT = {
    "1.1": [clears_first, row_by_row_cleared_to_zeros, assigns_the_gradient, gives_a_closure, one_gradient_per_token],
    "1.2": [floats_in_a_list, without_gradients, inferred, detached_and_weighted, restores_the_gradients],
    "1.3": [
        lambda noise, batch_size, new_batch_size: noise / math.sqrt(new_batch_size / batch_size),
        lambda noise, batch_size, new_batch_size: torch.tensor(noise) * (batch_size / new_batch_size) ** 0.5,
        lambda noise, batch_size, new_batch_size: np.sqrt(noise**2 * batch_size / new_batch_size),
        lambda noise, batch_size, new_batch_size: np.array(noise * math.sqrt(batch_size / new_batch_size)),
    ],
}
WRONG = {
    "1.1": [
        steps_twice,
        last_position_alone,
        moves_by_its_own_rule,
        spoils_the_batch,
        makes_its_own_optimizer,
        lambda *step: round(clears_first(*step), 2),
        lambda *step: 0.0,
    ],
    "1.2": [
        joins_them_all,
        keeps_the_logits,
        moves_the_weights,
        clears_the_gradients,
        stays_frozen,
        empties_the_list,
        lambda model, batches: floats_in_a_list(model, batches[:10]),
        lambda model, batches: 0.0,
    ],
    "1.3": [
        lambda noise, batch_size, new_batch_size: noise / max(new_batch_size // batch_size, 1) ** 0.5,
        lambda noise, batch_size, new_batch_size: noise / 2 if new_batch_size > batch_size else noise * 2,
        lambda noise, batch_size, new_batch_size: str(noise * (batch_size / new_batch_size) ** 0.5),
        lambda noise, batch_size, new_batch_size: None,
    ],
}
# Mutants of the reference answers that are right too, and why.
EQUIVALENT = {}
