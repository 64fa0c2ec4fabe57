# %% promise [markdown]
# # Exercises 5. Unequal micro-batches
#
# You weight means, write the step that is right for text of any lengths, repair a fix that lost the point, write the test that notices a mean of means, cut five losses, and read the weights of loops that you do not see.
#
# {{totals}}; [lesson 5](../05_unequal_micro_batches.ipynb) has all that they need.
# Fill in a cell that ends in `raise NotImplementedError`, or repair the code that is there, run it, and run its check.
# A check tells you what it tried, and what went wrong; run it as often as you like.

# %% setup
import copy

import torch
import torch.nn.functional as F
from torch.nn.functional import cross_entropy

from gradaccum import check_split, data, exercises, memory, models, relative_error
from gradaccum.exercises import attempt, check

# %% exercise-5-1 [markdown]
# ## Exercise 5.1 Weights for means
#
# difficulty 2/5 | 5 minutes | 3 points
#
# Some models hand you the mean loss over the targets of a micro-batch, and you cannot ask them for the sum.
#
# Write `mean_weights(counts)`.
# It returns a list of numbers, one for each micro-batch: what its mean loss is multiplied by, so that the products add up to the mean loss over all targets of the window.
#
# - `counts` is a list of ints: how many targets each micro-batch has. The counts differ, and some may be 0, but not all.
#
# **Example.** The lesson's first two micro-batches: two targets with a mean loss of 5, eight with a mean loss of 1.
# `mean_weights([2, 8])` is `[0.2, 0.8]`, and 0.2 * 5 + 0.8 * 1 = 1.8, the mean of the ten losses.


# %% answer-5-1
def mean_weights(counts):
    """Return what the mean loss of each micro-batch is multiplied by."""
    ### BEGIN SOLUTION
    total = sum(counts)
    return [count / total for count in counts]
    ### END SOLUTION


# %% try-5-1
attempt(mean_weights, [2, 8])  # expected: [0.2, 0.8]

# %% check-5-1
check("5.1", mean_weights)

# %% hints-5-1 [markdown]
# <details><summary>Where to look</summary>
#
# "Try it" at the end of lesson 5, and the rule *each mean x its share* in "Try other lengths".
#
# </details>
# <details><summary>The relation in words</summary>
#
# A mean times its own count is a sum of losses.
# What is the sum of all of them divided by?
#
# </details>
# <details><summary>Help: I divide by zero</summary>
#
# No weight needs a division by a micro-batch's own count.
# The count of all targets is never 0.
#
# </details>

# %% exercise-5-2 [markdown]
# ## Exercise 5.2 The token-weighted step
#
# difficulty 4/5 | 25 minutes | 6 points
#
# This is the step that libraries had wrong for years, and it is the one to take into your own code.
#
# Write `weighted_step(model, optimizer, micro_batches)`.
# It makes one update, with the gradient of the mean loss over all targets of the window, and returns that mean loss, a number without a graph.
#
# - `model` takes tokens, int64 of shape `(rows, length)`, to logits of shape `(rows, length, vocabulary)`, each row by itself.
# - `micro_batches` is a list of pairs `(inputs, targets)`, both int64 of shape `(rows, length)`; rows and length differ from one micro-batch to the next.
# - A target of `data.IGNORED`, which is -100, does not count; a micro-batch may have none that does, a window has at least one.
# - Call `optimizer.step()` once, and clear once, first or last: the step is called for one window after another.
# - Hold one micro-batch's activations at a time.
#
# <details><summary>The fine print</summary>
#
# An ignored target, padding or a part of a line that is not to be learned, may be at any place of a row.
# `optimizer` is one of `torch.optim`, perhaps with momentum.
# Leave its settings, and the window's tensors, as they are: both are used again in the next epoch.
# The first time, the gradients are empty.
#
# </details>
# <br>
#
# **Example.** In one micro-batch two targets count, with losses 4 and 6; in another, eight, with losses of 1 each; in a third, none.
# Then the step returns 1.8.
# If the model had one weight, and the gradients of these ten losses added up to 30, then SGD with lr=1 would lower the weight by 3.


# %% answer-5-2
def weighted_step(model, optimizer, micro_batches):
    """Make one update with the mean loss over all targets of the window; return it."""
    ### BEGIN SOLUTION
    count = sum((targets != data.IGNORED).sum() for _, targets in micro_batches)
    mean_loss = 0.0
    for inputs, targets in micro_batches:
        logits = model(inputs)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss = loss / count
        loss.backward()
        mean_loss += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return mean_loss
    ### END SOLUTION


