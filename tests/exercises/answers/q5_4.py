"""5.4: further right answers, which must get full points, and wrong ones, which must not."""

import copy

import numpy as np
import torch
from fills import count_of, loss_sum
from torch.nn.functional import cosine_similarity, cross_entropy

from gradaccum import data, full_batch_gradient, models, relative_error

WORDS = data.Characters(["OX", "ELEPHANT", "CAMEL", "COW"])


def mean_loss(model):
    return lambda batch: cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def gradients_compared(step):
    """Reads the gradient at the optimizer's step; with a micro-batch that has no target."""
    window = [WORDS.batch(["OX", "CAMEL"]), WORDS.batch(["COW"]), WORDS.batch(["ELEPHANT"])]
    window[1][1].fill_(data.IGNORED)
    model = models.GPT(len(WORDS), context=9, width=8, layers=1, heads=2)
    inputs, targets = WORDS.batch(["OX", "CAMEL", "COW", "ELEPHANT"])
    targets[2] = data.IGNORED
    expected = full_batch_gradient(model, (inputs, targets), mean_loss(model))
    optimizer, seen = torch.optim.Adam(model.parameters()), []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
    step(model, optimizer, window)
    return relative_error(seen, expected) < 1e-5


def two_windows_in_float32(step):
    model = models.embedding_linear(len(WORDS), 4).float()
    twin = copy.deepcopy(model)
    ours, theirs = (torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.5) for each in (model, twin))
    for names in (["OX", "ELEPHANT", "COW"], ["CAMEL", "OX"]):
        step(model, ours, [WORDS.batch(names[:1]), WORDS.batch(names[1:])])
        theirs.zero_grad()
        (loss_sum(twin, WORDS.batch(names)) / (len("".join(names)) + len(names))).backward()
        theirs.step()
    return all(torch.allclose(*pair, atol=1e-6) for pair in zip(model.parameters(), twin.parameters(), strict=True))


def two_updates_with_momentum(step):
    """Takes its own text twice, and hands back a tensor."""
    window = [WORDS.batch(["OX", "COW"]), WORDS.batch(["ELEPHANT"])]
    model = models.embedding_linear(len(WORDS), 4)
    twin = copy.deepcopy(model)
    ours, theirs = (torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, twin))
    for _ in range(2):
        step(model, ours, window)
        theirs.zero_grad()
        (loss_sum(twin, WORDS.batch(["OX", "COW", "ELEPHANT"])) / count_of(window)).backward()
        theirs.step()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return sum((one - other).norm() for one, other in pairs) < 1e-5


def updates_compared(agree, names=("OX", "COW", "CAMEL"), cut=2, optimizer=torch.optim.SGD, lr=1.0, some=slice(None)):
    """Make a test that compares the updates of some parameters in one way only."""

    def is_right(step):
        model = models.embedding_linear(len(WORDS), 4)
        twin = copy.deepcopy(model)
        before = [parameter.detach().clone() for parameter in model.parameters()][some]
        window = [WORDS.batch(part) for part in (names[:cut], names[cut:]) if part]
        step(model, optimizer(model.parameters(), lr=lr), window)
        (loss_sum(twin, WORDS.batch(names)) / count_of(window)).backward()
        optimizer(twin.parameters(), lr=lr).step()
        moved = (zip([*each.parameters()][some], before, strict=True) for each in (model, twin))
        return bool(agree(*(torch.cat([(one - start).flatten() for one, start in pairs]) for pairs in moved)))

    return is_right


def within(tolerance):
    return lambda one, other: (one - other).norm() < tolerance * other.norm()


def counts_its_calls():
    """Say right to the first four steps that it is given in a row, and wrong to the rest."""
    calls = []

    def is_right(step):
        calls.append(step)
        return len(calls) <= 4

    return is_right


def unlike_before(agree):
    def is_right(step):
        model = models.embedding_linear(len(WORDS), 4)
        before = copy.deepcopy(model)
        step(model, torch.optim.SGD(model.parameters(), lr=1.0), [WORDS.batch(["OX"]), WORDS.batch(["COW", "CAMEL"])])
        return not all(map(agree, model.parameters(), before.parameters()))

    return is_right


THIRTEENS = "OXOXOX", "CAMEL", "COWCOW", "CAMEL", "COWCOW", "CAMEL", "COWOX", "CAME"
ADAM = torch.optim.Adam
RIGHT = [
    gradients_compared,
    two_windows_in_float32,
    two_updates_with_momentum,
    updates_compared(torch.allclose),
    updates_compared(within(1e-3)),
    updates_compared(within(1e-5), lr=0.1),
    updates_compared(lambda one, other: np.allclose(one.detach(), other.detach(), atol=1e-6)),
    updates_compared(lambda one, other: (one - other).abs().max() < 1e-6, names=THIRTEENS),
    updates_compared(within(1e-4), optimizer=lambda weights, lr: torch.optim.SGD(weights, lr=lr, momentum=0.9)),
]
WRONG = [
    counts_its_calls(),
    lambda step: 1 / 0,
    updates_compared(lambda one, other: one.norm() > 0),
]
NAMED = [
    (lambda step: not gradients_compared(step), "exchanged"),
    (lambda step: None,),
    (lambda step: False, "always_wrong"),
    (unlike_before(torch.equal), "always_right"),
    (updates_compared(within(1e-2)), "a_little_tolerant"),
    (updates_compared(within(0.5)),),
    (updates_compared(within(1e-9)), "closer_than_float32"),
    (updates_compared(torch.allclose, some=slice(1)), "first_parameter_alone"),
    (updates_compared(torch.allclose, some=slice(1, None)), "but_first_parameter_alone"),
    (updates_compared(torch.allclose, some=slice(2, None)), "last_parameter_alone"),
    (updates_compared(lambda one, other: cosine_similarity(one, other, dim=0) > 0.9999), "with_clipping"),
    (updates_compared(lambda one, other: torch.isclose(one.norm(), other.norm())), "lengths_compared"),
    (updates_compared(within(1e-3), optimizer=ADAM, lr=1e-3), "with_adam"),
    (updates_compared(torch.allclose, cut=3), "with_one_micro_batch"),
    (updates_compared(torch.allclose, names=("COW", "OWL"), cut=1), "with_equal_lengths"),
    (updates_compared(torch.allclose, names=("COW", "OWL", "CAMEL")), "without_padding"),
]
# Mutants of the reference answer that are right too, and why.
EQUIVALENT = {
    "7: torch.manual_seed(0) -> pass": "a test may draw its weights anew each time",
    "7: 0 -> 1": "any seed serves",
    "8: models.embedding_linear(len(characters), width=8) -> "
    "models.embedding_linear(len(characters))": "a test may choose its width",
    "8: 8 -> 9": "a test may choose its width",
    "15: relative_error(model.parameters(), twin.parameters()) < 1e-05 -> "
    "relative_error(model.parameters(), twin.parameters()) <= 1e-05": "no error is exactly the bound",
}
