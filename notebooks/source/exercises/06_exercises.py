# %% promise [markdown]
# # Exercises 6. GPU memory
#
# You write a step's peak down to the byte, plan for a budget, say what accumulation costs, and free what a loop keeps.
#
# {{totals}}; [lesson 6](../06_gpu_memory.ipynb) has all that they need.
# Fill in a cell that ends in `raise NotImplementedError`, or repair the code that is there, run it, and run its check.
# A check tells you what it tried, and what went wrong; run it as often as you like.

# %% setup
import torch
from torch.nn.functional import cross_entropy

from gradaccum import data, exercises, memory, models
from gradaccum.exercises import attempt, check

torch.set_num_threads(1)

# %% exercise-6-1 [markdown]
# ## Exercise 6.1 The peak, to the byte
#
# difficulty 2/5 | 15 minutes | 3 points
#
# If you can write down a peak, you know what there is to save.
#
# Write `peak_bytes(rows, length, width, vocabulary, accumulation_steps)`.
# It returns the most bytes that one update of the lesson's model holds, as `measure_memory` would find it.
#
# - The model is `embedding_linear(vocabulary, width)` in float32, and the update is the lesson's: `loss.backward()` for each micro-batch, then `optimizer.step()` and `optimizer.zero_grad()`.
# - The optimizer is SGD *with momentum*, which the lesson's table does not have: it keeps one number for each weight. The update is not the first one, so these numbers are there already.
# - The window holds `rows` rows of `length` tokens in all; `accumulation_steps` divides `rows`, and each micro-batch has as many rows. All five are ints of at least 1.
# - As in the lesson, the worst moment is in the backward pass of the loss: a micro-batch has more tokens than `width`, and `vocabulary` is larger too.
#
# **Example.** `peak_bytes(12, 7, 5, 40, 1)` is 46,872, and `peak_bytes(12, 7, 5, 40, 3)` is 20,632.


# %% answer-6-1
def peak_bytes(rows, length, width, vocabulary, accumulation_steps):
    """Return the peak of one update with SGD and momentum, in bytes."""
    ### BEGIN SOLUTION
    tokens = rows * length
    at_a_time = tokens // accumulation_steps
    weights = 4 * (2 * vocabulary * width + vocabulary)
    momentum = weights
    collected = weights if accumulation_steps > 1 else 0
    activations = 4 * at_a_time * width + 3 * 4 * at_a_time * vocabulary + 8
    return weights + momentum + collected + 16 * tokens + activations
    ### END SOLUTION


