# %% promise [markdown]
# # 5. Unequal micro-batches: divided by what?
#
# You let the names have their real lengths, see what the division by k does to them, and write the loop that is right for any lengths.
#
# After this lesson you can
# - say when the mean of means is not the mean;
# - write the loop that is right for unequal micro-batches too, and hold its memory down;
# - use `accumulate` in a loop of your own, and say what your loss sums and counts.
#
# 55 minutes. It continues [lesson 4](04_windows.ipynb).

# %% setup tags=["nbval-ignore-output"]
from functools import partial

import torch
from torch.nn.functional import cross_entropy

import gradaccum
from gradaccum import data, memory, models, plots, widgets

torch.set_num_threads(1)  # as fast for small models, and no waiting
print(f"torch {torch.__version__}, running on the CPU")

# %% means [markdown]
# ## The mean of means
#
# Two tokens with losses 4 and 6, and eight tokens with losses of 1 each.
# What is the mean loss?

# %% means-run
short, long = torch.tensor([4.0, 6.0]), torch.ones(8)
mean_of_means = (short.mean() + long.mean()) / 2
mean = torch.cat([short, long]).mean()
print(f"mean of the two means: {mean_of_means:.1f}, mean of the ten losses: {mean:.1f}")

# %% means-test tags=["test"]
assert mean_of_means == 3
assert abs(mean - 1.8) < 1e-6

# %% lengths [markdown]
# ## From nearly equal to very unequal
#
# The mean of means counts the two tokens for as much as the eight.
# With micro-batches of equal size that is harmless, and lessons 2 to 4 took care to have them.
# Text is not like that.
#
# A name of n characters gives n + 1 targets, the end included.
# Shorter rows are padded, and the padding is ignored: its target is -100, which `cross_entropy` leaves out of its mean.
# The figure is one such micro-batch.

# %% lengths-figure tags=["hidden"] alt="Eight rows of a padded batch: in each row a filled bar of as many targets as the name has characters and an end, from 7 to 34, and a hatched rest that is ignored."
names, characters, _ = models.for_names()
inputs, targets = characters.batch(names[:8])
counts = (targets != data.IGNORED).sum(dim=1).tolist()
figure, (axis,) = plots.panels(["8 names in one padded batch"])
figure.set_size_inches(6, 3)
plots.padded_rows(axis, counts, width=targets.shape[1])
print(f"targets in each row: {counts}, together {sum(counts)} of {targets.numel()}")
figure

# %% lengths-figure-test tags=["test"]
assert data.count_targets((inputs, targets)).item() == sum(counts)

# %% lengths-ways [markdown]
# Below are four windows of 4 micro-batches, the names chosen and ordered in four ways.
# Each micro-batch's mean is divided by 4, as in lesson 3.
# The yardstick is one padded batch of the same 32 names, with its plain mean.

# %% lengths-guess tags=["nbval-ignore-output", "widget", "hidden"]
lengths_guess = widgets.predict(
    "32 random names, sorted by length, then cut into 4, each mean divided by 4. "
    "How many percent is the gradient off?"
)

# %% lengths-came-out [markdown] tags=["folded"]
# ### How far off, and which weights


# %% lengths-names
def loss_of(batch, reduction="mean"):
    """The loss of a batch: the mean over its targets, or the sum."""
    logits = model(batch[0]).flatten(0, 1)
    return cross_entropy(logits, batch[1].flatten(), reduction=reduction)


by_length = sorted(names, key=len)
ways = {
    "all of 18 characters": [name for name in names if len(name) == 18][:32],
    "at random": names[:32],
    "at random, sorted": sorted(names[:32], key=len),
    "24 shortest, 8 longest": by_length[:24] + by_length[-8:],
}

# %% lengths-run
found, errors = {}, {}
for way, lines in ways.items():
    _, _, model = models.for_names()
    full = gradaccum.full_batch_gradient(model, characters.batch(lines), loss_of)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    summed = partial(loss_of, reduction="sum")
    counted = data.count_targets
    with gradaccum.audit(
        model, optimizer, summed, counted, accumulation_steps=4
    ) as seen:
        for micro_batch in seen(
            [characters.batch(lines[i : i + 8]) for i in (0, 8, 16, 24)]
        ):
            (loss_of(micro_batch) / 4).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        errors[way] = gradaccum.relative_error(gradients, full)
        optimizer.step()
    found[way] = seen.updates[0]
