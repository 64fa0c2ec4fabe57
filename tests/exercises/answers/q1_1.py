"""1.1: further right answers, which must get full points, and wrong ones, which must not."""

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


def differentiates_a_function(model, optimizer, inputs, targets):
    def loss_at(weights):
        logits = torch.func.functional_call(model, weights, (inputs,))
        return cross_entropy(logits.log_softmax(-1).transpose(1, 2), targets)

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients, loss = torch.func.grad_and_value(loss_at)(weights)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name]
    optimizer.step()
    return loss.item()


def adds_foreach(model, optimizer, inputs, targets):
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss = flat(model, inputs, targets)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    torch._foreach_add_([parameter.grad for parameter in parameters], list(torch.autograd.grad(loss, parameters)))
    optimizer.step()
    return np.float64(loss.item())


def squeezes_in_place(model, optimizer, inputs, targets):
    before = clears_first(model, optimizer, inputs, targets)
    targets.squeeze_()
    return before


def leaves_eval_on(model, optimizer, inputs, targets):
    model.eval()
    return clears_first(model, optimizer, inputs, targets)


def clears_one_layer(model, optimizer, inputs, targets):
    loss = flat(model, inputs, targets)
    loss.backward()
    optimizer.step()
    model[0].zero_grad()
    return loss.item()


def closure_that_never_clears(model, optimizer, inputs, targets):
    def closure():
        loss = flat(model, inputs, targets)
        loss.backward()
        return loss

    return optimizer.step(closure).item()


def never_clears_and_returns_the_tensor(model, optimizer, inputs, targets):
    loss = flat(model, inputs, targets)
    loss.backward()
    optimizer.step()
    return loss


def returns_the_logits(model, optimizer, inputs, targets):
    logits = model(inputs)
    update(model, optimizer, cross_entropy(logits.flatten(0, 1), targets.flatten()))
    return logits


def shifts_the_other_way(model, optimizer, inputs, targets):
    return update(model, optimizer, cross_entropy(model(inputs)[:, 1:].flatten(0, 1), targets[:, :-1].flatten()))


RIGHT = [
    clears_first,
    row_by_row_cleared_to_zeros,
    assigns_the_gradient,
    gives_a_closure,
    one_gradient_per_token,
    differentiates_a_function,
    adds_foreach,
]
WRONG = [
    steps_twice,
    last_position_alone,
    moves_by_its_own_rule,
    spoils_the_batch,
    makes_its_own_optimizer,
    lambda *step: round(clears_first(*step), 2),
    lambda *step: 0.0,
    squeezes_in_place,
    leaves_eval_on,
    clears_one_layer,
]
NAMED = [
    (steps_twice, "stepped_twice"),
    (makes_its_own_optimizer, "new_optimizer"),
    (moves_by_its_own_rule,),
    (closure_that_never_clears, "not_cleared"),
    (never_clears_and_returns_the_tensor, "not_cleared", "with_its_graph"),
    (returns_the_logits, "with_its_graph", ...),
    (shifts_the_other_way,),
    (clears_one_layer,),
    (last_position_alone,),
]
