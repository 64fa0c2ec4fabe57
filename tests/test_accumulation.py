"""`windows` and `accumulate`: what a cut gives and where the claim ends; every mistake that can be seen is refused."""

import copy
import math
import pickle
import re
import warnings
import weakref
from contextlib import nullcontext
from itertools import islice
from operator import length_hint

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threaded import refused
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from gradaccum import Accumulated, NonFiniteLoss, accumulate, check_split, full_batch_gradient, relative_error, windows
from gradaccum.models import GPT, embedding_linear

inf, nan = math.inf, math.nan
repeatable = settings(deadline=None, derandomize=True)


# --- windows ---


@repeatable
@given(items=st.lists(st.integers(), max_size=30), steps=st.integers(1, 12))
def test_windows_are_the_input_in_lists_of_k(items, steps):
    expected = [items[start : start + steps] for start in range(0, len(items), steps)]
    assert list(windows(items, steps)) == list(windows(iter(items), steps)) == expected
    assert len(windows(items, steps)) == len(expected)


def test_windows_read_no_further_than_they_yield():
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
def test_windows_can_be_iterated_again(micro_batches, has_length):
    epoch = windows(micro_batches, 2)
    assert list(epoch) == list(epoch) == [[0, 1], [2]]
    assert list(zip(epoch, epoch, strict=True)) == [([0, 1], [0, 1]), ([2], [2])]
    if has_length:
        assert len(epoch) == tqdm(epoch, disable=True).total == 2
    else:
        with pytest.raises(TypeError):
            len(epoch)


@pytest.mark.parametrize("let_go", [False, True])
def test_one_windows_inputs_are_alive_at_a_time(let_go):
    alive, most = weakref.WeakSet(), 0

    def loader():
        nonlocal most
        for _ in range(12):
            micro_batch = torch.ones(1)
            alive.add(micro_batch)
            most = max(most, len(alive))
            yield micro_batch
            del micro_batch  # as a loader does that makes the next one

    for window in windows(loader(), 4):
        assert len(window) == 4
        if let_go:
            del window
    assert most == (4 if let_go else 8)


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
def test_any_cut_gives_the_full_batch_gradient(name, cut, seed, scale):
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
    whole = full_batch_gradient(task.model, collate(samples), lambda batch: task.loss_sum(batch, "mean"))
    assert relative_error(whole, expected) < 1e-12
    assert (result.count, type(result.count)) == (items, float if float in kinds else int)
    assert result.loss.item() == pytest.approx(mean, rel=1e-12)  # the scaler does not scale it