lengths_guess.reveal(
    f"{100 * errors['at random, sorted']:.0f} %", "off, with names sorted"
)

# %% lengths-all tags=["hidden"] alt="Four windows of four micro-batches. Every bar is a quarter. The outlines, which follow the counts, are all a quarter in the first window and ever more unequal in the others: from 0.13 to 0.40 for sorted names, and three of 0.05 beside one of 0.86 in the last."
heads = [f"{way}: {100 * error:.0f} % off" for way, error in errors.items()]
for head, update in zip(heads, found.values(), strict=True):
    print(f"{head:38} right: {', '.join(f'{share:.2f}' for share in update.right)}")
plots.weights(list(found.values()), heads)

# %% lengths-test tags=["test"]
assert errors["all of 18 characters"] < 1e-5
assert list(errors.values()) == sorted(errors.values())
for way, update in found.items():
    assert all(abs(weight - 1 / 4) < 1e-3 for weight in update.weights), way
    assert abs(update.error - errors[way]) < 1e-3, way

# %% lengths-why [markdown]
# Every bar is a quarter, whatever the micro-batch holds; the outlines follow the counts.
# The more unequal these are, the more the short names count for; in the last window the gradient is wrong by nearly its own length.
# This was pointed out in 2021 and found again in 2024, in libraries that everyone used (huggingface/transformers#34191).
# Sorting by length is no exotic case: loaders do it to save padding.

# %% explore [markdown]
# ## Try other lengths
#
# Four micro-batches of one line each.
# Choose how many targets each has, and compare three rules.

# %% explore-measure tags=["hidden"]
_, characters, model = models.for_names()
names = data.character_names()
# the first is unlike the others, so that it matters which line counts
lines = ["COW " * 16, *[name[:64] for name in names if len(name) > 67][:3]]
LENGTHS = [1, 2, 4, 8, 16, 32, 64]


def summed_gradient(line, length):
    """The gradient of the sum of a line's first `length` losses, as one vector."""
    inputs, targets = characters.batch([line])
    model.zero_grad()
    logits = model(inputs)[0, :length]
    cross_entropy(logits, targets[0, :length], reduction="sum").backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters()]
    return torch.cat(gradients).double()


sums = [{length: summed_gradient(line, length) for length in LENGTHS} for line in lines]


def errors_of(lengths):
    """The error of three rules for four target counts; arithmetic on `sums`."""
    all_counts, parts = sum(lengths), [sums[i][n] for i, n in enumerate(lengths)]
    means = [part / n for part, n in zip(parts, lengths, strict=True)]
    weights = [n / all_counts for n in lengths]
    rules = {
        "each mean / k": sum(mean / 4 for mean in means),
        "each mean x its share": sum(
            w * m for w, m in zip(weights, means, strict=True)
        ),
        "each sum / count of all": sum(part / all_counts for part in parts),
    }
    right = sum(parts) / all_counts
    return {
        rule: gradaccum.relative_error(found, right) for rule, found in rules.items()
    }


def compare(first=1, second=64, third=1, fourth=64):
    """The figure and the sentence for four target counts."""
    lengths = (first, second, third, fourth)
    percents = {rule: 100 * error for rule, error in errors_of(lengths).items()}
    listed = ", ".join(map(str, lengths))
    figure, (axis,) = plots.panels([f"targets: {listed}"])
    figure.set_size_inches(8, 2)
    values = list(percents.values())
    plots.bars(axis, list(percents), values, text="{:.0f} %", xlabel="error, percent")
    axis.set_xlim(0, 300)  # the same for all, so that two settings can be compared
    return figure, f"With {listed} targets, dividing by k is {values[0]:.0f} % off."


# %% explore-widget tags=["nbval-ignore-output", "widget", "hidden"]
widgets.explore(compare, first=LENGTHS, second=LENGTHS, third=LENGTHS, fourth=LENGTHS)

# %% explore-still [markdown] tags=["folded"]
# ### Two settings as text, and one as a figure

# %% explore-run tags=["hidden"] alt="Bars of the error with 1, 64, 1 and 64 targets: 262 % for each mean divided by k, 0 % for each mean times its share and for each sum divided by the count of all."
figure, sentence = compare(1, 64, 1, 64)
print(compare(16, 16, 16, 16)[1])
print(sentence)
figure

