# %% promise [markdown]
# # 1. The naive loop: one mini-batch, one update
#
# You run the training loop that all later lessons change, and measure the two things that the batch size decides.
#
# After this lesson you can
# - write the loop, and say what each of its lines does to the weights;
# - predict how much quieter the gradient gets when the batch grows;
# - predict how many more bytes a step then holds, and why a machine sets a limit.
#
# 25 minutes. You need to have seen a PyTorch model before, and no GPU.

# %% setup tags=["nbval-ignore-output"]
import torch
from torch.nn.functional import cross_entropy

from gradaccum import data, memory, models, plots, widgets

torch.set_num_threads(1)  # as fast for small models, and no waiting
print(f"torch {torch.__version__}, running on the CPU")

# %% directions [markdown]
# ## Two mini-batches, two directions
#
# A gradient says which way to move the weights.
# Here is a model after 50 updates on real text: 256 names of Unicode characters, each exactly 18 characters long.
# We show it 8 of the names, then 8 others, and ask each time: which way?
# A cosine of 1 means the same direction, 0 means that the two have nothing to do with each other.

# %% directions-run
names, characters, model = models.for_names(length=18)
inputs, targets = characters.batch(names)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)


def gradient(rows):
    """The gradient of the mean loss over some of the names, as one long vector."""
    model.zero_grad()
    cross_entropy(model(inputs[rows]).flatten(0, 1), targets[rows].flatten()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


for _ in range(50):
    gradient(slice(0, 256))
    optimizer.step()
one, other = gradient(slice(0, 8)), gradient(slice(8, 16))
cosine = torch.cosine_similarity(one, other, dim=0).item()
print(f"8 names, such as {names[0]!r}, and 8 others, such as {names[8]!r}")
print(f"cosine between their two gradients: {cosine:.1f}")

# %% directions-test tags=["test"]
assert abs(cosine) < 0.2

# %% directions-why [markdown]
# Same model, same text, and the two mini-batches do not agree at all.
# Each of them is right about its own 8 names.
# What they share, the way down for *all* names, is by now much smaller than what sets them apart.
#
# So the size of a mini-batch matters.
# First the loop itself, then how much it matters.

# %% loop [markdown]
# ## The loop
#
# This is the spine of the course.
# The model looks up each token in a table and predicts the next one from it.
# The tokens are random, 20 mini-batches of 8 rows with 20 tokens each, so there is nothing to learn: watch the steps.

# %% loop-run
torch.manual_seed(0)
model = models.embedding_linear(vocabulary=1000, width=128)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
updates = 0
for inputs, targets in data.random_tokens(batches=20, batch_size=8, length=20):
    logits = model(inputs)  # (8, 20, 1000): a score for each possible next token
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten())  # the mean of 160
    loss.backward()  # writes parameter.grad
    optimizer.step()  # reads parameter.grad, moves the weights
    optimizer.zero_grad()  # forgets parameter.grad
    updates += 1
print(f"20 mini-batches, {updates} updates")
print(f"logits {tuple(logits.shape)}, gradient now: {model[0].weight.grad}")

# %% loop-test tags=["test"]
assert updates == 20 and model[0].weight.grad is None

# %% loop-why [markdown]
# Three lines do the work, and only one of them moves anything.
# - `loss.backward()` computes the gradient and leaves it in each parameter's `.grad`.
# - `optimizer.step()` moves the weights by what it finds there.
# - `optimizer.zero_grad()` sets `.grad` to `None` again, so that the next mini-batch starts clean.
#
# One mini-batch, one update.
# Keep an eye on the last two lines: the next lesson moves them.

# %% text [markdown]
# ## The same loop on real text
#
# The names of Unicode characters are good practice text: 4,765 lines, of 2 to 78 characters, such as `OX`, and Unicode promises never to change one.
# We take those of up to 30 characters, and the loop stays as it was.
# The model is now a small GPT, the optimizer AdamW, and each mini-batch holds 64 names, padded to the longest.

# %% text-run tags=["nbval-ignore-output"]
short = [name for name in data.character_names() if len(name) <= 30]
names = data.shuffled(short, seed=0)
characters = data.Characters(names)
torch.manual_seed(0)
model = models.GPT(len(characters), context=32, width=64, layers=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
losses = []
for start in widgets.progress(2 * list(range(0, len(names), 64)), "two epochs"):
    inputs, targets = characters.batch(names[start : start + 64])
    logits = model(inputs)
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.1f}, after {len(losses)} updates {losses[-1]:.1f}")
print("the model invents:")
for line in model.invent(8, seed=1).tolist():
    print("   ", characters.decode(line))

