"""`windows` and `accumulate`: any cut of a window gives the full batch's gradient, and every mistake is refused."""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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

from gradaccum import Accumulated, accumulate, full_batch_gradient, windows
from gradaccum.models import GPT, embedding_linear

repeatable = settings(deadline=None, derandomize=True)


def is_one_sentence(error: pytest.ExceptionInfo[BaseException]) -> bool:
    text = str(error.value)
    return text.endswith(".") and ". " not in text and "\n" not in text


# --- windows ---


def counted(length: int, read: list[int]) -> Iterator[int]:
    for item in range(length):
        read.append(item)
        yield item


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


@repeatable
@given(items=st.lists(st.integers(), max_size=30), steps=st.integers(1, 12))
def test_windows_are_the_input_in_lists_of_k(items, steps):
    result = list(windows(items, steps))
    assert [item for window in result for item in window] == items
    assert all(type(window) is list and len(window) == steps for window in result[:-1])
    assert all(type(window) is list and 1 <= len(window) <= steps for window in result[-1:])
    assert len(windows(items, steps)) == len(result) == math.ceil(len(items) / steps)
    assert list(windows(iter(items), steps)) == result


def test_windows_read_no_further_than_the_list_they_yield():
    read: list[int] = []
    stream = windows(counted(7, read), 3)
    assert bool(stream)
    assert read == []
    for window in tqdm(stream, disable=True):
        assert read == list(range(window[-1] + 1))
    assert len(read) == 7
    with pytest.raises(TypeError):
        len(stream)
    assert list(windows(counted(7, []), 3)) == [[0, 1, 2], [3, 4, 5], [6]]  # `list` asks for a length too


def test_windows_can_be_iterated_again_and_twice_at_a_time():
    epoch = windows([1, 2, 3], 2)
    assert list(epoch) == list(epoch) == [[1, 2], [3]]
    assert list(zip(epoch, epoch, strict=True)) == [([1, 2], [1, 2]), ([3], [3])]


def test_windows_take_what_only_has_getitem():
    class Old:
        def __getitem__(self, index):
            if index == 3:
                raise IndexError
            return index

    assert list(windows(Old(), 2)) == [[0, 1], [2]]


def test_windows_of_data_loaders():
    loader = DataLoader(list(range(10)), batch_size=4)
    updates = windows(loader, 2)
    assert (len(updates), tqdm(updates, disable=True).total) == (2, 2)
    for _ in range(2):
        assert [[batch.tolist() for batch in window] for window in updates] == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9]]]
    updates = windows(DataLoader(Stream(), batch_size=4), 2)
    with pytest.raises(TypeError):
        len(updates)
    assert [len(window) for window in updates] == [len(window) for window in updates] == [2, 1]


@pytest.mark.parametrize(
    ("micro_batches", "steps", "error", "given"),
    [
        ([1], 4.0, TypeError, "4.0"),
        ([1], True, TypeError, "True"),
        ([1], "4", TypeError, "'4'"),
        ([1], None, TypeError, "None"),
        ([1], np.int64(4), TypeError, "int64"),
        ([1], 0, ValueError, "0"),
        ([1], -3, ValueError, "-3"),
        (7, 2, TypeError, "7"),
        (None, 2, TypeError, "None"),
    ],
)
def test_windows_refuse_at_the_call(micro_batches, steps, error, given):
    with pytest.raises(error) as caught:
        windows(micro_batches, steps)
    assert given in str(caught.value)
    assert ("accumulation_steps" if micro_batches == [1] else "micro_batches") in str(caught.value)
    assert is_one_sentence(caught)


# --- accumulate: the gradient, against an oracle that makes one padded batch and takes one mean ---


class Task(NamedTuple):
    model: nn.Module
    sample: Callable[[torch.Generator, str], tuple[Tensor, Tensor]]  # "all", "some" or "none" of the targets ignored
    collate: Callable[[list[tuple[Tensor, Tensor]]], tuple[Tensor, Tensor]]
    loss: Callable[[tuple[Tensor, Tensor], str], Tensor]
    count: Callable[[tuple[Tensor, Tensor]], Tensor]

    def loss_sum(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(batch, "sum")

    def full_batch(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor | None], Tensor]:
        mean = self.loss(self.collate(samples), "mean")
        return list(torch.autograd.grad(mean, list(self.model.parameters()), allow_unused=True)), mean.detach()


