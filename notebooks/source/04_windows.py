# %% promise [markdown]
# # 4. Windows: where does an update belong?
#
# You break the loop of lesson 3 at each of its edges, and then write one that has none.
#
# After this lesson you can
# - find the seven usual faults of an accumulation loop, and tell most of them by their weights;
# - write a loop in which clipping, schedule and logging have one obvious place;
# - answer what happens to the learning rate and the number of updates.
#
# 40 minutes. It continues [lesson 3](03_normalize.ipynb).

# %% setup tags=["nbval-ignore-output"]
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradaccum
from gradaccum import full_batch_gradient, models, plots, relative_error, widgets

torch.set_num_threads(1)  # as fast for small models, and no waiting
print(f"torch {torch.__version__}, running on the CPU")

# %% never [markdown]
# ## Three micro-batches, k = 4
#
# The loop of lesson 3, on a small data set: three micro-batches of real names, ten epochs.
# It steps where `(step + 1) % accumulation_steps == 0`, and `step` comes from `enumerate(micro_batches)`.

# %% never-guess tags=["nbval-ignore-output", "widget", "hidden"]
never_guess = widgets.predict(
    "Ten epochs of three micro-batches, k = 4. How many updates?"
)

# %% never-came-out [markdown] tags=["folded"]
# ### What the ten epochs did

# %% never-run
names, characters, model = models.for_names(length=18)
micro_batches = [characters.batch(names[i : i + 8]) for i in (0, 8, 16)]
accumulation_steps = 4
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
before = model[0].weight.clone()
updates = 0
for _epoch in range(10):
    for step, (inputs, targets) in enumerate(micro_batches):
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss = loss / accumulation_steps
        loss.backward()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
never_guess.reveal(updates, "updates")

# %% never-check
moved = (model[0].weight - before).abs().max()
print(f"30 micro-batches; the weights moved by {moved:.0f}")

# %% never-test tags=["test"]
assert updates == 0
assert moved == 0

# %% never-why [markdown]
# No error, no warning, and nothing is learned.
# `enumerate` starts again at each epoch, so `step + 1` never gets to 4.

# %% edges [markdown]
# ## Seven micro-batches, k = 3
#
# Real data sets seldom divide evenly.
# Here are three ways to write the condition, and what they make of seven micro-batches: `... or last` is `(step + 1) % 3 == 0 or step == 6`.


# %% edges-run tags=["hidden"]
def groups_of(is_update):
    """The micro-batches of each step; those that get none in this epoch, negative."""
    groups, group = [], []
    for step, number in enumerate(range(1, 8)):
        group.append(number)
        if is_update(step):
            groups.append(group)
            group = []
    return [*groups, [-number for number in group]] if group else groups


loops = {
    "(step + 1) % 3 == 0": groups_of(lambda step: (step + 1) % 3 == 0),
    "step % 3 == 0": groups_of(lambda step: step % 3 == 0),
    "... or last": groups_of(lambda step: (step + 1) % 3 == 0 or step == 6),
}
for name, groups in loops.items():
    print(f"{name:22} {groups}")
print("-7: no update of this epoch used the gradient of micro-batch 7")

# %% edges-figure tags=["hidden"] alt="Seven numbered squares in a row for each of three loops, coloured by window, an arrow after each update: (step + 1) % 3 leaves the seventh hollow, step % 3 has an arrow after the first, the third loop after each third and after the last."
figure, (axis,) = plots.panels(
    ["An arrow is an update; a hollow square gets none in this epoch"]
)
figure.set_size_inches(7, 2.4)
plots.window_strip(axis, loops)
figure

# %% edges-test tags=["test"]
assert loops["step % 3 == 0"] == [[1], [2, 3, 4], [5, 6, 7]]

# %% edges-why [markdown]
# - `(step + 1) % 3 == 0` leaves the seventh in `.grad`, where the next epoch's first window finds it.
# - `step % 3 == 0`, off by one, makes an update from the first micro-batch alone.
# - `... or last` steps at the end too.
#
# A fourth fault is not in the condition: `zero_grad()` before each `backward()`, so that only the window's last micro-batch survives.

# %% edges-guess tags=["nbval-ignore-output", "widget", "hidden"]
partial_guess = widgets.predict(
    "'... or last': the seventh micro-batch is alone, in a loop written for k = 3. "
    "How many times the right gradient does its update use?"
)

