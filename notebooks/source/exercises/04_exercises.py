# %% promise [markdown]
# # Exercises 4. Windows
#
# You cut a stream into windows, write an epoch that has no bad edges, repair two loops, and count updates.
#
# {{totals}}; [lesson 4](../04_windows.ipynb) has all that they need.
# Fill in a cell that ends in `raise NotImplementedError`, or repair the code that you find, run it, and run its check.
# A check tells you what it tried, and what went wrong; run it as often as you like.

# %% setup
from itertools import islice

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradaccum
from gradaccum import exercises
from gradaccum.exercises import attempt, check

# %% exercise-4-1 [markdown]
# ## Exercise 4.1 A stream in windows
#
# difficulty 2/5 | 10 minutes | 3 points
#
# Once the stream is cut into windows, the loop needs no counter and no `if`.
#
# Write `group(micro_batches, accumulation_steps)`.
# It gives the micro-batches in lists of `accumulation_steps`, one list after the other, in order.
# The last list may be shorter; no list is empty.
#
# - `micro_batches` is any iterable: a list, but also a generator, which has no length and cannot be indexed.
# - `accumulation_steps` is an int of at least 1.
# - Yield the lists, or return something that can be iterated over.
# - When a list is handed out, nothing beyond it has been read: a generator may never end.
# - Write it out, without `gradaccum.windows`.
#
# <details><summary>The fine print</summary>
#
# There may be nothing in `micro_batches`, or many thousands, and a micro-batch may be anything.
# Each list must stay as it is when the next one comes; tuples are as good as lists.
#
# </details>
# <br>
#
# **Example.** `list(group(range(1, 8), 3))` is `[[1, 2, 3], [4, 5, 6], [7]]`.


# %% answer-4-1
def group(micro_batches, accumulation_steps):
    """Yield lists of `accumulation_steps` micro-batches; the last may be shorter."""
    ### BEGIN SOLUTION
    stream = iter(micro_batches)
    window = list(islice(stream, accumulation_steps))
    while window:
        yield window
        window = list(islice(stream, accumulation_steps))
    ### END SOLUTION


# %% try-4-1
attempt(lambda: list(group(range(1, 8), 3)))
attempt(lambda: list(group((name for name in "abcd"), 2)))

# %% check-4-1
check("4.1", group)

# %% hints-4-1 [markdown]
# <details><summary>Where to look</summary>
#
# The section "Turn it inside out" of lesson 4.
# `islice(stream, k)` takes the next k from an iterator, or what is left.
#
# </details>
# <details><summary>The relation in words</summary>
#
# Collect until the list is full, hand it out, begin a new one.
# At the end, hand out what was begun, if there is anything in it.
#
# </details>
# <details><summary>Help: my function never ends, or begins with the same list again and again</summary>
#
# What does `islice` give when the stream is used up?
# And where does `islice(micro_batches, k)` begin to read, if `micro_batches` is a list?
#
# </details>

# %% exercise-4-2 [markdown]
# ## Exercise 4.2 One epoch
#
# difficulty 3/5 | 15 minutes | 4 points
#
# Real data sets seldom divide evenly, and large libraries got the last window wrong.
#
# Write `train_epoch(model, optimizer, micro_batches, accumulation_steps)`.
# It goes through the micro-batches once and makes one update for each window, the last one too if it is shorter.
# Each update is the one that the window's large batch would make.
#
# - `model` takes inputs of shape `(n, 3)` to logits of shape `(n, 3)`, each row by itself.
# - `micro_batches` is a list of pairs: inputs of shape `(n, 3)`, and targets of shape `(n,)`, all with the same n.
# - `accumulation_steps` is an int of at least 1. There may be fewer micro-batches than that.
# - Your function is called once for each epoch, and nothing of one epoch may reach the next.
# - Cut the windows yourself, without `gradaccum.windows`, and hold one micro-batch's activations at a time.
#
# <details><summary>The fine print</summary>
#
# `optimizer` is one of `torch.optim`, over the model's parameters; call `optimizer.step()` once for each window.
# The check trains with momentum: the gradient has to be right, and another learning rate is no cure.
# The gradients are empty before the first epoch, and the list is to be left as it is.
#
# </details>
# <br>
#
# **Example.** Seven micro-batches and k = 3 make three updates: from 1, 2 and 3, from 4, 5 and 6, and from 7 alone.
# If 7 has a mean loss of 2, then 2 is what goes through `backward()`, not a third of it.