# %% try-5-2
names = ["OX", "COW", "WATER BUFFALO", "EWE"]
characters = data.Characters(names)
window = [characters.batch(names[:2]), characters.batch(names[2:])]
nothing = torch.full_like(window[0][1], data.IGNORED)
torch.manual_seed(0)
model = models.embedding_linear(len(characters), width=8)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
window.append((window[0][0], nothing))
attempt(weighted_step, model, optimizer, window)
print("expected: 2.7556")
print("expected: -0.1930, 0.1166, -0.2330; got:", model[1].bias[:3].data)

# %% check-5-2
check("5.2", weighted_step)

# %% hints-5-2 [markdown]
# <details><summary>Where to look</summary>
#
# "Count first, then divide" in lesson 5: the loop there, without clipping.
#
# </details>
# <details><summary>Help: my gradient is too small by a constant factor</summary>
#
# What does your count count?
# Compare it with the number of targets that are not -100, by hand, for two short rows.
#
# </details>
# <details><summary>Help: my loss is nan</summary>
#
# Try `cross_entropy` on targets that are all -100: once with its mean, once with `reduction="sum"`.
#
# </details>
# <details><summary>Help: the first window is right and the second is not</summary>
#
# `backward()` adds to what is in `.grad`.
# What is left there when your step returns?
#
# </details>

# %% exercise-5-3 [markdown]
# ## Exercise 5.3 The fix that lost the point
#
# difficulty 3/5 | 15 minutes | 3 points
#
# This code is right about the gradient, and a large library shipped it; it needs nearly the memory of the full batch.
#
# Repair `window_gradient(model, micro_batches)` so that it holds one micro-batch's activations at a time.
# Everything else stays as it is: `.grad` ends as the gradient of the mean loss over all targets of the window, and that mean loss is returned, a number without a graph.
#
# - `model` and `micro_batches` are as in exercise 5.2, and the gradients are empty. Do not change the weights or the window.
#
# **Example.** For 8 micro-batches of 8 names each, the cell below measures 0.79 MB with the code as given.
# Repaired, it takes 0.33 MB.


# %% answer-5-3
def window_gradient(model, micro_batches):
    """Leave in .grad the gradient of the mean loss over all targets; return the loss."""
    ### BEGIN SOLUTION
    count = sum((targets != data.IGNORED).sum() for _, targets in micro_batches)
    mean = 0.0
    for inputs, targets in micro_batches:
        logits = model(inputs)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss = loss / count
        loss.backward()
        mean += loss.item()
    return mean
    ### END SOLUTION


# %% try-5-3
names = data.shuffled(data.character_names(), seed=0)[:64]
characters = data.Characters(names)
window = [characters.batch(names[i : i + 8]) for i in range(0, 64, 8)]
torch.manual_seed(0)
model = models.embedding_linear(len(characters), width=32)
with memory.measure_memory(model, window) as measured:
    attempt(window_gradient, model, window)
print(f"{measured.peak_bytes / 1e6:.2f} MB")

# %% check-5-3
check("5.3", window_gradient)

# %% hints-5-3 [markdown]
# <details><summary>Where to look</summary>
#
# "Why not one backward at the end?" in lesson 5: what keeps a graph, and what frees it?
#
# </details>
# <details><summary>The relation in words</summary>
#
# The gradient of a sum is the sum of the gradients, and `backward()` adds.
# The divisor is the same for all micro-batches, so it can be known before the first of them.
#
# </details>
# <details><summary>Help: "Trying to backward through the graph a second time"</summary>
#
# The sum of the losses so far holds the graphs of the earlier micro-batches, which are gone.
# Call `backward()` on the loss of one micro-batch, and keep only the number of it.
#
# </details>

# %% exercise-5-4 [markdown]
# ## Exercise 5.4 A test that notices
#
# difficulty 4/5 | 20 minutes | 4 points
#
# The mean of means was pointed out in 2021 and lived on for three years, in code that had tests.
#
# Write `is_right(step)`.
# It returns `True` for every training step that makes the update of the mean loss over all targets of the window, and `False` for every step that does not.
#
# - `step(model, optimizer, micro_batches)` makes one update; `model` and `micro_batches` are as in exercise 5.2.
# - You choose them, and the optimizer.
# - The step clears the gradients, accumulates over the micro-batches, calls `optimizer.step()` and clears again.
# - The update alone decides, not the memory. A right step may add in another order or weight in float32, so allow a relative error of 1e-5.
#
# The check hands your test right steps and wrong ones.
# One of the wrong ones takes the mean of means, one counts the ignored targets too, some are wrong in one parameter alone, one is off by less than 1 %, and others make the mistakes of earlier lessons.
#
# **Example.** If `step` leaves the weights as they were, `is_right(step)` is `False`.