# %% partial-came-out [markdown] tags=["folded"]
# ### What the seventh does

# %% partial-run
names, characters, model = models.for_names(length=18)


def mean_loss(number):
    """The mean loss of one micro-batch of 8 names, numbered from 1."""
    inputs, targets = characters.batch(names[8 * number - 8 : 8 * number])
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def gradient(numbers, divisor):
    """What .grad holds after these micro-batches, each loss divided by the divisor."""
    model.zero_grad()
    for number in numbers:
        (mean_loss(number) / divisor).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


partial = (gradient([7], divisor=3).norm() / gradient([7], divisor=1).norm()).item()
partial_guess.reveal(f"{partial:.4f}", "times the right gradient")

# %% partial-check
leak = relative_error(gradient([7, 1, 2, 3], divisor=3), gradient([1, 2, 3], divisor=3))
cleared = relative_error(gradient([3], divisor=3), gradient([1, 2, 3], divisor=3))
print(f"the seventh leaks into the next epoch's first window: {100 * leak:.0f} % off")
print(f"zero_grad before each backward: {100 * cleared:.0f} % off")

# %% partial-test tags=["test"]
assert abs(partial - 1 / 3) < 1e-6
assert 0.1 < leak < cleared < 1

# %% partial-why [markdown]
# A micro-batch that is alone in its window should be divided by 1, not by 3: the divisor must be the number of micro-batches *in this window*.
# accelerate and the Lightning Trainer step at the end, and still divide by 3 (Lightning-AI/pytorch-lightning#19987).

# %% once [markdown]
# ## Once per update
#
# Three more things belong to the update and are easily left in the inner loop.
# Clipping shortens a gradient that is too long; a schedule lowers the learning rate; and the log may take one micro-batch's loss for the window's.

# %% once-guess tags=["nbval-ignore-output", "widget", "hidden"]
once_guess = widgets.predict(
    "Clip the gradient's length to 0.05, once at the update or after each of 4 "
    "micro-batches: it ends at 0.05 either way. How far is the second gradient off?",
    choices={"0 %, it is the same": 1e-3, "about 5 %": 5, "about 30 %": 30},
)

# %% once-came-out [markdown] tags=["folded"]
# ### What clipping, schedule and log do there

# %% once-run
import warnings

warnings.filterwarnings("ignore", "Detected call of")  # torch warns of this fault


def train(inside, accumulation_steps=4, max_norm=0.05):
    """One epoch; `inside` clips and steps the schedule at every micro-batch."""
    names, characters, model = models.for_names(length=18)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=8)
    gradients, rates, shares = [], [], []
    for step, start in enumerate(range(0, 256, 8)):
        inputs, targets = characters.batch(names[start : start + 8])
        update = (step + 1) % accumulation_steps == 0
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss = loss / accumulation_steps
        loss.backward()
        shares.append(loss.item())
        if inside or update:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if update:
            gradients.append(
                [parameter.grad.clone() for parameter in model.parameters()]
            )
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
        if inside or update:
            schedule.step()
    return gradients[0], rates, shares


# %% once-compare
right_gradient, right_rates, _ = train(inside=False)
wrong_gradient, wrong_rates, shares = train(inside=True)
norms = [
    torch.cat([each.flatten() for each in gradient]).norm()
    for gradient in (right_gradient, wrong_gradient)
]
error = relative_error(wrong_gradient, right_gradient)
once_guess.reveal(f"{100 * error:.0f} %", "off, clipped inside")

# %% once-check
print(f"clipped once and inside: norms {norms[0]:.2f} and {norms[1]:.2f}")
print(f"logged: {shares[3]:.1f}; the window's loss: {sum(shares[:4]):.1f}")

# %% once-figure tags=["hidden"] alt="The learning rate over eight updates: stepped once per update it falls in a straight line from 1 to near 0; stepped at each micro-batch it is at its lowest from the third update on."
figure, (axis,) = plots.panels(["A schedule for 8 updates"])
series = {"stepped once an update": right_rates, "at each micro-batch": wrong_rates}
plots.lines(axis, range(1, 9), series, xlabel="update", ylabel="learning rate")
figure

# %% once-test tags=["test"]
assert error > 0.1
assert abs(wrong_rates[2] - 0.01) < 1e-6

