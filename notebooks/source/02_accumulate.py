# %% promise [markdown]
# # 2. Accumulate: many backwards, one step
#
# You delay the optimizer's step, find out what that does to the gradient, and measure why people want it.
#
# After this lesson you can
# - say what `.grad` holds after several calls of `backward()`, and read out of it what went in;
# - predict what a delayed step does to the gradient, and what plain SGD makes of it;
# - predict the peak memory of a window of small batches against one large batch.
#
# 30 minutes. It continues [lesson 1](01_naive_loop.ipynb).

# %% setup tags=["nbval-ignore-output"]
import torch
from torch.nn.functional import cross_entropy

from gradaccum import data, memory, models, plots, relative_error, widgets

torch.set_num_threads(1)  # as fast for small models, and no waiting
print(f"torch {torch.__version__}, running on the CPU")

# %% adds [markdown]
# ## `.grad` adds up
#
# The slope of `2 * weight` is 2, wherever you stand.
# Ask for it three times.

# %% adds-run
weight = torch.tensor(3.0, requires_grad=True)
for _ in range(3):
    (2 * weight).backward()
    print(weight.grad)

# %% adds-test tags=["test"]
assert weight.grad.item() == 6

# %% adds-why [markdown]
# `backward()` does not write the gradient into `.grad`.
# It **adds** it to what is there.
# Most people meet this as a bug, when they forget `zero_grad()`.
# Here it becomes the tool: leave `.grad` alone for a while, and it collects.

# %% delay [markdown]
# ## Delay the step, and nothing else
#
# Some words first.
# A **micro-batch** is what one forward and backward sees.
# The micro-batches of one update are a **window**, and their number is called **accumulation steps**, k for short.
#
# Below is the loop of lesson 1 on the real names, with plain SGD (its rate of 4 is explained below) and with a counter, `step`.
# The two lines that delay the update are marked.
# The micro-batches hold 8 names each, and the step comes after every fourth.

# %% delay-run
names, characters, model = models.for_names(length=18)
micro_batches = [characters.batch(names[i : i + 8]) for i in range(0, 256, 8)]
accumulation_steps = 4  # <-- new
optimizer = torch.optim.SGD(model.parameters(), lr=4.0)
updates = 0
for step, (inputs, targets) in enumerate(micro_batches):
    logits = model(inputs)
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    if (step + 1) % accumulation_steps == 0:  # <-- new
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
print(f"{len(micro_batches)} micro-batches, {updates} updates")

# %% delay-test tags=["test"]
assert updates == 8

# %% delay-ask [markdown]
# Four micro-batches of 8 names are the same 32 names as one batch of 32.
# These 32 are the **effective batch**, all items of a window: micro-batch times accumulation steps, where all micro-batches are equally large.
# Papers report the **global batch**: the same, over all processes that train together.
# We would like the same gradient, too.

# %% factor-guess tags=["nbval-ignore-output", "widget", "hidden"]
factor_guess = widgets.predict(
    "Four backwards on 8 names each, no step yet: .grad is how many times the "
    "gradient of the one batch of 32?"
)

# %% factor-came-out [markdown] tags=["folded"]
# ### What the delayed step collected

# %% factor-run
_, _, model = models.for_names(length=18)
for inputs, targets in micro_batches[:4]:
    cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
delayed = [parameter.grad for parameter in model.parameters()]

model.zero_grad()
inputs, targets = characters.batch(names[:32])
cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
full = [parameter.grad for parameter in model.parameters()]

factor = (delayed[0].norm() / full[0].norm()).item()
factor_guess.reveal(f"{factor:.5f}", "times the gradient of the one batch")

# %% factor-check
error = relative_error(delayed, full)
print(f"distance from the full batch's gradient: {100 * error:.0f} %")

# %% factor-test tags=["test"]
assert abs(factor - accumulation_steps) < 1e-5
assert abs(error - (accumulation_steps - 1)) < 1e-5

