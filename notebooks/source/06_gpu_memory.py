# %% promise [markdown]
# # 6. GPU memory: measured here, predicted for a GPU that is not
#
# You take a step's peak apart to the last byte, see what accumulation saves and what it cannot, and plan for a GPU that you do not have.
#
# After this lesson you can
# - write down the peak of a small model's step, and check it to the byte;
# - say which bytes accumulation saves, which it adds, and what gives them back;
# - find the largest micro-batch for a memory budget, with the effective batch kept exact.
#
# 25 minutes. It continues [lesson 5](05_unequal_micro_batches.ipynb), and no GPU is needed.

# %% setup tags=["nbval-ignore-output"]
import torch
from torch.nn.functional import cross_entropy

from gradaccum import data, memory, models, plots, widgets

torch.manual_seed(0)
torch.set_num_threads(1)  # as fast for small models, and no waiting
print(f"torch {torch.__version__}, running on the CPU")

# %% silence [markdown]
# ## A counter that says nothing
#
# Most tutorials show memory with `torch.cuda.max_memory_allocated()`.
# Here is one update of lesson 1's model on 64 rows, on the CPU, under that counter and under `measure_memory`.

# %% silence-run
torch.manual_seed(0)
model = models.embedding_linear(vocabulary=1000, width=128)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
inputs, targets = next(data.random_tokens(batch_size=64))
with memory.measure_memory(model, optimizer, inputs, targets) as measured:
    loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"torch.cuda says {torch.cuda.max_memory_allocated()} bytes")
print(measured)
assert measured.peak_bytes == 17_063_848
assert sum(measured.at_peak.values()) == measured.peak_bytes

# %% silence-why [markdown]
# Without a GPU, PyTorch's counter returns 0 and says no word about it.
# `measure_memory` follows every tensor's storage from its making to its end instead, to the byte and without a GPU.
# Its table shows the worst moment by role.

# %% anatomy [markdown]
# ## Anatomy of a peak
#
# Let N be the tokens of an update, n those of a micro-batch, d the width, V the vocabulary, P the bytes of the weights.
# Each number has 4 bytes, each token id 8. The worst moment is in the backward pass of the loss:
#
# | what is there | bytes |
# |---|---|
# | weights | P |
# | collected gradients, if there is more than one micro-batch | P |
# | inputs and targets of the whole window | 16 N |
# | the embedding's output, kept for the backward pass | 4 n d |
# | logarithms of the softmax, kept; the gradient on each side of it | 3 x 4 n V |
# | the loss, and one number that it keeps | 8 |

# %% anatomy-guess tags=["nbval-ignore-output", "widget"]
anatomy_guess = widgets.predict(
    "64 rows of 20 tokens, d = 128, V = 1000: which row of the table is the largest?",
    choices=["weights", "inputs", "embedding", "logarithms"],
)


# %% anatomy-run
def update(model, optimizer, window):
    """One update as in lesson 3; without names, nothing keeps logits and loss."""
    for inputs, targets in window:
        targets = targets.flatten()
        (cross_entropy(model(inputs).flatten(0, 1), targets) / len(window)).backward()
    optimizer.step()
    optimizer.zero_grad()