def stacked(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if not samples:
        return torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


def padded(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if not samples:
        return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)
    inputs, targets = ([pair[side] for pair in samples] for side in (0, 1))
    return pad_sequence(inputs, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-100)


def vector_sample(generator: torch.Generator, ignored: str) -> tuple[Tensor, Tensor]:
    drop = ignored == "all" or (ignored == "some" and torch.rand((), generator=generator) < 0.5)
    target = torch.tensor(-100) if drop else torch.randint(4, (), generator=generator)
    return torch.randn(3, generator=generator, dtype=torch.float64), target


def line_sample(generator: torch.Generator, ignored: str) -> tuple[Tensor, Tensor]:
    length = int(torch.randint(1, 7, (), generator=generator))
    inputs, targets = torch.randint(11, (2, length), generator=generator)
    drop = torch.rand(length, generator=generator) < {"all": 1.1, "some": 0.5, "none": 0.0}[ignored]
    return inputs, targets.masked_fill(drop, -100)


def make_task(name: str) -> Task:
    torch.manual_seed(0)
    models = {
        "linear": lambda: nn.Linear(3, 4),
        "mlp": lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4)),
        "embedding_linear": lambda: embedding_linear(vocabulary=11, width=4),
        "gpt": lambda: GPT(vocabulary=11, context=6, width=8, layers=1, heads=2),
    }
    model = models[name]().double()

    def loss(batch: tuple[Tensor, Tensor], reduction: str) -> Tensor:
        logits = model(batch[0])
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[1].flatten(), reduction=reduction)

    vectors = name in ("linear", "mlp")
    sample, collate = (vector_sample, stacked) if vectors else (line_sample, padded)
    return Task(model, sample, collate, loss, lambda batch: (batch[1] != -100).sum())


def distance(actual: list[Tensor | None], expected: list[Tensor | None]) -> float:
    assert [a is None for a in actual] == [e is None for e in expected]
    pairs = [(a.detach().double(), e.detach().double()) for a, e in zip(actual, expected, strict=True) if a is not None]
    assert all(a.shape == e.shape for a, e in pairs)
    return math.sqrt(
        sum(float((a - e).square().sum()) for a, e in pairs) / sum(float(e.square().sum()) for _, e in pairs)
    )


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


TASKS = {name: make_task(name) for name in ("linear", "mlp", "embedding_linear", "gpt")}
pieces = st.lists(
    st.tuples(st.sampled_from([0, 1, 1, 2, 3, 5]), st.sampled_from(["all", "some", "none"])), min_size=1, max_size=7
)
counts = st.lists(st.sampled_from([int, float, np.int64, torch.Tensor.clone, torch.Tensor.int]), min_size=7, max_size=7)


@pytest.mark.parametrize("name", TASKS)
@settings(repeatable, max_examples=60)
@given(cut=pieces, kinds=counts, seed=st.integers(0, 2**31), data=st.data())
def test_any_cut_of_any_window_gives_the_full_batch_gradient(name, cut, kinds, seed, data):
    task = TASKS[name]
    task.model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(seed)
    groups = [[task.sample(generator, ignored) for _ in range(size)] for size, ignored in cut]
    window = [task.collate(group) for group in groups]
    count_kind = {id(batch[0]): kind for batch, kind in zip(window, kinds, strict=False)}

    def count(batch):
        return count_kind[id(batch[0])](task.count(batch))

    items = sum(int(task.count(batch)) for batch in window)
    if items == 0:
        with pytest.raises(ValueError, match="returned 0"):
            accumulate(task.model, window, task.loss_sum, count)
        return
    shuffled = data.draw(st.permutations([sample for group in groups for sample in group]))
    expected, mean = task.full_batch(shuffled)
    result = accumulate(task.model, (batch for batch in window), task.loss_sum, count)
    assert distance(gradients(task.model), expected) < 1e-12
    assert distance(full_batch_gradient(task.model, window, task.loss_sum, count), expected) < 1e-12
    assert result.count == items
    assert abs(float(result.loss) - float(mean)) < 1e-12 * abs(float(mean))


def lines(name: str = "gpt", sizes: tuple[int, ...] = (3, 1, 2), seed: int = 1) -> tuple[Task, list, list]:
    """Make a task, its samples and a window of them."""
    task = TASKS[name]
    task.model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(seed)
    groups = [[task.sample(generator, "none") for _ in range(size)] for size in sizes]
    return task, [sample for group in groups for sample in group], [task.collate(group) for group in groups]