# %% answer-4-2
def train_epoch(model, optimizer, micro_batches, accumulation_steps):
    """Make one update for each window of the epoch."""
    ### BEGIN SOLUTION
    for start in range(0, len(micro_batches), accumulation_steps):
        window = micro_batches[start : start + accumulation_steps]
        for inputs, targets in window:
            loss = cross_entropy(model(inputs), targets) / len(window)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ### END SOLUTION


# %% try-4-2
torch.manual_seed(0)
model = nn.Linear(3, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
micro_batches = [(torch.randn(2, 3), torch.randint(3, (2,))) for _ in range(3)]
attempt(train_epoch, model, optimizer, micro_batches, 2)
print("expected: -0.1845, -0.1173, 0.1666; got:", model.bias.detach())

# %% check-4-2
check("4.2", train_epoch)

# %% hints-4-2 [markdown]
# <details><summary>Where to look</summary>
#
# The loop of "Turn it inside out", without clipping and schedule.
#
# </details>
# <details><summary>The relation in words</summary>
#
# The mean over a window divides by the number of micro-batches that the window has.
# What is that number in the last one?
#
# </details>
# <details><summary>Help: one epoch is right, a second is not</summary>
#
# What is in `.grad` when the first epoch is over?
# Print it.
#
# </details>

# %% exercise-4-3 [markdown]
# ## Exercise 4.3 Repair: the parity and the leak
#
# difficulty 3/5 | 15 minutes | 4 points
#
# This loop runs without an error or a warning, and makes its updates at the wrong places.
#
# Repair `train(model, optimizer, micro_batches, accumulation_steps, epochs)`.
# Each epoch goes through all the micro-batches and begins a new window.
# An update comes after every `accumulation_steps` micro-batches, and one more for what is left over at the end of the epoch.
# Each update is the one that its window's large batch would make: for the shorter window too.
#
# - The model takes inputs of shape `(n, d)` to logits of shape `(n, 3)`, each row by itself; `micro_batches` is a list of pairs as before, all of the same size.
# - The gradients are empty at the start. Updates are made by `optimizer.step()`, which the check watches.
# - You may use `gradaccum.windows` here, or do without.
#
# **Example.** Five micro-batches, k = 2 and two epochs make six updates, from the micro-batches [1, 2], [3, 4], [5], [1, 2], [3, 4], [5].


# %% answer-4-3
def train(model, optimizer, micro_batches, accumulation_steps, epochs):
    """Train for some epochs, with one update for each window."""
    ### BEGIN SOLUTION
    for _epoch in range(epochs):
        for window in gradaccum.windows(micro_batches, accumulation_steps):
            for inputs, targets in window:
                loss = cross_entropy(model(inputs), targets) / len(window)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    ### END SOLUTION


# %% try-4-3
inputs, targets = torch.eye(5), torch.tensor([0, 1, 2, 0, 1])
micro_batches = list(zip(inputs.split(1), targets.split(1), strict=True))
model = nn.Linear(5, 3, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def show(*_):
    """Only micro-batch i has a gradient in column i; print whose gradients there are."""
    print([i + 1 for i in range(5) if model.weight.grad[:, i].any()], end=" ")


optimizer.register_step_post_hook(show)
attempt(train, model, optimizer, micro_batches, 2, 2)
print("expected: [1, 2] [3, 4] [5] [1, 2] [3, 4] [5]")

# %% check-4-3
check("4.3", train)

# %% hints-4-3 [markdown]
# <details><summary>Where to look</summary>
#
# "Seven micro-batches, k = 3" shows what the condition makes of a stream; "Turn it inside out" gets rid of it.
#
# </details>
# <details><summary>The relation in words</summary>
#
# `step` counts from 0, so at the first micro-batch it is 0, which every number divides.
# And the end of an epoch is the end of a window, whatever the count.
#
# </details>
# <details><summary>Help: the updates are the right ones, but a shorter window is not</summary>
#
# By what is the loss of the fifth of five micro-batches divided, and by what should it be?
#
# </details>

# %% exercise-4-4 [markdown]
# ## Exercise 4.4 Repair: once per update
#
# difficulty 3/5 | 20 minutes | 4 points
#
# What belongs to the update and stands in the inner loop does damage that no error shows.
#
# Repair `train_windows(model, optimizer, schedule, windows, max_norm)`.
# It trains for one epoch, with one update for each window.
# Before each update the window's gradient is clipped to `max_norm`, and after each update the schedule moves on by one step.
# It returns a list with one number for each window: the mean loss over the window, as it was when its micro-batches went through the model.
# The code below clips at the wrong place, moves the schedule at the wrong place, and logs something else, which keeps graphs alive.
#
# - `windows` is a list of windows; a window is a list of pairs as before, all of the same size. The last window may be shorter.
# - The gradients are divided and cleared as they should be, and one micro-batch's activations are held at a time: keep that.
# - Clip with `nn.utils.clip_grad_norm_`. Return floats, or tensors of shape `()` that hold no graph.
#
# **Example.** A window of two micro-batches whose mean losses are 2 and 4 is logged as 3.0.
# Three windows of two micro-batches move the schedule on by 3, where the code as it is moves it on by 6.


# %% answer-4-4
def train_windows(model, optimizer, schedule, windows, max_norm):
    """Train for one epoch, and return the mean loss of each window."""
    ### BEGIN SOLUTION
    losses = []
    for window in windows:
        window_loss = 0.0
        for inputs, targets in window:
            loss = cross_entropy(model(inputs), targets) / len(window)
            loss.backward()
            window_loss += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(window_loss)
    return losses
    ### END SOLUTION


# %% try-4-4
torch.manual_seed(0)
model = nn.Linear(3, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
micro_batches = [(torch.randn(2, 3), torch.randint(3, (2,))) for _ in range(3)]
windows = [micro_batches[:2], micro_batches[2:]]
attempt(train_windows, model, optimizer, schedule, windows, 0.1)
print("expected: 1.3039 and 0.9418")
print(optimizer.param_groups[0]["lr"], "expected: 0.125")

# %% check-4-4
check("4.4", train_windows)

# %% hints-4-4 [markdown]
# <details><summary>Where to look</summary>
#
# "Once per update" in lesson 4 shows what each of the three does where it does not belong; "Turn it inside out" gives each its place.
#
# </details>
# <details><summary>The relation in words</summary>
#
# For each window: backward through its micro-batches, clip, step, schedule, clear.
# Each micro-batch's loss, once divided, is its share of the window's mean, and the window's loss is the sum of the shares.
#
# </details>
# <details><summary>Help: the loss is right, but it holds a graph</summary>
#
# A tensor that was computed from the model's output remembers how.
# `.item()` gives the number without the memory.
#
# </details>
# <details><summary>Help: PyTorch warns about lr_scheduler.step()</summary>
#
# It says that the schedule moved before the first update.
# Where does the first update come, and where the schedule?
#
# </details>

# %% exercise-4-5 [markdown]
# ## Exercise 4.5 How many updates
#
# difficulty 1/5 | 5 minutes | 2 points
#
# Warm-up and schedule are counted in updates, so a scheduler has to know their number before the training begins.
#
# Write `updates(number_of_micro_batches, accumulation_steps, epochs)`.
# It returns how many updates the whole training makes.
# Each epoch begins a new window, and its last window may be shorter.
#
# - All three are ints of at least 1; `number_of_micro_batches` is that of one epoch.
#
# **Example.** `updates(7, 3, 1)` is 3.


# %% answer-4-5
def updates(number_of_micro_batches, accumulation_steps, epochs):
    """Return the number of updates of the whole training."""
    ### BEGIN SOLUTION
    windows = -(-number_of_micro_batches // accumulation_steps)  # rounded up
    return windows * epochs
    ### END SOLUTION


# %% try-4-5
attempt(updates, 7, 3, 1)  # expected: 3
attempt(updates, 6, 3, 1)  # expected: 2

# %% check-4-5
check("4.5", updates)

# %% hints-4-5 [markdown]
# <details><summary>The relation in words</summary>
#
# How many windows has one epoch?
# Count those that are full, and then look at what is left.
#
# </details>
# <details><summary>Help: I am off by one or two updates in many epochs</summary>
#
# Does a window of yours begin in one epoch and end in the next?
#
# </details>

# %% scorecard [markdown]
# ## How did it go?

# %% scorecard-run
exercises.scorecard(4)

# %% after [markdown]
# - `exercises.solution("4.1")` in a new cell shows the worked solution. Read it once you have tried.
# - To start one exercise again, replace everything in its answer cell by `exercises.reset("4.1")` and run that; its points are cleared too.
# - `exercises.card(4)` draws a card of these exercises to share, `exercises.card()` one of all; right-click it to save it.
#
# **Next**: [lesson 5](../05_unequal_micro_batches.ipynb).