# %% answer-5-4
def is_right(step):
    """Tell whether a training step makes the update of the mean over all targets."""
    ### BEGIN SOLUTION
    names = ["OX", "COW", "WATER BUFFALO", "EWE"]
    characters = data.Characters(names)
    micro_batches = [characters.batch(names[:2]), characters.batch(names[2:])]
    torch.manual_seed(0)
    model = models.embedding_linear(len(characters), width=8)
    twin = copy.deepcopy(model)
    step(model, torch.optim.SGD(model.parameters(), lr=0.5), micro_batches)

    inputs, targets = characters.batch(names)  # all in one batch
    cross_entropy(twin(inputs).flatten(0, 1), targets.flatten()).backward()
    torch.optim.SGD(twin.parameters(), lr=0.5).step()
    return relative_error(model.parameters(), twin.parameters()) < 1e-5
    ### END SOLUTION


# %% try-5-4
def mean_of_means_step(model, optimizer, micro_batches):
    """A wrong step: the mean of means."""
    optimizer.zero_grad()
    for inputs, targets in micro_batches:
        logits = model(inputs).flatten(0, 1)
        loss = cross_entropy(logits, targets.flatten()) / len(micro_batches)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


attempt(is_right, mean_of_means_step)  # expected: False

# %% check-5-4
check("5.4", is_right)

# %% hints-5-4 [markdown]
# <details><summary>Where to look</summary>
#
# "From nearly equal to very unequal" in lesson 5 shows for which text the mean of means is right.
# The lesson's error is a distance from the full batch: what would one batch of all rows do?
#
# </details>
# <details><summary>Help: my test accepts the mean of means</summary>
#
# How many targets has each of your micro-batches?
#
# </details>
# <details><summary>Help: my test accepts a step that counts the ignored targets</summary>
#
# Has your text any?
# And a wrong divisor is a constant factor: which optimizer hides it?
#
# </details>
# <details><summary>Help: my test rejects a right step</summary>
#
# Compare with a tolerance, not with `==`, and with one batch of all rows.
#
# </details>

# %% exercise-5-5 [markdown]
# ## Exercise 5.5 Which sum, which count
#
# difficulty 4/5 | 35 minutes | 5 points
#
# To accumulate a loss of your own, you say what it sums and what it counts; nothing raises if you are wrong.
#
# The next cell has five losses as people write them, each the mean loss of a whole batch.
# Write `sum_and_count(loss, model, micro_batch)`.
# It returns the pair that `accumulate` needs of a micro-batch: a sum and a count.
#
# - `loss` is the name of one of the five functions, such as `"weighted"`.
# - `micro_batch` is a pair `(x, y)`, some rows of the batch: `x` of shape `(rows, width)`, or `(rows, length, width)` for text, `y` as the function says.
# - Rows and length differ from one micro-batch to the next, and some have no target at all.
# - The sum is a tensor of shape `()` with its graph, and the count a number. Added up over the micro-batches, the sums divided by the counts are the loss of the whole batch, with its gradient.
# - For one of the losses no sum and no count can do that: there, return `None`.
#
# **Example.** For the loss `cross_entropy(model(x), y)`, with no padding, the pair is `cross_entropy(model(x), y, reduction="sum")` and `len(y)`.


# %% losses-5-5
def weighted(model, batch):
    """Some classes matter more. y: (rows, length), and -100 is padding."""
    x, y = batch
    logits = model(x).flatten(0, 1)
    return cross_entropy(logits, y.flatten(), weight=model.class_weights)


def masked(model, batch):
    """Several labels for each row. y: (rows, labels), and -1 is unknown."""
    x, y = batch
    known = (y >= 0).to(x.dtype)
    return F.binary_cross_entropy_with_logits(model(x), y.clamp(min=0), weight=known)


def by_line(model, batch):
    """Each line counts alike. y: (rows, length), and -100 is padding."""
    x, y = batch
    losses = cross_entropy(model(x).transpose(1, 2), y, reduction="none")
    targets = (y != data.IGNORED).sum(dim=1).clamp(min=1)
    return (losses.sum(dim=1) / targets).mean()