# %% try-6-1
model = models.embedding_linear(vocabulary=40, width=5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
window = list(data.random_tokens(batches=3, batch_size=4, length=7, vocabulary=40))
for _ in range(2):  # the second update is the one that counts
    with memory.measure_memory(model, optimizer, window) as measured:
        for inputs, targets in window:
            targets = targets.flatten()
            (cross_entropy(model(inputs).flatten(0, 1), targets) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
print(f"measured: {measured.peak_bytes}")
attempt(peak_bytes, 12, 7, 5, 40, 3)

# %% check-6-1
check("6.1", peak_bytes)

# %% hints-6-1 [markdown]
# <details><summary>Where to look</summary>
#
# "Anatomy of a peak" in lesson 6. Which of its rows has N, and which has n?
#
# </details>
# <details><summary>The relation in words</summary>
#
# What is there for each weight: the weight, its momentum, and with several micro-batches its collected gradient.
# What is there for the whole window: the token ids. All else is there for one micro-batch.
#
# </details>
# <details><summary>Help: a single micro-batch is right, several are not</summary>
#
# What must stay while the second micro-batch runs, and how often is it there?
# And which tensors has only the micro-batch that runs?
#
# </details>
# <details><summary>Help: I am a little too low</summary>
#
# Has the linear layer a bias? And the table has a last row.
#
# </details>

# %% exercise-6-2 [markdown]
# ## Exercise 6.2 The largest micro-batch in a budget
#
# difficulty 3/5 | 20 minutes | 5 points
#
# A planner that turns your effective batch of 256 into 186 has changed your experiment.
#
# Write `plan(peak_of, effective_batch, budget)`.
# It returns the sizes of one window's micro-batches, a list of ints.
#
# - `peak_of(micro_batch)` returns the peak in bytes of an update with micro-batches of that size, an int from 1 to `effective_batch`. It never falls as the micro-batch grows; it may stay flat, or rise in steps.
# - Take the *largest* size whose peak is within `budget` (a peak of exactly the budget is), as often as it goes into the effective batch. If samples are left, they make one smaller micro-batch at the end.
# - The sizes add up to `effective_batch` exactly.
# - Where not even one sample fits, return an empty list.
# - A real `peak_of` takes seconds. Call it at most 40 times, even for an effective batch of 10,000.
#
# Write the search yourself: the module's planner does not count here.
#
# **Example.** With a peak of 1,000 bytes and 10 for each sample, an effective batch of 50 and a budget of 1,205 bytes, the plan is `[20, 20, 10]`.


# %% answer-6-2
def plan(peak_of, effective_batch, budget):
    """Return a window's sizes: the largest micro-batches that fit, the sum exact."""
    ### BEGIN SOLUTION
    fits, too_large = 0, effective_batch + 1
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if peak_of(middle) <= budget:
            fits = middle
        else:
            too_large = middle
    if fits == 0:
        return []
    sizes = [fits] * (effective_batch // fits)
    rest = effective_batch - sum(sizes)
    return [*sizes, rest] if rest else sizes
    ### END SOLUTION


# %% try-6-2
def example_peak(micro_batch):
    """1,000 bytes, and 10 for each sample."""
    return 1000 + 10 * micro_batch


attempt(plan, example_peak, 50, 1205)  # expected: [20, 20, 10]
attempt(plan, example_peak, 50, 1000)  # expected: []

# %% check-6-2
check("6.2", plan)

# %% hints-6-2 [markdown]
# <details><summary>Where to look</summary>
#
# The end of "A GPU that is not there" in lesson 6 shows a plan and the sizes of its window.
#
# </details>
# <details><summary>Help: my effective batch shrinks or grows</summary>
#
# `effective_batch // size` whole micro-batches leave some samples over.
# They are still part of the update.
#
# </details>
# <details><summary>Help: I call peak_of too often</summary>
#
# Keep a size that fits and one that is too large, and try the middle between them.
# Each call halves what is left: how many calls do 10,000 sizes take?
#
# </details>
# <details><summary>Help: I am off by one</summary>
#
# Try an effective batch of 1, a budget that all of it fits into, and a budget that is met exactly.
#
# </details>

# %% exercise-6-3 [markdown]
# ## Exercise 6.3 What accumulation costs
#
# difficulty 4/5 | 15 minutes | 2 points
#
# "Accumulation is free" and "accumulation costs a copy of the gradients" are both said, and both can be true.
#
# Write `accumulation_cost(gradients, activations, temporaries, accumulation_steps)`.
# It returns by how many bytes the peak of an update of `accumulation_steps` micro-batches lies above the peak of an update of one such micro-batch alone.
#
# - An update has two moments that can be the worst: one in the backward pass of a micro-batch, one in `optimizer.step()`. The peak is the larger one.
# - `gradients`: the bytes of one copy of all gradients, which `step()` reads.
# - `activations`: what the backward pass of one micro-batch holds at its worst moment, beyond gradients that were collected *before* it.
# - `temporaries`: what `step()` makes for itself, beyond the gradients.
# - Weights, optimizer state and inputs are there in both moments. Leave them out; the inputs of the further micro-batches too.
#
# <details><summary>The fine print</summary>
#
# All are ints of at least 0, `accumulation_steps` of at least 1. A cost is never negative.
#
# </details>
# <br>
#
# The check hands you what was measured in real updates, with SGD and AdamW, and compares your cost with the measured one.
#
# **Example.** `accumulation_cost(100, 300, 0, 4)` is 100: alone, the worst moment holds 300 bytes; with 4 micro-batches it holds 400.
# `accumulation_cost(100, 300, 900, 4)` is 0: the worst moment is the step's, and holds 1,000 bytes either way.


# %% answer-6-3
def accumulation_cost(gradients, activations, temporaries, accumulation_steps):
    """Return what accumulation adds to the peak, in bytes."""
    ### BEGIN SOLUTION
    step = gradients + temporaries
    collected = gradients if accumulation_steps > 1 else 0
    return max(collected + activations, step) - max(activations, step)
    ### END SOLUTION


# %% try-6-3
attempt(accumulation_cost, 100, 300, 0, 4)  # expected: 100
attempt(accumulation_cost, 100, 300, 900, 4)  # expected: 0

# %% check-6-3
check("6.3", accumulation_cost)

# %% hints-6-3 [markdown]
# <details><summary>Where to look</summary>
#
# "More data, the same micro-batch" in lesson 6, and the sentences after its numbers.
#
# </details>
# <details><summary>The relation in words</summary>
#
# Write down four numbers: the two moments for one micro-batch alone, and the two for several.
# Only one of the four has something that the others do not.
#
# </details>
# <details><summary>Help: between a copy and nothing I am wrong</summary>
#
# The worst moment may be the step's with one micro-batch and the backward pass's with several.
# Then the two peaks to compare are of two different moments.
#
# </details>

# %% exercise-6-4 [markdown]
# ## Exercise 6.4 What the loop keeps
#
# difficulty 3/5 | 15 minutes | 4 points
#
# Someone wanted to log two numbers, and now a window of 8 micro-batches runs out of memory where one of 2 does not.
#
# `train_step(model, optimizer, window)` is given. Its update is right, and so are the two numbers that it returns: the mean loss over the window, and the share of its targets that get the largest logit.
# But it holds far more than one micro-batch at a time. Find what it keeps, and repair it.
#
# - `window` is a list of pairs of inputs and targets, int64 of shape `(n, length)`, all of the same shape.
# - `model` takes inputs to logits of shape `(n, length, vocabulary)`.
# - The update and the two numbers (floats) stay as they are: the loss and the guesses are those of the weights *before* the step.
# - Beyond weights, optimizer and window, hold at most twice what a plain loop holds, with many layers as well as with a large vocabulary.
# - A number for each token or each micro-batch may be kept.
#
# <details><summary>The fine print</summary>
#
# NumPy arrays and lists count too.
# The gradients are empty before the first update.
#
# </details>
# <br>
#
# **Example.** A window with a loss of 2 and then 4, and 3 then 5 right guesses among 10 and 10 targets: it returns 3.0 and 0.4.


# %% answer-6-4
def train_step(model, optimizer, window):
    """Make one update; return the mean loss and the share of targets guessed."""
    ### BEGIN SOLUTION
    mean_loss, guessed, count = 0.0, 0, 0
    for inputs, targets in window:
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        loss = cross_entropy(logits, targets) / len(window)
        loss.backward()
        mean_loss += loss.item()
        guessed += (logits.argmax(1) == targets).sum().item()
        count += len(targets)
    optimizer.step()
    optimizer.zero_grad()
    return mean_loss, guessed / count
    ### END SOLUTION


# %% try-6-4
torch.manual_seed(0)
model = models.embedding_linear(vocabulary=1000, width=128)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for batches in (2, 4, 8):
    window = list(data.random_tokens(batches, batch_size=8))
    with memory.measure_memory(model, optimizer, window) as measured:
        attempt(train_step, model, optimizer, window)
    print(f"{batches} micro-batches hold {measured.peak_bytes:,} bytes")

# %% check-6-4
check("6.4", train_step)

# %% hints-6-4 [markdown]
# <details><summary>Where to look</summary>
#
# "What gives it back" in lesson 6: four habits and what each costs. More than one of them is here.
#
# </details>
# <details><summary>Help: it still grows, with many layers too</summary>
#
# What does `retain_graph=True` ask for, and does anything here go through a graph twice?
#
# </details>
# <details><summary>Help: it grows with many classes only</summary>
#
# `detach()` lets go of the graph, not of the numbers.
# How many numbers do you need of each micro-batch, in the end?
#
# </details>
# <details><summary>Help: a number that worked does no longer</summary>
#
# After `step()` the weights are other ones.
# And the mean over the window is that of all its micro-batches.
#
# </details>

# %% scorecard [markdown]
# ## How did it go?

# %% scorecard-run
exercises.scorecard(6)

# %% after [markdown]
# - `exercises.solution("6.1")` in a new cell shows the worked solution. Read it once you have tried.
# - To start one exercise again, replace everything in its answer cell by `exercises.reset("6.1")` and run that; its points are cleared too.
# - `exercises.card(6)` draws a card of these exercises to share, `exercises.card()` one of all; right-click it to save it.
#
# **Next**: these are the last exercises. Put `windows`, `accumulate` and the planner into a loop of your own.