# %% explore-test tags=["test"]
assert max(errors_of((16, 16, 16, 16)).values()) < 1e-12
assert errors_of((1, 64, 1, 64))["each mean / k"] > 0.5
assert max(list(errors_of((1, 64, 1, 64)).values())[1:]) < 1e-12

# %% count [markdown]
# ## Count first, then divide
#
# The right mean adds up all losses of the window and divides by the number of its targets.
# That number must be known *before* the first `backward()`.
# So count first; the rest of lesson 4's loop stays, without the schedule.

# %% count-run
names, characters, model = models.for_names()
by_length = sorted(names[:56], key=len)
micro_batches = [characters.batch(by_length[i : i + 8]) for i in range(0, 56, 8)]
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
for window in gradaccum.windows(micro_batches, accumulation_steps=3):
    count = sum((targets != data.IGNORED).sum() for _, targets in window)  # <-- new
    window_loss = 0.0
    for inputs, targets in window:
        logits = model(inputs).flatten(0, 1)
        loss = cross_entropy(logits, targets.flatten(), reduction="sum")  # <-- new
        loss = loss / count  # <-- new: not len(window)
        loss.backward()
        window_loss += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"micro-batches: {len(window)}, targets: {count}, loss {window_loss:.1f}")

# %% count-why [markdown]
# Three things changed: the count, `reduction="sum"`, and the divisor.
# It costs one thing: the inputs of a whole window must be at hand before its first forward pass.
# Inputs are small, and there are still one micro-batch's activations at a time.

# %% deferred [markdown]
# ### Why not one backward at the end?
#
# There is a tempting other way: add up the losses of all micro-batches, divide at the end, and call `backward()` once.
# Its gradient is right.
# A large library shipped that in 2024 and took it back (pytorch/torchtune#1875 and #1917).

# %% deferred-guess tags=["nbval-ignore-output", "widget", "hidden"]
deferred_guess = widgets.predict(
    "A small GPT, 64 rows, k = 8. How many times the peak of one backward per "
    "micro-batch does one backward at the end take?"
)

# %% deferred-came-out [markdown] tags=["folded"]
# #### What each way holds at its peak


# %% deferred-run
def peak_of(micro_batch_size, deferred=False):
    """The peak, in MB, of a small GPT's gradient in micro-batches."""
    torch.manual_seed(0)
    model = models.GPT(vocabulary=40, context=20, width=64, layers=2)
    window = list(
        data.random_tokens(64 // micro_batch_size, micro_batch_size, vocabulary=40)
    )
    with memory.measure_memory(model, window) as measured:
        count = sum(targets.numel() for _, targets in window)
        total = 0.0
        for inputs, targets in window:
            logits = model(inputs)
            loss = cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum"
            )
            if deferred:
                total = total + loss
            else:
                (loss / count).backward()
            del logits, loss
        if deferred:
            (total / count).backward()
    return measured.peak_bytes / 1e6


full, at_once, deferred = peak_of(64), peak_of(8), peak_of(8, deferred=True)
deferred_guess.reveal(
    f"{deferred / at_once:.1f}", "times the peak of one backward per micro-batch"
)

# %% deferred-all tags=["hidden"] alt="Three bars of the peak: one batch of 64 rows the longest, 8 micro-batches of 8 with one backward at the end nearly as long, a backward for each by far the shortest."
figure, (axis,) = plots.panels(["64 rows through a small GPT"])
figure.set_size_inches(8, 2)
rules = [
    "one batch of 64",
    "8 x 8, one backward at the end",
    "8 x 8, a backward for each",
]
plots.bars(axis, rules, [full, deferred, at_once], text="{:.1f} MB", xlabel="peak, MB")
given_back = (deferred - at_once) / (full - at_once)
print(f"One backward at the end loses {100 * given_back:.0f} % of what was saved.")
figure

# %% deferred-test tags=["test"]
assert 0.5 < given_back < 1

# %% deferred-why [markdown]
# A loss that has not been through `backward()` keeps its whole graph, so the activations of all 8 micro-batches pile up.
# The gradients are right, and only a memory test notices.