# %% once-why [markdown]
# - **Clipping inside** cuts the sum again and again, so the first micro-batches shrink each time. The norm is right, the direction is not: compare vectors, not norms.
# - **The schedule inside** is over after a quarter of the training. The rest runs at the lowest rate. (PyTorch warns of this one, because the schedule steps before the first update; the cell silences it.)
# - **The logged loss**, if you log `loss.item()` at the update, is the last micro-batch's, already divided by 4. The window's loss is the sum of its four shares.

# %% patterns [markdown]
# ## Which fault leaves which pattern?
#
# Seven faults so far: the leftover that leaks, the off-by-one, the wrong divisor, `zero_grad` before each `backward()`, clipping, the schedule, the log.
# Suppose that you meet a loop that you did not write, and it has one of them.
# Read it, line by line?
# Or ask what each micro-batch got?
#
# Below, one loop with k = 3 runs seven times under `audit`, each time with one fault: on seven micro-batches, then on seven others, numbered 8 to 14.

# %% patterns-guess tags=["nbval-ignore-output", "widget", "hidden"]
patterns_guess = widgets.predict(
    "Two of the seven faults leave the micro-batches' weights right. Which two?",
    choices=[
        "off-by-one and divisor",
        "zero_grad and clipping",
        "clipping and schedule",
        "schedule and log",
    ],
)

# %% patterns-came-out [markdown] tags=["folded"]
# ### What the audits found


# %% patterns-train
def train(micro_batches, fault, k=3):
    """One epoch of lesson 3's loop with a fault in it."""
    for step, (inputs, targets) in enumerate(micro_batches):
        if fault == "zero_grad":
            optimizer.zero_grad()
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) / k
        loss.backward()
        if fault == "clipping":
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        if fault == "schedule":
            schedule.step()
        update = (step + 1) % k == 0
        if fault == "off-by-one":
            update = step % k == 0
        if fault == "divisor":
            update = update or step == 6
        if update:
            optimizer.step()
            optimizer.zero_grad()
            logged.append(loss.item())  # "log": the last micro-batch's share


# %% patterns-run tags=["hidden"]
import warnings

warnings.filterwarnings("ignore", "Detected call of")  # torch warns of "schedule"


def loss_sum(micro_batch):
    """The sum of the losses of one micro-batch."""
    logits = model(micro_batch[0]).flatten(0, 1)
    return cross_entropy(logits, micro_batch[1].flatten(), reduction="sum")


telling = {"leftover": 2, "off-by-one": 0, "divisor": 2, "zero_grad": 0}
telling |= {"clipping": 0, "schedule": 0, "log": 0}  # which update to look at
found = {}
for fault, number in telling.items():
    names, characters, model = models.for_names(length=18)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=6)
    logged = []
    batches = [characters.batch(names[i : i + 8]) for i in range(0, 112, 8)]
    with gradaccum.audit(
        model, optimizer, loss_sum, lambda batch: batch[1].numel(), accumulation_steps=3
    ) as seen:
        train(seen(batches[:7]), fault)
        train(seen(batches[7:]), fault)
    found[fault] = seen.updates[number]
right = [fault for fault, update in found.items() if update.kind == "right"]
patterns_guess.reveal(" and ".join(right), "leave the weights right")

# %% patterns-figure tags=["hidden"] alt="Bars and dashed outlines of seven updates. Leftover: a fourth micro-batch of another epoch has a bar and no outline. Off-by-one: one bar for three outlines. Divisor: a bar of a third in an outline of 1. zero_grad: only the third bar. Clipping: three bars that grow. Schedule and log: three bars that fill their outlines."
from dataclasses import replace

from IPython.display import display

for fault, update in found.items():
    print(f"{fault:10} {update.kind}")
shown = [  # numbered from 1, as above
    replace(update, micro_batches=[number + 1 for number in update.micro_batches])
    for update in found.values()
]
display(plots.weights(shown[:4], list(found)[:4]))
plots.weights(shown[4:], list(found)[4:])

# %% patterns-test tags=["test"]
assert right == ["schedule", "log"]
kinds = {fault: update.kind for fault, update in found.items()}
assert kinds["leftover"] == kinds["off-by-one"] == "cut elsewhere"
assert kinds["divisor"] == "a partial window over k"
assert kinds["zero_grad"] == "only the last micro-batch"
assert kinds["clipping"] == "clipped or divided inside"

