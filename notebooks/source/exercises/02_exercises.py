# %% promise [markdown]
# # Exercises 2. Accumulate
#
# You predict what `.grad` holds, repair a loop that loses most of its gradients, and write the delayed step.
#
# {{totals}}; [lesson 2](../02_accumulate.ipynb) has all that they need.
# Fill in a cell that ends in `raise NotImplementedError`, or repair the code that a cell holds; run it, and run its check.
# A check tells you what it tried, and what went wrong; run it as often as you like.
#
# As in lesson 2, nothing is divided here: an update uses the *sum* of its window's gradients.

# %% setup
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum import exercises
from gradaccum.exercises import attempt, check

# %% exercise-2-1 [markdown]
# ## Exercise 2.1 What .grad holds
#
# difficulty 1/5 | 5 minutes | 2 points
#
# All that follows in this course rests on what `backward()` does to `.grad`.
#
# Write `held(events)`.
# It returns the number that one weight's `.grad` holds when all events are over.
#
# - `events` is a list of at least one event, in the order in which they happen to the weight; before the first, its `.grad` is empty. Leave the list as it is.
# - A number is one `backward()`: the gradient of that micro-batch's mean loss, positive or negative.
# - The string `"clear"` is one `optimizer.zero_grad()`. It may come first, last, twice in a row, or not at all.
# - Where `.grad` is empty in the end, return 0.
#
# **Example.** `held([2.0, 4.0, "clear", 1.0])` is 1.0, and `held([2.0])` is 2.0.


# %% answer-2-1
def held(events):
    """Return what .grad holds after these events."""
    ### BEGIN SOLUTION
    total = 0.0
    for event in events:
        if event == "clear":
            total = 0.0
        else:
            total += event
    return total
    ### END SOLUTION


# %% try-2-1
attempt(held, [2.0, 4.0, "clear", 1.0])  # expected: 1.0
attempt(held, [2.0])  # expected: 2.0

# %% check-2-1
check("2.1", held)

# %% hints-2-1 [markdown]
# <details><summary>Where to look</summary>
#
# The first section of lesson 2.
# You may also let PyTorch tell you: the gradient of `5 * weight` is 5, wherever the weight stands.
#
# </details>
# <details><summary>Help: TypeError, unsupported operand type(s) for +: 'float' and 'str'</summary>
#
# One of the events is the string `"clear"`.
# Look at each event before you count it.
#
# </details>

# %% exercise-2-2 [markdown]
# ## Exercise 2.2 The gradients that got lost
#
# difficulty 2/5 | 10 minutes | 3 points
#
# This loop runs without an error, and throws most of its work away.
#
# Repair `train(model, optimizer, micro_batches, accumulation_steps)`.
# After every `accumulation_steps` micro-batches it makes one update, by the sum of the gradients of these micro-batches and of no others.
# It returns nothing.
#
# - `model` takes inputs of shape `(n, 3)` to logits of shape `(n, 3)`, and `optimizer` is plain SGD over its parameters. All gradients are empty when you get them.
# - `micro_batches` is a list of pairs: inputs of shape `(n, 3)`, and targets of shape `(n,)`, as `cross_entropy` takes them. All have the same n, and their number is a multiple of `accumulation_steps`. The same ones may come again later, so leave them as they are.
# - `accumulation_steps` is an int, 1 or more. With 1, every micro-batch makes its own update; the code as it is does that already.
#
# **Example.** Say that four micro-batches have the gradients 2, 4, 1 and 3, wherever the one weight stands.
# With a learning rate of 0.1 and `accumulation_steps=2`, the weight has to move by -0.1 * (2 + 4), then by -0.1 * (1 + 3): by -1.0 in all.
# The code as it is moves it by -0.7.


# %% answer-2-2
def train(model, optimizer, micro_batches, accumulation_steps):
    """Make one update after every `accumulation_steps` micro-batches."""
    ### BEGIN SOLUTION
    for step, (inputs, targets) in enumerate(micro_batches):
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    ### END SOLUTION