# %% finished [markdown]
# ## The finished loop
#
# `gradaccum.accumulate` is the inner part of this loop in its finished form: it counts, divides and calls `backward()` for each micro-batch.
# It never steps, clips, schedules or clears: those stay in your loop, once per window.
#
# This is what it promises, and no more:
# Accumulation gives the large batch's gradient where the loss is a sum over items, each computed from its item alone by a forward that remembers nothing, divided by a number known beforehand.
#
# The cell compares it with the plain mean of all names of the window in one padded batch.
# In the cell after it, somebody has looked at a gradient and forgotten to clear it.

# %% finished-run
names, characters, model = models.for_names()
model = model.double()  # so that rounding is far below the errors of this lesson
by_length = sorted(names[:56], key=len)
pieces = [by_length[i : i + 8] for i in range(0, 56, 8)]
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)


def loss_of(batch, reduction="mean"):
    """The loss of a batch: the mean over its targets, or the sum."""
    logits = model(batch[0]).flatten(0, 1)
    return cross_entropy(logits, batch[1].flatten(), reduction=reduction)


loss_sum = partial(loss_of, reduction="sum")
for lines in gradaccum.windows(pieces, accumulation_steps=3):
    one_batch = characters.batch([name for piece in lines for name in piece])
    full = gradaccum.full_batch_gradient(model, one_batch, loss_of)
    window = [characters.batch(piece) for piece in lines]
    result = gradaccum.accumulate(model, window, loss_sum, data.count_targets)
    gradients = [parameter.grad for parameter in model.parameters()]
    error = gradaccum.relative_error(gradients, full)
    optimizer.step()
    optimizer.zero_grad()
    print(f"{result.count} targets, loss {result.loss:.1f}, {100 * error:.10f} % off")

# %% finished-test tags=["test"]
assert error < 1e-12

# %% finished-refusal
loss_sum(window[0]).backward()
try:
    gradaccum.accumulate(model, window, loss_sum, data.count_targets)
except ValueError as error:
    refusal = str(error)
    print(refusal)

# %% finished-refusal-test tags=["test"]
assert "zero_grad" in refusal

# %% sums [markdown]
# ## Your loss: what to sum, what to count?
#
# Your loss may be another one.
# `gradaccum.check_split` says whether it may be cut: you give it the loss that you mean of the whole batch, and the sum and the count of its pieces.
#
# Take 8 items of three classes in pieces of 2, 4 and 2, and a weight for each class.

# %% sums-guess tags=["nbval-ignore-output", "widget", "hidden"]
sums_guess = widgets.predict(
    "cross_entropy with a weight for each class: its mean divides the weighted sum by what?",
    choices=[
        "the number of items",
        "the weights of the items' classes, summed",
        "the weights of all classes, summed",
    ],
)

# %% sums-came-out [markdown] tags=["folded"]
# ### What it divides by

# %% sums-run
torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
x, y = torch.randn(8, 4), torch.tensor([0, 2, 1, 2, 0, 2, 0, 0])
weight = torch.tensor([1.0, 2.0, 4.0])


def mean_loss(items):
    """The loss that is meant, of some items."""
    return cross_entropy(model(x[items]), y[items], weight)


def loss_sum(items):
    """The sum of their weighted losses."""
    return cross_entropy(model(x[items]), y[items], weight, reduction="sum")


counts = {
    "the number of items": len,
    "the weights of the items' classes, summed": lambda items: weight[y[items]].sum(),
    "the weights of all classes, summed": lambda items: weight.sum(),
}
batch, splits = torch.arange(8), {}
for name, count in counts.items():
    splits[name] = gradaccum.check_split(
        model, batch, mean_loss, batch.split([2, 4, 2]), loss_sum, count
    )
right = [name for name, split in splits.items() if split.ok]
sums_guess.reveal(right[0], "is what it divides by")

# %% sums-test tags=["test"]
assert right == ["the weights of the items' classes, summed"]

# %% sums-others [markdown] tags=["folded"]
# ### Five losses, and what to count
#
# Each row was run on 8 items in pieces of 2, 4 and 2.
# `z` is the model's output for the inputs `x`, `y` are the targets, `w` the weights of the classes, and `n` is the count of a piece.
# In the last row only some items have a box: `p` says which, and `b` holds the boxes.

# %% sums-table tags=["hidden"]
import re

from IPython.display import Markdown, display
from torch import nn


