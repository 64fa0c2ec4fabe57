"""2.3: further right answers, which must get full points, and wrong ones, which must not."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def collects_by_hand(model, optimizer, micro_batches):
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for inputs, targets in micro_batches:
        loss = nn.CrossEntropyLoss()(model(inputs), targets)
        for held, found in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            held += found
    for parameter, held in zip(parameters, total, strict=True):
        parameter.grad = held
    optimizer.step()


def sums_backwards_and_clears_first(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for inputs, targets in micro_batches[::-1]:
        (cross_entropy(model(inputs), targets, reduction="sum") / len(inputs)).backward()
    optimizer.step()


def zeroes_in_place(model, optimizer, micro_batches):
    losses = []
    for inputs, targets in micro_batches:
        losses.append(cross_entropy(model(inputs), targets))
        losses[-1].backward()
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad.zero_()


def gives_a_closure(model, optimizer, micro_batches):
    def closure():
        optimizer.zero_grad()
        total = 0.0
        for inputs, targets in micro_batches:
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            total += loss.item()
        return total

    optimizer.step(closure)


def spoils_its_data(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
        inputs.zero_()
    optimizer.step()
    optimizer.zero_grad()


def empties_the_list(model, optimizer, micro_batches):
    while micro_batches:
        inputs, targets = micro_batches.pop()
        cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def steps_on_the_large_batch(model, optimizer, micro_batches):
    inputs, targets = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))
    cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def clears_some(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    model[0].zero_grad()


def keeps_all_graphs(model, optimizer, micro_batches):
    losses = []
    for inputs, targets in micro_batches:
        losses.append(cross_entropy(model(inputs), targets))
        losses[-1].backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()


def differentiates_a_function(model, optimizer, micro_batches):
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = torch.func.grad(lambda at, x, y: cross_entropy(torch.func.functional_call(model, at, (x,)), y))
    gradients = [found(weights, inputs, targets) for inputs, targets in micro_batches]
    for name, parameter in model.named_parameters():
        parameter.grad = sum(each[name] for each in gradients)
    optimizer.step()


def keeps_the_losses_that_were_used(model, optimizer, micro_batches):
    optimizer.zero_grad()
    total = 0
    for inputs, targets in micro_batches:
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        total = total + loss
    optimizer.step()
    return total / len(micro_batches)


def keeps_every_gradient(model, optimizer, micro_batches):
    parameters = list(model.parameters())
    found = [torch.autograd.grad(cross_entropy(model(x), y), parameters) for x, y in micro_batches]
    for parameter, *each in zip(parameters, *found, strict=True):
        parameter.grad = torch.stack(each).sum(0)
    optimizer.step()


def keeps_the_outputs(model, optimizer, micro_batches):
    kept = []
    for inputs, targets in micro_batches:
        kept.append(model(inputs))
        cross_entropy(kept[-1], targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def leaves_eval_on(model, optimizer, micro_batches):
    model.eval()
    collects_by_hand(model, optimizer, micro_batches)


def one_backward_and_never_clears(model, optimizer, micro_batches):
    sum(cross_entropy(model(inputs), targets) for inputs, targets in micro_batches).backward()
    optimizer.step()


def total_with_retain_graph(model, optimizer, micro_batches):
    total = 0
    for inputs, targets in micro_batches:
        total += cross_entropy(model(inputs), targets)
        total.backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()


def divides_and_never_clears(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()
    optimizer.step()


def clears_after_each(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
        optimizer.zero_grad()
    optimizer.step()


def leaves_the_last_out(model, optimizer, micro_batches):
    collects_by_hand(model, optimizer, micro_batches[:-1] or micro_batches)


def divides_by_the_samples(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(inputs)).backward()
    optimizer.step()
    optimizer.zero_grad()


def counts_the_last_twice(model, optimizer, micro_batches):
    collects_by_hand(model, optimizer, [*micro_batches, micro_batches[-1]])


def steps_twice(model, optimizer, micro_batches):
    collects_by_hand(model, optimizer, micro_batches)
    optimizer.step()


def steps_at_each(model, optimizer, micro_batches):
    for micro_batch in micro_batches:
        collects_by_hand(model, optimizer, [micro_batch])
        collects_by_hand(model, optimizer, [micro_batch])


RIGHT = [
    collects_by_hand,
    sums_backwards_and_clears_first,
    zeroes_in_place,
    gives_a_closure,
    differentiates_a_function,
    keeps_the_losses_that_were_used,
    keeps_every_gradient,
]
WRONG = [
    steps_on_the_large_batch,
    clears_some,
    keeps_all_graphs,
    spoils_its_data,
    empties_the_list,
    lambda *_: None,
    leaves_eval_on,
]
NAMED = [
    (keeps_all_graphs, "one_backward"),
    (keeps_the_outputs, "one_backward"),
    (steps_on_the_large_batch, "divided", "one_backward"),
    (one_backward_and_never_clears, "not_cleared", "one_backward"),
    (total_with_retain_graph, "running_total"),
    (divides_and_never_clears, "not_cleared_and_divided"),
    (clears_after_each, "cleared_before_step"),
    (divides_by_the_samples, "divided_by_samples"),
    (clears_some,),
    (leaves_the_last_out,),
]
WEIGHED = [
    (total_with_retain_graph, "s 4, 3, 2, 1 and should have 1 each", ""),
    (counts_the_last_twice, "s 1, 1, 1, 2 and should have 1 each", ""),
    (steps_twice, "s 2 each and should have 1 each", ""),
    (steps_at_each, "", "of this gradient is no weighted sum"),
    (clears_some, "", ""),
]