def test_what_it_returns():
    task, samples, window = lines()
    result = accumulate(task.model, window, task.loss_sum, task.count)
    assert isinstance(result, Accumulated)
    assert result._fields == ("loss", "count")
    assert result.loss.shape == ()
    assert result.loss.dtype == torch.float64
    assert result.loss.requires_grad is False
    assert type(result.count) is int
    assert result.loss.item() == pytest.approx(task.full_batch(samples)[1].item(), rel=1e-12)


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_whole_counts_add_up_to_an_int(kind):
    task, _, window = lines()
    assert type(accumulate(task.model, window, task.loss_sum, lambda batch: kind(len(batch[0]))).count) is int


def test_weights_may_be_counted_instead_of_items():
    task, samples, window = lines("mlp")
    result = accumulate(task.model, window, lambda b: task.loss_sum(b) * 0.25, lambda b: torch.tensor(0.25 * len(b[0])))
    assert result.count == 1.5
    assert distance(gradients(task.model), task.full_batch(samples)[0]) < 1e-12


def test_it_changes_nothing_but_grad():
    task, _, window = lines()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    accumulate(task.model, window, task.loss_sum, task.count)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert task.model.training
    with pytest.raises(ValueError, match="zero_grad"):  # nor does it clear what it has left there
        accumulate(task.model, window, task.loss_sum, task.count)


def test_a_scaler_scales_the_gradient_and_not_the_loss():
    task, samples, window = lines()
    expected, mean = task.full_batch(samples)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    result = accumulate(task.model, window, task.loss_sum, task.count, scaler=scaler)
    assert distance([g / 1024 for g in gradients(task.model)], expected) < 1e-12
    scaler.unscale_(optimizer)
    assert distance(gradients(task.model), expected) < 1e-12
    assert result.loss.item() == pytest.approx(mean.item(), rel=1e-12)
    assert result.loss.requires_grad is False


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_a_loss_that_is_not_finite_is_no_error_and_the_scaler_skips_the_step(scale):
    task, _, window = lines("linear")
    before = [parameter.detach().clone() for parameter in task.model.parameters()]
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    factors = iter([1.0, math.inf, 1.0])
    result = accumulate(task.model, window, lambda b: task.loss_sum(b) * next(factors), task.count, scaler=scaler)
    assert result.loss.item() == math.inf
    assert not all(gradient.isfinite().all() for gradient in gradients(task.model))
    if scale is not None:
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale / 2
        assert all(torch.equal(p, old) for p, old in zip(task.model.parameters(), before, strict=True))


def test_the_dtype_of_grad_is_the_parameters_own_choice():
    # 1024 pieces of 1/1024 each: in bf16 the sum stalls at a quarter, in float32 it is exact.
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = nn.Linear(1, 1, bias=False).bfloat16()
        model.weight.grad_dtype = dtype
        x = torch.ones(1, 1, dtype=torch.bfloat16)
        result = accumulate(model, [x] * 1024, lambda x, model=model: model(x).sum(), len)
        assert model.weight.grad.dtype == dtype
        assert result.loss.dtype == torch.float32
        assert result.loss.item() == pytest.approx(model.weight.item(), rel=1e-6)  # in bf16 this would stall too
        found[dtype] = model.weight.grad.item()
    assert found == {torch.bfloat16: 0.25, torch.float32: 1.0}


def test_autocast():
    model = nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 4))
    x, y = torch.randn(12, 3), torch.randint(4, (12,))

    def loss(batch, reduction="sum"):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model(batch[0]), batch[1], reduction=reduction)

    expected = torch.autograd.grad(loss((x, y), "mean"), list(model.parameters()))
    result = accumulate(model, [(x[:5], y[:5]), (x[5:], y[5:])], loss, lambda batch: len(batch[0]))
    assert distance(gradients(model), list(expected)) < 2e-2
    assert result.loss.dtype == torch.float32