# %% patterns-why [markdown]
# Five leave a pattern in the weights, and the audit names each.
# *Cut elsewhere* is both leftover and off-by-one: the update is not where the window ends.
# *A partial window over k* is a short window divided by k.
# For clipping, look at the slope and not at the height: clipped once, all three would be short alike.
# The schedule and the log change what is done with the gradient, not the gradient: look for those yourself.
# [One page](../notebooks/FAULTS.md) has fourteen faults with their weights, to print and pin to the wall.

# %% inside-out [markdown]
# ## Turn it inside out
#
# All seven come from one thing: the loop goes over micro-batches, and what belongs to the update is mixed in among them.
# So make the update the loop.
# First cut the stream into windows, then go through each.

# %% inside-out-run
from itertools import islice


def windows(micro_batches, accumulation_steps):  # <-- new
    """Yield lists of `accumulation_steps` micro-batches; the last may be shorter."""
    stream = iter(micro_batches)
    while window := list(islice(stream, accumulation_steps)):  # an empty list ends it
        yield window


names, characters, model = models.for_names(length=18)
micro_batches = [characters.batch(names[i : i + 8]) for i in range(0, 56, 8)]
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=3)
for window in windows(micro_batches, accumulation_steps=3):  # <-- new: the update
    window_loss = 0.0
    for inputs, targets in window:
        logits = model(inputs)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten()) / len(window)
        loss.backward()
        window_loss += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)  # from here on: no `if`
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(f"one update of {len(window)} micro-batches, loss {window_loss:.1f}")

# %% inside-out-why [markdown]
# Read the loop aloud: *for each window: backward through its micro-batches, clip, step, schedule, clear.*
# There is no `if`, no counter and no `% k`.
# The last window divides by its own length, nothing leaks, and each thing that happens once per update stands once.
#
# `gradaccum` has this function in its finished form: it can be read again at each epoch, checks its arguments, and knows its length if the data does.
# Test it against `full_batch_gradient`: it takes your loss and all names of a window, uncut, and goes backward once.
# Nothing of the loop is in it.


# %% module-run
def mean_loss(names):
    """The mean loss over all characters of some names, as one batch."""
    inputs, targets = characters.batch(names)
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


pieces = [names[i : i + 8] for i in range(0, 56, 8)]
cut, errors = gradaccum.windows(pieces, accumulation_steps=3), []
for window in cut:
    model.zero_grad()
    for piece in window:
        loss = mean_loss(piece) / len(window)
        loss.backward()
    all_names = [name for piece in window for name in piece]
    full = full_batch_gradient(model, all_names, mean_loss)
    gradients = [parameter.grad for parameter in model.parameters()]
    error = relative_error(gradients, full)
    errors.append(error)
    print(f"window of {len(window)}: off by {100 * error:.4f} %")
print(f"len(cut) is {len(cut)}: the updates, known before the first")

# %% module-test tags=["test"]
assert max(errors) < 5e-7
assert len(cut) == 3

# %% rate [markdown]
# ## What about the learning rate?
#
# Every learner asks it.
# With k = 8, the same data makes an eighth of the updates.
# Each is less noisy.

# %% rate-guess tags=["nbval-ignore-output", "widget", "hidden"]
rate_guess = widgets.predict(
    "SGD, four epochs, the same learning rate. Which ends with the lower loss?",
    choices=["k = 1, 128 updates", "k = 8, 16 updates", "they end the same"],
)

# %% rate-came-out [markdown] tags=["folded"]
# ### Where the two end


