"""`windows` and `accumulate`: what a cut gives and where the claim ends; every mistake that can be seen is refused."""

import copy
import math
import weakref
from collections import Counter
from contextlib import contextmanager
from operator import length_hint

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # private, but the only way to see the operators run
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from gradaccum import Accumulated, accumulate, full_batch_gradient, relative_error, windows
from gradaccum.models import GPT, embedding_linear

inf, nan = math.inf, math.nan
repeatable = settings(deadline=None, derandomize=True)


@contextmanager
def refused(error, *said):
    """Expect an error whose message is one sentence with all of `said` in it."""
    with pytest.raises(error) as caught:
        yield
    text = str(caught.value)
    assert [part for part in said if part not in text] == [], text
    assert text.endswith(".")
    assert text.count(". ") == text.count("\n") == 0


# --- windows ---


@repeatable
@given(items=st.lists(st.integers(), max_size=30), steps=st.integers(1, 12))
def test_windows_are_the_input_in_lists_of_k(items, steps):
    expected = [items[start : start + steps] for start in range(0, len(items), steps)]
    assert list(windows(items, steps)) == list(windows(iter(items), steps)) == expected
    assert len(windows(items, steps)) == len(expected)


def test_windows_read_no_further_than_the_list_they_yield():
    source = iter(range(7))
    updates = windows(source, 3)
    assert (bool(updates), length_hint(source)) == (True, 7)
    for window in tqdm(updates, disable=True):
        assert length_hint(source) == 6 - window[-1]


class OnlyGetitem:
    def __getitem__(self, index):
        return range(3)[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("micro_batches", "has_length"),
    [
        ([0, 1, 2], True),
        (OnlyGetitem(), False),
        (DataLoader(range(3), batch_size=None), True),
        (DataLoader(Stream(), batch_size=None), False),
    ],
)
def test_windows_can_be_iterated_again_and_twice_at_a_time(micro_batches, has_length):
    epoch = windows(micro_batches, 2)
    assert list(epoch) == list(epoch) == [[0, 1], [2]]
    assert list(zip(epoch, epoch, strict=True)) == [([0, 1], [0, 1]), ([2], [2])]
    if has_length:
        assert len(epoch) == tqdm(epoch, disable=True).total == 2
    else:
        with pytest.raises(TypeError):
            len(epoch)


def test_windows_refuse_at_the_call():
    for steps in (4.0, True, "4", None, np.int64(4), 0, -3):
        with refused(ValueError if type(steps) is int else TypeError, "accumulation_steps", str(steps)):
            windows([1], steps)
    for micro_batches in (7, None):
        with refused(TypeError, "micro_batches", repr(micro_batches)):
            windows(micro_batches, 2)


# --- accumulate: the gradient, against an oracle that makes one padded batch and takes one mean ---


class Task:
    def __init__(self, model: nn.Module) -> None:
        self.model = model.double()

    def loss_sum(self, batch: tuple[Tensor, Tensor], reduction: str = "sum") -> Tensor:
        return cross_entropy(self.model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction=reduction)

    def count(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (batch[1] != -100).sum()

    def gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self.model.parameters()]

    def full_batch(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, ...], float]:
        mean = self.loss_sum(collate(samples), "mean")
        return torch.autograd.grad(mean, list(self.model.parameters())), mean.item()


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if not samples:
        return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)
    inputs, targets = zip(*samples, strict=True)
    return pad_sequence(inputs, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-100)


def draw_sample(generator: torch.Generator, ignored: float) -> tuple[Tensor, Tensor]:
    length = int(torch.randint(1, 7, (), generator=generator))
    inputs, targets = torch.randint(11, (2, length), generator=generator)
    return inputs, targets.masked_fill(torch.rand(length, generator=generator) < ignored, -100)


def make(name="gpt", cut=((3, 0.0), (1, 0.0), (2, 0.0)), seed=1):
    """Make a task, its samples and a window of them; `cut` has the size and the share of ignored targets of each."""
    task = TASKS[name]
    task.model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(seed)
    groups = [[draw_sample(generator, ignored) for _ in range(size)] for size, ignored in cut]
    return task, [sample for group in groups for sample in group], [collate(group) for group in groups]


