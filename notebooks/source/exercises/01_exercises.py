# %% promise [markdown]
# # Exercises 1. The naive loop
#
# You write one training step, repair a loop that eats memory, and predict the noise of a batch.
#
# {{totals}}; [lesson 1](../01_naive_loop.ipynb) has all that they need.
# Fill in a cell that ends in `raise NotImplementedError`, or repair the code that you find there, run it, and run its check.
# A check tells you what it tried, and what went wrong; run it as often as you like.

# %% setup
import torch
from torch.nn.functional import cross_entropy

from gradaccum import data, exercises, memory, models
from gradaccum.exercises import attempt, check

# %% exercise-1-1 [markdown]
# ## Exercise 1.1 One training step
#
# difficulty 2/5 | 10 minutes | 4 points
#
# This is the spine of the course: all later lessons change these lines.
#
# Write `training_step(model, optimizer, inputs, targets)`.
# It makes one update of the lesson's loop, and returns the loss from before the update, as a float.
#
# - `model` takes tokens of shape `(rows, length)` to logits of shape `(rows, length, V)`, a score for each of V tokens.
# - `inputs` and `targets` hold tokens, both of shape `(rows, length)`. There may be one row, or one token.
# - The loss is the mean of `cross_entropy` over all the tokens.
# - Any optimizer over the model's parameters may come, so let it move the weights.
# - The function is called many times, and each call updates by the gradient of its own batch alone.
#
# <details><summary>The fine print</summary>
#
# Before the first call `.grad` is empty; whether you clear first or last is up to you.
# In the next epoch the batches come again, so leave them as they are.
# A loss tensor that you return holds its **graph**: all that the forward pass kept for the backward pass. A Python float, such as `2.5`, holds nothing.
#
# </details>
# <br>
#
# **Example.** A model that gives all of 1000 tokens the same score has the loss log 1000 = 6.908.
# With a useful step, a second call on the same batch returns less than the first.


# %% answer-1-1
def training_step(model, optimizer, inputs, targets):
    """Make one update, and return the loss from before it."""
    ### BEGIN SOLUTION
    logits = model(inputs)
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
    ### END SOLUTION


# %% try-1-1
torch.manual_seed(0)
model = models.embedding_linear(vocabulary=1000, width=128)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
inputs, targets = next(data.random_tokens())
for loss in ("7.08", "6.96", "6.85"):
    attempt(training_step, model, optimizer, inputs, targets)
    print("expected:", loss)

# %% check-1-1
check("1.1", training_step)

# %% hints-1-1 [markdown]
# <details><summary>Where to look</summary>
#
# "The loop" in lesson 1 has the update; the loop on real text also keeps its losses as floats.
#
# </details>
# <details><summary>The relation in words</summary>
#
# Only one line moves the weights.
# It reads `.grad`, so the gradient has to be there before it, and nothing of an older batch with it.
#
# </details>
# <details><summary>Help: one call is right, but several in a row are not</summary>
#
# What does `.grad` hold when the second call begins, and which line forgets it?
#
# </details>
# <details><summary>Help: cross_entropy complains about shapes</summary>
#
# It wants one row of scores for each target: logits of shape `(N, V)`, and targets of shape `(N,)`.
# The lesson flattens both.
#
# </details>

# %% exercise-1-2 [markdown]
# ## Exercise 1.2 Find the bug: the loss of an epoch
#
# difficulty 3/5 | 10 minutes | 3 points
#
# A loop like this one runs well on ten batches, and out of memory on a thousand.
#
# `epoch_loss(model, batches)` measures how good a model is: the mean loss over all batches.
# It does not train.
# The number that the code below computes is right.
# Yet it is no float, and the memory grows with every batch.
# Find out why, and repair the function.
#
# - `batches` is a list of pairs `inputs, targets`, all of the same shape `(rows, length)`; `model` is as in exercise 1.1.
# - Return the mean loss as a Python float.
# - Training goes on afterwards: leave the weights, `.grad` (which may hold something), the batches and the model's mode as they are, and all weights able to train.
# - However many batches there are, the peak memory must stay that of one or two.
#
# It helps to know: a loss holds its graph, with the activations that the forward pass kept, until it has been through `backward()`, or until nothing refers to the loss any more.
# What is computed from a tensor refers to that tensor's graph.
#
# **Example.** If the losses of two batches are 2.0 and 3.0, the function returns `2.5`.