def test_it_changes_nothing_but_grad():
    task, _, window = make()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    result = accumulate(task.model, window, task.loss_sum, task.count)
    assert type(result) is Accumulated
    assert (result.loss.shape, result.loss.dtype, result.loss.requires_grad) == ((), torch.float64, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert task.model.training
    with refused(ValueError, "zero_grad"):  # nor does it clear what it has left there
        accumulate(task.model, window, task.loss_sum, task.count)


@pytest.mark.parametrize(
    ("kinds", "total"),
    [
        ([np.uint8(200), np.uint8(100)], 300),
        ([np.int8(100)] * 3, 300),
        ([np.float16(30000.0)] * 3, 90000.0),
        ([torch.tensor(200, dtype=torch.uint8)] * 2, 400),
        ([torch.tensor(2**24 + 1), torch.tensor(1.5, dtype=torch.bfloat16)], 2**24 + 2.5),
        ([100_001, torch.tensor(0.5, dtype=torch.float16)], 100_001.5),
        ([np.float32(1.5), 2, torch.tensor(3)], 6.5),
    ],
)
def test_counts_of_few_bits_are_added_up_whole(kinds, total):
    model = nn.Linear(1, 1)
    result = accumulate(model, range(len(kinds)), lambda index: model(torch.ones(1, 1)).sum(), kinds.__getitem__)
    assert (result.count, type(result.count)) == (total, type(total))


def test_weights_may_be_counted_instead_of_items():
    task, samples, window = make()
    result = accumulate(task.model, window, lambda b: task.loss_sum(b) * 0.25, lambda b: task.count(b) * 0.25)
    assert result.count == 0.25 * sum(len(targets) for _, targets in samples)
    assert relative_error(task.gradients(), task.full_batch(samples)[0]) < 1e-12


@pytest.mark.parametrize("scaled", [False, True])
def test_the_scaler_skips_a_nonfinite_step(scaled):
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


def test_the_dtype_of_grad_is_the_parameters():
    # 1024 pieces of 1/1024 each: in bf16 the sum stalls at a quarter, in float32 it is exact.
    for dtype, total in ((torch.bfloat16, 0.25), (torch.float32, 1.0)):
        model = nn.Linear(1, 1, bias=False).bfloat16()
        model.weight.grad_dtype = dtype
        x = torch.ones(1, 1, dtype=torch.bfloat16)
        with pytest.warns(UserWarning, match="grad_dtype") if dtype == torch.bfloat16 else nullcontext():
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

    whole = full_batch_gradient(model, ALL, lambda rows: loss_sum(rows) / len(rows))
    with (
        pytest.warns(UserWarning, match="check_split")
        if isinstance(layer, nn.BatchNorm1d) and outside
        else nullcontext()
    ):
        accumulate(model, window, loss_sum, len)
    error = relative_error([parameter.grad for parameter in model.parameters()], whole)
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


# --- accumulate: several losses, several modules ---


class Detector(nn.Module):
    """A class and a box for each row, and boxes count where there is an object."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(3, 4).double(), nn.Linear(4, 4).double()

    def losses(self, rows, reduction="sum"):
        out = self.heads(self.body(X[rows]).tanh())
        found = (Y[rows] > 0).double()
        by_row = {"class": (out[:, 0] - found).square(), "box": (out[:, 1:] - X[rows]).abs().sum(1) * found}
        return {key: each.sum() for key, each in by_row.items()}

    @staticmethod
    def counts(rows):
        return {"box": (Y[rows] > 0).sum(), "class": len(rows)}


CUT = [ALL[0:1], ALL[1:9], ALL[9:11], ALL[11:16]]  # the first row has no object


def test_each_sum_is_divided_by_its_own_total():
    model = Detector()
    found, counts = model.losses(ALL), model.counts(ALL)
    means = {key: found[key] / counts[key] for key in found}
    expected = torch.autograd.grad(sum(means.values()), list(model.parameters()))
    result = accumulate(model, CUT, model.losses, model.counts)
    assert relative_error([parameter.grad for parameter in model.parameters()], expected) < 1e-12
    assert result.count == {"class": 16, "box": int((Y > 0).sum())}
    assert result.losses.keys() == means.keys()
    assert [result.losses[key].item() for key in means] == pytest.approx([mean.item() for mean in means.values()])
    assert result.loss.item() == pytest.approx(sum(means.values()).item())
    assert (result.loss.shape, result.loss.requires_grad) == ((), False)


@pytest.mark.parametrize("without", [lambda loss: loss, lambda loss: loss * nan, lambda loss: loss.detach()])
def test_a_key_that_counts_nothing_is_left_out(without):
    model = Detector()

    def losses(rows):
        found = model.losses(rows)
        return found | {"box": without(found["box"])}

    result = accumulate(model, CUT[:1], losses, model.counts, nonfinite="raise")
    assert (result.count, result.losses.keys()) == ({"class": 1, "box": 0}, {"class"})
    assert result.loss == result.losses["class"]
    expected = torch.autograd.grad(model.losses(CUT[0])["class"], list(model.parameters()))
    assert relative_error([parameter.grad for parameter in model.parameters()], expected) < 1e-12


def test_a_count_of_nothing_needs_no_graph():
    model = Detector()

    def losses(rows):
        return {"box": model.losses(rows)["box"] if any(Y[rows] > 0) else torch.zeros(())}

    result = accumulate(model, CUT, losses, lambda rows: {"box": model.counts(rows)["box"]})
    items = int(model.counts(ALL)["box"])
    expected = torch.autograd.grad(model.losses(ALL)["box"] / items, list(model.parameters()), allow_unused=True)
    assert result.count == {"box": items}
    assert relative_error([parameter.grad for parameter in model.parameters()], expected) < 1e-12


@pytest.mark.parametrize(
    ("losses", "counts", "error", "said"),
    [
        ({"a": 1}, 3, TypeError, "both return dicts or neither"),
        (1, {"a": 3}, TypeError, "both return dicts or neither"),
        ({"a": 1}, {"b": 3}, ValueError, "['a'] and ['b']"),
        ({"a": 1, "b": 1}, {"a": 3}, ValueError, "['a', 'b'] and ['a']"),
        ({"a": 1}, {}, ValueError, "empty dict"),
        ({"a": 1}, {"a": 0}, ValueError, "count returned 0 for all 2"),
        ({"a": 1}, {"a": "3"}, TypeError, "'3'"),
        ({"a": 1}, {"a": -3}, ValueError, "-3"),
        ({"a": None}, {"a": 3}, TypeError, "micro-batch 0, 'a'"),
        ({"a": torch.zeros(())}, {"a": torch.tensor(3)}, ValueError, "without a graph for micro-batch 0, 'a'"),
    ],
)
def test_bad_dicts_are_refused(losses, counts, error, said):
    model = nn.Linear(1, 1)

    def loss_sum(micro_batch):
        loss = model(torch.ones(1, 1)).sum()
        return {key: loss if one == 1 else one for key, one in losses.items()} if losses != 1 else loss

    with refused(error, said):
        accumulate(model, [0, 1], loss_sum, lambda micro_batch: counts)
    assert model.weight.grad is None


def test_dicts_that_differ_are_refused():
    for other, error, said in (({"b": 1}, ValueError, "return 0 for a loss without items"), (1, TypeError, "or none")):
        with refused(error, said):
            accumulate(nn.Linear(1, 1), [0, 1], never, [{"a": 1}, other].__getitem__)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_modules(kind):
    torch.manual_seed(0)
    one, other = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
    centres = nn.Parameter(torch.randn(3, 3).double())
    shared = nn.ParameterList([centres, one.weight])

    def loss_sum(rows):
        return ((other(one(X[rows]).tanh()) - centres[Y[rows]]).square()).sum()

    modules = kind([one, other, shared])
    for _ in range(2):  # from the second window on a forgotten module goes wrong
        parameters = {id(each): each for module in modules for each in module.parameters()}.values()
        expected = torch.autograd.grad(loss_sum(ALL) / 16, list(parameters))
        accumulate(modules, CUT, loss_sum, len)
        assert relative_error([parameter.grad for parameter in parameters], expected) < 1e-12
        with refused(ValueError, "'weight' of Linear", "zero_grad"):
            accumulate(modules, CUT, loss_sum, len)
        for module in modules:
            module.zero_grad()

    def fails(rows):
        return loss_sum(rows) if rows is CUT[0] else {}["mine"]

    with pytest.raises(KeyError):
        accumulate(modules, CUT, fails, len)
    assert [each.grad for each in parameters] == [None] * len(parameters)
    for bad in ([], [one, centres], iter([one]), "model"):
        with refused((TypeError, ValueError), "model"):
            accumulate(bad, CUT, loss_sum, len)


def test_a_loss_of_another_model_is_refused():
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    with refused(ValueError, "No parameter of the model got a gradient"):
        accumulate(model, [torch.ones(2, 3)], lambda x: other(x).sum(), len)


# --- accumulate: losses that are not finite ---


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("factors", [(1, inf, 1), (nan, 1, -inf)])
def test_nonfinite_losses_are_named(factors, keyed):
    task, _, window = make("mlp")
    bad = [index for index, factor in enumerate(factors) if not math.isfinite(factor)]
    window = list(zip(window, factors, strict=True))

    def loss_sum(micro_batch):
        sound = task.loss_sum(micro_batch[0])
        return {"sound": sound, "other": sound * micro_batch[1]} if keyed else sound * micro_batch[1]

    def count(micro_batch):
        items = task.count(micro_batch[0])
        return {"other": items, "sound": items} if keyed else items

    with pytest.raises(NonFiniteLoss, match=", ".join(map(str, bad))) as caught:
        accumulate(task.model, window, loss_sum, count, nonfinite="raise")
    assert (caught.value.micro_batches, isinstance(caught.value, ArithmeticError)) == (bad, True)
    assert pickle.loads(pickle.dumps(caught.value)).micro_batches == bad
    assert set(task.gradients()) == {None}
    kept = [each for index, each in enumerate(window) if index not in bad]
    items = sum(int(task.count(each[0])) for each in kept)
    loss = sum(task.loss_sum(each[0]) for each in kept) * (2 if keyed else 1) / items
    expected = torch.autograd.grad(loss, list(task.model.parameters()))
    accumulate(task.model, kept, loss_sum, count, nonfinite="raise")
    assert relative_error(task.gradients(), expected) < 1e-12
    with refused(ValueError, "nonfinite", "'stop'"):
        accumulate(task.model, kept, loss_sum, count, nonfinite="stop")


# --- accumulate: hooks, BatchNorm, processes ---


def in_backward(model):
    """An optimizer in the backward pass, as torch's tutorial has it."""
    optimizers = {each: torch.optim.SGD([each], lr=0.1) for each in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    return [each.register_post_accumulate_grad_hook(step) for each in model.parameters()]


def lomo(model):
    """As LOMO: each gradient that arrives lets the others step."""

    def step(gradient):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
                parameter.grad = None
        return gradient

    return [each.register_hook(step) for each in model.parameters()]


@pytest.mark.parametrize("hooks", [in_backward, lomo])
def test_a_step_in_backward_is_refused(hooks):
    task, samples, window = make("mlp")
    task = Task(copy.deepcopy(task.model))
    handles = hooks(task.model)
    seen = []
    for _ in range(2):  # as long as it is there
        with refused(RuntimeError, "steps in the backward pass", "made one step already"):
            accumulate(task.model, window, lambda batch: seen.append(batch) or task.loss_sum(batch), task.count)
    assert seen == [window[0]] * 2
    with refused(RuntimeError, "steps in the backward pass"):  # also if the first micro-batch has no backward
        accumulate(
            task.model,
            window,
            lambda batch: {"sum": torch.zeros(()) if batch is window[0] else task.loss_sum(batch)},
            lambda batch: {"sum": 0 if batch is window[0] else task.count(batch)},
        )
    assert set(task.gradients()) == {None}
    for handle in handles:
        handle.remove()
    accumulate(task.model, window, task.loss_sum, task.count)
    assert relative_error(task.gradients(), task.full_batch(samples)[0]) < 1e-12


def test_hooks_that_take_nothing_away_pass():
    task, samples, window = make("mlp")
    task, norms, unused = Task(copy.deepcopy(task.model)), [], nn.Linear(2, 2)
    doubled = [2 * gradient for gradient in task.full_batch(samples)[0]]
    for parameter in task.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda each: norms.append(each.grad.norm().item()))
        parameter.register_hook(lambda gradient: gradient * 2)
    accumulate([task.model, unused], window, task.loss_sum, task.count)
    assert relative_error(task.gradients(), doubled) < 1e-12
    assert len(norms) == 3 * len(task.gradients())
    assert all(len(each._post_accumulate_grad_hooks) == 1 for each in task.model.parameters())


@pytest.mark.parametrize(
    ("norm", "warned"),
    [
        (nn.BatchNorm1d(3), True),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), True),
        (nn.SyncBatchNorm(3), True),
        (nn.BatchNorm1d(3).eval(), False),
        (nn.LayerNorm(3), False),
    ],
    ids=["training", "no-statistics", "synchronized", "frozen", "LayerNorm"],
)
def test_batch_norm_is_warned_of_once_a_model(norm, warned):
    model = nn.Sequential(copy.deepcopy(norm), nn.Linear(3, 1)).double()
    forwards = []

    def loss_sum(rows):
        forwards.append(rows)
        return model[1](X[rows]).sum()

    def run(window):
        model.zero_grad()
        accumulate(model, window, loss_sum, len)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run([ALL])  # one micro-batch is the batch
        assert caught == []
        run(CUT)
        run(CUT)
    assert [each.category for each in caught] == [UserWarning] * warned
    if not warned:
        return
    assert caught[0].filename == __file__  # the line that calls accumulate
    line = re.search(r"warnings\.filterwarnings\(.*?\)", str(caught[0].message))[0]
    model = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as silenced:
        warnings.simplefilter("always")
        eval(line)
        run(CUT)
    assert silenced == []
    model, before = copy.deepcopy(model), len(forwards)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="BatchNorm"):
            run(CUT)
    assert len(forwards) == before  # none has run


