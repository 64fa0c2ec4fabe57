"""Lesson 3: further right answers, which must get full points, and wrong ones, which must not."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy


def collects_by_hand(model, micro_batches):
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for inputs, targets in micro_batches:
        loss = nn.CrossEntropyLoss()(model(inputs), targets)
        for held, found in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            held += found
    for parameter, held in zip(parameters, total, strict=True):
        parameter.grad = held / len(micro_batches)


def sums_backwards_and_clears_first(model, micro_batches):
    model.zero_grad()
    items = sum(inputs.shape[0] for inputs, _ in micro_batches)
    for inputs, targets in micro_batches[::-1]:
        cross_entropy(model(inputs), targets, reduction="sum").div(items).backward()


def passes_the_gradient_in(model, micro_batches):
    for inputs, targets in micro_batches:
        loss = cross_entropy(model(inputs), targets)
        loss.backward(torch.full_like(loss, 1 / len(micro_batches)))


def divides_at_the_end_in_place(model, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
    for parameter in model.parameters():
        parameter.grad.mul_(1 / len(micro_batches))


def float32_factor(model, micro_batches):
    factor = torch.tensor(1.0, dtype=torch.float32) / len(micro_batches)
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) * factor).backward()


def mean_so_far(model, micro_batches):
    for before, (inputs, targets) in enumerate(micro_batches):
        for parameter in model.parameters():
            if before:
                parameter.grad *= before / (before + 1)
        (cross_entropy(model(inputs), targets) / (before + 1)).backward()


def leaves_its_hooks(model, micro_batches):
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient / len(micro_batches))
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()


def spoils_its_data(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()
        inputs.zero_()


def divides_by_one_more(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / (len(micro_batches) + 1)).backward()


def leaves_the_first_out(model, micro_batches):
    for inputs, targets in micro_batches[1:]:
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()


def does_nothing(model, micro_batches):
    pass


def keeps_all_graphs(model, micro_batches):
    kept = []
    for inputs, targets in micro_batches:
        kept.append(cross_entropy(model(inputs), targets) / len(micro_batches))
        kept[-1].backward(retain_graph=True)


def gradients_compared(step):
    """Reads the gradient at the optimizer's step, before anything is cleared."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    inputs, targets = torch.randn(6, 2), torch.randint(2, (6,))
    cross_entropy(model(inputs), targets).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    optimizer, seen = torch.optim.Adam(model.parameters()), []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
    step(model, optimizer, [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])])
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(seen, expected, strict=True))


def one_weight(step):
    model = nn.Linear(1, 2, bias=False)
    twin = copy.deepcopy(model)
    batch = torch.randn(8, 1), torch.randint(2, (8,))
    for each, window in (
        (model, [(x, y) for x, y in zip(batch[0].split(2), batch[1].split(2), strict=True)]),
        (twin, [batch]),
    ):
        optimizer = torch.optim.SGD(each.parameters(), lr=1.0, momentum=0.9)
        if each is model:
            step(each, optimizer, window)
        else:
            cross_entropy(each(batch[0]), batch[1]).backward()
            optimizer.step()
    return torch.dist(model.weight, twin.weight) < 1e-5


def records_the_gradient(step):
    """Gives an optimizer that only looks."""
    model, seen = nn.Linear(2, 3), []
    inputs, targets = torch.randn(6, 2), torch.randint(3, (6,))

    class Recorder(torch.optim.SGD):
        def step(self):
            seen.extend(parameter.grad.clone() for parameter in model.parameters())

    step(model, Recorder(model.parameters()), list(zip(inputs.split(3), targets.split(3), strict=True)))
    expected = torch.autograd.grad(cross_entropy(model(inputs), targets), list(model.parameters()))
    return max((one - other).abs().max() for one, other in zip(seen, expected, strict=True)) < 1e-5


def repeats_one_micro_batch(step):
    model = nn.Linear(3, 3)
    twin = copy.deepcopy(model)
    batch = torch.randn(4, 3), torch.randint(3, (4,))
    step(model, torch.optim.SGD(model.parameters(), lr=0.5), [batch] * 3)
    step(twin, torch.optim.SGD(twin.parameters(), lr=0.5), [batch])
    return torch.allclose(model.weight, twin.weight)


def only_one_update_looked_at(step):
    """Notices that the weights moved, not where to."""
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    step(model, torch.optim.SGD(model.parameters(), lr=0.5), [(torch.randn(4, 3), torch.randint(3, (4,)))] * 3)
    return not torch.equal(before, model.weight)


RIGHT = {
    "3.1": [
        collects_by_hand,
        sums_backwards_and_clears_first,
        passes_the_gradient_in,
        divides_at_the_end_in_place,
        float32_factor,
        mean_so_far,
    ],
    "3.2": [
        lambda reduction, sizes: float(len(sizes)) if reduction == "mean" else float(sum(sizes)),
        lambda reduction, sizes: {"mean": len(sizes), "sum": len(sizes) * sizes[0]}[reduction],
        lambda reduction, sizes: torch.tensor(sizes).sum() if reduction == "sum" else np.size(sizes),
        lambda reduction, sizes: np.sum(sizes) if reduction == "sum" else 1 / (1 / len(sizes)),
    ],
    "3.3": [gradients_compared, one_weight, records_the_gradient],
}
WRONG = {
    "3.1": [
        divides_by_one_more,
        leaves_the_first_out,
        does_nothing,
        keeps_all_graphs,
        leaves_its_hooks,
        spoils_its_data,
        lambda model, micro_batches: mean_so_far(model, micro_batches[:5]),
    ],
    "3.2": [lambda reduction, sizes: len(sizes) + 1, lambda reduction, sizes: None, lambda reduction, sizes: 0],
    "3.3": [only_one_update_looked_at, repeats_one_micro_batch, lambda step: None],
}
# Mutants of the reference answers that are right too, and why.
EQUIVALENT = {
    "3.3": {
        "4: torch.manual_seed(0) -> pass": "a test may draw its data anew each time",
        "4: 0 -> 1": "any seed serves",
        "5: 3 -> 4": "a fourth class that no target names changes nothing in what is compared",
        "8: zip(inputs.split(4), targets.split(4), strict=True) -> "
        "zip(inputs.split(4), targets.split(4))": "equally long",
        "8: True -> False": "equally long",
        "13: relative_error(model.parameters(), twin.parameters()) < 1e-05 -> "
        "relative_error(model.parameters(), twin.parameters()) <= 1e-05": "no error is exactly the bound",
    },
}
