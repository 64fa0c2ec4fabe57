"""`accumulate` on several ranks: one process's gradient, or a refusal.

DDP on threads with real gloo is in the quick suite; `fully_shard` and what needs processes, ranks_job.py, is slow.
"""

import copy
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threaded import ended, errors_of, refused, said_by_ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks, post_localSGD_hook
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gradaccum import NonFiniteLoss, Window, accumulate, relative_error, windows
from gradaccum.threads import run_ranks

ROWS = 40
X, Y = torch.randn(2, ROWS, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLASSES = torch.arange(ROWS) % 3
DEAL = [[range(0, 2), range(2, 4), range(4, 6)], [range(6, 16), range(16, 40)]]  # unequal in items and micro-batches
torch.manual_seed(0)
START = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def squares(model, rows):
    return mse_loss(model(X[list(rows)]), Y[list(rows)], reduction="sum")


def gradients(model):
    return [each.grad for each in model.parameters() if each.requires_grad]


def whole(model=START, rows=range(ROWS), loss_sum=squares, divisor=None):
    """The gradient of the global batch in one process, and its loss: the oracle, which cuts nothing."""
    model = copy.deepcopy(model)
    loss = loss_sum(model, rows) / (divisor or len(rows))
    loss.backward()
    return gradients(model), loss.item()


def wrapped(group, model=START, **options):
    return DistributedDataParallel(copy.deepcopy(model), process_group=group, **options)


def off(model, right):
    return relative_error(gradients(model), right)


class Sent(TorchDispatchMode):
    """Note the collectives of a block: how many numbers each sends."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.numbers.append((func._opname, sum(each.numel() for each in args[0])))
        return func(*args, **(kwargs or {}))


# --- the gradient ---


def masked(model, rows):
    return cross_entropy(model(X[list(rows)])[:, :3], targets(rows), reduction="sum")


def targets(rows):
    return torch.where(torch.tensor([row % 4 == 1 for row in rows], dtype=torch.bool), -100, CLASSES[list(rows)])


def counted(rows):
    return (targets(rows) != -100).sum()


@st.composite
def deals(draw):
    """1 to 4 ranks with 0 to 4 micro-batches each, of 1 to 5 rows that are drawn anew."""
    rows = iter(draw(st.permutations(range(ROWS))))
    sizes = draw(st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=4))
    return [[[next(rows) for _ in range(size)] for size in of_rank] for of_rank in sizes]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(deal=deals(), sync=st.sampled_from(["last", "each"]), as_tensor=st.booleans())
def test_any_deal_is_one_processs_gradient(deal, sync, as_tensor):
    rows = [row for of_rank in deal for micro_batch in of_rank for row in micro_batch]
    items = int(counted(rows)) if rows else 0

    def work(rank, group):
        model = wrapped(group)
        window = Window(deal[rank], spare=[1])
        count = counted if as_tensor else lambda rows: int(counted(rows))
        result = accumulate(model, window, lambda rows: masked(model, rows), count, sync=sync)
        return off(model, right), result.count, result.loss.item()

    if items == 0:
        said = {str(error) for error in errors_of(len(deal), lambda rank, group: work(rank, group))}
        assert len(said) == 1
        assert ("skip this window" in said.pop()) or len(deal) == 1
        return
    right, mean = whole(rows=rows, loss_sum=masked, divisor=items)
    for error, count, loss in run_ranks(len(deal), work):
        assert error < 1e-12
        assert (count, type(count)) == (items, int)
        assert loss == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("sync", ["last", "each"])
def test_what_is_sent_is_counted(size, sync):
    def work(rank, group):
        model = wrapped(group)
        for _ in range(3):  # DDP rebuilds its buckets in the first two
            model.zero_grad()
            with Sent() as sent:
                accumulate(model, DEAL[rank % 2], lambda rows: squares(model, rows), len, sync=sync)
        return sent.numbers

    numbers = sum(each.numel() for each in START.parameters())
    for sent in run_ranks(size, work):
        assert [name for name, _ in sent] == ["allreduce_"] * len(sent)
        table, *passes, loss = [amount for _, amount in sent]
        assert passes == [numbers] * (1 if sync == "last" else 3)
        assert table <= 16 * size
        assert loss == 2


@pytest.mark.parametrize("nonfinite", ["pass", "raise"])
@pytest.mark.parametrize("counted_as", [torch.tensor, int])
def test_one_wait_a_window_and_one_to_raise(monkeypatch, counted_as, nonfinite):
    waited, waits = [], ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal")

    def noting(name, original):
        def call(self, *args, **kwargs):
            waited.append((threading.get_ident(), name))
            return original(self, *args, **kwargs)

        return call

    def work(rank, group):
        model = wrapped(group)
        window = [(rows, counted_as(len(rows))) for rows in DEAL[rank]]
        for _ in range(3):
            model.zero_grad()
            before = len(waited)
            accumulate(model, window, lambda each: squares(model, each[0]), lambda each: each[1], nonfinite=nonfinite)
        return [name for thread, name in waited[before:] if thread == threading.get_ident()]

    for name in waits:
        monkeypatch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
    assert run_ranks(2, work) == [["tolist"] * (1 + (nonfinite == "raise"))] * 2


def two_losses(model, rows):
    out = model(X[list(rows)])
    even = [index for index, row in enumerate(rows) if row % 2 == 0]
    return {"all": out.square().sum(), "even": out[even].exp().sum()}


def two_counts(rows):
    return {"even": sum(row % 2 == 0 for row in rows), "all": torch.tensor(len(rows))}


@pytest.mark.parametrize("many", [0, 9])
def test_dicts_of_counts_each_have_their_total(many):
    extra = [f"more {index}" for index in range(many)]

    def loss_sum(model, rows):
        losses = two_losses(model, rows)
        return losses | {key: (index + 1) * losses["all"] for index, key in enumerate(extra)}

    def work(rank, group):
        model = wrapped(group)

        def count(rows):
            counts = two_counts(rows) | dict.fromkeys(extra, len(rows))
            return dict(reversed(counts.items())) if rank else counts  # their order is nobody's business

        result = accumulate(model, DEAL[rank], lambda rows: loss_sum(model, rows), count)
        return off(model, right), result

    def mean(model, rows):
        losses = loss_sum(model, rows)
        return sum(losses[key] / (20 if key == "even" else 40) for key in losses)

    right, value = whole(loss_sum=mean, divisor=1)
    for error, result in run_ranks(2, work):
        assert error < 1e-12
        assert result.count == {"even": 20, "all": 40, **dict.fromkeys(extra, 40)}
        assert result.loss.item() == pytest.approx(value, rel=1e-12)


# --- kinds of models and of training ---


class Wrapper(nn.Module):
    """As libraries wrap: what is inside is a submodule, and the forward hands on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args)