@pytest.fixture
def ranks(request):
    """A group of that many processes, of which this is the first and the others do not exist."""
    # Private, but a refusal needs no other process, and two real ones take ten seconds.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    backend, store = ("gloo", torch.distributed.HashStore()) if request.param == 1 else ("fake", FakeStore())
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=request.param)
    yield request.param
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2], indirect=True)
@pytest.mark.parametrize("wrapper", ["", "DistributedDataParallel", "FSDPModule", "compiled"])
def test_a_group_of_one_is_one_process(ranks, wrapper):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2)).double()
    outer = nn.Sequential(model)
    if wrapper == "FSDPModule":
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (ranks,)))
    elif wrapper:
        outer = nn.Sequential(nn.parallel.DistributedDataParallel(model))
    if wrapper == "compiled":
        outer = torch.compile(outer, backend="eager")
    if ranks == 1:
        result = accumulate(outer, CUT, lambda rows: outer(X[rows]).sum(), len)
        assert (result.count, model[1].weight.grad is None) == (16, False)
        return
    if not wrapper:  # an engine's ranks are in test_ranks.py; here the others do not exist
        with refused(NotImplementedError, "2 processes train together", "alone=True"):
            accumulate(outer, CUT, never, never)
        accumulate(outer, CUT, lambda rows: outer(X[rows]).sum(), len, alone=True)
        outer.zero_grad()
    for call in (lambda: full_batch_gradient(outer, X, never), lambda: check_split(outer, X, never, CUT, never, len)):
        if wrapper or call.__code__.co_names[0] == "check_split":
            with refused(NotImplementedError, "2 processes"):
                call()
    if not wrapper:  # the oracle of one rank
        assert full_batch_gradient(outer, X, lambda x: outer(x).sum())[0] is not None