# %% factor-why [markdown]
# Each micro-batch's loss is a *mean* over its own 8 names.
# Adding up four means gives four times the mean of all 32.
# The direction is right, the length is k times the right one.
#
# `relative_error` is the yardstick of this course: the length of the difference over the length of the right gradient.
# 0 is equal, and 100 % is as far off as having no gradient at all.
# Four times the gradient is three gradients too many: 300 %.

# %% solve [markdown]
# ## What did each micro-batch get?
#
# Does `.grad` forget what went into it?
# If not, one can find faults in a loop by asking it, and later lessons do.
#
# What it holds is some factor times the first micro-batch's gradient, plus another times the second's, and so on.
# Such a factor is called the micro-batch's **weight**; it has nothing to do with the weights of the model.
# `.grad` has 1,885 numbers.
# Each is the sum of the four gradients' numbers at the same place, each times its weight: 1,885 equations for four unknowns.
# *Least squares* finds the four that fit best, in five lines; PyTorch has it as `lstsq`.

# %% solve-came-out [markdown] tags=["folded"]
# ### The five lines, and a picture

# %% solve-run
names, characters, model = models.for_names(length=18)


def collected(*starts):
    """What .grad holds after the micro-batches of 8 names from these on, as one vector."""
    model.zero_grad()
    for start in starts:
        inputs, targets = characters.batch(names[start : start + 8])
        cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


# The five lines:
starts = [0, 8, 16, 24]
total = collected(*starts)
pieces = torch.stack([collected(start) for start in starts], dim=1)
weights = torch.linalg.lstsq(pieces, total[:, None]).solution.flatten()
unexplained = relative_error(pieces @ weights, total)
print(f"{len(total):,} equations for {len(weights)} unknown")
print("weights of the micro-batches:", " ".join(f"{each:.4f}" for each in weights))
print(f"unexplained: {100 * unexplained:.2f} %")

# %% solve-figure tags=["hidden"] alt="Four bars of height 1, one for each micro-batch; the dashed outline around each foot is a quarter high: what it should have got."
from gradaccum.auditing import Update

update = Update([1, 2, 3, 4], weights.tolist(), right=4 * [1 / 4])
plots.weights([update], ["no division"])

# %% solve-test tags=["test"]
assert (weights - 1).abs().max() < 1e-5
assert unexplained < 1e-5

# %% solve-why [markdown]
# A bar is the weight that a micro-batch got, the dashed outline the one that it should have: here a quarter each, for the mean over 32 names.
# Nothing is unexplained: the sum is these four gradients and nothing else.
#
# Four unknowns are few and the equations are many, so the answer is the only one, unless two micro-batches have the same gradient.
# This picture comes again in each lesson: a right loop fills its outlines, and each wrong line leaves a pattern of its own.

# %% astray [markdown]
# ## What does plain SGD make of it?
#
# SGD moves the model's weights by the learning rate times the gradient.
# Take a learning rate of 4, with which the batch of 32 trains well, and train on with the delayed step.

# %% astray-guess tags=["nbval-ignore-output", "widget", "hidden"]
astray_guess = widgets.predict(
    "SGD at a rate of 4. Where is the loss after 24 delayed updates?",
    choices=[
        "a little lower than with the batch of 32",
        "a little higher",
        "more than 100 times as high",
    ],
)

# %% astray-came-out [markdown] tags=["folded"]
# ### Where the loss goes


# %% astray-run
def losses_of(accumulation_steps, micro_batch_size):
    """The loss over all names after each update of SGD, for three epochs."""
    names, characters, model = models.for_names(length=18)
    everything = characters.batch(names)
    optimizer = torch.optim.SGD(model.parameters(), lr=4.0)
    losses = []
    for step, start in enumerate(3 * list(range(0, 256, micro_batch_size))):
        inputs, targets = characters.batch(names[start : start + micro_batch_size])
        cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                logits = model(everything[0]).flatten(0, 1)
                losses.append(cross_entropy(logits, everything[1].flatten()).item())
    return losses