# %% answer-1-2
def epoch_loss(model, batches):
    """Return the mean loss over all batches, as a float."""
    ### BEGIN SOLUTION
    total = 0
    for inputs, targets in batches:
        logits = model(inputs)
        total += cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    return total / len(batches)
    ### END SOLUTION


# %% try-1-2
torch.manual_seed(0)
model = models.embedding_linear(vocabulary=1000, width=128)
batches = list(data.random_tokens(batches=20))
for count in (5, 20):
    with memory.measure_memory(model, batches) as measured:
        attempt(epoch_loss, model, batches[:count])
    print(f"{count} batches: {measured.peak_bytes - measured.start_bytes:,} bytes")
print("expected: a float each time, and as many bytes for 20 batches as for 5")

# %% check-1-2
check("1.2", epoch_loss)

# %% hints-1-2 [markdown]
# <details><summary>Where to look</summary>
#
# The loop on real text in lesson 1 keeps the losses of 116 batches: in which form?
#
# </details>
# <details><summary>The relation in words</summary>
#
# A sum of tensors is a tensor, and its graph has the graphs of all of them in it.
# A sum of floats is a float.
#
# </details>
# <details><summary>Help: it is a float now, but the memory still grows</summary>
#
# When does the loss become a float: after each batch, or once at the end?
#
# </details>
# <details><summary>Help: the memory is flat, but the check says "a tensor"</summary>
#
# Without its graph, a loss still is a tensor.
# One more call makes it a float.
#
# </details>

# %% exercise-1-3 [markdown]
# ## Exercise 1.3 The noise of another batch
#
# difficulty 2/5 | 5 minutes | 2 points
#
# The noise is what a larger batch buys; whoever pays for it in bytes should know how much they get.
#
# Write `predicted_noise(noise, batch_size, new_batch_size)`.
# The noise of the gradient was measured at one batch size; predict it for another.
#
# - `noise` is a float, the typical distance from the true gradient divided by the length of the true gradient, as in the lesson. It was measured with batches of `batch_size` rows.
# - `batch_size` and `new_batch_size` are ints from 1 up, in rows drawn independently. The new batch may be the larger one, the smaller one, or of the same size.
# - Return a number: the noise to expect with batches of `new_batch_size` rows.
#
# **Example.** `predicted_noise(0.8, 4, 16)` is 0.4: four times the batch, half the noise.


# %% answer-1-3
def predicted_noise(noise, batch_size, new_batch_size):
    """Return the noise to expect at another batch size."""
    ### BEGIN SOLUTION
    return noise * (batch_size / new_batch_size) ** 0.5
    ### END SOLUTION


# %% try-1-3
attempt(predicted_noise, 0.8, 4, 16)
print("expected: 0.4")
attempt(predicted_noise, 0.57, 8, 128)
print("lesson 1 measured 0.57 with 8 names, and 0.14 with 128")

# %% check-1-3
check("1.3", predicted_noise)

# %% hints-1-3 [markdown]
# <details><summary>Where to look</summary>
#
# The figure "Noise against batch size" in lesson 1, and the sentence below it.
#
# </details>
# <details><summary>The relation in words</summary>
#
# How many times larger is the new batch?
# The noise falls by the square root of that.
#
# </details>
# <details><summary>Help: it is right from one row, but not from other batches</summary>
#
# The noise that you are given is that of `batch_size` rows.
# What would it be for one row?
#
# </details>

# %% scorecard [markdown]
# ## How did it go?

# %% scorecard-run
exercises.scorecard(1)

# %% after [markdown]
# - `exercises.solution("1.1")` in a new cell shows the worked solution. Read it once you have tried.
# - To start one exercise again, replace everything in its answer cell by `exercises.reset("1.1")` and run that; its points are cleared too.
# - `exercises.card(1)` draws a card of these exercises to share, `exercises.card()` one of all; right-click it to save it.
#
# **Next**: [lesson 2](../02_accumulate.ipynb).