# --- accumulate: what a plain outer loop serves ---


def test_a_window_can_be_used_twice_as_sam_does():
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def sam(model, backward):
        backward(model)
        norm = torch.stack([each.grad.norm() for each in model.parameters()]).norm()
        climb = [0.05 * each.grad / norm for each in model.parameters()]
        with torch.no_grad():
            for each, way in zip(model.parameters(), climb, strict=True):
                each += way
        model.zero_grad()
        backward(model)
        return [each.grad for each in model.parameters()]

    whole = sam(copy.deepcopy(start), lambda model: (alone(model, ALL, ALL) / 16).backward())
    cut = sam(copy.deepcopy(start), lambda model: accumulate(model, CUT, lambda rows: alone(model, rows, ALL), len))
    assert relative_error(cut, whole) < 1e-12


def test_second_order_gradients_over_tasks():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()

    def adapted(rows):  # MAML: an inner step on some rows, the loss of the others after it
        parameters = dict(model.named_parameters())
        inner = (model(X[rows[::2]])[:, 0] - Y[rows[::2]]).square().mean()
        slopes = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
        fast = {name: each - 0.1 * slope for (name, each), slope in zip(parameters.items(), slopes, strict=True)}
        return (torch.func.functional_call(model, fast, (X[rows[1::2]],))[:, 0] - Y[rows[1::2]]).square().sum()

    tasks = [ALL[0:4], ALL[4:8], ALL[8:16]]
    expected = torch.autograd.grad(sum(adapted(rows) for rows in tasks) / 8, list(model.parameters()))
    accumulate(model, tasks, adapted, lambda rows: len(rows) // 2)
    assert relative_error([each.grad for each in model.parameters()], expected) < 1e-12


def test_a_detached_state_is_carried_on():
    torch.manual_seed(0)
    memory, head = nn.GRU(3, 4).double(), nn.Linear(4, 1).double()

    def carrying():
        state = [None]

        def loss_sum(rows):
            out, after = memory(X[rows], state[0])
            state[0] = after.detach()
            return head(out).square().sum()

        return loss_sum

    modules = [memory, head]
    parameters = [each for module in modules for each in module.parameters()]
    loss_sum = carrying()
    expected = torch.autograd.grad(sum(loss_sum(rows) for rows in CUT) / 16, parameters)
    accumulate(modules, CUT, carrying(), len)
    assert relative_error([each.grad for each in parameters], expected) < 1e-12


def test_a_run_goes_on_in_the_middle_of_an_epoch():
    epochs = [list(windows([(epoch, index) for index in range(7)], 3)) for epoch in range(3)]  # 3, 3, 1
    made = 5
    epoch, done = divmod(made, len(windows(range(7), 3)))
    resumed = islice(windows([(epoch, index) for index in range(7)], 3), done, None)
    assert next(resumed) == [each for windows_of in epochs for each in windows_of][made] == [(1, 6)]


# --- accumulate: what it costs ---

SCALERS = [None, torch.amp.GradScaler("cpu", init_scale=8.0)]


# What waits for a device, if the tensor is on one. They are patched: on a CPU `tolist` runs no operator.
WAITS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
    "nonzero",
    "equal",
)


