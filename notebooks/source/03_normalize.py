# %% promise [markdown]
# # 3. Normalize: one division, and who misses it
#
# You mend the gradient with one line, check how equal "equal" is, and then delete the line again to see who notices.
#
# After this lesson you can
# - write gradient accumulation as most tutorials teach it;
# - say how close it comes to the large batch, and why not closer;
# - say which optimizers and settings notice a missing division, and test in a way that is not fooled.
#
# 30 minutes. It continues [lesson 2](02_accumulate.ipynb).

# %% setup tags=["nbval-ignore-output"]
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum import audit, data, models, plots, relative_error, widgets

torch.set_num_threads(1)  # as fast for small models, and no waiting
print(f"torch {torch.__version__}, running on the CPU")

# %% line [markdown]
# ## One line more
#
# Lesson 2 ended with a gradient four times too large.
# So divide each loss by `accumulation_steps` before `backward()`.
# This is the loop as a well-known short course teaches it.

# %% line-run
torch.manual_seed(0)
micro_batches = list(data.random_tokens(batches=20, batch_size=8, length=20))
model = nn.Sequential(nn.Embedding(1000, 128), nn.Linear(128, 1000))
loss_function = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
accumulation_steps = 4

for step, (inputs, targets) in enumerate(micro_batches):
    logits = model(inputs)
    loss = loss_function(logits.view(-1, 1000), targets.view(-1))
    loss = loss / accumulation_steps  # <-- new in this lesson
    loss.backward()
    if (step + 1) % accumulation_steps == 0:
        optimizer.step()
        optimizer.zero_grad()
        print(f"Step {step + 1} - weights updated")

# %% line-why [markdown]
# The course calls this "mathematically equivalent" to a batch four times as large.
# On paper it is, for this model: a quarter of each of the four means, added up, is the mean of all, if all four have the same size.
# A computer is not paper.

# %% equal [markdown]
# ## How equal is equal?
#
# Take one window of four micro-batches, 32 of the real names, and compare its gradient with that of the one batch of 32.

# %% equal-guess tags=["nbval-ignore-output", "widget", "hidden"]
equal_guess = widgets.predict(
    "How far apart are the two gradients, relative to their length, in float32?",
    choices={
        "exactly 0": 0,
        "below 0.00001": 1e-7,
        "about 0.001": 1e-3,
        "about 0.1": 1e-1,
    },
)

# %% equal-came-out [markdown] tags=["folded"]
# ### How far apart the two are


# %% equal-run tags=["nbval-ignore-output"]
def gradient(groups, dtype):
    """The gradient of one window; each group of names is a micro-batch."""
    _, characters, model = models.for_names(length=18)
    model = model.to(dtype)
    for group in groups:
        inputs, targets = characters.batch(group)
        logits = model(inputs)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten()) / len(groups)
        loss.backward()
    return [parameter.grad for parameter in model.parameters()]


names, _, _ = models.for_names(length=18)
window = [names[start : start + 8] for start in (0, 8, 16, 24)]
errors = {}
for dtype in (torch.float32, torch.float64):
    full = gradient([names[:32]], dtype)
    accumulated = relative_error(gradient(window, dtype), full)
    mixed = data.shuffled(names[:32], seed=1)
    reordered = relative_error(gradient([mixed], dtype), full)
    errors[dtype] = accumulated, reordered
equal_guess.reveal(f"{errors[torch.float32][0]:.1e}", "in float32")

# %% equal-check tags=["nbval-ignore-output"]
print("distance from the full batch's gradient, relative to its length")
for dtype, (accumulated, reordered) in errors.items():
    print(f"{dtype}: accumulated {accumulated:.1e}, reordered {reordered:.1e}")

# %% equal-bounds
print("0.1 + (0.2 + 0.3) =", 0.1 + (0.2 + 0.3))
print("(0.1 + 0.2) + 0.3 =", (0.1 + 0.2) + 0.3)

