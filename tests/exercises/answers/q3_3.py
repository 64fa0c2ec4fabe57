"""3.3: further right answers, which must get full points, and wrong ones, which must not."""

import copy

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from gradaccum import relative_error


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


def compares(agree, count=None):
    """Compare the gradients of some parameters with those of the whole batch."""

    def is_right(step):
        model, seen = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), []
        inputs, targets = torch.randn(10, 2), torch.randint(3, (10,))
        expected = torch.autograd.grad(cross_entropy(model(inputs), targets), list(model.parameters()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
        step(model, optimizer, list(zip(inputs.split(5), targets.split(5), strict=True)))
        return all(agree(one, other) for one, other in list(zip(seen, expected, strict=True))[:count])

    return is_right


def counts_its_calls():
    """Say right to the first four steps that it is given in a row, and wrong to the rest."""
    calls = []

    def is_right(step):
        calls.append(step)
        return len(calls) <= 4

    return is_right


def reads_the_name(step):
    return "divided" not in repr(step) and "divided" not in str(step.__closure__[0].cell_contents)


def grads_of(step, twin_too=False):
    """Compares .grad when the step is over, and has cleared it."""
    model = nn.Linear(3, 3)
    twin = copy.deepcopy(model)
    inputs, targets = torch.randn(12, 3), torch.randint(3, (12,))
    step(model, torch.optim.SGD(model.parameters(), lr=0.5), list(zip(inputs.split(4), targets.split(4), strict=True)))
    cross_entropy(twin(inputs), targets).backward()
    if twin_too:
        twin.zero_grad()
    return relative_error(*([p.grad for p in each.parameters()] for each in (model, twin))) < 1e-5


def looks_at_the_whole_batch(step):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    inputs, targets = torch.randn(12, 3), torch.randint(3, (12,))
    step(model, torch.optim.SGD(model.parameters(), lr=0.5), list(zip(inputs.split(4), targets.split(4), strict=True)))
    cross_entropy(twin(inputs), targets).backward()
    torch.optim.SGD(twin.parameters(), lr=0.5).step()
    return relative_error(model.parameters(), twin.parameters()) < 1e-5


RIGHT = [gradients_compared, one_weight, records_the_gradient]
WRONG = [
    only_one_update_looked_at,
    repeats_one_micro_batch,
    lambda step: None,
    compares(torch.allclose, count=1),
    compares(lambda one, other: (one - other).norm() < 1e-2 * other.norm()),
    compares(lambda one, other: cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9999),
    compares(lambda one, other: (one.norm() - other.norm()).abs() < 1e-6),
    counts_its_calls(),
    reads_the_name,
]
NAMED = [
    (compares(torch.allclose, count=3), "one_parameter_alone"),
    (compares(lambda one, other: (one - other).norm() < 1e-2 * other.norm()), "a_little_tolerant"),
    (grads_of, "always_wrong"),
    (lambda step: grads_of(step, twin_too=True), "always_right"),
    (looks_at_the_whole_batch, "to_the_last_bit"),
    (lambda step: not one_weight(step), "exchanged"),
    (lambda step: None,),
    (lambda step: float(one_weight(step)),),
    (lambda step: "right" if one_weight(step) else "wrong",),
]
# Mutants of the reference answer that are right too, and why.
EQUIVALENT = {
    "4: torch.manual_seed(0) -> pass": "a test may draw its data anew each time",
    "4: 0 -> 1": "any seed serves",
    "5: 3 -> 4": "a fourth class that no target names changes nothing in what is compared",
    "8: zip(inputs.split(4), targets.split(4), strict=True) -> zip(inputs.split(4), targets.split(4))": "equally long",
    "8: True -> False": "equally long",
    "13: relative_error(model.parameters(), twin.parameters()) < 1e-05 -> "
    "relative_error(model.parameters(), twin.parameters()) <= 1e-05": "no error is exactly the bound",
}