# %% text-test tags=["test"]
assert losses[-1] < 2.2 < 3 < losses[0]

# %% text-why [markdown]
# A few seconds of training, and the inventions have the sound of the real ones.
# To use a text of your own, put `data.text_lines("my_file.txt")` in the place of `data.character_names()`.

# %% size [markdown]
# ## What the batch size decides
#
# ### How noisy is the gradient?
#
# Take the gradient over all 256 names as the truth.
# A mini-batch drawn from them misses it by some distance.
# Call the typical distance, divided by the length of the true gradient, the **noise**.
# We take the untrained model, where the true gradient is still long.
# After the 50 updates above it is short, and 8 names miss it by many times its length.

# %% noise-guess tags=["nbval-ignore-output", "widget", "hidden"]
noise_guess = widgets.predict(
    "The noise of a batch of 4 names is how many times the noise of 16?",
    choices={
        "1 time, it stays the same": 1,
        "2 times": 2,
        "4 times": 4,
        "16 times": 16,
    },
)

# %% noise-came-out [markdown] tags=["folded"]
# #### How the noise falls

# %% noise-run
names, characters, model = models.for_names(length=18)
inputs, targets = characters.batch(names)


def gradient(rows):
    """The gradient of the mean loss over some of the names, as one long vector."""
    model.zero_grad()
    cross_entropy(model(inputs[rows]).flatten(0, 1), targets[rows].flatten()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


true_gradient = gradient(slice(0, 256))
draws = torch.Generator().manual_seed(0)
noise = {}
for batch_size in (1, 2, 4, 8, 16, 32, 64, 128):
    mini_batches = [
        torch.randint(256, (batch_size,), generator=draws) for _ in range(200)
    ]
    squares = [(gradient(rows) - true_gradient).square().sum() for rows in mini_batches]
    distance = torch.stack(squares).mean().sqrt()
    noise[batch_size] = (distance / true_gradient.norm()).item()

noise_guess.reveal(
    round(noise[4] / noise[16], 1), "is the noise of 4 over the noise of 16"
)

# %% noise-figure tags=["hidden"] alt="The noise against the batch size on logarithmic axes: a straight line from 1 to 128 names, on the dots of one over the square root of the batch size."
figure, (axis,) = plots.panels(["Noise against batch size"])
expected = [noise[1] / batch_size**0.5 for batch_size in noise]
plots.lines(
    axis,
    list(noise),
    {"measured": list(noise.values()), "expected: 1 / sqrt(batch size)": expected},
    log="xy",
    xlabel="batch size, names",
    ylabel="noise, relative to the gradient",
)
print(f"From 1 name to 64, the noise falls {noise[1] / noise[64]:.0f} times.")
figure

# %% noise-test tags=["test"]
assert 1.8 < noise[4] / noise[16] < 2.2 and 7.6 < noise[1] / noise[64] < 8.4

# %% noise-why [markdown]
# The errors of independent samples partly cancel, so the noise falls as one over the square root of the batch size.
# A quiet gradient is worth having: it allows longer steps.

# %% bytes [markdown]
# ### How many bytes does a step hold?
#
# A larger batch is less noisy, so why not always take a large one?
#
# `measure_memory` follows every tensor that lives inside its block, to the byte, on any CPU.
# The **peak** is the worst moment: what the machine must have.

# %% bytes-guess tags=["nbval-ignore-output", "widget", "hidden"]
bytes_guess = widgets.predict(
    "A step on 8 rows holds about 3.0 MB at its peak. How many MB for 16 rows?"
)
# %% bytes-came-out [markdown] tags=["folded"]
# #### What a step holds


# %% bytes-run
def peak_bytes(batch_size):
    """Run one update of the lesson's model and return the most bytes it held at once."""
    model = models.embedding_linear(vocabulary=1000, width=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = next(data.random_tokens(batch_size=batch_size))
    with memory.measure_memory(model, optimizer, inputs, targets) as measured:
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return measured.peak_bytes


peaks = {batch_size: peak_bytes(batch_size) for batch_size in (8, 16, 32, 64, 128)}
bytes_guess.reveal(
    f"{peaks[16] / 1e6:.1f}", f"MB for 16 rows, after {peaks[8] / 1e6:.1f} MB for 8"
)

# %% bytes-slope
per_row = (peaks[16] - peaks[8]) // 8
fixed = peaks[8] - 8 * per_row
print(f"each further row: {per_row:,} bytes; whatever the batch: {fixed:,}")
print(f"rows that fit into 1 GB: {(10**9 - fixed) // per_row:,}")

# %% bytes-test tags=["test"]
assert peaks[8] < peaks[16] < 2 * peaks[8]
assert all(peak == fixed + batch_size * per_row for batch_size, peak in peaks.items())

# %% bytes-why [markdown]
# Twice the rows, less than twice the bytes: the part that depends on the batch doubles, the rest is there once.
# The straight line is exact for these sizes; with very few rows the peak comes later, when the gradients stand beside the weights.
# The fixed part is the weights, 257,000 numbers of 4 bytes, and 8 bytes for the loss and one number that `cross_entropy` keeps.
# What grows with every row is the **activations**, which the forward pass keeps for the backward pass, and what the backward pass makes of them.
# So each machine has a largest batch, and no learning rate moves it.

# %% both [markdown]
# ### Both at once
#
# Move the slider: the noise of the names' model beside the bytes of the random tokens' model.
# The numbers belong to two models; the shapes are the same for any.


# %% trade tags=["hidden"]
def trade(batch_size=8):
    """The figure and the sentence for one batch size, from what was measured."""
    sizes, megabytes = list(peaks), [peak / 1e6 for peak in peaks.values()]
    figure, (left, right) = plots.panels(["The noise", "The bytes"])
    plots.lines(
        left,
        sizes,
        {"noise": [noise[size] for size in sizes]},
        xlabel="batch size",
        ylabel="noise",
    )
    plots.lines(
        right, sizes, {"peak": megabytes}, xlabel="batch size", ylabel="peak, MB"
    )
    for axis, height in ((left, noise[batch_size]), (right, peaks[batch_size] / 1e6)):
        axis.plot(batch_size, height, "ko", markersize=13, fillstyle="none")
        axis.set_ylim(bottom=0)
    sentence = f"noise {noise[batch_size]:.2f}, peak {peaks[batch_size] / 1e6:.1f} MB"
    return figure, f"Batch size {batch_size}: {sentence}."


# %% trade-widget tags=["nbval-ignore-output", "widget", "hidden"]
widgets.explore(trade, batch_size=[8, 16, 32, 64, 128])

# %% trade-still [markdown] tags=["folded"]
# #### Two sizes as text, and one as a figure

# %% trade-run tags=["hidden"] alt="Two panels against the batch size: the noise falls in a curve that gets flatter, the bytes rise in a straight line; a ring marks 128."
figure, sentence = trade(batch_size=128)
print(trade(batch_size=8)[1])
print(sentence)
figure

# %% trade-test tags=["test"]
assert sentence.startswith(f"Batch size 128: noise {noise[128]:.2f}, peak")

# %% recap [markdown]
# ## Recap
#
# <details><summary>The lesson in three sentences: say yours first</summary>
#
# - The loop makes one update from one mini-batch: `backward()` fills `.grad`, `step()` uses it, `zero_grad()` forgets it.
# - The gradient's noise falls as one over the square root of the batch size: four times the batch, half the noise.
# - The bytes held grow in a straight line with the batch, so the machine sets a limit.
#
# </details>
# <br>
#
# **Try it.** In `peak_bytes`, call `data.random_tokens(batch_size=batch_size, length=40)` instead.
# Predict first which of the two numbers printed below it moves: bytes for each further row, or bytes whatever the batch.
#
# <details><summary>What happens</summary>
#
# Only the bytes for each row: twice the tokens, twice the bytes, 501,120.
# The weights know nothing of the length.
#
# </details>
# <br>
#
# **Exercises**, which grade themselves: [write one training step, find what an epoch's loss holds on to, and say how quiet another batch will be](exercises/01_exercises.ipynb).
#
# **Next**, in [lesson 2](02_accumulate.ipynb): what if you want the quiet gradient of a large batch on a machine that holds a small one?

# %% recap-guesses tags=["hidden"]
widgets.recap()