# %% try-2-2
torch.manual_seed(0)
model = nn.Linear(3, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
micro_batches = [(torch.randn(4, 3), torch.randint(3, (4,))) for _ in range(4)]
attempt(train, model, optimizer, micro_batches, accumulation_steps=2)
print("expected: 0.0228, -0.0211, -0.1369; got:", model.bias.detach())

# %% check-2-2
check("2.2", train)

# %% hints-2-2 [markdown]
# <details><summary>Where to look</summary>
#
# "Delay the step, and nothing else" in lesson 2 has this loop.
# Compare line by line: what happens how often?
#
# </details>
# <details><summary>The relation in words</summary>
#
# A window has k calls of `backward()`, one step, and one clearing.
# A clearing between two calls of `backward()` of the same window throws a gradient away.
#
# </details>
# <details><summary>Help: one window is right, but several are not</summary>
#
# What is in `.grad` when the second window begins?
#
# </details>

# %% exercise-2-3 [markdown]
# ## Exercise 2.3 The delayed step
#
# difficulty 2/5 | 15 minutes | 3 points
#
# Here you write the whole update of one window, at the memory of one micro-batch.
#
# Write `delayed_step(model, optimizer, micro_batches)`.
# It makes exactly one update, by the sum of the gradients of all its micro-batches, and returns nothing.
#
# - `model` takes inputs of shape `(n, 3)` to logits of shape `(n, 3)`, and `optimizer` is plain SGD over its parameters.
# - `micro_batches` is one window: a list of at least one pair of inputs of shape `(n, 3)` and targets of shape `(n,)`. All have the same n. Each one's loss is the mean that `cross_entropy` gives. The same window may come again later, so leave it as it is.
# - Your function is called again and again, each time with the next window. All gradients are empty at the first call; what a call leaves in them must not change the next update.
# - Hold one micro-batch's activations at a time.
#
# **Example.** A window has three micro-batches with the gradients 2, 4 and 1, wherever the one weight stands.
# With a learning rate of 0.1, the weight moves by -0.1 * (2 + 4 + 1), that is by -0.7.
# If the next call gets the same window, the weight moves by -0.7 again.


# %% answer-2-3
def delayed_step(model, optimizer, micro_batches):
    """Make one update by the sum of the gradients of all micro-batches."""
    ### BEGIN SOLUTION
    for inputs, targets in micro_batches:
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    ### END SOLUTION


# %% try-2-3
torch.manual_seed(0)
model = nn.Linear(3, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
micro_batches = [(torch.randn(4, 3), torch.randint(3, (4,))) for _ in range(3)]
attempt(delayed_step, model, optimizer, micro_batches)
print("expected: 0.0314, -0.0652, -0.1013; got:", model.bias.detach())
attempt(delayed_step, model, optimizer, micro_batches)
print("expected: -0.0739, 0.0301, -0.0915; got:", model.bias.detach())

# %% check-2-3
check("2.3", delayed_step)

# %% hints-2-3 [markdown]
# <details><summary>Where to look</summary>
#
# The loop inside `peak_of`, near the end of lesson 2.
#
# </details>
# <details><summary>The relation in words</summary>
#
# `backward()` once for each micro-batch; `step()` and `zero_grad()` once for the window.
#
# </details>
# <details><summary>Help: the update is right, but not the memory</summary>
#
# A loss that has not been through `backward()` holds its graph, with all activations.
# When does each of yours go through it?
#
# </details>
# <details><summary>Help: the first call is right, the second is not</summary>
#
# What does your first call leave in `.grad`?
#
# </details>

# %% scorecard [markdown]
# ## How did it go?

# %% scorecard-run
exercises.scorecard(2)

# %% after [markdown]
# - `exercises.solution("2.1")` in a new cell shows the worked solution. Read it once you have tried.
# - To start one exercise again, replace everything in its answer cell by `exercises.reset("2.1")` and run that; its points are cleared too.
# - `exercises.card(2)` draws a card of these exercises to share, `exercises.card()` one of all; right-click it to save it.
#
# **Next**: [lesson 3](../03_normalize.ipynb).