def measured_peak(accumulation_steps, rows=64):
    """The peak of one update of the lesson's model over these rows, in bytes."""
    torch.manual_seed(0)
    model = models.embedding_linear(vocabulary=1000, width=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    window = list(data.random_tokens(accumulation_steps, rows // accumulation_steps))
    with memory.measure_memory(model, optimizer, window) as measured:
        update(model, optimizer, window)
    return measured.peak_bytes


def parts_of(accumulation_steps, rows=64, d=128, V=1000):
    """The table above, in bytes."""
    N, weights = 20 * rows, 4 * (2 * V * d + V)
    n = N // accumulation_steps
    gradients = weights if accumulation_steps > 1 else 0
    return {
        "weights": weights,
        "gradients": gradients,
        "inputs": 16 * N,
        "embedding": 4 * n * d,
        "logarithms": 12 * n * V,
        "loss": 8,
    }


parts = parts_of(accumulation_steps=1)
largest = max(parts, key=parts.get)
share = parts[largest] / sum(parts.values())
anatomy_guess.reveal(largest, f"with {100 * share:.0f} % of the peak")

# %% anatomy-check
for accumulation_steps in (1, 2, 4, 8, 16):
    by_hand = sum(parts_of(accumulation_steps).values())
    found = measured_peak(accumulation_steps)
    print(
        f"k = {accumulation_steps:2}: by hand {by_hand:10,}, measured {found:10,} bytes"
    )
    assert by_hand == found

# %% flat [markdown]
# The table is exact.
# With a large vocabulary the logits are most of the problem, not the layers.
#
# ### More data, the same micro-batch
#
# Now keep the micro-batch at 8 rows and make the effective batch larger: 8 rows, 16, 32, 64.

# %% flat-guess tags=["nbval-ignore-output", "widget"]
flat_guess = widgets.predict(
    "8 rows in one micro-batch hold 3.0 MB. How many MB for 64 rows in 8 micro-batches?"
)

# %% flat-run
peaks = {rows: measured_peak(rows // 8, rows) for rows in (8, 16, 32, 64)}
flat_guess.reveal(f"{peaks[64] / 1e6:.1f}", "MB for 64 rows in 8 micro-batches")

# %% flat-check
for rows, peak in peaks.items():
    print(f"{rows:2} rows in {rows // 8} micro-batches: {peak:9,} bytes")
weights = parts_of(accumulation_steps=1)["weights"]
inputs_of_8 = 16 * 20 * 8
assert peaks[16] - peaks[8] == weights + inputs_of_8
assert peaks[64] - peaks[32] == 4 * inputs_of_8

# %% flat-why [markdown]
# From one micro-batch to two, the peak grows by one copy of the gradients: they must stay while the next micro-batch runs.
# That is the whole price of accumulation, and here it is exactly the weights' 1,028,000 bytes.
# From then on only the inputs are added, a few thousand bytes for each micro-batch.
# Where the optimizer's step is the worst moment, the gradients are there anyway, and accumulation costs less than a copy, or nothing.

# %% floor [markdown]
# ## What shrinks, and what does not
#
# A small GPT with AdamW, 32 rows of 64 tokens, cut into more and more micro-batches.


# %% floor-run
def update(model, optimizer, window):
    """One update as in lesson 3; without names, nothing keeps logits and loss."""
    for inputs, targets in window:
        targets = targets.flatten()
        (cross_entropy(model(inputs).flatten(0, 1), targets) / len(window)).backward()
    optimizer.step()
    optimizer.zero_grad()


def two_updates(accumulation_steps):
    """What a small GPT holds in its first update, and in its second."""
    torch.manual_seed(0)
    model = models.GPT(vocabulary=64, context=64, width=64, layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shape = {"batch_size": 32 // accumulation_steps, "length": 64, "vocabulary": 64}
    window = list(data.random_tokens(accumulation_steps, **shape))
    reports = []
    for _ in range(2):
        with memory.measure_memory(model, optimizer, window) as measured:
            update(model, optimizer, window)
        reports.append(measured)
    return reports


reports = {f"k = {k}": two_updates(k) for k in (1, 2, 4, 8, 16, 32)}
figure, (axis,) = plots.panels(["The second update, by role"], height=3.8)
figure.set_size_inches(8, 3.8)
plots.stacked_roles(
    axis, {name: second.at_peak for name, (_, second) in reports.items()}
)
for name, (first, second) in reports.items():
    print(
        f"{name:6}: first update {first.peak_bytes:10,}, second {second.peak_bytes:10,} bytes"
    )
held = [second.peak_bytes for _, second in reports.values()]
assert held == sorted(held, reverse=True)
assert all(second.peak_bytes > first.peak_bytes for first, second in reports.values())
figure

# %% floor-why [markdown]
# Only the activations and what the backward pass makes of them shrink.
# Weights, gradients and the optimizer's two numbers for each weight are the floor, and each doubling of k saves about half of what the last one saved.
#
# The second update holds more than the first.
# AdamW makes its state at the *end* of the first step, so a run can go out of memory at the second.
#
# What does a large k cost in time?

# %% floor-time tags=["nbval-ignore-output"]
import statistics
import time


def timed(accumulation_steps):
    """One timed update of a small GPT on 32 rows."""
    started = time.perf_counter()
    update(*setups[accumulation_steps])
    return time.perf_counter() - started


setups = {}
for k in (1, 4, 16, 32):
    model = models.GPT(vocabulary=64, context=64, width=64, layers=2)
    shape = {"batch_size": 32 // k, "length": 64, "vocabulary": 64}
    setups[k] = (
        model,
        torch.optim.AdamW(model.parameters()),
        list(data.random_tokens(k, **shape)),
    )
rounds = [{k: timed(k) for k in setups} for _ in widgets.progress(range(5), "timing")]
for k in setups:
    ratio = statistics.median(times[k] / times[1] for times in rounds)
    print(f"k = {k:2}: {ratio:.1f} times the time of the one large batch")

# %% floor-time-why [markdown]
# The ratio is your machine's, in this minute.
# A small k costs little or nothing; a large k pays for many small operations.
# So take the *largest* micro-batch that fits, and no more steps than that needs.

# %% leaks [markdown]
# ## What gives it back
#
# Four habits that look harmless, on 64 rows in 8 micro-batches of the lesson's model.

# %% leaks-guess tags=["nbval-ignore-output", "widget"]
leaks_guess = widgets.predict(
    "Which of these costs the fewest bytes?",
    choices=[
        "keep each loss",
        "keep each logits",
        "retain_graph=True",
        "one backward at the end",
    ],
)


# %% leaks-run
def peak_with(habit):
    """The peak of the lesson's model on 8 micro-batches of 8 rows, with one habit."""
    torch.manual_seed(0)
    model = models.embedding_linear(vocabulary=1000, width=128)
    window = list(data.random_tokens(batches=8, batch_size=8))
    kept = []
    with memory.measure_memory(model, window) as measured:
        for inputs, targets in window:
            logits = model(inputs).flatten(0, 1)
            loss = cross_entropy(logits, targets.flatten()) / len(window)
            if habit == "one backward at the end":
                kept.append(loss)
            else:
                loss.backward(retain_graph=habit == "retain_graph=True")
                if habit in ("keep each loss", "retain_graph=True"):
                    kept.append(loss)
                if habit == "keep each logits":
                    kept.append(logits.detach())
            del logits, loss
        if habit == "one backward at the end":
            sum(kept).backward()
    return measured.peak_bytes


habits = [
    "none",
    "keep each loss",
    "keep each logits",
    "retain_graph=True",
    "one backward at the end",
]
costs = {habit: peak_with(habit) - peak_with("none") for habit in habits[1:]}
cheapest = min(costs, key=costs.get)
leaks_guess.reveal(cheapest, f"costs {costs[cheapest]} bytes")

# %% leaks-check
for habit, cost in costs.items():
    print(f"{habit:24} {cost:+10,} bytes")
assert costs["keep each loss"] < 100
assert min(costs[habit] for habit in habits[2:]) > 1_000_000

# %% leaks-why [markdown]
# A loss that has been through `backward()` holds its own 4 bytes and no activations, whatever one reads.
# Kept logits are kept in full.
# A graph that is kept, by `retain_graph=True` or by a backward that comes later, keeps everything.

# %% gpu [markdown]
# ## A GPU that is not there
#
# The same code can run on tensors that have a shape and no data.
# Nothing is allocated, and what it *would* hold is followed as before.
# First the proof on what we can measure, then a model that this machine could not train.


# %% gpu-run
def update(model, optimizer, window):
    """One update as in lesson 3; without names, nothing keeps logits and loss."""
    for inputs, targets in window:
        targets = targets.flatten()
        (cross_entropy(model(inputs).flatten(0, 1), targets) / len(window)).backward()
    optimizer.step()
    optimizer.zero_grad()


def build(sizes, layers, width, vocabulary, length, dtype=torch.float32):
    """A GPT, AdamW, and one window of micro-batches of these sizes."""
    model = models.GPT(vocabulary, context=length, width=width, layers=layers).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    window = [(torch.zeros(size, length, dtype=torch.int64),) * 2 for size in sizes]
    return model, optimizer, window


tiny = {"layers": 2, "width": 64, "vocabulary": 64, "length": 32}
predicted = memory.predict_memory(lambda: build([4, 4], **tiny), update, device="cpu")
built = build([4, 4], **tiny)
for _ in range(2):
    with memory.measure_memory(*built) as measured:
        update(*built)
print(
    f"second update, predicted {predicted.peak_bytes:,}, measured {measured.peak_bytes:,} bytes"
)
assert predicted.peak_bytes == measured.peak_bytes
assert predicted.at_peak == measured.at_peak

gpt2_small = {"layers": 12, "width": 768, "vocabulary": 50257, "length": 512}
for dtype in (torch.float32, torch.bfloat16):
    report = memory.predict_memory(
        lambda: build([4, 4], **gpt2_small, dtype=dtype), update
    )
    print(
        f"GPT-2 small's shape, {dtype}, micro-batch 4: {report.peak_bytes / 1e9:.1f} GB"
    )

# %% gpu-plan [markdown]
# And the question behind it all: what is the largest micro-batch for a given budget?
# The effective batch stays exact, with a smaller last micro-batch if need be.

# %% gpu-plan-run
shallow = {"layers": 1, "width": 256, "vocabulary": 8192, "length": 256}
plan = memory.plan_micro_batches(
    lambda sizes: build(sizes, **shallow), update, effective_batch=50, budget="500 MB"
)
print(plan)
print(f"sizes of the window: {plan.sizes}")
assert sum(plan.sizes) == 50
assert plan.peak_bytes <= plan.budget_bytes < plan.next_micro_batch_peak_bytes

# %% gpu-why [markdown]
# These are predictions for CUDA: sizes rounded as its allocator does, AdamW in the form that it takes there.
# They have **not yet been compared with a real GPU** in this course, and they leave out the CUDA context and the libraries' workspaces.
# Leave some room.
#
# Related work: the FakeTensorMode memory tracker in PyTorch's forum, Hugging Face's "Visualize and understand GPU memory in PyTorch", xMem (arXiv 2510.21048) and LLMem (arXiv 2404.10933).

# %% recap [markdown]
# ## Recap
#
# - A step's peak is weights, gradients, state, inputs and activations, and for a small model you can write it down to the byte.
# - Accumulation shrinks activations alone, at the price of at most one copy of the gradients; a large k also costs time.
# - The same code on tensors without data predicts the peak, and plans the largest micro-batch that fits.
#
# **Try it.** Give `build` another optimizer, `torch.optim.SGD`, and predict what that does to the plan for 500 MB.
#
# <details><summary>What happens</summary>
#
# SGD has no state: the two extra numbers for each weight are gone, and the room goes to a larger micro-batch.
#
# </details>
#
# **Next**: this is the last lesson so far. Put `windows`, `accumulate` and the planner into a loop of your own.