# %% rate-run
def losses_of(accumulation_steps, learning_rate, epochs):
    """The loss over all 256 names after each update, micro-batches of 8."""
    names, characters, model = models.for_names(length=18)
    inputs, targets = characters.batch(names)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    micro_batches = epochs * torch.arange(256).split(8)
    for window in gradaccum.windows(micro_batches, accumulation_steps):
        for rows in window:
            logits = model(inputs[rows]).flatten(0, 1)
            (cross_entropy(logits, targets[rows].flatten()) / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            logits = model(inputs).flatten(0, 1)
            losses.append(cross_entropy(logits, targets.flatten()).item())
    return losses


small = losses_of(1, learning_rate=0.5, epochs=4)
large = losses_of(8, learning_rate=0.5, epochs=32)
longer_steps = losses_of(8, learning_rate=0.5 * 8**0.5, epochs=32)
ends = {"k = 1, 128 updates": small[-1], "k = 8, 16 updates": large[15]}
shown = [f"{loss:.1f}" for loss in ends.values()]
rate_guess.reveal(
    " and ".join(shown),
    "are the losses of k = 1 and k = 8",
    right="they end the same" if len({*shown}) == 1 else min(ends, key=ends.get),
)

# %% rate-figure tags=["hidden"] alt="Two panels of the loss over all names. At equal samples k = 8 at the same rate lies above k = 1, and at a rate times the root of 8 between them. At equal updates k = 1 and k = 8 at the same rate are nearly one line, and the larger rate is below both."
figure, (by_samples, by_updates) = plots.panels(
    ["At equal samples", "At equal updates"]
)
names_of = {
    "k = 1": small,
    "k = 8, same rate": large,
    "k = 8, rate x sqrt(8)": longer_steps,
}
for index, (label, losses) in enumerate(names_of.items()):
    per_update = 8 if index == 0 else 64
    style = {
        "color": plots.COLOURS[index],
        "linestyle": plots.LINES[index],
        "marker": plots.MARKERS[index],
        "label": label,
    }
    seen = [
        per_update * (update + 1)
        for update in range(len(losses))
        if per_update * update < 1024
    ]
    by_samples.plot(seen, losses[: len(seen)], markevery=len(seen) // 8, **style)
    by_updates.plot(range(1, len(losses) + 1), losses, markevery=16, **style)
by_samples.set(xlabel="names seen", ylabel="loss over all names")
by_updates.set(xlabel="updates")
by_updates.legend(frameon=False, handlelength=3)
for label, losses in names_of.items():
    at_1024 = losses[-1 if label == "k = 1" else 15]
    after = f"{at_1024:.2f} after 1,024 names, {losses[-1]:.2f} after 128 updates"
    print(f"{label:22} {after}")
figure

# %% rate-test tags=["test"]
assert small[-1] < longer_steps[15] < large[15]
assert large[-1] < small[-1]

# %% rate-why [markdown]
# At equal *samples*, fewer updates get less far.
# At equal *updates* and the same rate the two are nearly the same, and k = 8 has used eight times the data for it.
# But a quieter gradient allows a longer step, and with one, k = 8 gets further for each update.
# How much longer? Multiply the rate by the square root of k, or by k: both are rules of thumb, so measure.
# Count warm-up, schedule, checkpoints and total steps in **updates**.

# %% steps [markdown] tags=["folded"]
# ### Extra: does one window move as far as k small steps?

# %% steps-run
moved = {}
for label, batches in (("4 steps on 8 names", 4), ("1 step on the window of 32", 1)):
    names, characters, model = models.for_names(length=18)
    inputs, targets = characters.batch(names[:32])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    for rows in torch.arange(32).chunk(batches):
        cross_entropy(
            model(inputs[rows]).flatten(0, 1), targets[rows].flatten()
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved[label] = (
        (nn.utils.parameters_to_vector(model.parameters()) - start).norm().item()
    )
    print(f"{label:27} moved the weights by {moved[label]:.1f}")

# %% steps-test tags=["test"]
assert moved["4 steps on 8 names"] > 2 * moved["1 step on the window of 32"]

# %% steps-why [markdown]
# No: an accumulated update is not k small steps.
# Each small step starts from where the one before arrived, and goes its full length.
# The window takes one step along the mean of the four.

# %% recap [markdown]
# ## Recap
#
# <details><summary>The lesson in three sentences: say yours first</summary>
#
# - A loop over micro-batches with an `if` goes wrong in seven ways: leftover, off-by-one, divisor, `zero_grad`, clipping, schedule, log. Five show in the weights, and `audit` reads those of any loop.
# - With the window as the outer loop each update stands once, and the divisor is the window's own.
# - The same data makes k times fewer updates; the learning rate and the schedule have to know that.
#
# </details>
# <br>
#
# **Try it.** Predict what `list(gradaccum.windows(range(7), 4))` prints, and what `gradaccum.windows(range(7), 4.0)` says.
#
# <details><summary>Answer</summary>
#
# `[[0, 1, 2, 3], [4, 5, 6]]`, and a `TypeError` that repeats the 4.0 and asks for an int.
#
# </details>
# <br>
#
# **Exercises**, which grade themselves: [group a stream, write an epoch, and repair the off-by-one, the leak and the logged loss](exercises/04_exercises.ipynb).
#
# **Next**: all micro-batches had the same size so far. [Lesson 5](05_unequal_micro_batches.ipynb) lets the names have their real lengths.

# %% recap-guesses tags=["hidden"]
widgets.recap()