@pytest.fixture
def waited(monkeypatch):
    names = []

    def noting(name, original):
        def call(self, *args, **kwargs):
            names.append(name)
            return original(self, *args, **kwargs)

        return call

    for name in WAITS:
        monkeypatch.setattr(Tensor, name, noting(name, getattr(Tensor, name)))
    return names


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("nonfinite", ["pass", "raise"])
@pytest.mark.parametrize("keys", [None, ["one"], ["one", "two"]])
@pytest.mark.parametrize("counted", [torch.clone, int])
def test_one_wait_a_window_and_one_to_raise(waited, counted, keys, nonfinite, scaler):
    task, _, window = make("mlp", cut=((2, 0.0),) * 8)
    numbers = [counted(torch.tensor(5)) for _ in window]

    def keyed(value):
        return dict.fromkeys(keys, value) if keys else value

    window = list(zip(window, numbers, strict=True))
    waited.clear()
    accumulate(
        task.model,
        window,
        lambda batch: keyed(task.loss_sum(batch[0])),
        lambda batch: keyed(batch[1]),
        scaler=scaler,
        nonfinite=nonfinite,
    )
    assert waited == ["tolist"] * ((counted is torch.clone) + (nonfinite == "raise"))


def test_the_waits_are_seen(waited):
    task, _, window = make("mlp", cut=((2, 0.0),) * 3)
    waited.clear()  # what made the window
    accumulate(task.model, window, task.loss_sum, lambda batch: int(task.count(batch)))
    assert waited == ["__int__"] * 3


