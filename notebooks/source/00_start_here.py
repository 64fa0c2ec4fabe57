# %% promise [markdown]
# # Start here: gradient accumulation, and when it is exact
#
# Gradient accumulation trains with the gradient of a large batch on a machine that holds a small one: cut the batch, add up the gradients of the pieces, divide.
#
# Divide by what?
# By the number of pieces, said the libraries that everyone used, and for texts of unequal length that is wrong.
# It was pointed out in 2021, and mended in October 2024 ([huggingface/transformers#34191](https://github.com/huggingface/transformers/pull/34191)).
#
# This page takes 15 minutes.
# Press Shift + Enter now, and again and again: each press runs one cell and goes on.
# A grey line that ends in dots is folded code: click on the dots to read it.
# The pages come with what their cells printed: to guess in earnest, choose *Edit*, *Clear Outputs of All Cells* first.

# %% setup tags=["nbval-ignore-output", "hidden"]
import torch
from torch.nn.functional import cross_entropy

import gradaccum
from gradaccum import data, models, plots, widgets

torch.set_num_threads(1)  # as fast for small models, and no waiting
print(f"torch {torch.__version__}, gradaccum {gradaccum.__version__}")

# %% surprise [markdown]
# ## Four texts
#
# A small language model learns from four texts: `OX`, `SUN`, `CAT`, and one of 78 characters.
# At the start and after every character it has to say which comes next; the right one is a **target**.
# `OX` has 3: the O, the X, and the end.
# One batch of all four takes the mean over all 90 targets, so there each text counts by its share of them: that is the gradient that we want.
# The dashed outlines are these shares, the bars how much each text counts in the usual loop.

# %% surprise-figure tags=["hidden"] alt="Four bars of a quarter. The dashed outlines, the shares of the targets, are 3, 4 and 4 percent for OX, SUN and CAT, and 88 percent for the sentence of 78 characters."
from gradaccum.auditing import Update

names, characters, model = models.for_names()
sentences = ["OX", "SUN", "CAT", max(data.character_names(), key=len)]
targets = [len(sentence) + 1 for sentence in sentences]  # and one for the end
shares = [count / sum(targets) for count in targets]
print("the long one:", sentences[3])
print(f"its share of the targets: {100 * shares[3]:.0f} %; it counts for 25 %")
names_of = [
    f"{name}\nshould: {share:.2f}"
    for name, share in zip(["OX", "SUN", "CAT", "78 characters"], shares, strict=True)
]
usual = Update(names_of, 4 * [1 / 4], shares)
figure = plots.weights([usual], ["each text's mean, divided by 4"])
figure.axes[0].set(xlabel="text", ylabel="share of the gradient")
figure.set_figheight(2.4)
figure

# %% surprise-ask [markdown]
# Does it matter?
# Here is the loop of most tutorials.
# It is run on all four as one batch, and on one text at a time.
# `characters.batch` turns texts into numbers; short ones are padded, and padding does not count.


# %% surprise-loop
def gradient(micro_batches):
    """The gradient as most tutorials do it: each mean loss over their number."""
    model.zero_grad()
    for lines in micro_batches:
        inputs, targets = characters.batch(lines)
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss = loss / len(micro_batches)
        loss.backward()
    return [parameter.grad for parameter in model.parameters()]


# %% surprise-run
one_batch = gradient([sentences])
one_by_one = gradient([[sentence] for sentence in sentences])
apart = gradaccum.relative_error(one_by_one, one_batch)
print(f"The same texts, cut in two ways: {100 * apart:.0f} % apart.")

# %% surprise-test tags=["test"]
assert apart > 1.5

# %% surprise-why [markdown]
# *Apart* is the length of the difference over the length of the one batch's gradient, all its numbers taken as one vector.
# No gradient at all would be 100 % apart: this one is worse.

# %% how [markdown]
# ### How a lesson works
#
# Run a cell with Shift + Enter and go down the page.
# Before the important numbers you are asked for a guess.
# Type it and press Enter, or Tab to your choice and press Enter; the mouse will do as well.
# Then go on with Shift + Enter: it opens the closed heading below, and the number appears beside your guess.
# Without a guess the same keys go on, and the number stays closed until you click on it.
# A wrong guess that you remember teaches more than a right number that you read.
# Try it on the same loop:

