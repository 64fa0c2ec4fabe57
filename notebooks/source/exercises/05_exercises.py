# %% promise [markdown]
# # Exercises 5. Unequal micro-batches
#
# You weight means, write the step that is right for text of any lengths, repair a fix that lost the point, and write the test that notices a mean of means.
#
# {{totals}}; [lesson 5](../05_unequal_micro_batches.ipynb) has all that they need.
# Fill in a cell that ends in `raise NotImplementedError`, or repair the code that is there, run it, and run its check.
# A check tells you what it tried, and what went wrong; run it as often as you like.

# %% setup
import copy

import torch
from torch.nn.functional import cross_entropy

from gradaccum import data, exercises, memory, models, relative_error
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
# "Try it" at the end of lesson 5, and the loop in "Adam does not hide it, and the log looks better".
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
# - A target of `data.IGNORED`, which is -100, does not count: padding, or a part of a line that is not to be learned. It may stand at any place of a row. So a micro-batch may have no target that counts; a window has at least one.
# - `optimizer` is one of `torch.optim`, perhaps with momentum. Leave its settings, and the window's tensors, as they are: both are used again in the next epoch.
# - Call `optimizer.step()` once. Clear the gradients once per window, first or last: the step is called for one window after another, and the first time the gradients are empty.
# - Hold one micro-batch's activations at a time.
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
# "A fix that lost the point" in lesson 5: what keeps a graph, and what frees it?
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
# - `step(model, optimizer, micro_batches)` makes one update: it clears the gradients, accumulates over the micro-batches, calls `optimizer.step()` and clears again. `model` and `micro_batches` are as in exercise 5.2; you choose them, and the optimizer.
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