class Shifting(nn.Module):
    """Predicts the next token; it shifts its labels itself, as many language models do."""

    def __init__(self):
        super().__init__()
        self.logits = models.embedding_linear(5, width=4)

    def forward(self, x, y):
        """The mean loss over the labels from the second on."""
        logits = self.logits(x)[:, :-1]
        return cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten())


class Sounds(nn.Linear):
    """Log-probabilities of shape (time, items, symbols), as CTC takes them."""

    def forward(self, x):
        """From x of shape (items, time, 4)."""
        return super().forward(x).log_softmax(-1).transpose(0, 1)


def l2(model):
    """The sum of all squared weights."""
    return sum(parameter.square().sum() for parameter in model.parameters())


def dice(z, y):
    """How little the predicted pixels overlap the true ones, over all items."""
    return 1 - 2 * (z.sigmoid() * y).sum() / (z.sigmoid() + y).sum()


def contrast(z, e):
    """How hard it is to find each item's partner among those of all items."""
    return cross_entropy(z @ e.T, torch.arange(len(z)))


def check(model, items, loss, summed, count, n):
    """`check_split` of a loss, a sum and a count that are given as code."""

    def value(code, rows, **known):
        known |= {name: tensor[rows] for name, tensor in items.items()}
        if re.search(r"\bz\b", code):
            known["z"] = model(known["x"])
        tools = vars(torch.nn.functional) | {"w": w, "l2": l2, "dice": dice}
        return eval(code, tools | {"contrast": contrast, "model": model} | known)

    return gradaccum.check_split(
        model,
        torch.arange(8),
        lambda rows: value(loss, rows),
        torch.arange(8).split([2, 4, 2]),
        lambda rows: value(summed, rows, n=value(n, rows)),
        lambda rows: value(count, rows),
        dtype=torch.float64,
    )


def said(split):
    """Verdict and error, as the table shows them: in one line."""
    error = "< 1e-12" if split.error < 1e-12 else f"{100 * split.error:.0f} %"
    words = f"{split.ok}, {error}".replace(" ", "\N{NO-BREAK SPACE}")
    return words.replace("-", "\N{NON-BREAKING HYPHEN}")


found = {}  # for each loss the verdicts of what is right, if anything is, and of a habit
rows = [
    "| your loss | what to sum | what to count | `ok`, error |",
    "|---|---|---|---|",
]
habits = ["| your loss | a habit | `ok`, error |", "|---|---|---|"]


def row(name, model, loss, right=None, habit=None, **items):
    """Check what is summed and counted, right and by habit, and add a row."""
    first = right or habit  # where nothing is right, the habit is all there is to check
    habit = habit and (habit[0] or first[0], habit[1])
    pairs = [pair for pair in (right, habit) if pair]
    found[name] = [check(model, items, loss, *pair, n=first[1]) for pair in pairs]
    codes = [f"`{code}`" for code in right] if right else ["cannot be cut", ""]
    cells = [f"{name}: `{loss}`", *codes, said(found[name][0]) if right else ""]
    rows.append("| " + " | ".join(cells) + " |")
    if habit:
        changed = f"sum `{habit[0]}`, " if habit[0] != first[0] or not right else ""
        last = said(found[name][-1])
        habits.append(f"| {name} | {changed}count `{habit[1]}` | {last} |")