def test_shared_frozen_and_unused_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.middle = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight
            self.middle.bias.requires_grad_(False)
            self.unused.bias.requires_grad_(False)

    model = Tied().double()
    tokens, targets = torch.randint(7, (2, 9))

    def loss(batch, reduction="sum"):
        return cross_entropy(model.head(model.middle(model.embedding(batch[0]))), batch[1], reduction=reduction)

    used = [model.embedding.weight, model.middle.weight]
    expected = torch.autograd.grad(loss((tokens, targets), "mean"), used)
    accumulate(model, [(tokens[:2], targets[:2]), (tokens[2:], targets[2:])], loss, lambda batch: len(batch[0]))
    assert distance([parameter.grad for parameter in used], list(expected)) < 1e-12
    assert model.head.weight.grad is model.embedding.weight.grad
    assert [p.grad for p in (model.middle.bias, model.unused.weight, model.unused.bias)] == [None] * 3


def test_sparse_gradients_stay_sparse():
    model = nn.Embedding(9, 3, sparse=True).double()
    tokens = torch.tensor([1, 1, 5, 2, 5])
    accumulate(model, [tokens[:2], tokens[2:]], lambda x: model(x).square().sum(), len)
    assert model.weight.grad.is_sparse
    expected = torch.zeros(9, 3, dtype=torch.float64).index_add(0, tokens, 2 / 5 * model(tokens).detach())
    assert distance([model.weight.grad.to_dense()], [expected]) < 1e-12


# --- accumulate: what it costs ---


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):  # `tolist` on a CPU tensor runs no operator
    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen[getattr(func, "__name__", "")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=8.0)])
def test_at_most_one_scalar_read_a_window(scaler):
    task, _, window = lines("mlp", sizes=(2,) * 8)
    with Operators() as operators, Calls() as calls:
        result = accumulate(task.model, window, task.loss_sum, task.count, scaler=scaler)
    assert result.count == 16
    waits = ("aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero")
    assert sum(operators.seen[name] for name in waits) <= 1
    waits = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose")
    assert sum(calls.seen[name] for name in waits) <= 1
    assert operators.seen["aten.addmm"] == 16  # 8 micro-batches through two layers: the modes do see what runs


class Kept:
    """A tensor saved for backward, which counts its bytes for as long as it lives."""

    alive = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        Kept.alive += self.bytes
        Kept.most = max(Kept.most, Kept.alive)

    def __del__(self) -> None:
        Kept.alive -= self.bytes


def most_saved(task: Task, window: list[Any], scaler: torch.amp.GradScaler | None = None) -> int:
    task.model.zero_grad(set_to_none=True)
    assert Kept.alive == 0
    Kept.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        accumulate(task.model, window, task.loss_sum, task.count, scaler=scaler)
    assert Kept.alive == 0
    return Kept.most


def test_activations_are_free_before_the_next_forward():
    task, _, window = lines("mlp", sizes=(4,) * 5)
    one = max(most_saved(task, [micro_batch]) for micro_batch in window)
    assert most_saved(task, window) == one > 0
    scaler = torch.amp.GradScaler("cpu")
    assert most_saved(task, window, scaler) == max(most_saved(task, [micro_batch], scaler) for micro_batch in window)


def test_the_graph_itself_is_gone_before_the_next_forward():
    # A custom function, such as activation checkpointing, may keep tensors on its node, which backward does not free.
    kept: list[weakref.ref[Tensor]] = []

    class KeepOnNode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = x.clone()
            kept.append(weakref.ref(ctx.kept))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    model = nn.Linear(3, 2)

    def loss_sum(x):
        assert [reference() for reference in kept] == [None] * len(kept)
        return KeepOnNode.apply(model(x)).sum()

    for scaler in (None, torch.amp.GradScaler("cpu")):
        model.zero_grad(set_to_none=True)
        accumulate(model, [torch.ones(2, 3)] * 4, loss_sum, len, scaler=scaler)
    assert len(kept) == 8


# --- accumulate: what it refuses before the first forward ---


def never(micro_batch):
    raise AssertionError("no forward may run")


nan, inf = math.nan, math.inf


