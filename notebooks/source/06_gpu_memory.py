# %% promise [markdown]
# # 6. GPU memory: measured here, predicted for a GPU that is not
#
# You take a step's peak apart to the last byte, see what accumulation saves and what it cannot, and say which GPT trains on which GPU.
#
# After this lesson you can
# - write down the peak of a small model's step, and check it to the byte;
# - say which bytes accumulation saves, which it adds, and what gives them back;
# - choose between accumulation, 16 bits and checkpointing, and find the largest micro-batch that fits.
#
# 50 minutes. It continues [lesson 5](05_unequal_micro_batches.ipynb), and no GPU is needed.

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
# Tutorials show memory with `torch.cuda.max_memory_allocated()`.
# Here is one update of lesson 1's model on 64 rows under that counter and under `measure_memory`.

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

# %% silence-test tags=["test"]
assert measured.peak_bytes == 17_063_848
assert sum(measured.at_peak.values()) == measured.peak_bytes

# %% silence-why [markdown]
# Without a GPU, PyTorch's counter returns 0 without a word.
# `measure_memory` follows every tensor's storage from its making to its end instead; its table is the worst moment, by role.

# %% anatomy [markdown]
# ## Anatomy of a peak
#
# Let N be the tokens of an update, n those of a micro-batch, d the width, V the vocabulary, P the bytes of the weights.
# Each number has 4 bytes, each token id 8.
# The worst moment is in the backward pass of the loss:
#
# | what is there | bytes |
# |---|---|
# | weights | P |
# | collected gradients, if there is more than one micro-batch | P |
# | inputs and targets of the whole window | 16 N |
# | the embedding's output, kept for the backward pass | 4 n d |
# | logarithms of the softmax, kept; the gradient on each side of it | 3 x 4 n V |
# | the loss, and one number that it keeps | 8 |

# %% anatomy-guess tags=["nbval-ignore-output", "widget", "hidden"]
anatomy_guess = widgets.predict(
    "64 rows of 20 tokens, d = 128, V = 1000: which row of the table is the largest?",
    choices=["weights", "inputs", "embedding", "logarithms"],
)

# %% anatomy-came-out [markdown] tags=["folded"]
# ### The largest row, and all rows against the meter


# %% anatomy-run tags=["hidden"]
def update(model, optimizer, window):
    """One update as in lesson 3; without names, nothing keeps logits and loss."""
    for inputs, targets in window:
        targets = targets.flatten()
        (cross_entropy(model(inputs).flatten(0, 1), targets) / len(window)).backward()
    optimizer.step()
    optimizer.zero_grad()