class Blocks(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.blocks, self.reentrant = copy.deepcopy(START), reentrant

    def forward(self, x):
        return checkpoint(self.blocks, x.requires_grad_(), use_reentrant=self.reentrant)


class Routed(nn.Module):
    """Which half is used depends on the rows, and one never is."""

    def __init__(self):
        super().__init__()
        self.halves = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]).double()

    def forward(self, x):
        return self.halves[int(len(x) > 5)](x)


class Answer(nn.Module):
    """As models of transformers do: keywords in, a dict out."""

    def __init__(self):
        super().__init__()
        self.net = copy.deepcopy(START)

    def forward(self, x=None, again=False):
        return {"logits": self.net(x), "twice": self.net(2 * x) if again else None}


class Asked(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x=x)["logits"] + self.inner(x=x, again=True)["twice"]


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    return model


def frozen():
    model = copy.deepcopy(START)
    model[0].weight.requires_grad_(False)
    return model


KINDS = {
    "wrapped": (START, {}, Wrapper),
    "wrapped twice": (Wrapper(START), {}, lambda ddp: Wrapper(Wrapper(ddp))),
    "compiled": (START, {}, lambda ddp: torch.compile(ddp, backend="aot_eager")),
    "compiled inside": (
        START,
        {},
        lambda ddp: setattr(ddp, "module", torch.compile(ddp.module, backend="eager")) or ddp,
    ),
    "frozen": (frozen(), {}, Wrapper),
    "tied": (tied(), {}, Wrapper),
    "two forwards, a dict": (Answer(), {}, Asked),
    "unused": (Routed(), {"find_unused_parameters": True}, Wrapper),
    "static graph": (START, {"static_graph": True}, Wrapper),
    "bucket views": (START, {"gradient_as_bucket_view": True}, Wrapper),
    "checkpoint": (Blocks(reentrant=False), {}, Wrapper),
    "reentrant checkpoint": (Blocks(reentrant=True), {"static_graph": True}, Wrapper),
}