@pytest.mark.parametrize(
    ("counts", "error", "given"),
    [
        ([2, -1], ValueError, "-1"),
        ([2, torch.tensor(-3)], ValueError, "-3"),
        ([2, -0.5], ValueError, "-0.5"),
        ([2, nan], ValueError, "nan"),
        ([2, inf], ValueError, "inf"),
        ([2.0, torch.tensor(nan)], ValueError, "nan"),
        ([torch.tensor(2.0), torch.tensor(inf)], ValueError, "inf"),
        ([0, torch.tensor(0)], ValueError, "0"),
        ([0.0, 0], ValueError, "0"),
        ([2, None], TypeError, "None"),
        ([2, "3"], TypeError, "'3'"),
        ([2, True], TypeError, "True"),
        ([2, 1j], TypeError, "1j"),
        ([2, [3]], TypeError, "[3]"),
        ([2, torch.tensor([3])], TypeError, "(1,)"),
        ([2, torch.tensor(True)], TypeError, "torch.bool"),
        ([2, torch.tensor(1j)], TypeError, "torch.complex64"),
    ],
)
def test_a_bad_count_is_refused_before_the_first_forward(counts, error, given):
    model, returned = nn.Linear(2, 1), iter(counts)
    with pytest.raises(error) as caught:
        accumulate(model, ["a", "b"], never, lambda micro_batch: next(returned))
    assert given in str(caught.value)
    assert "count" in str(caught.value)
    assert "micro-batch 1" in str(caught.value) or "2 micro-batches" in str(caught.value)
    assert is_one_sentence(caught)
    assert gradients(model) == [None, None]


@pytest.mark.parametrize("window", [[], iter(())])
def test_an_empty_window_is_refused(window):
    with pytest.raises(ValueError, match="window is empty") as caught:
        accumulate(nn.Linear(2, 1), window, never, never)
    assert is_one_sentence(caught)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 1).requires_grad_(False)])
def test_a_model_with_nothing_to_train_is_refused(model):
    with pytest.raises(ValueError, match=type(model).__name__) as caught:
        accumulate(model, [1], never, never)
    assert "trainable" in str(caught.value)
    assert is_one_sentence(caught)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_grad_that_is_already_there_is_refused_and_left_alone(value, frozen):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    left = model[1].weight.grad = torch.full((1, 2), value)
    model[1].weight.requires_grad_(not frozen)
    with pytest.raises(ValueError, match=r"'1\.weight'.*zero_grad\(set_to_none=True\)") as caught:
        accumulate(model, [1], never, never)
    assert is_one_sentence(caught.match("grad") and caught)
    assert model[1].weight.grad is left
    assert left.eq(value).all()
    assert [parameter.grad is None for parameter in model.parameters()] == [True, True, False, True]


# --- accumulate: what it refuses when it sees it, and what passes through ---


@pytest.mark.parametrize(
    ("spoil", "error", "given"),
    [
        (lambda loss: loss.item(), TypeError, "float"),
        (lambda loss: None, TypeError, "None"),
        (lambda loss: loss.expand(3), ValueError, "(3,)"),
        (lambda loss: loss.reshape(1), ValueError, "(1,)"),
        (lambda loss: loss.detach(), ValueError, "without a graph"),
    ],
)
def test_a_bad_loss_is_refused_and_every_grad_is_none_again(spoil, error, given):
    task, _, window = lines("mlp")
    seen = []

    def loss_sum(batch):
        loss = task.loss_sum(batch)
        seen.append(gradients(task.model)[0])
        return spoil(loss) if len(seen) == 2 else loss

    with pytest.raises(error) as caught:
        accumulate(task.model, window, loss_sum, task.count)
    assert seen[1] is not None  # the first micro-batch's gradient was there
    assert gradients(task.model) == [None] * 6
    assert given in str(caught.value)
    assert "loss_sum" in str(caught.value)
    assert "micro-batch 1" in str(caught.value)
    assert is_one_sentence(caught)


@pytest.mark.parametrize("place", ["count", "forward", "backward"])
@pytest.mark.parametrize(
    "error", [KeyError("mine"), torch.OutOfMemoryError("full"), KeyboardInterrupt(), SystemExit(3)]
)
def test_any_error_passes_through_and_the_window_works_in_smaller_pieces(error, place):
    task, samples, window = lines("mlp")

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
    assert gradients(task.model) == [None] * 6
    pieces = [(x, y) for batch in window for x, y in zip(batch[0].split(1), batch[1].split(1), strict=True)]
    accumulate(task.model, pieces, task.loss_sum, task.count)
    assert distance(gradients(task.model), task.full_batch(samples)[0]) < 1e-12


def test_an_error_in_the_window_itself_passes_through():
    def window():
        yield torch.ones(1, 2)
        raise OSError("disk")

    model = nn.Linear(2, 1)
    with pytest.raises(OSError, match="disk"):
        accumulate(model, window(), never, len)
    assert gradients(model) == [None, None]