torch.manual_seed(0)
x, numbers = torch.randn(8, 4), torch.randn(8, 3)
y = torch.tensor([0, 2, 1, 2, 0, 2, 0, 0])
w = torch.tensor([1.0, 2.0, 4.0])
linear = nn.Linear(4, 3)
ce, mse = 'cross_entropy(z, y, reduction="sum")', 'mse_loss(z, y, reduction="sum")'
row(
    "cross entropy",
    linear,
    "cross_entropy(z, y)",
    (ce, "len(y)"),
    ("cross_entropy(z, y)", "1"),
    x=x,
    y=y,
)
weighted = 'cross_entropy(z, y, w, reduction="sum")'
row(
    "with class weights",
    linear,
    "cross_entropy(z, y, w)",
    (weighted, "w[y].sum()"),
    ("", "len(y)"),
    x=x,
    y=y,
)
some = y.where(torch.arange(8) % 4 > 0, data.IGNORED)
row(
    "with ignored targets",
    linear,
    "cross_entropy(z, y)",
    (ce, "(y != -100).sum()"),
    ("", "len(y)"),
    x=x,
    y=some,
)
labels = torch.randint(5, (8, 6))
lengths = torch.tensor([6, 2, 3, 2, 6, 4, 2, 3])
labels[torch.arange(6) >= lengths[:, None]] = data.IGNORED
row(
    "the model shifts its labels inside",
    Shifting(),
    "model(x, y)",
    ("model(x, y) * n", "(y[:, 1:] != -100).sum()"),
    ("", "(y != -100).sum()"),
    x=labels.clamp(min=0),
    y=labels,
)
row(
    "CTC",
    Sounds(4, 6),
    "ctc_loss(z, y, t, s)",
    ('(ctc_loss(z, y, t, s, reduction="none") / s).sum()', "len(s)"),
    ('ctc_loss(z, y, t, s, reduction="sum")', "s.sum()"),
    x=torch.randn(8, 12, 4),
    y=torch.randint(1, 6, (8, 5)),
    t=torch.full((8,), 12),
    s=torch.tensor([1, 2, 5, 1, 3, 2, 4, 1]),
)
squares = "(z - y).square().sum()"
row(
    "squared error, rows",
    linear,
    "(z - y).square().sum(1).mean()",
    (squares, "len(y)"),
    ("", "y.numel()"),
    x=x,
    y=numbers,
)
row(
    "squared error, elements",
    linear,
    "mse_loss(z, y)",
    (mse, "y.numel()"),
    ("", "len(y)"),
    x=x,
    y=numbers,
)
fit = "mse_loss(z, y) + l2(model)"
row(
    "L2 or another term that is no sum",
    linear,
    fit,
    (f"{mse} + n * l2(model)", "y.numel()"),
    (f"{mse} + l2(model)", "y.numel()"),
    x=x,
    y=numbers,
)
row(
    "the same, as a loss of its own",
    linear,
    fit,
    (f'{{"fit": {mse}, "l2": l2(model)}}', '{"fit": y.numel(), "l2": 1}'),
    x=x,
    y=numbers,
)
box = 'l1_loss(z[p], b[p], reduction="sum")'
row(
    "two losses, two denominators",
    linear,
    "cross_entropy(z, y) + l1_loss(z[p], b[p])",
    (f'{{"class": {ce}, "box": {box}}}', '{"class": len(y), "box": b[p].numel()}'),
    (f"{ce} + {box}", "len(y)"),
    x=x,
    y=y,
    b=numbers,
    p=y > 0,
)
row(
    "Dice over the batch",
    linear,
    "dice(z, y)",
    habit=("n * dice(z, y)", "len(y)"),
    x=x,
    y=(numbers > 0).float(),
)
row(
    "contrastive",
    linear,
    "contrast(z, e)",
    habit=("n * contrast(z, e)", "len(e)"),
    x=x,
    e=numbers,
)
normed = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
row(
    "any, with BatchNorm in training",
    normed,
    "cross_entropy(z, y)",
    habit=(ce, "len(y)"),
    x=x,
    y=y,
)

common = [
    "cross entropy",
    "with class weights",
    "with ignored targets",
    "the model shifts its labels inside",
    "two losses, two denominators",
]
first = [line for line in rows[2:] if line[2:].partition(": ")[0] in common]
display(Markdown("\n".join(rows[:2] + first)))
print(f"A habit, with class weights: {found['with class weights'][-1]}")

# %% sums-why [markdown]
# The habit is what people write, and nothing raises.
# Where a loss has several denominators, `accumulate` takes dicts: each sum is divided by its own total.
#
# `check_split` does not see everything.
# Dropout is noise, not an error, so it is left out.
# A loss that draws random numbers cannot be judged: draw them before the batch is cut.

# %% sums-habits [markdown] tags=["folded"]
# ### Eight more, and what people write instead
#
# For CTC, `t` and `s` are the lengths of the inputs and of the targets, in a contrastive loss `e` holds each item's partner.
# `l2` is the sum of all squared weights of the model.
# In the last three rows items see each other (BatchNorm in training is one), and no sum and no count mends it.
# The second table has the habits; how far off they are depends on the data.

