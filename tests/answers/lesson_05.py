"""Lesson 5: further right answers, which must get full points, and wrong ones, which must not."""

import copy
from fractions import Fraction

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from gradaccum import data, full_batch_gradient, models, relative_error


def loss_sum(model, micro_batch):
    return cross_entropy(model(micro_batch[0]).transpose(1, 2), micro_batch[1], reduction="sum")


def count_of(micro_batches):
    return sum(map(data.count_targets, micro_batches))


def means_in_float32_without_the_empty(model, micro_batches):
    mean = torch.zeros(())
    for inputs, targets in micro_batches:
        share = (data.count_targets((inputs, targets)) / count_of(micro_batches)).float()
        if share > 0:
            loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) * share
            loss.backward()
            mean += loss.detach()
    return mean


def collects_by_hand(model, micro_batches):
    parameters = list(model.parameters())
    held, mean = [torch.zeros_like(parameter) for parameter in parameters], 0
    for micro_batch in micro_batches[::-1]:
        loss = loss_sum(model, micro_batch) / count_of(micro_batches)
        held = [one + other for one, other in zip(held, torch.autograd.grad(loss, parameters), strict=True)]
        mean = mean + loss.detach()
    for parameter, found in zip(parameters, held, strict=True):
        parameter.grad = found
    return mean


def divides_at_the_end(model, micro_batches):
    model.zero_grad()
    losses = []
    for micro_batch in micro_batches:
        losses.append(loss_sum(model, micro_batch))  # kept, but its graph is gone after backward
        losses[-1].backward()
    for parameter in model.parameters():
        parameter.grad.div_(count_of(micro_batches))
    return sum(losses) / count_of(micro_batches)


def row_by_row(model, micro_batches):
    count, total = sum((targets >= 0).sum().item() for _, targets in micro_batches), 0.0
    for inputs, targets in micro_batches:
        for row, wanted in zip(inputs, targets, strict=True):
            kept = wanted != -100
            loss = cross_entropy(model(row[None])[0][kept], wanted[kept], reduction="none").sum()
            loss.backward(torch.full_like(loss, 1 / count))
            total += float(loss)
    return total / count


def means_of_those_with_targets(model, micro_batches):
    some = [each for each in micro_batches if data.count_targets(each)]
    losses = [loss_sum(model, each) / data.count_targets(each) / len(some) for each in some]
    for loss in losses:
        loss.backward()
    return sum(losses)


def zero_over_zero(model, micro_batches):
    total = 0.0
    for micro_batch in micro_batches:
        count = data.count_targets(micro_batch)
        loss = loss_sum(model, micro_batch) / count * (count / count_of(micro_batches))
        loss.backward()
        total += loss.item()
    return total


def stops_at_the_empty(model, micro_batches):
    empty = [not data.count_targets(each) for each in micro_batches]
    return divides_at_the_end(model, micro_batches[: [*empty, True].index(True)] or micro_batches)


def padding_at_the_edges_only(model, micro_batches):
    """Takes a row's targets to be those that follow its first place."""
    count, total = count_of(micro_batches), 0.0
    for inputs, targets in micro_batches:
        for row, wanted in zip(inputs, targets, strict=True):
            here = slice(1, 1 + int((wanted != data.IGNORED).sum()))
            loss = cross_entropy(model(row[None])[0][here], wanted[here], reduction="sum") / count
            loss.backward()
            total += loss.item()
    return total


def keeps_all_graphs(model, micro_batches):
    kept = [loss_sum(model, micro_batch) / count_of(micro_batches) for micro_batch in micro_batches]
    for loss in kept:
        loss.backward(retain_graph=True)
    return sum(kept)


def returns_nothing(model, micro_batches):
    divides_at_the_end(model, micro_batches)


def clears_last(fill):
    def step(model, optimizer, micro_batches):
        mean = fill(model, micro_batches)
        optimizer.step()
        model.zero_grad()
        return mean

    return step