# %% equal-test tags=["test"]
for dtype, bound in ((torch.float32, 5e-6), (torch.float64, 1e-14)):
    assert max(errors[dtype]) < bound
    assert errors[dtype][0] < 5 * errors[dtype][1]

# %% equal-why [markdown]
# Not equal bit for bit, but up to rounding.
# Adding floating-point numbers in another order gives another last digit, and accumulation adds the rows in another order.
# Merely shuffling the rows of the full batch does the same.
#
# So this is what "equal" will mean from here on: **apart by rounding only, at most a few times what reordering the full batch causes**.
# The claim of the course holds for micro-batches of equal size, and for a loss that sees each name alone.
# BatchNorm, which looks at a whole batch, is outside it; lesson 5 says where the claim ends.

# %% delete [markdown]
# ## Delete the line again
#
# Now take the division out, and train for 20 updates with Adam, as the course does.
# We compare the *weights* of the model with those that full-batch training reaches.
# The distance is given in percent of how far that training moved them: 100 % is as far off as not having trained.

# %% delete-guess tags=["nbval-ignore-output", "widget", "hidden"]
delete_guess = widgets.predict(
    "No division, k = 4, Adam, 20 updates. How far off are the weights?",
    choices={
        "less than 0.1 %": 0.01,
        "about 1 %": 1,
        "about 40 %": 40,
        "about 400 %": 400,
    },
)

# %% delete-came-out [markdown] tags=["folded"]
# ### How far off they are

# %% delete-optimizers
Adam, AdamW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
optimizers = {  # the class, its settings, and the largest gradient norm it is given
    "Adam": (Adam, {"lr": 1e-3}, None),
    "AdamW, decay 0.1": (AdamW, {"lr": 1e-3, "weight_decay": 0.1}, None),
    "Adam, L2 decay 0.1": (Adam, {"lr": 1e-3, "weight_decay": 0.1}, None),
    "Adam, eps 0.001": (Adam, {"lr": 1e-3, "eps": 1e-3}, None),
    "SGD": (SGD, {"lr": 1.0}, None),
    "SGD, clipped at 0.5": (SGD, {"lr": 1.0}, 0.5),
    "SGD, clipped at 0.05": (SGD, {"lr": 1.0}, 0.05),
}


# %% delete-train
def train(optimizer_name, accumulation_steps, divide):
    """The weights, as one vector, at the start and after each of 20 updates on 32 names."""
    names, characters, model = models.for_names(length=18)
    kind, settings, max_norm = optimizers[optimizer_name]
    optimizer = kind(model.parameters(), **settings)
    weights = [nn.utils.parameters_to_vector(model.parameters()).detach()]
    for update in range(20):
        size, first = 32 // accumulation_steps, 32 * update % 256
        for start in range(first, first + 32, size):
            inputs, targets = characters.batch(names[start : start + size])
            logits = model(inputs)
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
            if divide:
                loss = loss / accumulation_steps
            loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    return weights


# %% delete-run
full = {name: train(name, accumulation_steps=1, divide=True) for name in optimizers}


def distances(optimizer_name, accumulation_steps, divide):
    """The distance from full-batch training after each update, in percent."""
    right = full[optimizer_name]
    way = (right[-1] - right[0]).norm()
    ours = train(optimizer_name, accumulation_steps, divide)
    return [
        100 * ((one - other).norm() / way).item()
        for one, other in zip(ours, right, strict=True)
    ]


missing = {
    name: distances(name, accumulation_steps=4, divide=False)[-1] for name in optimizers
}
delete_guess.reveal(f"{missing['Adam']:.3f} %", "of the way, with Adam")

# %% delete-all tags=["hidden"] alt="Bars of the distance after 20 updates without the division: 0.003 % with Adam and AdamW, 0.000 % with SGD that always clips; between 36 and 300 % with L2 decay, a larger eps, SGD, and SGD clipped at 0.5."
figure, (axis,) = plots.panels(["No division, k = 4: distance after 20 updates"])
figure.set_size_inches(8, 3)
shown = {"text": "{:.3g} %", "xlabel": "percent of the way"}
values = [float(f"{value:.3f}") for value in missing.values()]
plots.bars(axis, list(missing), values, **shown)
figure