# %% sums-more tags=["hidden"]
others = [line for line in rows[2:] if line not in first]
display(Markdown("\n".join(rows[:2] + others)), Markdown("\n".join(habits)))
print(f"The last habit: {found['any, with BatchNorm in training'][-1]}")

# %% sums-table-test tags=["test"]
for name, of_it in found.items():
    cut = len(of_it) == 2 or name == "the same, as a loss of its own"
    assert of_it[0].ok is cut, name
    assert of_it[0].error < 1e-12 if cut else of_it[0].error > 0.01, name
    assert of_it[-1].error > 0.01 or len(of_it) == 1, name
assert len(found) == 13
assert "normalizes each micro-batch by its own statistics" in str(of_it[0])

# %% libraries [markdown]
# ## Does your library do it right?
#
# Each library was run under `gradaccum.audit`, on a window with unequal counts.
# A dashed outline is what a micro-batch should get.

# %% libraries-table tags=["nbval-ignore-output", "hidden"] alt="The weights of four micro-batches with 34, 165, 43 and 58 targets in four libraries: a quarter each under accelerate's accumulate() and Lightning, the right ones under transformers' Trainer with Llama, and all 5 percent too small with GPT-2."
from types import SimpleNamespace

from IPython.display import Markdown

record = data.library_record()
provenance = record["provenance"]
rows = ["| library | how | unequal | 2 left over of k = 4 |", "|---|---|---|---|"]
pictures = {}
for row in record["rows"]:
    cells = [f"{row['library']} {row['version']}".strip(), row["how"]]
    for window in ({4, 5, 6, 7}, {8, 9}):
        shared = [len(window & {*step["micro_batches"]}) for step in row["updates"]]
        step = row["updates"][shared.index(max(shared))]
        off = f", {100 * step['error']:.0f} % off" if step["error"] > 1e-3 else ""
        cells.append(f"{step['kind']}{off}")
        if 4 in window:
            pictures[f"{row['library']}: {row['how']}"] = SimpleNamespace(**step)
    rows.append(f"| {' | '.join(cells)} |")
print(
    f"{provenance['date']}, torch {provenance['versions']['torch']}: {provenance['command']}"
)
shown = {
    "accelerate, accumulate()": "accelerate: `with accelerator.accumulate(model)`",
    "Lightning Trainer": "Lightning Trainer: `accumulate_grad_batches`",
    "Trainer, Llama": "transformers Trainer: a tiny LlamaForCausalLM",
    "Trainer, GPT-2": "transformers Trainer: a tiny GPT2LMHeadModel",
}
plots.weights([pictures[name] for name in shown.values()], list(shown))

# %% libraries-test tags=["test"]
assert record["rows"][-1]["updates"][1]["error"] < 1e-6

# %% libraries-why [markdown]
# Two of four ways gave every micro-batch a quarter, whatever it held.
# transformers' Trainer counts where the model takes the count, as Llama does; with GPT-2 it counts labels that the shift drops, and is 5 % off.
#
# The record is made by one command; [the benchmarks](../benchmarks/README.md) link the guides.

# %% libraries-all [markdown] tags=["folded"]
# ### All loops that were tried, and the window at the end
#
# The names of the faults are the audit's, as in lesson 4.

# %% libraries-rows tags=["nbval-ignore-output", "hidden"]
Markdown("\n".join(rows))

# %% adam [markdown]
# ## Does Adam hide it, and does the log tell?
#
# In lesson 3 Adam hid a constant factor.
# The mean of means is no factor: it changes the direction, and differently in every window.
#
# Train a small GPT twice, on text in which length and content go together: each window has 24 short names of letters, such as `RUNIC LETTER ...`, and 8 long ones.
# One loop divides by k, the other counts.
# Then compare what each *logs* with the mean loss over all targets of names that neither has seen.

# %% adam-guess tags=["nbval-ignore-output", "widget", "hidden"]
adam_guess = widgets.predict(
    "Two GPTs, one divided by k and one by count. Which logs the lower loss at the end?",
    choices=["divided by k", "divided by count", "they log the same"],
)

# %% adam-came-out [markdown] tags=["folded"]
# ### What they log, and what they learned

