"""Lesson 6: further right answers, which must get full points, and wrong ones, which must not."""

from bisect import bisect_right

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum.memory import measure_memory
from gradaccum.models import embedding_linear


def measures(rows, length, width, vocabulary, accumulation_steps):
    model = embedding_linear(vocabulary, width).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = torch.zeros(2, rows, length, dtype=torch.int64).split(rows // accumulation_steps, dim=1)
    window = [(inputs.clone(), targets.clone()) for inputs, targets in batches]
    for _ in range(2):
        with measure_memory(model, optimizer, window) as memory:
            for inputs, targets in window:
                targets = targets.flatten()
                (cross_entropy(model(inputs).flatten(0, 1), targets) / len(window)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return memory.peak_bytes


def counts_numbers_as_floats(rows, length, width, vocabulary, accumulation_steps):
    n = rows / accumulation_steps * length
    copies = 2.0 if accumulation_steps == 1 else 3.0
    numbers = copies * vocabulary * (2 * width + 1) + n * (width + 3 * vocabulary) + 2
    return torch.tensor(4 * numbers + 2 * 8 * rows * length)


def embedding_of_the_window(rows, length, width, vocabulary, accumulation_steps):
    """Lets only the logits shrink with the micro-batch."""
    right = counts_numbers_as_floats(rows, length, width, vocabulary, accumulation_steps)
    return right + 4 * width * length * (rows - rows // accumulation_steps)


def fixed_length(rows, length, width, vocabulary, accumulation_steps):
    return counts_numbers_as_floats(rows, 20, width, vocabulary, accumulation_steps)


def doubles_then_narrows(peak_of, effective_batch, budget):
    size, jump = 0, 1
    while jump:
        if size + jump <= effective_batch and peak_of(size + jump) <= budget:
            size, jump = size + jump, jump * 2
        else:
            jump //= 2
    window = []
    while size and sum(window) < effective_batch:
        window.append(min(size, effective_batch - sum(window)))
    return tuple(window)


def by_bisect(peak_of, effective_batch, budget):
    fitting = bisect_right(range(1, effective_batch + 1), budget, key=peak_of)
    return (len(each) for each in torch.arange(effective_batch).split(fitting)) if fitting else ()


def recursive(peak_of, effective_batch, budget):
    def search(low, high):
        if low == high:
            return low
        middle = (low + high + 1) // 2
        return search(middle, high) if peak_of(middle) <= budget else search(low, middle - 1)

    size = search(0, effective_batch)
    whole, rest = divmod(effective_batch, size) if size else (0, 0)
    return torch.tensor([size] * whole + [rest] * (rest > 0))


def shorter_one_first(peak_of, effective_batch, budget):
    return list(recursive(peak_of, effective_batch, budget))[::-1]


def beyond_the_batch(peak_of, effective_batch, budget):
    """Asks for peaks of more samples than there are, which in earnest is no memory left."""
    most = 1
    while peak_of(most) <= budget:
        most *= 2
    return list(by_bisect(peak_of, min(most, effective_batch), budget))


def nine_halvings(peak_of, effective_batch, budget):
    fits, too_large = 0, effective_batch + 1
    for _ in range(9):
        middle = (fits + too_large) // 2
        fits, too_large = (middle, too_large) if middle and peak_of(middle) <= budget else (fits, middle)
    return list(by_bisect(lambda n: n, effective_batch, fits))


def size_alone(peak_of, effective_batch, budget):
    return max(by_bisect(peak_of, effective_batch, budget), default=0)


def halves_only(peak_of, effective_batch, budget):
    size = effective_batch
    while size and peak_of(size) > budget:
        size //= 2
    return list(by_bisect(lambda n: n, effective_batch, size))


def everything_at_once(peak_of, effective_batch, budget):
    return [effective_batch] if peak_of(effective_batch) <= budget else []


def none_where_nothing_fits(peak_of, effective_batch, budget):
    return list(by_bisect(peak_of, effective_batch, budget)) or None


def ledger(gradients, activations, temporaries, accumulation_steps):
    """Walks through the update, moment by moment."""

    def peak(steps):
        held, worst = 0, 0
        for _ in range(steps):
            worst, held = max(worst, held + activations), gradients
        return max(worst, held + temporaries)

    return float(peak(accumulation_steps) - peak(1))


def by_cases(gradients, activations, temporaries, accumulation_steps):
    if accumulation_steps == 1 or activations <= temporaries:
        return 0
    return min(gradients, activations - temporaries)


def free(gradients, activations, temporaries, accumulation_steps):
    return 0


def step_forgotten(gradients, activations, temporaries, accumulation_steps):
    return min(gradients, activations) if accumulation_steps > 1 else 0


def detached_losses_kept(model, optimizer, window):
    optimizer.zero_grad()
    losses, guesses = [], []
    for inputs, targets in window:
        logits = model(inputs)
        loss = nn.CrossEntropyLoss()(logits.transpose(1, 2), targets)
        (loss / len(window)).backward()
        losses.append(loss.detach())
        guesses.append(logits.argmax(-1) == targets)
        del logits, loss
    optimizer.step()
    return torch.stack(losses).mean(), torch.cat(guesses).double().mean()


def gradients_by_hand(model, optimizer, window):
    parameters, total, losses, right = list(model.parameters()), None, [], []
    for inputs, targets in reversed(window):
        logits = model(inputs).flatten(0, 1)
        losses.append(cross_entropy(logits, targets.flatten()))  # a loss after its backward holds four or eight bytes
        right.append((logits.argmax(1) == targets.flatten()).double().mean())
        found = torch.autograd.grad(losses[-1], parameters)
        total = found if total is None else [one.add_(other) for one, other in zip(total, found, strict=True)]
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient / len(window)
    optimizer.step()
    return sum(losses).item() / len(window), sum(right) / len(window)


def looks_first(model, optimizer, window):
    """Reads both numbers without gradients, before it trains: slower, and right."""
    items = sum(targets.numel() for _, targets in window)
    with torch.no_grad():
        right = sum((model(inputs).argmax(-1) == targets).sum() for inputs, targets in window) / items
    summed = 0
    for inputs, targets in window:
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum") / items
        loss.backward()
        summed += loss.detach()
    optimizer.step()
    model.zero_grad()
    return summed, right


def by_closure(model, optimizer, window):
    found = []

    def closure():
        optimizer.zero_grad()
        for inputs, targets in window:
            logits = model(inputs)
            loss = cross_entropy(logits.transpose(1, 2), targets) / len(window)
            loss.backward()
            found.append([loss.item(), (logits.argmax(-1) == targets).double().mean().item() / len(window)])

    optimizer.step(closure)
    return [sum(each) for each in zip(*found, strict=True)]


def keeps_probabilities(model, optimizer, window):
    kept = []
    for inputs, targets in window:
        logits = model(inputs).flatten(0, 1)
        kept.append((logits.softmax(1).detach(), targets.flatten(), cross_entropy(logits, targets.flatten())))
        (kept[-1][2] / len(window)).backward()
    optimizer.step()
    optimizer.zero_grad()
    share = torch.cat([each.argmax(1) == targets for each, targets, _ in kept]).double().mean()
    return sum(loss for _, _, loss in kept) / len(window), share


def never_clears(model, optimizer, window):
    loss, right, items = 0.0, 0, 0
    for inputs, targets in window:
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        each = cross_entropy(logits, targets) / len(window)
        each.backward()
        loss, right = loss + each.item(), right + (logits.argmax(1) == targets).sum().item()
        items += len(targets)
    optimizer.step()
    return loss, right / items


def returns_sums(model, optimizer, window):
    loss, share = detached_losses_kept(model, optimizer, window)
    return loss * len(window), share


RIGHT = {
    "6.1": [measures, counts_numbers_as_floats],
    "6.2": [doubles_then_narrows, by_bisect, recursive],
    "6.3": [ledger, by_cases],
    "6.4": [
        detached_losses_kept,
        gradients_by_hand,
        looks_first,
        by_closure,
        lambda *known: torch.stack(looks_first(*known)),
    ],
}
WRONG = {
    "6.1": [embedding_of_the_window, fixed_length, lambda *shape: str(int(counts_numbers_as_floats(*shape)))],
    "6.2": [
        *(shorter_one_first, halves_only, everything_at_once, none_where_nothing_fits),
        *(beyond_the_batch, nine_halvings, size_alone, lambda *question: list(map(str, by_bisect(*question)))),
    ],
    "6.3": [
        free,
        step_forgotten,
        lambda *held: str(by_cases(*held)),
        lambda *held: (held[3] > 1) * (held[1] - held[2]),
    ],
    "6.4": [keeps_probabilities, never_clears, returns_sums, lambda *known: detached_losses_kept(*known)[0]],
}
# Mutants of the reference answers that are right too, and why.
EQUIVALENT = {
    "6.1": {"5: tokens // accumulation_steps -> tokens / accumulation_steps": "it divides the rows, and so the tokens"},
    "6.4": {
        "9: loss.item() -> loss": "a loss that has been through backward holds no activations, and is a number too",
        "10: (logits.argmax(1) == targets).sum().item() -> (logits.argmax(1) == targets).sum()": "a number too",
    },
}