def clears_first(model, optimizer, micro_batches):
    optimizer.zero_grad(set_to_none=False)
    mean = row_by_row(model, micro_batches)
    optimizer.step()
    return mean


def by_closure(model, optimizer, micro_batches):
    def closure():
        optimizer.zero_grad()
        return collects_by_hand(model, micro_batches)

    return optimizer.step(closure)


def smaller_learning_rate(model, optimizer, micro_batches):
    """Right for plain SGD only."""
    total, count = 0.0, count_of(micro_batches)
    for micro_batch in micro_batches:
        loss = loss_sum(model, micro_batch)
        loss.backward()
        total += loss.item()
    optimizer.param_groups[0]["lr"] /= count
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= count
    optimizer.zero_grad()
    return total / count


def clears_before_the_step(model, optimizer, micro_batches):
    mean = divides_at_the_end(model, micro_batches)
    optimizer.zero_grad()
    optimizer.step()
    return mean


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


RIGHT_FILLS = [means_in_float32_without_the_empty, collects_by_hand, divides_at_the_end, row_by_row]
WRONG_FILLS = [means_of_those_with_targets, zero_over_zero, stops_at_the_empty, keeps_all_graphs]
WRONG_FILLS += [padding_at_the_edges_only, returns_nothing, lambda model, micro_batches: None]
RIGHT = {
    "5.1": [
        lambda counts: torch.tensor(counts, dtype=torch.float32) / sum(counts),
        lambda counts: (Fraction(count, sum(counts)) for count in counts),
        lambda counts: tuple(torch.tensor(counts) * (1 / sum(counts))),
    ],
    "5.2": [*map(clears_last, RIGHT_FILLS), clears_first, by_closure],
    "5.3": RIGHT_FILLS,
    "5.4": [gradients_compared, two_windows_in_float32, two_updates_with_momentum, compared_by(torch.allclose)],
}
WRONG = {
    "5.1": [
        lambda counts: None,
        lambda counts: [count // sum(counts) for count in counts],
        lambda counts: [str(count / sum(counts)) for count in counts],
        lambda counts: sum(counts),
        lambda counts: [round(count / sum(counts), 2) for count in counts],
        lambda counts: [count / sum(counts) / len(counts) for count in counts],
        lambda counts: [bool(count) / sum(map(bool, counts)) for count in counts],
        lambda counts: torch.softmax(torch.tensor(counts, dtype=torch.float64), dim=0),
    ],
    "5.2": [*map(clears_last, WRONG_FILLS), clears_before_the_step, smaller_learning_rate],
    "5.3": WRONG_FILLS,
    "5.4": [
        lambda step: None,
        looks_at_the_bias_only,
        compared_by(torch.allclose, names=["ELEPHANT"]),
        compared_by(lambda one, other: torch.allclose(one, other, atol=1.0)),
        compared_by(lambda one, other: cosine_similarity(one, other, dim=0) > 0.99999),
        compared_by(lambda one, other: one.norm() > 0),
    ],
}
# Mutants of the reference answers that are right too, and why.
NO_GRAPH_LEFT = "a number in a tensor is a number, and the graph was freed by backward"
EQUIVALENT = {
    "5.2": {"11: loss.item() -> loss": NO_GRAPH_LEFT},
    "5.3": {"11: loss.item() -> loss": NO_GRAPH_LEFT},
    "5.4": {
        "7: torch.manual_seed(0) -> pass": "a test may draw its weights anew each time",
        "7: 0 -> 1": "any seed serves",
        "8: models.embedding_linear(len(characters), width=8) -> "
        "models.embedding_linear(len(characters))": "a test may choose its width",
        "8: 8 -> 9": "a test may choose its width",
        "15: relative_error(model.parameters(), twin.parameters()) < 1e-05 -> "
        "relative_error(model.parameters(), twin.parameters()) <= 1e-05": "no error is exactly the bound",
    },
}
