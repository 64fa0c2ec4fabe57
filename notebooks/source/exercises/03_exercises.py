# %% promise [markdown]
# # Exercises 3. Normalize
#
# You normalize a window without a length, say what a summed loss needs, and write the test that notices a missing division.
#
# {{totals}}; [lesson 3](../03_normalize.ipynb) has all that they need.
# Fill in a cell that ends in `raise NotImplementedError`, run it, and run its check.
# A check tells you what it tried, and what went wrong; run it as often as you like.

# %% setup
import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum import exercises, relative_error
from gradaccum.exercises import attempt, check

# %% exercise-3-1 [markdown]
# ## Exercise 3.1 A window without a length
#
# difficulty 3/5 | 20 minutes | 4 points
#
# Data that comes as a stream has no `len`: nobody knows k before the last micro-batch is through.
#
# Write `accumulate_window(model, micro_batches)`.
# It leaves in `.grad` the gradient of the mean loss over the whole window, as one large batch would give it, and returns nothing.
#
# - `model` takes inputs of shape `(n, 3)` to logits of shape `(n, 3)`, each row by itself. Its gradients are empty when you get it. The check's has several layers: reach the weights of any model through `model.parameters()`.
# - `micro_batches` gives at least one pair: inputs of shape `(n, 3)` and targets of shape `(n,)`, all with the same n.
# - It may be a list, but also a generator: that has no length, cannot be indexed, and is read once, in a `for` loop.
# - Do not collect the micro-batches: when the next one is read, at most two of those before it may still be there.
# - Hold one micro-batch's activations at a time.
#
# <details><summary>The fine print</summary>
#
# Leave the model (but for `.grad`) and the micro-batches as they are.
# Called again after `model.zero_grad()`, with the same micro-batches, your function gives the same gradient.
#
# </details>
# <br>
#
# **Example.** With a model that has one weight, and micro-batches whose mean losses have the gradients 2, 4 and 9, `.grad` ends as 5.
# If one more comes, with a gradient of 1, `.grad` ends as 4: then each of the others counts for less.


# %% answer-3-1
def accumulate_window(model, micro_batches):
    """Leave in .grad the gradient of the mean loss over all micro-batches."""
    ### BEGIN SOLUTION
    k = 0
    for inputs, targets in micro_batches:
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        k += 1
    for parameter in model.parameters():
        parameter.grad /= k
    ### END SOLUTION


# %% try-3-1
torch.manual_seed(0)
model = nn.Linear(3, 3)
inputs, targets = torch.randn(8, 3), torch.randint(3, (8,))


def stream():
    """Give the eight rows in micro-batches of two."""
    for start in range(0, 8, 2):
        yield inputs[start : start + 2], targets[start : start + 2]


def gradient_after():
    """Fill .grad, and return the bias's."""
    accumulate_window(model, stream())
    return model.bias.grad


attempt(gradient_after)  # expected: tensor([ 0.3501,  0.1145, -0.4646])

# %% check-3-1
check("3.1", accumulate_window)

# %% hints-3-1 [markdown]
# <details><summary>Where to look</summary>
#
# The first section of lesson 3 divides each loss, before `backward()`.
# What else can be divided, and when do you know by what?
#
# </details>
# <details><summary>The relation in words</summary>
#
# A sum of gradients, divided by k, is what you get if each loss is divided by k first.
# `.grad` is a tensor for each parameter of the model, and you may write to it: `parameter.grad *= 2` doubles it.
#
# </details>
# <details><summary>Help: TypeError, object of type 'generator' has no len()</summary>
#
# Count the micro-batches as they come.
# When the loop is over, you know how many there were.
#
# </details>
# <details><summary>Help: my gradient is all zeros, or parameter.grad is None</summary>
#
# A generator is read once.
# Did something else read it before your loop did, to count?
# Does `backward()` run for each micro-batch?
# And does something clear in the end? Here nothing steps, and nothing clears.
#
# </details>
# <details><summary>Help: my gradient is exactly k times too large</summary>
#
# `backward()` adds to `.grad`, and each micro-batch's loss is already a mean.
# What do k means have to be divided by to become one mean?
# A division of the loss after its `backward()` comes too late.
#
# </details>
# <details><summary>Help: the gradient is right, but too many micro-batches are still there</summary>
#
# `list(micro_batches)` has a length, since it holds them all.
# A list of losses that wait for `backward()` holds them too, each through its graph.
#
# </details>
# <details><summary>Help: the gradient is right, but not the memory</summary>
#
# A loss keeps its graph, with all activations, until it has been through `backward()`.
#
# </details>