def decayed(model, batch):
    """Squared error, and a penalty on large weights. y: (rows, outputs)."""
    x, y = batch
    squares = sum(p.square().sum() for p in model.parameters())
    return F.mse_loss(model(x), y) + 0.1 * squares


def matched(model, batch):
    """Each row of x looks for its own y in the batch. y: (rows, width)."""
    x, y = batch
    return cross_entropy(model(x) @ y.T, torch.arange(len(x)))


# %% answer-5-5
def sum_and_count(loss, model, micro_batch):
    """Return what a micro-batch adds to the sum and to the count, or None."""
    ### BEGIN SOLUTION
    x, y = micro_batch
    if loss == "weighted":
        logits, weights = model(x).flatten(0, 1), model.class_weights
        targets = y[y != data.IGNORED]
        total = cross_entropy(logits, y.flatten(), weight=weights, reduction="sum")
        return total, weights[targets].sum()
    if loss == "masked":
        losses = F.binary_cross_entropy_with_logits(
            model(x), y.clamp(min=0), reduction="none"
        )
        return losses[y >= 0].sum(), y.numel()
    if loss == "by_line":
        losses = cross_entropy(model(x).transpose(1, 2), y, reduction="none")
        targets = (y != data.IGNORED).sum(dim=1).clamp(min=1)
        return (losses.sum(dim=1) / targets).sum(), len(y)
    if loss == "decayed":
        squares = sum(p.square().sum() for p in model.parameters())
        total = F.mse_loss(model(x), y, reduction="sum")
        return total + y.numel() * 0.1 * squares, y.numel()
    return None
    ### END SOLUTION


# %% try-5-5
torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
model.register_buffer("class_weights", torch.tensor([1.0, 2.0, 5.0]))
lines = torch.tensor([[2, 0, 1, -100], [1, -100, -100, -100], [0, 1, 2, 0]])
labels = torch.tensor([[1.0, 0.0, -1.0], [1.0, -1.0, -1.0], [0.0, 0.0, 1.0]])
text, rows = (torch.randn(3, 4, 4), lines), (torch.randn(3, 4), labels)


def cut(loss, batch):
    """True, or what is wrong with the pairs of two micro-batches."""
    name, pieces = loss.__name__, [[t[:2] for t in batch], [t[2:] for t in batch]]
    if sum_and_count(name, model, pieces[0]) is None:
        return f"{name}: None"
    split = check_split(
        model,
        batch,
        lambda batch: loss(model, batch),
        pieces,
        lambda piece: sum_and_count(name, model, piece)[0],
        lambda piece: sum_and_count(name, model, piece)[1],
    )
    return split.ok or f"{name}: {split}"


attempt(cut, weighted, text)  # expected: True
for loss, batch in [(masked, rows), (by_line, text), (decayed, rows), (matched, rows)]:
    attempt(cut, loss, batch)

# %% check-5-5
check("5.5", sum_and_count)

# %% hints-5-5 [markdown]
# <details><summary>Where to look</summary>
#
# "Your loss: what to sum, what to count?" in lesson 5: its table has relatives of some of the five.
#
# </details>
# <details><summary>How do I find out what a mean divides by?</summary>
#
# Take a small batch: its sum, with `reduction="sum"`, over its mean is the divisor.
# Of what in this batch is it the number, or the sum?
#
# </details>
# <details><summary>Help: "index -100 is out of bounds"</summary>
#
# Padding has no class, so it has no weight either.
# Leave it out before you look the weights up.
#
# </details>
# <details><summary>Help: my loss is nan</summary>
#
# The mean over no target is nan, and nan times 0 is nan.
# What is the sum over no target?
#
# </details>
# <details><summary>Help: a term that is no sum over items</summary>
#
# It is in the loss once, after the division.
# What has to be in the sum, so that this comes out, however the batch is cut?
#
# </details>

