"""6.4: find what a training step keeps, and let go of it."""

from functools import cache

import torch
from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake


def train_step(model, optimizer, window):
    """Make one update; return the mean loss and the share of targets guessed."""
    kept = []
    for inputs, targets in window:
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        loss = cross_entropy(logits, targets) / len(window)
        loss.backward(retain_graph=True)
        kept.append((loss, logits.detach(), targets))
    optimizer.step()
    optimizer.zero_grad()
    mean_loss = sum(loss.item() for loss, _, _ in kept)
    guessed = sum((logits.argmax(1) == targets).sum() for _, logits, targets in kept)
    return mean_loss, guessed.item() / sum(len(targets) for _, _, targets in kept)


def two_updates(answer, case):
    model, optimizer, window = material.deep_token_model(case)
    returned = [answer(model, optimizer, each) for each in (window, window[::-1])]
    pairs = [list(map(material.plain_number, each)) if hasattr(each, "__iter__") else [] for each in returned]
    if any(len(pair) != 2 for pair in pairs):
        raise TypeError(f"Return two numbers, the mean loss and the share; this returned {returned[0]!r:.80}.")
    numbers = {"losses": [loss for loss, _ in pairs], "shares": [share for _, share in pairs]}
    return {"weights": material.weights(model), "numbers": numbers}[case["compared"]]


def large_update(model, optimizer, window):
    inputs, targets = material.joined(window)
    logits, targets = model(inputs).flatten(0, 1), targets.flatten()
    loss = cross_entropy(logits, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss, (logits.argmax(1) == targets).double().mean()


def of_two_large_updates(case):
    return two_updates(large_update, case)


def held(answer, case):
    known = material.deep_token_model(case)
    return material.peak_beyond_start(lambda: answer(*known), *known)


@cache
def twice_the_plain_loop(*case):
    return 2 * held(repaired, dict(case))


def windows_for(vocabulary, layers, *sizes, **more):
    return lambda draw: [
        {"k": k, "rows": rows, "vocabulary": vocabulary, "layers": layers, "seed": draw.randrange(10**6), **more}
        for k, rows in sizes
    ]


TRIED = "{k} micro-batches of {rows} rows, {vocabulary} classes, {layers} layers between"


def still(name, compared):
    cases = windows_for(7, 0, (3, 2), (1, 4), (4, 1), compared=compared)
    return Property(name, 0, cases, two_updates, of_two_large_updates, f"two updates of {TRIED}")


def small(name, vocabulary, layers):
    def oracle(case):
        return twice_the_plain_loop(*case.items())

    cases, judge = windows_for(vocabulary, layers, (12, 5)), material.at_most_bytes
    return Property(name, 2, cases, held, oracle, TRIED, judge, by_value=False)


QUESTION = Question(
    "What the loop keeps",
    (
        still("the weights change as by the large batch", "weights"),
        still("the mean loss and the share are the large batch's", "numbers"),
        small("with many layers: no graph outlives its micro-batch", 3, 4),
        small("with many classes: no logits outlive their micro-batch", 90, 0),
    ),
    given=train_step,
)


def repaired(model, optimizer, window, read=lambda logits: logits.argmax(1), divide=True, late=False, last=False):
    """Make the update without a kept graph, with one thing changed."""
    losses, read_logits = [], []
    for inputs, targets in window:
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        loss = cross_entropy(logits, targets) / (len(window) if divide else 1)
        loss.backward()
        losses.append(loss.item())
        read_logits.append((read(logits.detach()), targets))
    optimizer.step()
    optimizer.zero_grad()
    if late:
        read_logits = [(model(inputs).flatten(0, 1).argmax(1), targets.flatten()) for inputs, targets in window]
    guesses = [(each if each.ndim == 1 else each.argmax(1)) == targets for each, targets in read_logits]
    return losses[-1] * len(window) if last else sum(losses), torch.cat(guesses).double().mean().item()


@mistake("Graphs are kept, by retain_graph=True or a later backward; a plain backward for each micro-batch frees them.")
def only_logits_dropped(model, optimizer, window):
    losses, guessed, count = [], 0, 0
    for inputs, targets in window:
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        losses.append(cross_entropy(logits, targets) / len(window))
        losses[-1].backward(retain_graph=True)
        guessed, count = guessed + (logits.argmax(1) == targets).sum().item(), count + len(targets)
    optimizer.step()
    optimizer.zero_grad()
    return sum(losses).item(), guessed / count


@mistake("The logits of every micro-batch are kept, in full; count the right guesses in the loop.")
def logits_kept(model, optimizer, window):
    return repaired(model, optimizer, window, read=lambda logits: logits)


@mistake("Each micro-batch contributes its whole mean; the loss has to be divided as it was.")
def not_divided(model, optimizer, window):
    return repaired(model, optimizer, window, divide=False)


@mistake("The guesses are made after the step, by other weights; count them in the loop.")
def guessed_late(model, optimizer, window):
    return repaired(model, optimizer, window, late=True)


@mistake("The loss is the last micro-batch's; it has to be the mean over the window, as it was.")
def last_loss(model, optimizer, window):
    return repaired(model, optimizer, window, last=True)
