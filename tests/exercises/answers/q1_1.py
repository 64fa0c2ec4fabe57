"""1.1: further right answers, which must get full points, and wrong ones, which must not."""

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


RIGHT = [clears_first, row_by_row_cleared_to_zeros, assigns_the_gradient, gives_a_closure, one_gradient_per_token]
WRONG = [
    steps_twice,
    last_position_alone,
    moves_by_its_own_rule,
    spoils_the_batch,
    makes_its_own_optimizer,
    lambda *step: round(clears_first(*step), 2),
    lambda *step: 0.0,
]