def one_update(accumulation_steps, rows=64):
    """What one update of the lesson's model holds over these rows."""
    torch.manual_seed(0)
    model = models.embedding_linear(vocabulary=1000, width=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    window = list(data.random_tokens(accumulation_steps, rows // accumulation_steps))
    with memory.measure_memory(model, optimizer, window) as measured:
        update(model, optimizer, window)
    return measured


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


parts, tensor = parts_of(1), one_update(1).largest[0]
row = max(parts, key=parts.get)
by_hand = {k: sum(parts_of(k).values()) for k in (1, 2, 4, 16)}
listed = ", ".join(f"{total:,} bytes at k = {k}" for k, total in by_hand.items())
anatomy_guess.reveal(
    row,
    f"{100 * parts[row] / by_hand[1]:.0f} % of the peak; the largest tensor has the "
    f"shape {tensor.shape}; all rows by hand, and measured the same: {listed}",
)

# %% anatomy-test tags=["test"]
assert by_hand == {k: one_update(k).peak_bytes for k in by_hand}

# %% anatomy-why [markdown]
# The table is exact.
# With a large vocabulary the logits are most of the problem, not the layers.

# %% flat [markdown]
# ### More data, the same micro-batch
#
# Keep the micro-batch at 8 rows and let the effective batch grow: 8 rows, 16, 32, 64.

# %% flat-guess tags=["nbval-ignore-output", "widget", "hidden"]
flat_guess = widgets.predict(
    "8 rows in one micro-batch hold 3.0 MB. How many MB for 64 rows in 8 micro-batches?"
)

# %% flat-came-out [markdown] tags=["folded"]
# #### The peaks of 8 to 64 rows

# %% flat-run
peaks = {rows: one_update(rows // 8, rows).peak_bytes for rows in (8, 16, 32, 64)}
listed = ", ".join(f"{peak:,} bytes for {rows}" for rows, peak in peaks.items())
weights, inputs_of_8 = parts_of(1)["weights"], 16 * 20 * 8
flat_guess.reveal(
    f"{peaks[64] / 1e6:.1f}",
    f"MB for 64 rows; in full: {listed}; the weights have {weights:,}, "
    f"8 rows of inputs and targets {inputs_of_8:,}",
)

# %% flat-test tags=["test"]
assert peaks[8] < 3.05e6
assert peaks[16] - peaks[8] == weights + inputs_of_8
assert peaks[64] - peaks[32] == 4 * inputs_of_8

# %% flat-why [markdown]
# From one micro-batch to two, the peak grows by one copy of the gradients, as large as the weights: they must stay while the next micro-batch runs.
# In memory, that is the whole price of accumulation.
# From then on only the inputs are added.
# Where the optimizer's step is the worst moment, the gradients are there anyway, and accumulation costs less than a copy, or nothing.

# %% floor [markdown]
# ## What shrinks, and what does not
#
# A small GPT with AdamW, 32 rows of 64 tokens, cut ever finer.
# Which roles shrink? And at which moment is the peak?


# %% floor-run tags=["hidden"]
from IPython.display import display


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
    model = models.GPT(vocabulary=64, context=64, width=64, layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shape = {"batch_size": 32 // accumulation_steps, "length": 64, "vocabulary": 64}
    window = list(data.random_tokens(accumulation_steps, **shape))
    reports = []
    for _ in range(2):
        with memory.measure_memory(model, optimizer, window, timeline=True) as measured:
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
    both = f"first update {first.peak_bytes:10,}, second {second.peak_bytes:10,} bytes"
    print(f"{name:6}: {both}")
display(figure)

timelines = {name: reports[name][1].timeline for name in ("k = 1", "k = 4")}
for name, timeline in timelines.items():
    highest = max(sum(held) for held in zip(*timeline.values(), strict=True))
    print(f"{name}: the highest moment {highest:,} bytes")
plots.stacked_timelines(timelines)

# %% floor-test tags=["test"]
held = [second.peak_bytes for _, second in reports.values()]
assert held == sorted(held, reverse=True)
assert all(second.peak_bytes > first.peak_bytes for first, second in reports.values())
for name, timeline in timelines.items():
    highest = max(sum(held) for held in zip(*timeline.values(), strict=True))
    assert highest == reports[name][1].peak_bytes

# %% time [markdown]
# Each tooth is a micro-batch: it climbs forward, and its tip is early in the backward pass.
# Only the activations and what the backward pass makes of them shrink.
# Weights, gradients and the optimizer's two numbers for each weight are the floor, and each doubling of k saves about half of what the last one did.
#
# The second update holds more than the first.
# AdamW makes its state at the *end* of the first step, so a run can go out of memory at the second.
#
# What does a large k cost in time?

# %% time-run tags=["nbval-ignore-output"]
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
    window = list(data.random_tokens(k, **shape))
    setups[k] = (model, torch.optim.AdamW(model.parameters()), window)
rounds = [{k: timed(k) for k in setups} for _ in widgets.progress(range(3), "timing")]
for k in setups:
    ratio = statistics.median(times[k] / times[1] for times in rounds)
    print(f"k = {k:2}: {ratio:.1f} times the time of the one large batch")

# %% time-why [markdown]
# The ratio is your machine's, in this minute.
# A small k costs little or nothing; a large k pays for many small operations.
# So take the *largest* micro-batch that fits.

# %% leaks [markdown]
# ## What gives it back
#
# Four habits that look harmless, and a fifth: `zero_grad(set_to_none=False)` fills the gradients with zeros and keeps them.
# The model is lesson 1's, with 64 rows.

# %% leaks-guess tags=["nbval-ignore-output", "widget", "hidden"]
leaks_guess = widgets.predict(
    "8 micro-batches: which of these costs the fewest bytes?",
    choices=[
        "keep each loss",
        "keep each logits",
        "retain_graph=True",
        "one backward at the end",
    ],
)
zeros_guess = widgets.predict(
    "When does set_to_none=False cost a copy of the weights?",
    choices=["at k = 1", "at k = 8", "at both", "never"],
)

# %% leaks-came-out [markdown] tags=["folded"]
# ### What each habit costs


# %% leaks-run tags=["hidden"]
def peak_with(habit="", accumulation_steps=8, set_to_none=True):
    """The peak of the second update of the lesson's model, with one habit."""
    torch.manual_seed(0)
    model = models.embedding_linear(vocabulary=1000, width=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    window = list(data.random_tokens(accumulation_steps, 64 // accumulation_steps))
    for _ in range(2):
        kept = []
        with memory.measure_memory(model, optimizer, window) as measured:
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
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    return measured.peak_bytes


habits = [
    "keep each loss",
    "keep each logits",
    "retain_graph=True",
    "one backward at the end",
]
usual = peak_with()
costs = {habit: peak_with(habit) - usual for habit in habits}
listed = ", ".join(f"{habit} {cost:,}" for habit, cost in costs.items())
cheapest = min(costs, key=costs.get)
leaks_guess.reveal(cheapest, f"costs {costs[cheapest]} bytes; in full: {listed}")
zeros = {k: peak_with("", k, False) - peak_with("", k) for k in (1, 8)}
listed = ", ".join(f"{cost:,} bytes at k = {k}" for k, cost in zeros.items())
costly = [f"at k = {k}" for k, cost in zeros.items() if cost]
when = "at both" if len(costly) == 2 else "".join(costly) or "never"
zeros_guess.reveal(when, f"it costs a copy: {listed}")

# %% leaks-test tags=["test"]
assert costs[cheapest] < 100
assert sorted(costs.values())[1] > 1_000_000
assert sorted(zeros.values()) == [0, 4 * (2 * 1000 * 128 + 1000)]

# %% leaks-why [markdown]
# A loss that has been through `backward()` holds its own 4 bytes and no activations, whatever one reads.
# Kept logits are kept in full, and a kept graph keeps everything.
# Zeros cost a copy where there would be no gradients during the forward pass: at k = 1.

# %% gpu [markdown]
# ## A GPU that is not there
#
# The same code can run on tensors that have a shape and no data.
# Nothing is allocated, and what it *would* hold is followed.
# For CUDA, sizes are rounded as its allocator does, and AdamW takes its form there.
#
# On a GPU the cell shows the device's own peak, and what its allocator has *reserved*: it takes large pieces and keeps what is free again.
#
# The cell after it plans, and runs what it planned: the largest micro-batch for lesson 1's model, 50 rows and 4 MB on the CPU.
# The effective batch stays exact: the last micro-batch may be smaller.


# %% gpu-run tags=["nbval-ignore-output", "hidden"]
from IPython.display import display


def update(model, optimizer, window):
    """One update as in lesson 3; without names, nothing keeps logits and loss."""
    for inputs, targets in window:
        targets = targets.flatten()
        (cross_entropy(model(inputs).flatten(0, 1), targets) / len(window)).backward()
    optimizer.step()
    optimizer.zero_grad()


def build(device):
    """A small GPT, AdamW, and one window of two micro-batches."""
    with torch.device(device):
        model = models.GPT(vocabulary=1000, context=64, width=128, layers=2)
        window = [torch.zeros(2, 8, 64, dtype=torch.int64) for _ in range(2)]
    return model, torch.optim.AdamW(model.parameters()), window


for device in ("cpu", "cuda"):
    predicted = memory.predict_memory(lambda: build(device), update, device=device)
    print(f"{device:4}: second update, predicted {predicted.peak_bytes:,} bytes")
    if device == "cuda" and not torch.cuda.is_available():
        print("      there is no GPU here, and this course has no record of one yet")
        break
    built = build(device)
    for _ in range(2):
        with memory.measure_memory(*built, timeline=True) as measured:
            update(*built)
    print(f"      second update, measured  {measured.peak_bytes:,} bytes")
    if device == "cpu":
        assert predicted.peak_bytes == measured.peak_bytes
        assert predicted.at_peak == measured.at_peak
    else:
        print(f"      reserved by the allocator {measured.reserved_bytes:,} bytes")
        display(plots.stacked_timelines({"on the GPU": measured.timeline}))


# %% plan-run
def build_lesson(sizes):
    """The lesson's model, SGD, and one window of micro-batches of these sizes."""
    model = models.embedding_linear(vocabulary=1000, width=128)
    window = [torch.zeros(2, size, 20, dtype=torch.int64) for size in sizes]
    return model, torch.optim.SGD(model.parameters(), lr=0.1), window


plan = memory.plan_micro_batches(
    build_lesson, update, effective_batch=50, budget="4 MB", device="cpu"
)
print(plan)
print(f"sizes of the window: {plan.sizes}")
built = build_lesson(plan.sizes)
with memory.measure_memory(*built) as measured:
    update(*built)
print(f"measured: {measured.peak_bytes:,} bytes")
assert sum(plan.sizes) == 50
assert measured.peak_bytes == plan.peak_bytes <= plan.budget_bytes

# %% plan-why [markdown]
# On the CPU, to the byte.
# For CUDA it meets figures that others published, of an A100 ([the tables](../benchmarks/README.md)): **25 of 25 counters of single layers to the last digit**, and what three GPTs *reserved* to 0.3 %.
# No GPU of ours has been compared yet.
# The workspaces of cuBLAS are counted, as "libraries"; the CUDA context, 0.5 to 1.5 GB, is not.

# %% roads [markdown]
# ## Other roads
#
# Accumulation is one. Two more:
# - **16 bits**: under `autocast` the large multiplications run in bfloat16, and keep half as many bytes;
# - **checkpointing**: a block keeps its input alone, and runs forward again for the backward pass.
#
# A GPT of 2 layers, 16 rows of 1,024 tokens, AdamW, on CUDA.

# %% roads-guess tags=["nbval-ignore-output", "widget", "hidden"]
roads_guess = widgets.predict(
    "One batch of 16, and two switches. Which of them alone brings the peak down further?",
    choices=["autocast", "checkpointing"],
)

# %% roads-came-out [markdown] tags=["folded"]
# ### What each road holds

# %% roads-run tags=["hidden"]
from torch.utils.checkpoint import checkpoint


class Checkpointed(torch.nn.Module):
    """A block that keeps only its input, and runs again in the backward pass."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def predicted(accumulation_steps=1, autocast=False, checkpointed=False):
    """What one update of 16 rows would hold on CUDA, by role."""

    def build():
        model = models.GPT(vocabulary=8192, context=1024, width=768, layers=2, heads=12)
        if checkpointed:
            model.blocks = torch.nn.Sequential(*map(Checkpointed, model.blocks))
        batch = torch.zeros(2, 16, 1024, dtype=torch.int64)
        window = batch.split(16 // accumulation_steps, dim=1)
        return model, torch.optim.AdamW(model.parameters()), batch, window

    def update(model, optimizer, batch, window):
        for inputs, targets in window[:2]:  # a third would hold no more than the second
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                logits = model(inputs).flatten(0, 1)
                loss = cross_entropy(logits, targets.flatten()) / len(window)
            del logits
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return memory.predict_memory(build, update).at_peak


settings = {
    "one batch of 16": {},
    "autocast": {"autocast": True},
    "checkpointing": {"checkpointed": True},
    "k = 4": {"accumulation_steps": 4},
    "k = 16": {"accumulation_steps": 16},
    "checkpointing, k = 4": {"accumulation_steps": 4, "checkpointed": True},
}
roads = {
    road: predicted(**settings[road])
    for road in widgets.progress(settings, "predicting each road")
}
alone = ("autocast", "checkpointing")
lowest = min(alone, key=lambda road: sum(roads[road].values()))
roads_guess.reveal(lowest, f"{sum(roads[lowest].values()) / 1e9:.2f} GB")

# %% roads-figure tags=["hidden"]
for road, roles in roads.items():
    print(f"{road:20} {sum(roles.values()):13,} bytes")
figure, (axis,) = plots.panels(["Predicted peak of the second update"], height=3.8)
figure.set_size_inches(8, 3.8)
plots.stacked_roles(axis, roads, unit="GB")
figure

# %% roads-test tags=["test"]
for roles in roads.values():
    assert sum(roles.values()) <= sum(roads["one batch of 16"].values())

# %% roads-why [markdown]
# When is each the better answer?
# - **16 bits** first, where the device has them: often faster too. The loss stays in float32, so a large vocabulary gains less. The gradient changes a little.
# - **Accumulation** where the effective batch is too large: the same gradient where lesson 5's claim holds, no work twice.
# - **Checkpointing** where even a small micro-batch is too large: the same gradient, one more forward pass. It gains with depth.
#
# They add up. None of them shrinks the weights and the state.

# %% shapes [markdown]
# ## Will it train?
#
# Which of GPT-2's four sizes trains on 8, 16 or 24 GB, with 512 rows of 1,024 tokens an update, in float32 with AdamW?
#
# The peak is at one of two moments: in the loss's backward, or at the update's end, when all gradients are there.
# At both, each layer adds the same bytes.
# So predict no layer and one, and follow the line to 48.
#
# In the table, a number is the largest micro-batch.
# A "no" says what is too much: the collected gradients if one row without accumulation fits, else the largest role.
# Where that is the state, accumulation cannot help; a larger GPU can, or an optimizer that keeps less.
# The last row has weights of 16 bits and 2,048 tokens a row.
# No room is left for the CUDA context.

# %% shapes-run tags=["hidden"]
from functools import cache, partial

from IPython.display import Markdown

SHAPES = {  # layers, width, vocabulary, tokens in a row, type of the weights
    "GPT-2 small": (12, 768, 50257, 1024, torch.float32),
    "GPT-2 medium": (24, 1024, 50257, 1024, torch.float32),
    "GPT-2 large": (36, 1280, 50257, 1024, torch.float32),
    "GPT-2 XL": (48, 1600, 50257, 1024, torch.float32),
    "7 billion": (32, 4096, 32000, 2048, torch.bfloat16),
}


def build(shape, sizes, optimizer=torch.optim.AdamW, layers=None):
    """A GPT whose embedding and head share one matrix, as in GPT-2, and a window."""
    all_layers, width, vocabulary, length, dtype = SHAPES[shape]
    layers = all_layers if layers is None else layers
    model = models.GPT(vocabulary, length, width, layers, heads=width // 64).to(dtype)
    model.head.weight = model.token_embedding.weight
    window = [torch.zeros(2, size, length, dtype=torch.int64) for size in sizes]
    return model, optimizer(model.parameters(), lr=1e-3), window


def update(model, optimizer, window, autocast=False):
    """One update, in float32 or under autocast."""
    for inputs, targets in window:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits = model(inputs).flatten(0, 1)
            loss = cross_entropy(logits, targets.flatten()) / len(window)
        del logits
        loss.backward()
        del loss
    optimizer.step()
    optimizer.zero_grad()


def peak_of(autocast, *arguments):
    """By role, the peak of what `build` makes of these arguments."""
    step = partial(update, autocast=autocast)
    return memory.predict_memory(partial(build, *arguments), step).at_peak


@cache
def no_layer_and_one(shape, autocast):
    """What these hold for two rows of SGD: in the loss's backward."""
    return [peak_of(autocast, shape, [2], torch.optim.SGD, n) for n in (0, 1)]


def blocks(size):
    """A size as CUDA's allocator rounds it."""
    return -(-size // 512) * 512


def moments(shape, micro_batch, rows, adamw=True, autocast=False, layers=None):
    """By role, what an update of `rows` rows holds at the two moments."""
    all_layers, width, vocabulary, length, _ = SHAPES[shape]
    layers = all_layers if layers is None else layers
    none, one = no_layer_and_one(shape, autocast)
    line = {role: none[role] + layers * (one[role] - none[role]) for role in one}
    P, more = line["parameters"], rows > micro_batch
    # Activations grow with the micro-batch, all but two numbers and the positions,
    # and under autocast a copy of each matrix in 16 bits.
    fixed = 2 * 512 + 8 * length
    fixed += autocast * (24 * width**2 * layers + blocks(2 * vocabulary * width))
    held = dict.fromkeys(memory.ROLES, 0)
    held |= {"parameters": P, "inputs": 16 * length * rows}
    held["libraries"] = line["libraries"]
    held["optimizer state"] = 2 * P * adamw
    loss = held | {"gradients": P * more}
    loss["activations"] = fixed + (line["activations"] - fixed) // 2 * micro_batch
    loss["backward temporaries"] = line["backward temporaries"] // 2 * micro_batch
    end = held | {"gradients": P, "optimizer temporaries": P * adamw}
    if not adamw:  # then worst where the shared matrix's gradients are added up
        shared = blocks(4 * vocabulary * width)
        end["backward temporaries"] = (2 + more) * shared + 2 * 512
    return {"the loss's backward": loss, "the update's end": end}


def worst(*arguments):
    """The moment that holds more, by role."""
    return max(moments(*arguments).values(), key=lambda roles: sum(roles.values()))


def verdict(shape, limit):
    """The largest micro-batch that fits, or what is too much."""
    fits = [m for m in range(1, 513) if sum(worst(shape, m, 512).values()) <= limit]
    if fits:
        return f"{max(fits)}"
    if sum(worst(shape, 1, 1).values()) <= limit:
        return "no: collected gradients"
    blame = worst(shape, 1, 512)
    return f"no: {max(blame, key=blame.get)}"


whole = peak_of(False, "GPT-2 small", [4])
print(f"GPT-2 small, 12 layers, 4 rows: {sum(whole.values()):,} bytes")
print(f"the same from the line: {sum(worst('GPT-2 small', 4, 4).values()):,} bytes")
assert whole == worst("GPT-2 small", 4, 4)
budgets = (8, 16, 24, 80)
head = ["model", "weights, millions", "GB, row by row"] + [f"{n} GB" for n in budgets]
table = [head, ["---"] * len(head)]
for shape in widgets.progress(SHAPES, "no layer and one"):
    least = worst(shape, 1, 512)
    weights = least["parameters"] / SHAPES[shape][-1].itemsize / 1e6
    first = [shape, f"{weights:,.0f}", f"{sum(least.values()) / 1e9:.2f}"]
    table.append([*first, *(verdict(shape, n * 10**9) for n in budgets)])
Markdown("\n".join(f"| {' | '.join(cells)} |" for cells in table))


# %% explore-widget tags=["nbval-ignore-output", "widget", "hidden"]
def what_is_held(
    model="GPT-2 small",
    micro_batch=8,
    accumulation_steps=8,
    optimizer="AdamW",
    precision="float32",
    GPU_GB=16,
):
    """The figure and the sentence for one setting."""
    adamw, autocast = optimizer == "AdamW", precision != "float32"
    rows = micro_batch * accumulation_steps
    both = moments(model, micro_batch, rows, adamw, autocast)
    total = {moment: sum(roles.values()) for moment, roles in both.items()}
    peak = max(total, key=total.get)
    figure, (axis,) = plots.panels([f"{model}, {optimizer}, {precision}"])
    figure.set_size_inches(8, 2.8)
    plots.stacked_roles(axis, both, unit="GB", limit_bytes=GPU_GB * 10**9)
    axis.set_xlabel("bytes held, GB")
    setting = f"{model}, micro-batch {micro_batch}, k = {accumulation_steps}"
    amount = f"{total[peak] / 1e9:.2f} GB at {peak}"
    fits = "fits in" if total[peak] <= GPU_GB * 10**9 else "too much for"
    sentence = f"{setting}, {optimizer}, {precision}: {amount}, {fits} {GPU_GB} GB"
    return figure, sentence


for model in widgets.progress(list(SHAPES)[:4], "the same under autocast"):
    no_layer_and_one(model, True)  # kept, so that a move of the slider need not wait

widgets.explore(
    what_is_held,
    model=list(SHAPES)[:4],
    micro_batch=[1, 2, 4, 8, 16, 32],
    accumulation_steps=[1, 2, 4, 8, 16],
    optimizer=["AdamW", "SGD"],
    precision=["float32", "bf16 autocast"],
    GPU_GB=[8, 16, 24],
)

# %% explore-still [markdown] tags=["folded"]
# ### One model at two settings, as text and figure

# %% explore-run tags=["hidden"]
figure, sentence = what_is_held("GPT-2 large", 1, 8)
print(what_is_held("GPT-2 large", 1, 1)[1])
print(sentence)
few = moments("GPT-2 XL", 3, 3, adamw=False, autocast=True, layers=3)
whole = peak_of(True, "GPT-2 XL", [3], torch.optim.SGD, 3)
figure

# %% explore-test tags=["test"]
assert whole in few.values()
assert "too much" in sentence

# %% explore-why [markdown]
# One row of GPT-2 large takes 15.50 GB and fits in 16; eight in eight micro-batches take 16.05: the collected gradients tip it.

# %% recap [markdown]
# ## Recap
#
# <details><summary>The lesson in three sentences: say yours first</summary>
#
# - A step's peak is weights, gradients, state, inputs and activations, and for a small model you can write it down to the byte.
# - Accumulation shrinks activations alone, for at most one copy of the gradients; 16 bits and checkpointing add to it.
# - The same code on tensors without data predicts the peak, and plans the largest micro-batch that fits.
#
# </details>
# <br>
#
# **Try it.** Give `build_lesson` AdamW, and predict what that does to the plan for 4 MB.
#
# <details><summary>What happens</summary>
#
# AdamW's two numbers for each weight alone need more than half of it.
# Not even single rows fit, and the plan says so, with the role to blame.
#
# </details>
# <br>
#
# **Exercises**: [a peak, a plan, and what a loop keeps](exercises/06_exercises.ipynb).
#
# **Next**: put `windows`, `accumulate` and the planner into a loop of your own.

# %% recap-guesses tags=["hidden"]
widgets.recap()