# %% delete-test tags=["test"]
assert missing["Adam"] < 0.1 and missing["AdamW, decay 0.1"] < 0.1
assert missing["SGD, clipped at 0.05"] < 0.1
for name in ("SGD", "Adam, L2 decay 0.1", "Adam, eps 0.001", "SGD, clipped at 0.5"):
    assert missing[name] > 10

# %% delete-why [markdown]
# With Adam, nothing that you would ever see.
# It divides a running mean of the gradient by the root of a running mean of its square, so a constant factor cancels.
# If your only test is "it trains as well as before, with Adam", the missing division passes.

# %% why-divide [markdown]
# #### So why divide?
#
# Because everything that compares the gradient with *something else* notices.
# - **SGD** takes it as it is: the step is k times as long.
# - **L2 decay** inside Adam adds a share of the model's weights to the gradient: against one four times too large, the decay is four times too weak. AdamW decays apart from the gradient, and does not notice.
# - **eps**, the small number in Adam's denominator, counts for less.
# - **Clipping** compares the length with a limit, and now cuts what it should not. If it always cuts (the last bar), it hides the factor again.
#
# So test without anything that hides: **compare `.grad` itself**, as the last section did, or train with SGD without clipping.

# %% explore [markdown]
# ### Try the others
#
# Choose an optimizer, k, and whether to divide.
# The axes stay the same, so that two settings can be compared.

# %% explore-measure tags=["hidden"]
measured = {
    (name, k, divide): distances(name, k, divide)
    for name in widgets.progress(optimizers, "every optimizer, k and rule")
    for k in (2, 4, 8)
    for divide in (True, False)
}


def from_full_batch(optimizer="SGD", accumulation_steps=4, divide=False):
    """The figure and the sentence for one setting, from what was measured."""
    distance = measured[optimizer, accumulation_steps, divide]
    rule = "divided" if divide else "not divided"
    setting = f"{optimizer}, k = {accumulation_steps}, {rule}"
    figure, (axis,) = plots.panels([f"{setting}: distance from full-batch training"])
    figure.set_figwidth(7)
    labels = {"xlabel": "update", "ylabel": "percent of the way"}
    shown = [max(value, 0.001) for value in distance[1:]]
    plots.lines(axis, range(1, 21), {"distance": shown}, **labels)
    axis.set(yscale="log", ylim=(0.0005, 2000))
    axis.set_yticks([0.001, 0.1, 10, 1000], ["0.001 or less", "0.1", "10", "1,000"])
    axis.minorticks_off()
    amount = f"{distance[-1]:.0f} %" if distance[-1] > 0.5 else "less than 0.01 %"
    return figure, f"{setting}: after 20 updates, off by {amount} of the way."


# %% explore-widget tags=["nbval-ignore-output", "widget", "hidden"]
widgets.explore(
    from_full_batch,
    optimizer=list(optimizers),
    accumulation_steps=[2, 4, 8],
    divide=[True, False],
)

# %% explore-still [markdown] tags=["folded"]
# #### Three settings as text, and one as a figure

# %% explore-run tags=["hidden"] alt="A line on a logarithmic axis, the distance from full-batch training over 20 updates of SGD with k = 8, not divided: it starts at several hundred percent and stays there."
figure, sentence = from_full_batch("SGD", accumulation_steps=8, divide=False)
print(from_full_batch("SGD", accumulation_steps=8, divide=True)[1])
print(from_full_batch("Adam", accumulation_steps=8, divide=False)[1])
print(sentence)
worst = max(distance[-1] for (_, _, divide), distance in measured.items() if divide)
figure

