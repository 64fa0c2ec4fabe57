# %% promise [markdown]
# # Start here: gradient accumulation, and when it is exact
#
# Gradient accumulation can give you the gradient of a large batch on a machine that holds a small one.
# Most tutorials teach it with one division that is right on some data and wrong on the rest.
# Run the next cells and see. It takes 5 minutes to read this page.

# %% setup tags=["nbval-ignore-output"]
import torch
from torch.nn.functional import cross_entropy

import gradaccum
from gradaccum import data, models, widgets

torch.manual_seed(0)
torch.set_num_threads(1)  # as fast for small models, and no waiting
print(f"torch {torch.__version__}, gradaccum {gradaccum.__version__}")

# %% surprise
names = data.character_names()
characters = data.Characters(names)
sentences = ["OX", "SUN", "CAT", max(names, key=len)]  # the last has 78 characters
torch.manual_seed(0)
model = models.embedding_linear(len(characters), width=32)


def gradient(micro_batches):
    """The gradient as most tutorials do it: each mean loss over their number."""
    model.zero_grad()
    for lines in micro_batches:
        inputs, targets = characters.batch(lines)
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss = loss / len(micro_batches)
        loss.backward()
    return [parameter.grad for parameter in model.parameters()]


one_batch = gradient([sentences])
one_by_one = gradient([[sentence] for sentence in sentences])
apart = gradaccum.relative_error(one_by_one, one_batch)
print(f"The same sentences, cut in two ways: {100 * apart:.0f} % apart.")
assert apart > 1.5

# %% surprise-why [markdown]
# The same sentences, the same model, the textbook loop, and the second gradient is further from the first than no gradient at all would be.
# On sentences of equal length the same loop is exact up to rounding.
# Here are the same four sentences, one by one, through the loop that this course builds:


# %% right
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
# Lessons 1 to 6 end with a link to their exercises, which grade themselves.

# %% how [markdown]
# ## How a lesson works
#
# Run a cell with Shift + Enter and go down the page.
# Before the important numbers you are asked for a guess.
# Type it and press Enter; where there are choices, Tab to yours and press Enter.
# Then run the next cell: the number opens beside your guess.
# If you would rather read, click on *Answer*.
# The pages come with what their cells printed; to guess in earnest, choose *Edit*, *Clear Outputs of All Cells* before you begin.
# A wrong guess that you remember teaches more than a right number that you read.
#
# Try it on the four sentences:

# %% how-guess tags=["nbval-ignore-output", "widget"]
share_guess = widgets.predict(
    "How many percent of all characters and end marks belong to the longest sentence?"
)

# %% how-run
sentences = ["OX", "SUN", "CAT", max(data.character_names(), key=len)]
share = (len(sentences[3]) + 1) / sum(len(sentence) + 1 for sentence in sentences)
share_guess.reveal(
    f"{100 * share:.0f} %",
    "of the targets; the textbook loop gives it 25 % of the weight",
)

# %% how-recap [markdown]
# Each lesson ends with a recap, something to try with its answer folded away, and a table that says how your guesses did.
# Here it is for this page:

# %% how-recap-run
widgets.recap()

# %% how-more [markdown]
# ## What is kept, and how to come back
#
# `make lab` opens copies of the notebooks, in the folder `work`: what you write stays there, and no update and no command of this course overwrites or deletes it.
# On Colab and Kaggle it stays in your account once you save a copy; on Binder it is gone after ten idle minutes, unless you press the cloud with the arrow down in the toolbar (*Save to browser storage*), or *Download* beside it, which works even after the session has ended.
# To come back on Binder, launch again in the same browser, open the same notebook and press the cloud with the arrow up, or drag your download into the list of files.
#
# After a break, or a kernel that died, run the set-up cell and go on at any section.
#
# ## What is here
#
# The next cell looks at your machine.
# If the set-up cell at the top failed, run this one by itself: it says what is missing.

# %% check tags=["nbval-ignore-output"]
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
# If the cell above names nothing as missing, you are ready.
#
# **Next**: [lesson 1](01_naive_loop.ipynb).