@pytest.mark.parametrize("sync", ["last", "each"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models_three_windows_each(kind, sync):
    start, options, outer = KINDS[kind]

    def pieces(model, rows):  # as they are cut, where the forward looks at how many there are
        return sum(squares(model, piece) for of_rank in DEAL for piece in of_rank)

    reference = Asked(start) if outer is Asked else start
    right, mean = whole(reference, loss_sum=pieces)

    def work(rank, group):
        model = outer(wrapped(group, start, **options))
        found = []
        for number in range(3):
            window = DEAL[(rank + number) % 2]
            result = accumulate(model, window, lambda rows: squares(model, rows), len, sync=sync)
            mine = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained(model)]
            found.append((relative_error(mine, [torch.zeros(()) if each is None else each for each in right]), result))
            model.zero_grad()
        return found

    def trained(model):
        return [each for each in model.parameters() if each.requires_grad]

    right = [torch.zeros_like(each) if one is None else one for each, one in zip(trained(start), right, strict=True)]
    assert len(right) == len(trained(start)) > 0
    for found in run_ranks(2, work):
        for error, result in found:
            assert error < 1e-12
            assert result.loss.item() == pytest.approx(mean, rel=1e-12)


def test_two_modules_in_a_list_each_in_an_engine():
    towers = [START, copy.deepcopy(START)]

    def both(models, rows):
        left, right = (model(X[list(rows)]) for model in models)
        return (left * right).sum(-1).exp().sum()

    reference = copy.deepcopy(towers)
    (both(reference, range(ROWS)) / ROWS).backward()
    right = [each.grad for model in reference for each in model.parameters()]

    def work(rank, group):
        models = [wrapped(group, each) for each in towers]
        accumulate(models, DEAL[rank], lambda rows: both(models, rows), len)
        return relative_error([each.grad for model in models for each in model.parameters()], right)

    assert max(run_ranks(2, work)) < 1e-12


def test_sparse_gradients():
    start = nn.Sequential(nn.Embedding(3, 4, sparse=True), nn.Linear(4, 4)).double()

    def loss_sum(model, rows):
        return model(CLASSES[list(rows)]).square().sum()

    def work(rank, group):
        model = wrapped(group, start)
        accumulate(model, DEAL[rank], lambda rows: loss_sum(model, rows), len)
        return relative_error([each.to_dense() for each in gradients(model)], right)

    right = [each.to_dense() for each in whole(start, loss_sum=loss_sum)[0]]
    assert max(run_ranks(2, work)) < 1e-12


class Talking(nn.SyncBatchNorm):
    """A stand-in that runs on a CPU: it exchanges something in each forward."""

    group = None

    def forward(self, x):
        torch.distributed.all_reduce(torch.zeros(3), group=self.group)
        return x


@pytest.mark.filterwarnings("ignore:BatchNorm")
def test_ranks_that_talk_in_the_forward_keep_pace():
    right, _ = whole()

    def work(rank, group):
        model = wrapped(group)
        model.module.append(Talking(4, affine=False))  # DDP itself refuses it on a CPU
        model.module[-1].group = group
        accumulate(model, DEAL[rank], lambda rows: squares(model, rows), len)  # 3 passes and 2
        return off(model, right)

    assert max(run_ranks(2, work)) < 1e-12


def test_an_evaluation_between_windows():
    right, _ = whole()

    def work(rank, group):
        model = wrapped(group)
        for _ in range(3):
            model.zero_grad()
            accumulate(model, DEAL[rank], lambda rows: squares(model, rows), len)
            with torch.no_grad():
                model.eval()(X)
            model.train()
        return off(model, right)

    assert max(run_ranks(2, work)) < 1e-12


def test_a_scaler_and_its_step():
    def work(rank, group):
        model, scaler = wrapped(group), torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = [each.detach().clone() for each in model.parameters()]
        accumulate(
            model,
            Window(DEAL[1], [0]) if rank else Window([], [0]),
            lambda rows: squares(model, rows),
            len,
            scaler=scaler,
        )
        scaler.unscale_(optimizer)
        gradient = [each.clone() for each in gradients(model)]
        scaler.step(optimizer)
        scaler.update()
        moved = [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]
        return relative_error(moved, gradient), relative_error(gradient, right)

    right, _ = whole(rows=range(6, 40))
    for moved, error in run_ranks(2, work):
        assert moved < 1e-12
        assert error < 1e-12


# --- refusals: on all ranks together ---


def stale(model):
    model.module[0].weight.grad = torch.zeros_like(model.module[0].weight)


def uncovered(model):
    model.extra = nn.Parameter(torch.zeros(1))


def thawed(model):
    model.module[0].bias.requires_grad_(False)


FAULTS = {  # what is wrong on rank 1 alone: the model, the window and the options
    "stale": (stale, {}, ValueError, "zero_grad"),
    "uncovered": (uncovered, {}, ValueError, "'extra' is trainable and no engine averages it"),
    "frozen later": (thawed, {}, ValueError, "freeze or unfreeze parameters"),
    "negative": (None, {"count": lambda rows: torch.tensor(-1)}, ValueError, "for micro-batch 0 it returned -1"),
    "nan": (None, {"count": lambda rows: torch.tensor(math.nan)}, ValueError, "it returned nan"),
    "minus": (None, {"count": lambda rows: -2}, ValueError, "it returned -2"),
    "no number": (None, {"count": lambda rows: "2"}, TypeError, "'2' (str)"),
    "empty": (None, {"window": []}, ValueError, "The window is empty"),
    "alone": (None, {"alone": True}, ValueError, "for a model without an engine"),
    "sync": (None, {"sync": "never"}, ValueError, "sync must be 'last' or 'each'"),
    "nonfinite": (None, {"nonfinite": "skip"}, ValueError, "nonfinite must be 'pass' or 'raise'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_ranks_fault_is_raised_on_all(fault):
    spoil, options, kind, said = FAULTS[fault]
    forwards = []

    def work(rank, group):
        model = wrapped(group)
        if rank == 1 and spoil:
            spoil(model)
        given = {"window": DEAL[rank], "count": len} | (options if rank == 1 else {})
        accumulate(model, given.pop("window"), forwards.append, **given)

    other, own = errors_of(2, work)
    assert (type(other), type(own)) == (kind, kind)
    assert str(other) == "Rank 1 raised an error: see that rank."
    assert str(own).startswith("On rank 1: ")
    assert said in str(own)
    assert forwards == []


def test_an_error_of_count_is_raised_on_all():
    def work(rank, group):
        model = wrapped(group)
        accumulate(model, DEAL[rank], lambda rows: squares(model, rows), lambda rows: 1 // 0 if rank else 1)

    other, own = errors_of(2, work)
    assert (type(other), type(own)) == (RuntimeError, ZeroDivisionError)
    assert "Rank 1 raised" in str(other)


@pytest.mark.parametrize(
    ("differ", "said"),
    [
        ({"count": lambda rows: {"a": 1}}, "same keys"),
        ({"nonfinite": "raise"}, "nonfinite must be the same"),
    ],
)
def test_what_differs_between_ranks_is_refused(differ, said):
    def work(rank, group):
        model = wrapped(group)
        accumulate(model, DEAL[rank], None, **{"count": len} | (differ if rank else {}))

    first, second = errors_of(2, work)
    assert type(first) is type(second) is ValueError
    assert str(first) == str(second)
    assert said in str(first)
    assert "ranks 0 and 1" in str(first)


@pytest.mark.parametrize("k", [1, 3])
def test_a_pass_around_the_engine_is_refused(k):
    def work(rank, group):
        model = wrapped(group)
        accumulate(model, DEAL[0][:k], lambda rows: squares(model.module, rows), len)

    for error in errors_of(2, work):
        assert type(error) is RuntimeError
        assert "call the wrapped model" in str(error)


def test_engines_that_average_otherwise():
    def within_no_sync(rank, group):
        model = wrapped(group)
        with model.no_sync():
            accumulate(model, DEAL[rank], None, len)

    def nested(rank, group):
        model = DistributedDataParallel(nn.Sequential(wrapped(group)), process_group=group)
        accumulate(model, DEAL[rank], None, len)

    def alone(rank, group):
        accumulate(wrapped(group), DEAL[rank], None, len, alone=True)

    for work, kind, said in (
        (within_no_sync, RuntimeError, "inside no_sync()"),
        (nested, NotImplementedError, "averages too"),
        (alone, ValueError, "alone=True"),
    ):
        for error in errors_of(2, work):
            assert type(error) is kind, error
            assert said in str(error)


def test_one_made_trainable_for_another_is_refused():
    def work(rank, group):
        model = wrapped(group, frozen(), find_unused_parameters=True)
        model.module[0].weight.requires_grad_(True)
        model.module[2].weight.requires_grad_(False)  # as many, and as large
        accumulate(model, DEAL[rank], None, len)

    for error in errors_of(2, work):
        assert "'module.0.weight' is trainable and no engine averages it" in str(error)


def test_communication_hooks():
    def work(hook, state=None):
        def on(rank, group):
            model = wrapped(group)
            model.register_comm_hook(state or group, hook)
            accumulate(model, DEAL[rank], lambda rows: squares(model, rows), len)
            assert off(model, right) < 1e-3  # half precision is sent

        return on

    right, _ = whole()
    run_ranks(2, work(default_hooks.fp16_compress_hook))
    for hook in (
        debugging_hooks.noop_hook,
        default_hooks.fp16_compress_wrapper(debugging_hooks.noop_hook),
        post_localSGD_hook.post_localSGD_hook,
    ):
        for error in errors_of(2, work(hook)):
            assert type(error) is NotImplementedError
            assert "with the communication hook" in str(error)


@pytest.mark.parametrize("wraps", [True, False])
def test_a_loss_that_trains_what_is_not_given(wraps):
    def work(rank, group):
        model, other = wrapped(group), copy.deepcopy(START)
        if wraps:
            other = DistributedDataParallel(other, process_group=group)

        def loss_sum(rows):
            return squares(model, rows) + squares(other, rows)

        accumulate(model, DEAL[rank], loss_sum, len)

    for error in errors_of(2, work):
        assert type(error) is ValueError
        assert "that is in none of the modules passed" in str(error)


def test_gradients_not_all_sent_are_refused():
    def work(rank, group):
        model = wrapped(group, Routed())  # without find_unused_parameters
        try:
            accumulate(model, [range(2)], lambda rows: squares(model, rows), len)
        finally:
            assert set(gradients(model)) == {None}

    for error in errors_of(2, work):
        assert type(error) is RuntimeError
        assert "set find_unused_parameters=True" in str(error)


# --- losses that are not finite, errors within a window, windows that end at different times ---


def test_not_finite_is_raised_on_all_and_tried():
    bad = DEAL[1][0]

    def work(rank, group):
        model = wrapped(group)
        window = Window(DEAL[rank], spare=bad)

        def loss_sum(rows):
            return squares(model, rows) * (math.inf if rows is bad else 1)

        with pytest.raises(NonFiniteLoss) as caught:
            accumulate(model, window, loss_sum, len, nonfinite="raise")
        assert set(gradients(model)) == {None}
        assert str(caught.value).count(".") == 1
        left = caught.value.micro_batches
        accumulate(model, window.without(left), loss_sum, len, nonfinite="raise")
        return left, off(model, right)

    right, _ = whole(rows=[*range(6), *range(16, 40)])
    (first, error), (second, same) = run_ranks(2, work)
    assert (first, second) == ([], [0])
    assert max(error, same) < 1e-12


@pytest.mark.parametrize("sync", ["last", "each"])
def test_a_spare_that_is_not_finite_adds_nothing(sync):
    def work(rank, group):
        model = wrapped(group)

        def loss_sum(rows):
            return (squares(model, rows) * (0 if rank else 1)).log() if rank else squares(model, rows)

        accumulate(model, Window([] if rank else DEAL[0], spare=[0]), loss_sum, len, nonfinite="raise", sync=sync)
        return off(model, right)

    right, _ = whole(rows=range(6))
    assert max(run_ranks(2, work)) < 1e-12


@pytest.mark.parametrize("place", [0, 1])
def test_after_an_error_the_next_window_is_exact(place):
    right, _ = whole()

    def work(rank, group):
        model, calls = wrapped(group), []

        def loss_sum(rows):
            calls.append(rows)
            if len(calls) == place + 1:
                raise KeyError(place)
            return squares(model, rows)

        with pytest.raises(KeyError):
            accumulate(model, DEAL[rank], loss_sum, len)
        assert set(gradients(model)) == {None}
        accumulate(model, DEAL[rank], loss_sum, len)
        return off(model, right)

    assert max(run_ranks(2, work)) < 1e-12


def test_windows_that_end_at_different_times():
    loaders = [[range(0, 4), range(4, 9), range(9, 10), range(10, 20), range(20, 26)], [range(26, 40)]]
    rights = [whole(rows=[*range(0, 9), *range(26, 40)]), whole(rows=range(9, 20)), whole(rows=range(20, 26))]

    def work(rank, group):
        model, found = wrapped(group), []
        epoch = windows(loaders[rank], 2, group=group)
        for _ in range(2):
            for window in epoch:
                accumulate(model, window, lambda rows: squares(model, rows), len)
                found.append(off(model, rights[len(found) % 3][0]))
                model.zero_grad()
        return len(epoch), found

    (long, first), (short, second) = run_ranks(2, work)
    assert (long, short) == (3, 1)  # each rank's own
    assert len(first) == len(second) == 6
    assert max(first + second) < 1e-12


def test_windows_refuse_together():
    def failing():
        yield [1]
        raise OSError("disk")

    def work(loaders):
        return lambda rank, group: [list(window) for window in windows(loaders[rank], 1, group=group)]

    first, second = errors_of(2, work([[[1]], []]))
    assert str(first) == str(second) == "Rank 1 has no micro-batch: give each rank at least one."
    first, second = errors_of(2, work([[[1], [2]], failing()]))
    assert (type(first), type(second)) == (RuntimeError, OSError)
    assert run_ranks(2, work([[], []])) == [[], []]
    with refused(TypeError, "group"):
        windows([1], 1, group=2)


def test_one_rank_takes_the_path_of_one_process():
    right, _ = whole()

    def work(rank, group):
        model = wrapped(group)
        with Sent() as sent:
            accumulate(model, [rows for of_rank in DEAL for rows in of_rank], lambda rows: squares(model, rows), len)
        return off(model, right), [numbers for name, numbers in sent.numbers if name == "allreduce_"]

    ((error, sent),) = run_ranks(1, work)
    assert error < 1e-12
    assert sent == [49] * 5  # DDP's own, and no table


# --- ranks as processes ---

JOB = Path(__file__).with_name("ranks_job.py")
CASES = re.findall(r"    def ((?:two|four)_\w+)\(", JOB.read_text())


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each rank says of each case, by the number of processes that it is for."""
    found = {}
    for prefix, size in (("two", 2), ("four", 4)):
        found |= said_by_ranks(JOB, size, tmp_path_factory.mktemp(prefix) / "store", prefix)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_as_processes(said, case):
    ranks = range(2 if case.startswith("two") else 4)
    assert {rank: said.get((case, rank), "it was not reached") for rank in ranks} == dict.fromkeys(ranks, "ok")


KILLED = """import os, signal, sys, torch
from torch import nn
from gradaccum import accumulate
rank, store = int(os.environ["RANK"]), torch.distributed.FileStore(sys.argv[1], 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
def loss_sum(number):
    if rank == 1 and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return model(torch.ones(1, 2)).sum()
print("starts", flush=True)
accumulate(model, [0, 1, 2], loss_sum, lambda number: 1)
print("went on", flush=True)
"""


@pytest.mark.slow
def test_torchrun_ends_the_job_of_a_killed_rank(tmp_path):
    (script := tmp_path / "job.py").write_text(KILLED)
    # Not --standalone, whose store listens on all addresses: here the launcher's and the ranks' stores are files.
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={tmp_path / 'meeting'}", "--rdzv-conf=store_type=file"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--rdzv-id=1", "--nnodes=1"]
    command += ["--nproc-per-node=2", script, tmp_path / "store"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = str(JOB.parents[1])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    with ended([process], timeout=90) as (output,):
        assert process.returncode != 0
        assert output.count("starts") == 2, output
        assert "went on" not in output
        assert "Signal 9 (SIGKILL)" in output