# %% explore-test tags=["test"]
assert worst < 0.001
assert measured["SGD", 8, False][-1] > 100
ends = [distance[-1] for distance in measured.values()]
assert not [end for end in ends if 0.01 <= end <= 0.5], "said as less than 0.01 %"

# %% weights [markdown]
# ## What do the weights of the micro-batches say?
#
# Lesson 2 took one `.grad` apart, with least squares: how much of each micro-batch is in it?
# `gradaccum.audit` does that at every step of a loop.
# The loop stays as it is; only its micro-batches are drawn through `seen`.
# The audit is given what a micro-batch's losses sum to and how many they are, and from that it knows what each should have got.
#
# Here is the loop of this lesson with Adam, once with the line and once without.

# %% weights-guess tags=["nbval-ignore-output", "widget", "hidden"]
weights_guess = widgets.predict(
    "No division, k = 4, Adam. Which weight does the audit find for each micro-batch?",
    choices={"a quarter: Adam hides it": 0.25, "1": 1, "4": 4},
)

# %% weights-came-out [markdown] tags=["folded"]
# ### What each micro-batch got

# %% weights-run
names, characters, _ = models.for_names(length=18)
micro_batches = [characters.batch(names[i : i + 8]) for i in range(0, 64, 8)]


def loss_sum(micro_batch):
    """The sum of the losses of one micro-batch."""
    logits = model(micro_batch[0]).flatten(0, 1)
    return cross_entropy(logits, micro_batch[1].flatten(), reduction="sum")


def train(micro_batches, divisor):
    """One epoch of this lesson's loop."""
    for step, (inputs, targets) in enumerate(micro_batches):
        logits = model(inputs)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten()) / divisor
        loss.backward()
        if (step + 1) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()


# %% weights-audit
found = {}
for label, divisor in {"loss / 4": 4, "no division": 1}.items():
    _, _, model = models.for_names(length=18)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with audit(
        model, optimizer, loss_sum, data.count_targets, accumulation_steps=4
    ) as seen:
        train(seen(micro_batches), divisor)
    found[label] = seen.updates[0]
weights_guess.reveal(f"{found['no division'].weights[0]:.4f}", "for the first one")

# %% weights-figure tags=["hidden"] alt="Two windows of four micro-batches: with the division each bar is a quarter and fills its outline, without it each bar is 1 and the outlines stay at a quarter."
for label, update in found.items():
    print(f"{label}: {update.verdict}")
plots.weights(list(found.values()), list(found))

# %% weights-test tags=["test"]
assert found["loss / 4"].kind == "right"
assert found["no division"].kind == "not divided"

# %% weights-why [markdown]
# An optimizer can hide a factor from the loss and from the model.
# It cannot hide it from the weights, since these are read before it does anything.
# So the picture is the same under Adam, SGD or any clipping that comes after.

# %% recap [markdown]
# ## Recap
#
# <details><summary>The lesson in three sentences: say yours first</summary>
#
# - Divide each micro-batch's mean loss by k, and the window has the large batch's gradient, if the micro-batches are equally large and the loss sees each item alone.
# - Equal means up to rounding, of the size that reordering the batch causes; bit for bit it is not.
# - Adam, AdamW and constant clipping hide a missing division; SGD, L2 decay, eps and ordinary clipping do not. Compare gradients, or read the weights.
#
# </details>
# <br>
#
# **Try it.** Some loops use `cross_entropy(..., reduction="sum")`. By what should each loss be divided then?
#
# <details><summary>Answer</summary>
#
# By the number of items in the whole window, here 32 names of 19 targets each, 608.
# With `"mean"` and equal sizes it is k; popular posts have it the wrong way round.
#
# </details>
# <br>
#
# **Exercises**, which grade themselves: [normalize a window without a length, say what a sum needs, and write the test that notices](exercises/03_exercises.ipynb).
#
# **Next**: the division is right, and the loop around it still goes wrong at its edges. [Lesson 4](04_windows.ipynb) breaks it in seven ways, then turns it inside out.

# %% recap-guesses tags=["hidden"]
widgets.recap()