# %% exercise-5-6 [markdown]
# ## Exercise 5.6 Read the weights
#
# difficulty 3/5 | 25 minutes | 5 points
#
# `gradaccum.audit` finds in any loop which weight each micro-batch got in an update: the factor of its own mean gradient.
# They show the fault of a loop that you have not seen.
#
# Five loops, `accumulation_steps=4`, one window of each:
#
# | loop | counts | weights |
# |---|---|---|
# | 1 | 2, 6, 1, 3 | 0.25, 0.25, 0.25, 0.25 |
# | 2 | 2, 6, 1, 3 | 0.045, 0.136, 0.057, 0.171 |
# | 3 | 2, 6, 1, 3 | 1, 1, 1, 1 |
# | 4 | 2, 6, 1, 3 | 0, 0, 0, 0.25 |
# | 5 | 3, 3 | 0.25, 0.25 |
#
# Write `read(weights, counts, accumulation_steps)`.
# It returns a pair: the name of the fault, and the letter of the line that makes the loop right in every window, whatever the counts.
#
# - `weights` is a list of floats. They are measured: what should be equal differs by less than 1e-5, and all else by 0.01 or more.
# - `counts` is a list of ints, how many items each micro-batch has. Some may be 0, but not all.
# - The window has `accumulation_steps` (k) micro-batches, or fewer at the end of an epoch.
# - The loop has one of these faults, or none.
#
# | name | what the loop does |
# |---|---|
# | `"right"` | nothing wrong, and nothing had to be clipped |
# | `"not divided"` | adds the mean losses, or the summed losses, as they are |
# | `"each mean over k"` | divides each mean by the number of micro-batches in its window (k, if it is full) |
# | `"a partial window over k"` | divides each mean by `accumulation_steps`, in a window with fewer |
# | `"only the last micro-batch"` | clears the gradients before each `backward()` |
# | `"clipped or divided inside"` | clips the gradients after each `backward()`; an audit cannot tell that from dividing them there |
#
# | line | |
# |---|---|
# | A | `loss = loss_sum / count`, the count of the whole window |
# | B | `loss = mean_loss / accumulation_steps` |
# | C | `loss = mean_loss / len(window)` |
# | D | `optimizer.zero_grad()` once, after `optimizer.step()` |
# | E | `clip_grad_norm_(...)` once, before `optimizer.step()` |
# | F | none |
#
# **Example.** `read([0.25, 0.75], [1, 3], 2)` is `("right", "F")`.


# %% answer-5-6
def read(weights, counts, accumulation_steps):
    """Return the name of a loop's fault, and the letter of the line that mends it."""
    ### BEGIN SOLUTION
    total, many = sum(counts), len(counts)

    def near(values):
        return all(abs(w - v) < 1e-3 for w, v in zip(weights, values, strict=True))

    if near([count / total for count in counts]):
        return "right", "F"
    if near([1] * many) or near(counts):
        return "not divided", "A"
    if near([1 / many] * many):
        return "each mean over k", "A"
    if near([1 / accumulation_steps] * many):
        return "a partial window over k", "A"
    if near([0] * (many - 1) + [counts[-1] / total]):
        return "only the last micro-batch", "D"
    return "clipped or divided inside", "E"
    ### END SOLUTION


# %% try-5-6
attempt(read, [0.25, 0.75], [1, 3], 2)  # expected: ('right', 'F')
loops = [
    ([0.25, 0.25, 0.25, 0.25], [2, 6, 1, 3]),
    ([0.045, 0.136, 0.057, 0.171], [2, 6, 1, 3]),
    ([1, 1, 1, 1], [2, 6, 1, 3]),
    ([0, 0, 0, 0.25], [2, 6, 1, 3]),
    ([0.25, 0.25], [3, 3]),
]
for weights, counts in loops:
    attempt(read, weights, counts, 4)

# %% check-5-6
check("5.6", read)

# %% hints-5-6 [markdown]
# <details><summary>Where to look</summary>
#
# Your answer to 5.1: it is the weights of a right window.
# And "Does your library do it right?" in lesson 5 shows weights beside the right ones.
#
# </details>
# <details><summary>The relation in words</summary>
#
# Write down for each row of the table of names which weights it gives, for counts of 2, 6, 1 and 3.
# A sum is a mean times its count.
#
# </details>
# <details><summary>Help: every window gets the same name</summary>
#
# `0.1 + 0.2 == 0.3` is `False`, and measured numbers are further off than that.
#
# </details>
# <details><summary>Help: a right window gets the name of a fault</summary>
#
# Two rules may fit the same weights: with equal counts, with one micro-batch, with counts of 0.
# Which of the two do you ask first?
#
# </details>

# %% scorecard [markdown]
# ## How did it go?

# %% scorecard-run
exercises.scorecard(5)

# %% after [markdown]
# - `exercises.solution("5.1")` in a new cell shows the worked solution. Read it once you have tried.
# - To start one exercise again, replace everything in its answer cell by `exercises.reset("5.1")` and run that; its points are cleared too.
# - `exercises.card(5)` draws a card of these exercises to share, `exercises.card()` one of all; right-click it to save it.
#
# **Next**: [lesson 6](../06_gpu_memory.ipynb).