# %% how-guess tags=["nbval-ignore-output", "widget", "hidden"]
equal_guess = widgets.predict(
    "Four texts of 18 characters each, one at a time through the usual loop. "
    "How far is the gradient from the one batch's?",
    choices={"0 %, but for rounding": 1e-5, "about 25 %": 25, "about 170 %": 170},
)

# %% how-came-out [markdown] tags=["folded"]
# #### How far it is, and what is right

# %% how-run
equal = [name for name in names if len(name) == 18][:4]
one_by_one = gradient([[sentence] for sentence in equal])
apart = 100 * gradaccum.relative_error(one_by_one, gradient([equal]))
equal_guess.reveal(f"{apart:.3f} %", "apart", right=max(apart, 1e-5))

# %% how-test tags=["test"]
assert apart < 1e-3

# %% right [markdown]
# So the usual loop is right where all pieces are equally large, and that is where most people test it.
# The loop that this course builds counts the targets first, then divides each summed loss by that count.
# `gradaccum.accumulate` does both; lessons 4 and 5 write it out, so here look only at the number.
# The four texts again:


# %% right-run
def loss_sum(lines):
    """The sum of the losses of some sentences."""
    inputs, targets = characters.batch(lines)
    logits = model(inputs).flatten(0, 1)
    return cross_entropy(logits, targets.flatten(), reduction="sum")


def count(lines):
    """The number of targets in some sentences."""
    return data.count_targets(characters.batch(lines))


model.zero_grad()
micro_batches = [[sentence] for sentence in sentences]
for window in gradaccum.windows(micro_batches, accumulation_steps=4):
    gradaccum.accumulate(model, window, loss_sum, count)
gradients = [parameter.grad for parameter in model.parameters()]
right = gradaccum.relative_error(gradients, one_batch)
print(f"Counted first, then divided: {100 * right:.0f} % apart.")

# %% right-test tags=["test"]
assert right < 1e-5

# %% able [markdown]
# ## What you will be able to do
#
# - Write an accumulation loop that gives the large batch's gradient, and say why it does, and where it cannot.
# - Find the usual mistakes in other people's loops from what they do to the gradient.
# - Say beforehand what a step costs in memory, and what accumulation saves.
#
# ## The map
#
# {{lessons}}
#
# Take them in this order: each opens with the loop that the one before ended with.
# All of them run on a laptop without a GPU.
# One call comes in most of them: `names, characters, model = models.for_names()` makes texts to learn (the names of Unicode characters), what turns them into numbers, and a model of two layers.
#
# Each lesson ends with a recap, and a table that says how your guesses did.
# Here it is for this page:

# %% how-recap-run tags=["hidden"]
widgets.recap()

# %% how-more [markdown]
# ## What is kept, and how to come back
#
# `make lab` opens copies of the notebooks, in the folder `work`: what you write stays there, and no update and no command of this course overwrites or deletes it.
# After a break, or a kernel that died, run the set-up cell and go on at any section.
# If a cell failed, the next section says what is missing on your machine.
#
# <details><summary>On Binder, Colab or Kaggle</summary>
#
# On Colab and Kaggle your work stays in your account once you save a copy.
# On Binder it is gone after ten idle minutes, unless you press the cloud with the arrow down in the toolbar (*Save to browser storage*), or *Download* beside it, which works even after the session has ended.
# To come back, launch again in the same browser, open the same notebook and press the cloud with the arrow up, or drag your download into the list of files.
#
# </details>

# %% ready [markdown] tags=["folded"]
# ## Is your machine ready?

# %% check tags=["nbval-ignore-output", "hidden"]
import os
import platform
from importlib.metadata import PackageNotFoundError, version

print(f"Python {platform.python_version()}, {os.cpu_count()} cores")
needed = {
    "torch": "nothing runs without it",
    "jupyterlab": "it shows the lessons; another notebook editor will do",
    "ipywidgets": "without it there are no guesses and no sliders",
    "matplotlib": "without it there are no figures",
    "tqdm": "without it there are no progress bars",
    "nbval": "only needed to test the notebooks",
}
for package, why in needed.items():
    try:
        print(f"  {package} {version(package)}")
    except PackageNotFoundError:
        print(f"  {package} is missing ({why}): pip install {package}")
try:
    import torch
except ImportError:
    print("accelerator: install torch first")
else:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    print(f"accelerator: {accelerator or 'none'}; the lessons do not need one")

# %% next [markdown]
# ## Go on
#
# **Next**: [lesson 1](01_naive_loop.ipynb).
