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


RIGHT = [collects_by_hand, sums_backwards_and_clears_first, zeroes_in_place, gives_a_closure]
WRONG = [
    steps_on_the_large_batch,
    clears_some,
    keeps_all_graphs,
    spoils_its_data,
    empties_the_list,
    lambda *_: None,
]