torch.manual_seed(0)
TASKS = {
    "embedding_linear": Task(embedding_linear(vocabulary=11, width=4)),
    "mlp": Task(nn.Sequential(nn.Embedding(11, 3), nn.Linear(3, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 11))),
    "gpt": Task(GPT(vocabulary=11, context=6, width=8, layers=1, heads=2)),
}
piece = st.tuples(st.sampled_from([0, 1, 1, 2, 3, 5]), st.sampled_from([0.0, 0.5, 1.0]))
kind = st.sampled_from([int, float, np.int64, torch.Tensor.clone, torch.Tensor.int])
cuts = st.lists(st.tuples(piece, kind), min_size=1, max_size=7)


@pytest.mark.parametrize("name", TASKS)
@settings(repeatable, max_examples=60)
@given(cut=cuts, seed=st.integers(0, 2**31), scale=st.sampled_from([None, 1024.0]))
def test_any_cut_of_any_window_gives_the_full_batch_gradient(name, cut, seed, scale):
    pieces, kinds = zip(*cut, strict=True)
    task, samples, window = make(name, pieces, seed)
    window = [(*batch, kind) for batch, kind in zip(window, kinds, strict=True)]
    items = sum(int(task.count(batch)) for batch in window)
    scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale)

    def count(batch):
        return batch[2](task.count(batch))

    if items == 0:
        with refused(ValueError, "count returned 0", f"{len(window)} micro-batches"):
            accumulate(task.model, window, task.loss_sum, count)
        return
    expected, mean = task.full_batch(samples)
    result = accumulate(task.model, (batch for batch in window), task.loss_sum, count, scaler=scaler)
    assert relative_error([gradient / (scale or 1) for gradient in task.gradients()], expected) < 1e-12
    assert relative_error(full_batch_gradient(task.model, window, task.loss_sum, count), expected) < 1e-12
    assert (result.count, type(result.count)) == (items, float if float in kinds else int)
    assert result.loss.item() == pytest.approx(mean, rel=1e-12)  # the scaler does not scale it