@pytest.mark.parametrize("scaler", SCALERS)
def test_no_graph_is_alive_in_the_next_forward(scaler):
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
def test_a_negative_or_infinite_count_is_refused(good, bad):
    with refused(ValueError, "count", "micro-batch 1", f"{float(bad):g}"):
        accumulate(nn.Linear(2, 1), [0, 1], never, [good, bad].__getitem__)


@pytest.mark.parametrize(
    "bad", [None, "3", True, 1j, [3], torch.tensor([3]), torch.tensor(True), torch.tensor(1j), torch.ones(2)]
)
def test_a_count_that_is_no_number_is_refused(bad):
    given = f"shape {tuple(bad.shape)} and dtype {bad.dtype}" if isinstance(bad, Tensor) else repr(bad)
    with refused(TypeError, "count", "micro-batch 1", given):
        accumulate(nn.Linear(2, 1), [0, 1], never, [2, bad].__getitem__)


def test_nothing_to_train_or_to_read_is_refused():
    for window in ([], iter(())):
        with refused(ValueError, "window is empty"):
            accumulate(nn.Linear(2, 1), window, never, never)
    for model in (nn.ReLU(), nn.Linear(2, 1).requires_grad_(False)):
        with refused(ValueError, f"({type(model).__name__}) has no trainable parameter"):
            accumulate(model, [1], never, never)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_grad_already_there_is_refused_and_kept(value, frozen):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    left = model[1].weight.grad = torch.full((1, 2), value)
    model[1].weight.requires_grad_(not frozen)
    with refused(ValueError, "'1.weight' of Sequential", "zero_grad(set_to_none=True)", "another loss or model"):
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
        (lambda loss: loss * 1j, TypeError, "torch.complex128"),
        (lambda loss: loss.detach(), ValueError, "without a graph"),
    ],
)
def test_a_bad_loss_is_refused_and_resets_grad(spoil, error, said):
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
def test_any_error_passes_and_a_retry_works(error, place):
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
