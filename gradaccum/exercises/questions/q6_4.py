"""6.4: find what a training step keeps, and let go of it."""

from functools import cache, partial
from statistics import fmean

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


def held_anywhere(answer, case):
    known, again = material.deep_token_model(case), material.deep_token_model(case)
    in_tensors = material.peak_beyond_start(lambda: answer(*known), *known)
    return in_tensors + material.kept_outside_torch(lambda: answer(*again), again[0])


@cache
def twice_the_plain_loop(probe, *case):
    return 2 * probe(one_by_one, dict(case))


TRIED = "{k} micro-batches of {rows} rows, {vocabulary} classes, {layers} layers between"


def still(name, compared):
    def cases(draw):
        sizes = (draw.randint(2, 4), 2), (1, draw.randint(3, 5)), (draw.randint(4, 6), 1)
        of = {"vocabulary": 7, "layers": 0, "compared": compared}
        return [{"k": k, "rows": rows, **of, "seed": draw.randrange(10**6)} for k, rows in sizes]

    return Property(name, 0, cases, two_updates, of_two_large_updates, f"two updates of {TRIED}")


def small(name, probe, **of):
    def cases(draw):
        return [{**of, "rows": draw.randint(4, 6), "seed": draw.randrange(10**6)}]

    def limit(case):
        return twice_the_plain_loop(probe, *case.items())

    return Property(name, 2, cases, probe, limit, TRIED, material.at_most_bytes, by_value=False)


QUESTION = Question(
    "What the loop keeps",
    (
        still("the weights change as by the large batch", "weights"),
        still("the mean loss and the share are the large batch's", "numbers"),
        small("with many layers: no graph outlives its micro-batch", held, k=12, vocabulary=3, layers=4),
        small("with many classes: no logits outlive their micro-batch", held_anywhere, k=48, vocabulary=200, layers=0),
    ),
    given=train_step,
)


def means(losses, shares, model, window):
    return fmean(losses), fmean(shares)


def one_by_one(
    model, optimizer, window, divide=True, clear="after", step="after", keep=None, retain=False, returned=means
):
    """Make the update with a plain loop, or with something changed."""
    kept, losses, shares = [], [], []
    for inputs, targets in window:
        if clear == "inside":
            optimizer.zero_grad()
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        loss = cross_entropy(logits, targets)
        (loss / (len(window) if divide else 1)).backward(retain_graph=retain)
        losses.append(loss.item())
        shares.append((logits.argmax(1) == targets).double().mean().item())
        kept.append(keep and keep(logits))
        if step == "inside":
            optimizer.step()
    if step == "after":
        optimizer.step()
    if clear == "after":
        optimizer.zero_grad()
    return returned(losses, shares, model, window)


def afterwards(model, window):
    """Return the mean loss and the share by the weights as they are now."""
    losses, shares = [], []
    for inputs, targets in window:
        logits, targets = model(inputs).detach().flatten(0, 1), targets.flatten()
        losses.append(cross_entropy(logits, targets).item())
        shares.append((logits.argmax(1) == targets).double().mean().item())
    return fmean(losses), fmean(shares)


def changed(sentence, **options):
    """Make the mistake that has something changed."""
    return mistake(sentence)(partial(one_by_one, **options))


graphs_kept = changed(
    "More is held than one micro-batch needs, with few classes too: by retain_graph=True or create_graph=True, a "
    "backward after the loop, several micro-batches in one forward, or a list of gradients; call a plain backward for "
    "each micro-batch, and keep numbers.",
    retain=True,
    keep=lambda logits: logits,
)
logits_kept = changed(
    "With many classes more is held than one micro-batch needs: most likely something of the logits' size is kept of "
    "each, the logits, probabilities, a mask, a view or a copy of them, in NumPy or lists too; count the right guesses "
    "in the loop.",
    keep=lambda logits: logits.detach(),
)
UNDIVIDED = "Each micro-batch adds its whole mean to the gradient; the loss has to be divided before its backward."
not_divided = changed(UNDIVIDED, divide=False, returned=lambda losses, shares, *_: (sum(losses), fmean(shares)))
not_divided_in_the_gradient = changed(UNDIVIDED, divide=False)
never_stepped = changed("The weights do not move: step() is missing, or the gradients are cleared before it.", step="")
never_cleared = changed(
    "The gradients are not cleared, so they are in the next update too; clear them before the loop or at the end.",
    clear="never",
)
cleared_inside = changed(
    "Only the last micro-batch's gradient is left: they are cleared inside the loop, or backward comes after it.",
    clear="inside",
)
STEPS = "A step is made for each micro-batch; an update is one step, after the loop."
stepped_inside = changed(STEPS, step="inside")
stepped_and_cleared_inside = changed(STEPS, step="inside", clear="inside")
AFTER = "The loss, the guesses or both are those of the weights after the step; take them from the loop."
guessed_late = changed(AFTER, returned=lambda losses, _, *after: (fmean(losses), afterwards(*after)[1]))
loss_taken_late = changed(AFTER, returned=lambda _, shares, *after: (afterwards(*after)[0], fmean(shares)))
both_taken_late = changed(AFTER, returned=lambda losses, shares, *after: afterwards(*after))
LAST = "The loss is the last micro-batch's, or its part; it has to be the mean over the window, as it was."
last_loss = changed(LAST, returned=lambda losses, shares, *_: (losses[-1], fmean(shares)))
last_part = changed(LAST, returned=lambda losses, shares, *_: (losses[-1] / len(losses), fmean(shares)))
loss_added_up = changed(
    "The loss is the sum of the micro-batches' means; it has to be their mean, as it was.",
    returned=lambda losses, shares, *_: (sum(losses), fmean(shares)),
)
loss_divided_again = changed(
    "The loss is divided by the number of micro-batches twice; once gives the mean over the window.",
    returned=lambda losses, shares, *_: (fmean(losses) / len(losses), fmean(shares)),
)
ALL = "The right guesses are not divided by the number of all targets: that of tokens, not of rows or micro-batches."
share_of_rows = changed(ALL, returned=lambda losses, shares, _, w: (fmean(losses), w[0][1].shape[1] * fmean(shares)))
share_of_batches = changed(ALL, returned=lambda losses, shares, _, w: (fmean(losses), w[0][1].numel() * fmean(shares)))
share_added_up = changed(ALL, returned=lambda losses, shares, *_: (fmean(losses), sum(shares)))
swapped = changed(
    "The two numbers are the wrong way round: the mean loss comes first.",
    returned=lambda losses, shares, *_: (fmean(shares), fmean(losses)),
)