def test_it_returns_the_loss_and_the_count_and_changes_nothing_but_grad():
    task, _, window = make()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    result = accumulate(task.model, window, task.loss_sum, task.count)
    assert type(result) is Accumulated
    assert (result.loss.shape, result.loss.dtype, result.loss.requires_grad) == ((), torch.float64, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert task.model.training
    with refused(ValueError, "zero_grad"):  # nor does it clear what it has left there
        accumulate(task.model, window, task.loss_sum, task.count)


def test_weights_may_be_counted_instead_of_items():
    task, samples, window = make()
    result = accumulate(task.model, window, lambda b: task.loss_sum(b) * 0.25, lambda b: task.count(b) * 0.25)
    assert result.count == 0.25 * sum(len(targets) for _, targets in samples)
    assert relative_error(task.gradients(), task.full_batch(samples)[0]) < 1e-12


@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_that_is_not_finite_is_no_error_and_the_scaler_skips_the_step(scaled):
    task, _, window = make("embedding_linear")
    before = [parameter.detach().clone() for parameter in task.model.parameters()]
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    factors = iter([1.0, inf, 1.0])
    result = accumulate(task.model, window, lambda b: task.loss_sum(b) * next(factors), task.count, scaler=scaler)
    assert result.loss.item() == inf
    assert not all(gradient.isfinite().all() for gradient in task.gradients())
    if scaled:
        scaler.step(torch.optim.SGD(task.model.parameters()))
        assert relative_error(list(task.model.parameters()), before) == 0


def test_the_dtype_of_grad_is_the_parameters_own_choice():
    # 1024 pieces of 1/1024 each: in bf16 the sum stalls at a quarter, in float32 it is exact.
    for dtype, total in ((torch.bfloat16, 0.25), (torch.float32, 1.0)):
        model = nn.Linear(1, 1, bias=False).bfloat16()
        model.weight.grad_dtype = dtype
        x = torch.ones(1, 1, dtype=torch.bfloat16)
        result = accumulate(model, [x] * 1024, lambda x, model=model: model(x).sum(), len)
        assert (model.weight.grad.dtype, model.weight.grad.item()) == (dtype, total)
        assert result.loss.dtype == torch.float32
        assert result.loss.item() == pytest.approx(model.weight.item(), rel=1e-6)  # in bf16 this would stall too


def test_shared_frozen_and_unused_parameters():
    embedding, middle, unused, head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    middle.bias.requires_grad_(False)
    model = nn.ModuleList([embedding, unused, head, middle]).double()
    tokens, targets = torch.randint(7, (2, 9))

    def loss_sum(batch, reduction="sum"):
        return cross_entropy(head(middle(embedding(batch[0]))), batch[1], reduction=reduction)

    expected = torch.autograd.grad(loss_sum((tokens, targets), "mean"), [embedding.weight, middle.weight])
    accumulate(model, [(tokens[:2], targets[:2]), (tokens[2:], targets[2:])], loss_sum, lambda batch: len(batch[0]))
    assert relative_error([embedding.weight.grad, middle.weight.grad], expected) < 1e-12
    assert [parameter.grad for parameter in (middle.bias, unused.weight, unused.bias)] == [None] * 3


def test_sparse_gradients_stay_sparse():
    model = nn.Embedding(9, 3, sparse=True).double()
    tokens = torch.tensor([1, 1, 5, 2, 5])
    accumulate(model, [tokens[:2], tokens[2:]], lambda x: model(x).square().sum(), len)
    assert model.weight.grad.is_sparse
    expected = torch.zeros(9, 3, dtype=torch.float64).index_add(0, tokens, 2 / 5 * model(tokens).detach())
    assert relative_error(model.weight.grad, expected) < 1e-12


# --- accumulate: where the claim ends, and no divisor helps ---

X, Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(16) % 5 % 3
ALL = range(16)


class Centred(nn.Module):
    """A forward that remembers: in training it moves the mean that it takes off."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.mean = (self.mean + x.mean(0)) / 2
        return x - self.mean


def alone(model, rows, seen):
    return cross_entropy(model(X[rows]), Y[rows], reduction="sum")


def negatives(model, rows, seen):
    own = torch.tensor([seen.index(row) for row in rows])
    return cross_entropy(model(X[rows]) @ X[seen].T, own, reduction="sum")


def weighted(model, rows, seen):
    weights = 1 / Y[seen].bincount(minlength=3).double()
    return cross_entropy(model(X[rows]), Y[rows], weights, reduction="sum")


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(
    ("layer", "loss"),
    [(nn.BatchNorm1d(3), alone), (Centred(), alone), (nn.Identity(), negatives), (nn.Identity(), weighted)],
    ids=["BatchNorm", "a-mean-kept", "negatives", "weights"],
)
def test_where_the_claim_ends(layer, loss, outside):
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(layer), nn.Linear(3, 3)).double().train(outside)
    window = [ALL[start : start + 4] for start in (0, 4, 8, 12)]

    def loss_sum(rows):  # outside the claim an item sees its micro-batch; inside, what is fixed beforehand
        return loss(model, rows, rows if outside else ALL)

    one_batch = full_batch_gradient(model, [ALL], loss_sum, len)
    as_cut = full_batch_gradient(model, window, loss_sum, len)
    accumulate(model, window, loss_sum, len)
    found = [parameter.grad for parameter in model.parameters()]
    assert relative_error(found, as_cut) < 1e-12  # the oracle is cut in the same way, and cannot tell
    error = relative_error(found, one_batch)
    assert (error > 0.05) if outside else (error < 1e-12)


def test_ranks_that_average_end_the_claim():
    task, samples, window = make("mlp", ((5, 0.0), (1, 0.0)))
    of_each = []
    for batch in window:
        accumulate(task.model, [batch], task.loss_sum, task.count)
        of_each.append(task.gradients())
        task.model.zero_grad()
    averaged = [(one + other) / 2 for one, other in zip(*of_each, strict=True)]
    assert relative_error(averaged, task.full_batch(samples)[0]) > 0.05


# --- accumulate: what it costs ---

SCALERS = [None, torch.amp.GradScaler("cpu", init_scale=8.0)]


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):  # `tolist` on a CPU tensor runs no operator
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen[getattr(func, "__name__", "")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaler", SCALERS)
def test_at_most_one_scalar_read_a_window(scaler):
    task, _, window = make("mlp", cut=((2, 0.0),) * 8)
    operators, calls = Operators(), Calls()
    operators.seen, calls.seen = Counter(), Counter()
    with operators, calls:
        accumulate(task.model, window, task.loss_sum, task.count, scaler=scaler)
    waits = ("aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero")
    assert sum(operators.seen[name] for name in waits) <= 1
    waits = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose")
    assert sum(calls.seen[name] for name in waits) <= 1
    assert operators.seen["aten.native_layer_norm"] == calls.seen["layer_norm"] == 8  # the modes do see what runs


@pytest.mark.parametrize("scaler", SCALERS)
def test_nothing_of_a_graph_is_alive_during_the_next_forward(scaler):
    alive, saved = weakref.WeakSet(), []

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)

    class KeepOnNode(torch.autograd.Function):  # as activation checkpointing does: backward alone does not free it
        @staticmethod
        def forward(ctx, x):
            ctx.kept = Kept(x)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            assert len(alive) < saved[-1]  # what came later is free already
            return gradient

    model = nn.Sequential(nn.Linear(3, 2), nn.GELU())

    def loss_sum(x):
        assert len(alive) == 0
        loss = KeepOnNode.apply(model(x)).square().sum()
        saved.append(len(alive))
        return loss

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        accumulate(model, [torch.ones(2, 3)] * 4, loss_sum, len, scaler=scaler)
    assert len(alive) == 0


# --- accumulate: what it refuses, most of it before the first forward, and what passes through ---


def never(micro_batch):
    raise AssertionError("no forward may run")


@pytest.mark.parametrize("bad", [-1, torch.tensor(-3), -0.5, nan, inf, torch.tensor(nan), torch.tensor(inf)])
@pytest.mark.parametrize("good", [2, torch.tensor(2.0)])
def test_a_count_that_is_negative_or_not_finite_is_refused(good, bad):
    with refused(ValueError, "count", "micro-batch 1", f"{float(bad):g}"):
        accumulate(nn.Linear(2, 1), [0, 1], never, [good, bad].__getitem__)


@pytest.mark.parametrize(
    "bad", [None, "3", True, 1j, [3], torch.tensor([3]), torch.tensor(True), torch.tensor(1j), torch.ones(2)]
)
def test_a_count_that_is_no_number_is_refused(bad):
    given = f"shape {tuple(bad.shape)} and dtype {bad.dtype}" if isinstance(bad, Tensor) else repr(bad)
    with refused(TypeError, "count", "micro-batch 1", given):
        accumulate(nn.Linear(2, 1), [0, 1], never, [2, bad].__getitem__)


def test_an_empty_window_and_a_model_with_nothing_to_train_are_refused():
    for window in ([], iter(())):
        with refused(ValueError, "window is empty"):
            accumulate(nn.Linear(2, 1), window, never, never)
    for model in (nn.ReLU(), nn.Linear(2, 1).requires_grad_(False)):
        with refused(ValueError, f"({type(model).__name__}) has no trainable parameter"):
            accumulate(model, [1], never, never)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_grad_that_is_already_there_is_refused_and_left_alone(value, frozen):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    left = model[1].weight.grad = torch.full((1, 2), value)
    model[1].weight.requires_grad_(not frozen)
    with refused(ValueError, "'1.weight'", "zero_grad(set_to_none=True)"):
        accumulate(model, [1], never, never)
    assert model[1].weight.grad is left
    assert left.tolist() == [[value] * 2]


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda loss: loss.item(), TypeError, "float"),
        (lambda loss: None, TypeError, "None"),
        (lambda loss: loss.expand(3), ValueError, "(3,)"),
        (lambda loss: loss.reshape(1), ValueError, "(1,)"),
        (lambda loss: loss.detach(), ValueError, "without a graph"),
    ],
)
def test_a_bad_loss_is_refused_and_every_grad_is_none_again(spoil, error, said):
    task, _, window = make("mlp")

    def loss_sum(batch):
        loss = task.loss_sum(batch)
        assert (batch is window[0]) == (task.gradients()[0] is None)
        return spoil(loss) if batch is window[1] else loss

    with refused(error, "loss_sum", "micro-batch 1", said):
        accumulate(task.model, window, loss_sum, task.count)
    assert set(task.gradients()) == {None}


@pytest.mark.parametrize("place", ["count", "forward", "backward"])
@pytest.mark.parametrize("error", [KeyError(), torch.OutOfMemoryError("full"), KeyboardInterrupt(), SystemExit(3)])
def test_any_error_passes_through_and_the_window_works_in_smaller_pieces(error, place):
    task, samples, window = make("mlp")

    def fail(*_):
        raise error

    def loss_sum(batch):
        loss = task.loss_sum(batch)
        if place != "count" and batch is window[1]:
            fail() if place == "forward" else loss.register_hook(fail)
        return loss

    def count(batch):
        return fail() if place == "count" and batch is window[1] else task.count(batch)

    with pytest.raises(type(error)) as caught:
        accumulate(task.model, window, loss_sum, count)
    assert caught.value is error
    assert set(task.gradients()) == {None}
    accumulate(task.model, [collate([sample]) for sample in samples], task.loss_sum, task.count)
    assert relative_error(task.gradients(), task.full_batch(samples)[0]) < 1e-12
