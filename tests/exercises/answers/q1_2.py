"""1.2: further right answers, which must get full points, and wrong ones, which must not."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy


def flat(model, inputs, targets):
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


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


def evaluates_and_goes_back(model, batches):
    model.eval()
    with torch.no_grad():
        found = floats_in_a_list(model, batches)
    model.train()
    return found


def detaches_in_place(model, batches):
    total = 0
    for batch in batches:
        total += flat(model, *batch).detach_()
    return float(total) / len(batches)


def mean_so_far(model, batches):
    mean = 0.0
    for count, batch in enumerate(batches, start=1):
        mean += (flat(model, *batch).item() - mean) / count
    return mean


def leaves_eval_on(model, batches):
    model.eval()
    return floats_in_a_list(model, batches)


def adds_with_graphs_then_detaches(model, batches):
    return (sum(flat(model, *batch) for batch in batches) / len(batches)).detach()


def undivided_with_graphs(model, batches):
    return sum(flat(model, *batch) for batch in batches)


def returns_in_the_loop(model, batches):
    total = 0
    for batch in batches:
        total += flat(model, *batch).item()
        return total / len(batches)


RIGHT = [
    floats_in_a_list,
    without_gradients,
    inferred,
    detached_and_weighted,
    restores_the_gradients,
    evaluates_and_goes_back,
    detaches_in_place,
    mean_so_far,
]
WRONG = [
    joins_them_all,
    keeps_the_logits,
    moves_the_weights,
    clears_the_gradients,
    stays_frozen,
    empties_the_list,
    lambda model, batches: floats_in_a_list(model, batches[:10]),
    lambda model, batches: 0.0,
    leaves_eval_on,
]
NAMED = [
    (keeps_the_logits, "float_at_the_end"),
    (joins_them_all, "float_at_the_end"),
    (adds_with_graphs_then_detaches, "added_detached", "float_at_the_end"),
    (undivided_with_graphs, "not_divided", "added_as_tensors"),
    (clears_the_gradients, "gradients_cleared"),
    (returns_in_the_loop, "first_batch_divided"),
    (moves_the_weights,),
    (stays_frozen,),
]