whole, delayed = losses_of(1, micro_batch_size=32), losses_of(4, micro_batch_size=8)
times = delayed[-1] / whole[-1]
choice = min(2, int(times > 1) + int(times > 100))
astray_guess.reveal(
    astray_guess.choices[choice],
    f"({whole[-1]:.1f} with the batch of 32)",
    right=astray_guess.choices[choice],
)

# %% astray-figure tags=["hidden"] alt="The loss over 24 updates on a logarithmic axis: with one batch of 32 it falls a little, with the delayed step it rises by many powers of ten."
figure, (axis,) = plots.panels(["Same names, same learning rate"])
series = {"one batch of 32": whole, "4 micro-batches of 8, delayed": delayed}
plots.lines(
    axis,
    range(1, 25),
    series,
    log="y",
    xlabel="update",
    ylabel="loss over all names",
)
figure

# %% astray-why [markdown]
# A gradient four times too large is a learning rate four times too large: 16 in place of 4.
# Then each step overshoots further than the last.
# The batch of 32 went from 2.9 to 2.3, which this axis is too long to show.

# %% astray-test tags=["test"]
assert whole[-1] < 2.5
assert delayed[-1] > max(1000, delayed[11])

# %% where [markdown]
# ## Where do the gradients live?
#
# Nothing is lost, as the weights show.
# But where is it, when the loop overwrites `loss` at every micro-batch?

# %% where-figure tags=["hidden"] alt="A drawing. Four boxes, loss 1 to loss 4, the first three gone. From each an arrow, backward adds, to one box, .grad, which is beside the box of the weight; one arrow, step, leads from .grad to the weight."
figure, (axis,) = plots.panels(["One place collects"], height=2.9)
figure.set_figwidth(7)
box = {"boxstyle": "round,pad=0.5", "fill": False}
words = {"ha": "center", "va": "center", "bbox": box}
for number in range(1, 5):
    place = (0.1, 1.1 - 0.25 * number)
    text = f"loss {number}" if number == 4 else f"loss {number}, gone"
    axis.annotate(
        "",
        (0.56, 0.5),
        (0.19, place[1]),
        arrowprops={"arrowstyle": "->", "ec": plots.COLOURS[number - 1]},
    )
    axis.text(*place, text, color=plots.COLOURS[number - 1], **words)
axis.text(0.37, 0.9, "backward() adds", ha="center")
axis.text(0.63, 0.5, ".grad", weight="bold", **words)
axis.text(0.93, 0.5, "the weight", **words)
axis.annotate("", (0.85, 0.5), (0.69, 0.5), arrowprops={"arrowstyle": "->"})
axis.text(0.77, 0.57, "step()", ha="center")
axis.set(xlim=(0, 1), ylim=(0, 1))
axis.axis("off")
figure

# %% where-why [markdown]
# The gradient does not live in the loss.
# It lives beside each weight of the model, in one place, and every `backward()` adds to that place.
# The loss holds only the way back through one micro-batch, and `backward()` frees that as it goes.
# So the name `loss` may be overwritten.
# Even a kept loss would hold only its own 4 bytes; a loss that never went through `backward()` would hold all activations of its micro-batch.

# %% where-look [markdown] tags=["folded"]
# ### Look for yourself: one address, and as many bytes as the weights

# %% where-run
names, characters, model = models.for_names(length=18)
places = set()
for start in (0, 8, 16, 24):
    inputs, targets = characters.batch(names[start : start + 8])
    loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    places.add(model[0].weight.grad.data_ptr())
    del loss
weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
gradient_bytes = sum(parameter.grad.nbytes for parameter in model.parameters())
print(f"4 losses, all deleted; places where the gradient lay: {len(places)}")
print(f"bytes of the weights: {weight_bytes:,}, of their gradients: {gradient_bytes:,}")

# %% where-test tags=["test"]
assert len(places) == 1
assert gradient_bytes == weight_bytes