# %% adam-data tags=["hidden"]
names = data.character_names()
characters = data.Characters(names)
alphabets = ("RUNIC", "GOTHIC", "CHEROKEE", "HIRAGANA", "GEORGIAN", "GREEK", "THAI")
is_letter = [name for name in names if name.startswith(alphabets) and len(name) <= 18]
short = data.shuffled(is_letter, seed=0)
long = data.shuffled([name for name in names if len(name) >= 45], seed=0)
unseen = {"short": short[:24], "long": long[:8], "all": short[:24] + long[:8]}
unseen = {kind: characters.batch(lines) for kind, lines in unseen.items()}
short, long = 20 * short[24:], 20 * long[8:]  # enough for all updates
micro_batches = []
for update in range(60):
    groups = [short[24 * update + skip :][:8] for skip in (0, 8, 16)]
    groups.append(long[8 * update :][:8])
    micro_batches += map(characters.batch, groups)


# %% adam-run
def loss_of(batch, reduction="mean"):
    """The loss of a batch: the mean over its targets, or the sum."""
    logits = model(batch[0]).flatten(0, 1)
    return cross_entropy(logits, batch[1].flatten(), reduction=reduction)


trained = {}
for rule in ("divided by k", "divided by count"):
    torch.manual_seed(0)
    model = models.GPT(len(characters), context=80, width=32, layers=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    logged = []
    for window in gradaccum.windows(micro_batches, accumulation_steps=4):
        if rule == "divided by count":
            summed = partial(loss_of, reduction="sum")
            result = gradaccum.accumulate(model, window, summed, data.count_targets)
            logged.append(result.loss)
        else:
            logged.append(0.0)
            for micro_batch in window:
                loss = loss_of(micro_batch) / 4
                loss.backward()
                logged[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        losses = {kind: loss_of(batch).item() for kind, batch in unseen.items()}
    trained[rule] = model, sum(logged[-10:]) / 10, losses
lower = min(trained, key=lambda rule: trained[rule][1])
adam_guess.reveal(lower, "logs the lower loss", right=lower)

# %% adam-all
print(f"{'':16}  logs   unseen names: short  long  all")
for rule, (_, log, loss) in trained.items():
    cells = "  ".join(f"{loss[kind]:4.1f}" for kind in ("short", "long", "all"))
    print(f"{rule:16} {log:5.1f} {'':14} {cells}")

# %% adam-invents tags=["nbval-ignore-output"]
for rule, (model, _, _) in trained.items():
    print(f"{rule} invents")
    for line in model.invent(4, seed=1).tolist():
        print("   ", characters.decode(line))

# %% adam-test tags=["test"]
(_, by_k_log, by_k_loss), (_, by_count_log, by_count_loss) = trained.values()
assert by_k_log < by_count_log - 0.1
assert by_k_loss["all"] > by_count_loss["all"] + 0.03
assert by_k_loss["short"] < by_count_loss["short"]
assert by_k_loss["long"] > by_count_loss["long"]

# %% adam-why [markdown]
# Adam does not hide it: divided by k, the model learned the short names better and the long ones worse.
# So what it invents looks neater, and it logs the *lower* loss; over all targets of unseen names its loss is the *higher* one.
# Its log is a mean of means, too.
# Two loops with different divisors cannot be compared by their logs.

# %% recap [markdown]
# ## Recap
#
# <details><summary>The lesson in three sentences: say yours first</summary>
#
# - The mean of means is not the mean when the counts differ; the error grows to the gradient's own length and beyond, and Adam does not hide it.
# - Count the window's items first, then divide each summed loss by that count, with one `backward()` for each micro-batch.
# - `windows` and `accumulate` are that loop; the rest of an update stays with you, and `check_split` says whether your loss may be cut.
#
# </details>
# <br>
#
# **Try it.** Your loss already comes as a mean over the micro-batch's targets, and you cannot change that. How do you weight it?
#
# <details><summary>Answer</summary>
#
# By the micro-batch's share of the targets, its count over the count of the window.
# It is the second rule of the figure above.
#
# </details>
# <br>
#
# **Exercises**, which grade themselves: [weigh means, write the token-weighted step, mend a fix that lost the point, write the test, say what five losses count, and read the weights](exercises/05_exercises.ipynb).
#
# **Next**: the reason for all this was memory. [Lesson 6](06_gpu_memory.ipynb) counts it to the byte, and plans for a GPU that is not there.

# %% recap-guesses tags=["hidden"]
widgets.recap()
