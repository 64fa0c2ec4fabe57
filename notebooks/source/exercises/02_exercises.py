# %% promise [markdown]
# # Exercises 2. Accumulate
#
# You predict what `.grad` holds, repair a loop that loses most of its gradients, and cut a batch that does not fit.
#
# {{totals}}; [lesson 2](../02_accumulate.ipynb) has all that they need.
# Fill in a cell that ends in `raise NotImplementedError`, or repair the code that a cell holds; run it, and run its check.
# A check tells you what it tried, and what went wrong; run it as often as you like.
#
# As in lesson 2, nothing is divided here: an update uses the *sum* of its micro-batches' gradients.

# %% setup
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum import exercises
from gradaccum.exercises import attempt, check

# %% exercise-2-1 [markdown]
# ## Exercise 2.1 What .grad holds
#
# difficulty 1/5 | 10 minutes | 2 points
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
# - `model` takes inputs of shape `(n, 3)` to logits of shape `(n, 3)`, and `optimizer` is plain SGD over its parameters.
# - `micro_batches` is a list of pairs: inputs of shape `(n, 3)`, and targets of shape `(n,)`, all with the same n.
# - `accumulation_steps` is an int, 1 or more; the number of micro-batches is a multiple of it.
# - With `accumulation_steps=1` every micro-batch makes its own update; the code as it is does that already.
#
# <details><summary>The fine print</summary>
#
# All gradients are empty when you get them.
# The same micro-batches may come again later, so leave them as they are.
# Memory is not checked here; in 2.3 it is.
#
# </details>
# <br>
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
micro_batches = []
for _ in range(4):
    micro_batches.append((torch.randn(4, 3), torch.randint(3, (4,))))


def bias_after():
    """Train, and return what became of the bias."""
    train(model, optimizer, micro_batches, accumulation_steps=2)
    return model.bias.detach()


attempt(bias_after)  # expected: tensor([ 0.0228, -0.0211, -0.1369])

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
# <details><summary>Help: RuntimeError, Trying to backward through the graph a second time</summary>
#
# A sum of losses that goes on through the next window still holds the graphs of the old one.
# Call `backward()` for each loss at once.
# Do not add `retain_graph=True`: the old losses would count again.
#
# </details>

# %% exercise-2-3 [markdown]
# ## Exercise 2.3 A batch that does not fit
#
# difficulty 3/5 | 20 minutes | 3 points
#
# A batch often comes in one piece, too large for the memory: then the cutting is up to you.
#
# Write `delayed_step(model, optimizer, inputs, targets, most_rows)`.
# It makes exactly one update, by the gradient of the *summed* loss of all rows: that of `cross_entropy(model(inputs), targets, reduction="sum")`.
# But no more than `most_rows` rows go through the model at once.
#
# - `model` takes inputs of shape `(n, 3)` to logits of shape `(n, 3)`, each row by itself; `optimizer` is plain SGD.
# - `inputs` has the shape `(rows, 3)`, and `targets` `(rows,)`. There is at least one row.
# - `most_rows` is an int, 1 or more. It need not divide `rows`, and may be larger.
# - Hold the activations of one piece at a time: of `most_rows` rows, or fewer.
# - Your function is called again and again, each time with another batch; what a call leaves in `.grad` must not change the next update.
#
# <details><summary>The fine print</summary>
#
# All gradients are empty at the first call.
# The same batch may come again later, so leave `inputs` and `targets` as they are, and make no copy of all rows.
# The function returns nothing.
#
# </details>
# <br>
#
# **Example.** Five rows have losses with the gradients 2, 4, 1, 3 and 5, wherever the one weight stands.
# With `most_rows=2` they are three pieces, the last one shorter, and the sum is 15.
# With a learning rate of 0.1, the weight moves by -1.5.
# It moves by -1.5 with any other `most_rows` too, and if the next call gets the same rows, by -1.5 again.


# %% answer-2-3
def delayed_step(model, optimizer, inputs, targets, most_rows):
    """Make one update by the summed loss of all rows, at most most_rows at once."""
    ### BEGIN SOLUTION
    for start in range(0, len(inputs), most_rows):
        rows = slice(start, start + most_rows)
        loss = cross_entropy(model(inputs[rows]), targets[rows], reduction="sum")
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    ### END SOLUTION


# %% try-2-3
torch.manual_seed(0)
model = nn.Linear(3, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
inputs, targets = torch.randn(10, 3), torch.randint(3, (10,))


def bias_after(most_rows):
    """Make an update, and return what became of the bias."""
    delayed_step(model, optimizer, inputs, targets, most_rows)
    return model.bias.detach()


attempt(bias_after, most_rows=4)  # expected: tensor([-0.1265,  0.0947, -0.1033])
attempt(bias_after, most_rows=3)  # expected: tensor([-0.2404,  0.2475, -0.1423])

# %% check-2-3
check("2.3", delayed_step)

# %% hints-2-3 [markdown]
# <details><summary>Where to look</summary>
#
# The loop inside `peak_of`, near the end of lesson 2, gets its micro-batches cut; here you cut them.
# "Delay the step, and nothing else" cuts a list of names, `names[i : i + 8]`; a tensor's rows are cut in the same way.
# A slice that goes beyond the end is shorter, and no error.
#
# </details>
# <details><summary>The relation in words</summary>
#
# A sum over all rows is the sum over some of them plus the sum over the others, wherever the border is.
# So no piece needs a factor.
#
# </details>
# <details><summary>Help: it is right only where most_rows divides the number of rows</summary>
#
# Does your loop reach the last row?
# And what is the loss of a piece: its sum, or its mean, which `cross_entropy` takes if you ask for nothing else?
#
# </details>
# <details><summary>Help: a piece has more rows than most_rows</summary>
#
# `inputs.chunk(2)` makes two pieces, whatever their size; `inputs.split(4)` makes pieces of 4 rows and a shorter one.
#
# </details>
# <details><summary>Help: the update is right, but more is held than one piece needs</summary>
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