# %% reason [markdown]
# ## The reason to do it
#
# Lesson 1's model again, with random tokens.
# One update over 64 rows held 17.1 MB at its peak.
# Now cut the 64 rows into 4 micro-batches of 16, with one step at the end.

# %% peak-guess tags=["nbval-ignore-output", "widget", "hidden"]
peak_guess = widgets.predict(
    "One batch of 64 rows: 17.1 MB. How many MB for 4 micro-batches of 16?"
)

# %% peak-came-out [markdown] tags=["folded"]
# ### What the pieces hold, by role


# %% peak-run
def peak_of(accumulation_steps, rows=64):
    """Run one update over 64 rows in equal micro-batches, following every tensor."""
    model = models.embedding_linear(vocabulary=1000, width=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    micro_batch_size = rows // accumulation_steps
    micro_batches = list(
        data.random_tokens(batches=accumulation_steps, batch_size=micro_batch_size)
    )
    with memory.measure_memory(model, optimizer, micro_batches) as measured:
        for inputs, targets in micro_batches:
            cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return measured


one_batch, four_pieces = peak_of(1), peak_of(4)
peak_guess.reveal(
    f"{four_pieces.peak_bytes / 1e6:.1f}", "MB for the window of 4 micro-batches"
)

# %% peak-figure tags=["hidden"] alt="Two bars of bytes by role: one batch of 64 rows holds 17.1 MB at its worst moment, 4 micro-batches of 16 rows hold 6.1 MB, and only these hold gradients then."
figure, (axis,) = plots.panels(["What is held at the worst moment, by role"])
figure.set_size_inches(8, 2.6)
plots.stacked_roles(
    axis, {"1 x 64 rows": one_batch.at_peak, "4 x 16 rows": four_pieces.at_peak}
)
print(f"1 x 64 rows: {one_batch.peak_bytes:,} bytes")
print(f"4 x 16 rows: {four_pieces.peak_bytes:,} bytes")
print(f"gradients at the peak: {four_pieces.at_peak['gradients']:,} bytes")
figure

# %% peak-test tags=["test"]
assert one_batch.peak_bytes == 17_063_848
assert four_pieces.at_peak["gradients"] == four_pieces.at_peak["parameters"]

# %% peak-why [markdown]
# More than a quarter, and for two reasons.
# The model's weights are there however small the pieces are.
# And the collected gradients must stay while the next micro-batch runs: one number for each of the model's weights, which the single batch did not hold at its peak.
# Nearly all the rest went down to a quarter, because each micro-batch's activations are freed before the next one starts.
# The largest part, *backward temporaries*, is made and freed during the backward pass: mostly two tensors as large as the logits.
#
# This is the trade: the data of a large batch, the activations of a small one.

# %% recap [markdown]
# ## Recap
#
# <details><summary>The lesson in three sentences: say yours first</summary>
#
# - `backward()` adds to `.grad`, which lives beside the model's weights, and least squares says how much of each micro-batch is in it.
# - A delayed step on mean losses has k times the right gradient, and SGD goes astray on it.
# - A window holds one micro-batch's activations and one copy of the gradients at a time.
#
# </details>
# <br>
#
# **Try it.** What will `peak_of(16).peak_bytes` be? Write your number down before you run it in a new cell (B makes one below).
#
# <details><summary>How to work it out</summary>
#
# Weights and gradients are 1,028,000 bytes each and do not change.
# What is left of the 6.1 MB grows with the rows: the activations of 16 rows, and what the backward pass makes of them.
# 4 rows have a quarter of that.
# That makes 2.06 + 4.02 / 4, about 3.1 MB.
#
# </details>
# <br>
#
# **Exercises**, which grade themselves: [say what `.grad` holds, find the gradients that got lost, and train on a batch that does not fit](exercises/02_exercises.ipynb).
#
# **Next**: [lesson 3](03_normalize.ipynb) mends the length of the gradient with one line, and then asks who would notice without that line.

# %% recap-guesses tags=["hidden"]
widgets.recap()
