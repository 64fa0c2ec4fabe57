"""5.4: further right answers, which must get full points, and wrong ones, which must not."""

import copy

import torch
from fills import count_of, loss_sum
from torch.nn.functional import cosine_similarity

from gradaccum import data, full_batch_gradient, models, relative_error

WORDS = data.Characters(["OX", "ELEPHANT", "CAMEL", "COW"])


def gradients_compared(step):
    """Reads the gradient at the optimizer's step; with a micro-batch that has no target."""
    window = [WORDS.batch(["OX", "CAMEL"]), WORDS.batch(["COW"]), WORDS.batch(["ELEPHANT"])]
    window[1][1].fill_(data.IGNORED)
    model = models.GPT(len(WORDS), context=9, width=8, layers=1, heads=2)
    expected = full_batch_gradient(model, window, lambda each: loss_sum(model, each), data.count_targets)
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


def looks_at_the_bias_only(step):
    window = [WORDS.batch(["OX", "COW"]), WORDS.batch(["ELEPHANT"])]
    model = models.embedding_linear(len(WORDS), 4)
    full = full_batch_gradient(model, window, lambda each: loss_sum(model, each), data.count_targets)
    before = model[1].bias.detach().clone()
    step(model, torch.optim.SGD(model.parameters(), lr=1.0), window)
    return torch.allclose(before - model[1].bias, full[-1])


def compared_by(measure, names=("OX", "ELEPHANT", "COW")):
    """Make a test that compares the two updates in one way only."""

    def is_right(step):
        window = [WORDS.batch(names[:1]), *([WORDS.batch(names[1:])] if names[1:] else [])]
        model = models.embedding_linear(len(WORDS), 4)
        full = full_batch_gradient(model, window, lambda each: loss_sum(model, each), data.count_targets)
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        step(model, torch.optim.SGD(model.parameters(), lr=1.0), window)
        moved = before - torch.nn.utils.parameters_to_vector(model.parameters())
        return bool(measure(moved, torch.cat([found.flatten() for found in full])))

    return is_right


RIGHT = [gradients_compared, two_windows_in_float32, two_updates_with_momentum, compared_by(torch.allclose)]
WRONG = [
    lambda step: None,
    looks_at_the_bias_only,
    compared_by(torch.allclose, names=["ELEPHANT"]),
    compared_by(lambda one, other: torch.allclose(one, other, atol=1.0)),
    compared_by(lambda one, other: cosine_similarity(one, other, dim=0) > 0.99999),
    compared_by(lambda one, other: one.norm() > 0),
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