# %% exercise-3-2 [markdown]
# ## Exercise 3.2 Sum or mean
#
# difficulty 2/5 | 5 minutes | 2 points
#
# Popular posts have this the wrong way round.
#
# Write `divisor(reduction, sizes)`.
# It returns the number by which each micro-batch's loss is divided before `backward()`, so that `.grad` ends as the gradient of the mean over all items of the window.
#
# - `reduction` is `"mean"` or `"sum"`, as it was given to `cross_entropy`.
# - `sizes` is a list of ints, the items of each micro-batch; all are equal.
#
# **Example.** A window of one micro-batch with 6 items: `divisor("mean", [6])` is 1, and `divisor("sum", [6])` is 6.


# %% answer-3-2
def divisor(reduction, sizes):
    """Return what each micro-batch's loss is divided by."""
    ### BEGIN SOLUTION
    if reduction == "mean":
        return len(sizes)
    return sum(sizes)
    ### END SOLUTION


# %% try-3-2
attempt(divisor, "mean", [6])  # expected: 1
attempt(divisor, "sum", [6])  # expected: 6

# %% check-3-2
check("3.2", divisor)

# %% hints-3-2 [markdown]
# <details><summary>The relation in words</summary>
#
# In the end, every item's loss has to be divided by the number of all items, once.
# Which part of that has the reduction done already?
#
# </details>

# %% exercise-3-3 [markdown]
# ## Exercise 3.3 A test that notices
#
# difficulty 4/5 | 40 minutes | 5 points
#
# The missing division lived for years in code that had tests.
# Now you write the test.
#
# Write `is_right(step)`.
# It returns `True` for every training step that does what one large batch does, and `False` for every step that does not.
#
# - `step(model, optimizer, micro_batches)` makes one update. You choose the model, the optimizer and the data.
# - It clears the gradients, accumulates over the micro-batches, calls `optimizer.step()` and clears again: afterwards `.grad` is empty, so compare the weights.
# - `micro_batches` is a list of pairs of inputs and targets for `cross_entropy`, all of the same size.
# - A right step promises the large batch's update for equal sizes only, and for a model that takes each row by itself.
# - A right step may add in another order, so it may differ by rounding.
#
# The check hands your test right steps and wrong ones; one of the wrong ones does not divide at all.
#
# <details><summary>The fine print</summary>
#
# The check uses float64; in float32 right steps differ by about 1e-7.
#
# </details>
# <br>
#
# **Example.** If `step` leaves the weights as they were, `is_right(step)` is `False`.


# %% answer-3-3
def is_right(step):
    """Tell whether a step makes the large batch's update."""
    ### BEGIN SOLUTION
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    twin = copy.deepcopy(model)
    inputs, targets = torch.randn(12, 3), torch.randint(3, (12,))
    micro_batches = list(zip(inputs.split(4), targets.split(4), strict=True))
    step(model, torch.optim.SGD(model.parameters(), lr=0.5), micro_batches)

    cross_entropy(twin(inputs), targets).backward()
    torch.optim.SGD(twin.parameters(), lr=0.5).step()
    return relative_error(model.parameters(), twin.parameters()) < 1e-5
    ### END SOLUTION


# %% try-3-3
def step_without_division(model, optimizer, micro_batches):
    """A wrong step: nothing divides."""
    optimizer.zero_grad()
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def step_with_division(model, optimizer, micro_batches):
    """A right step: each loss is divided by k."""
    optimizer.zero_grad()
    for inputs, targets in micro_batches:
        loss = cross_entropy(model(inputs), targets) / len(micro_batches)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


attempt(is_right, step_without_division)  # expected: False
attempt(is_right, step_with_division)  # expected: True

# %% check-3-3
check("3.3", is_right)

# %% hints-3-3 [markdown]
# <details><summary>Where to look</summary>
#
# "Delete the line again" in lesson 3 shows which optimizers notice, and "How equal is equal?" how close two right gradients are.
# `copy.deepcopy(model)` makes a second model with the same weights; `torch.cat([a, b])` joins rows.
#
# </details>
# <details><summary>Help: my test rejects a right step</summary>
#
# Compare with a tolerance, not with `==`.
# And are all your micro-batches of the same size?
#
# </details>
# <details><summary>Help: my test accepts a step that does not divide</summary>
#
# Which optimizer did you give it, and how many micro-batches?
#
# </details>
# <details><summary>Help: my test accepts some other wrong step</summary>
#
# Which numbers could a wrong step divide by: k, the samples of a micro-batch, all samples, k twice?
# Is one of them 1 in your window, or are two of them equal?
# Is each micro-batch another one?
# Is your tolerance small enough, and do you compare all parameters?
#
# </details>

# %% scorecard [markdown]
# ## How did it go?

# %% scorecard-run
exercises.scorecard(3)

# %% after [markdown]
# - `exercises.solution("3.1")` in a new cell shows the worked solution. Read it once you have tried.
# - To start one exercise again, replace everything in its answer cell by `exercises.reset("3.1")` and run that; its points are cleared too.
# - `exercises.card(3)` draws a card of these exercises to share, `exercises.card()` one of all; right-click it to save it.
#
# **Next**: [lesson 4](../04_windows.ipynb).
