"""`check_split`: which losses may be cut, how far off the others are, and when nothing can be told.

Every error is compared with that of two gradients computed here, without the module: the whole batch's, and that of the
pieces' sums divided by what they count.
"""

import random
import re
from collections.abc import MutableMapping

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import (
    cross_entropy,
    ctc_loss,
    dropout,
    l1_loss,
    mse_loss,
    normalize,
    scaled_dot_product_attention,
    softplus,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from gradaccum import accumulate, check_split, full_batch_gradient, relative_error

torch.set_num_threads(1)
SIZES = [9, 2, 5]
generator = torch.Generator().manual_seed(0)
X, Y = torch.randn(16, 8, generator=generator), torch.arange(16) % 5
SCALED = X * torch.linspace(0.1, 3, 16)[:, None]
WEIGHTS = torch.tensor([0.1, 4.0, 1.0, 0.5, 2.0])
POSITIVE = (torch.arange(16) > 10).float()


def mlp(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), *(middle or [nn.Tanh()]), nn.Linear(6, 5))


def by_items(model, mean, total, count=len, x=X):
    """The usual form: rows with their classes, and two functions of the logits and the classes."""

    def of(function):
        return lambda rows: function(model(x[rows]), Y[rows], rows)

    return model, of(mean), of(total), count


def classes(logits, targets, rows):
    return cross_entropy(logits, targets)


def classes_sum(logits, targets, rows):
    return cross_entropy(logits, targets, reduction="sum")


def squares(model):
    return 0.1 * sum(parameter.square().sum() for parameter in model.parameters())


def pairs(logits, targets, rows):
    similar = normalize(logits) @ normalize(X[rows, :5]).T / 0.1
    return cross_entropy(similar, torch.arange(len(rows)))


def dice(logits, targets, rows):
    share = logits[:, 0].sigmoid()
    return 1 - (2 * (share * POSITIVE[rows]).sum() + 1) / (share.sum() + POSITIVE[rows].sum() + 1)


def balance(logits, targets, rows):
    return 5 * (logits.softmax(1).mean(0) * (logits.argmax(1, keepdim=True) == torch.arange(5)).float().mean(0)).sum()


class Centred(nn.Module):
    """A forward that remembers: in training it moves the mean that it takes off."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Calls(Centred):
    """Remembers without using it."""

    def forward(self, x):
        self.mean = self.mean + 1
        return x


def l2(times):
    model = mlp()
    mean = by_items(model, lambda *a: classes(*a) + squares(model), classes_sum)
    return *mean[:2], lambda rows: mean[2](rows) + squares(model) * (len(rows) if times else 1), len


def boxes(counts):
    """Two losses and two denominators, as detectors have them; `counts` has one of them or both."""
    model = mlp()

    def parts(rows):
        out = model(X[rows])
        return mse_loss(out[:, 0], POSITIVE[rows], reduction="sum"), (
            l1_loss(out[:, 1:], X[rows, :4], reduction="none").sum(1) * POSITIVE[rows]
        ).sum()

    def loss(rows):
        one, other = parts(rows)
        return one / len(rows) + other / POSITIVE[rows].sum()

    if counts == "one":
        return model, loss, lambda rows: sum(parts(rows)), len
    return (
        model,
        loss,
        lambda rows: dict(zip(("class", "box"), parts(rows), strict=True)),
        lambda rows: {"box": POSITIVE[rows].sum(), "class": len(rows)},
    )


def ctc(divided):
    """Label lengths differ, and reduction="mean" divides each loss by its own."""
    torch.manual_seed(0)
    model, lengths = nn.Linear(8, 5), torch.arange(16) % 3 + 1
    labels = torch.arange(48).view(16, 3) % 4 + 1

    def losses(rows, reduction):
        logits = model(torch.stack([X[rows] + step for step in range(7)]))
        heard = torch.full((len(rows),), 7)
        return ctc_loss(logits.log_softmax(2), labels[rows], heard, lengths[rows], reduction=reduction)

    return (
        model,
        lambda rows: losses(rows, "mean"),
        lambda rows: (losses(rows, "none") / (lengths[rows] if divided else 1)).sum(),
        len,
    )


def shifted(label_count):
    """A causal model's labels: the first of each row is never a target."""
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7)), torch.arange(16 * 4).view(16, 4) % 7

    def loss(rows, reduction="mean"):
        lengths = torch.arange(16)[rows] % 3 + 2
        labels = tokens[rows].masked_fill(torch.arange(4) >= lengths[:, None], -100)
        return cross_entropy(model(tokens[rows])[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)

    less = 0 if label_count else 1
    return model, loss, lambda rows: loss(rows, "sum"), lambda rows: int((torch.arange(16)[rows] % 3 + 2 - less).sum())


def towers():
    """The loss's own parameters: one proxy for each class."""
    model, proxies = mlp(), nn.Linear(5, 5, bias=False)
    return [model, proxies], *by_items(nn.Sequential(model, proxies), classes, classes_sum)[1:]


def penalty(over_batch):
    model = mlp()

    def total(rows):
        x = X[rows].detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        term = ((slope.norm() - 1) ** 2) * len(rows) if over_batch else 5 * slope.square().sum()
        return softplus(-model(x)).sum() + term

    return model, lambda rows: total(rows) / len(rows), total, len


RIGHT = {
    "classes": lambda: by_items(mlp(), classes, classes_sum),
    "class weights": lambda: by_items(
        mlp(),
        lambda logits, y, rows: cross_entropy(logits, y, WEIGHTS),
        lambda logits, y, rows: cross_entropy(logits, y, WEIGHTS, reduction="sum"),
        lambda rows: WEIGHTS[Y[rows]].sum(),
    ),
    "ctc": lambda: ctc(divided=True),
    "labels shifted inside": lambda: shifted(label_count=False),
    "an L2 term, once": lambda: l2(times=True),
    "two denominators": lambda: boxes("both"),
    "the loss's own parameters": towers,
    "a penalty on each gradient": lambda: penalty(over_batch=False),
    "GroupNorm": lambda: by_items(mlp(nn.GroupNorm(2, 6)), classes, classes_sum),
    "BatchNorm in eval mode": lambda: by_items(mlp(nn.BatchNorm1d(6).eval()), classes, classes_sum),
    "dropout twice": lambda: by_items(mlp(nn.Dropout(), nn.Linear(6, 6), nn.Dropout()), classes, classes_sum),
}
SUM, FACTOR, SEE, BATCH_NORM = (
    "sum or count do not match this loss",
    "in the same direction",
    "see each other",
    ("BatchNorm ('1') normalizes each micro-batch"),
)
WRONG = {
    "BatchNorm": (lambda: by_items(mlp(nn.BatchNorm1d(6)), classes, classes_sum, x=SCALED), BATCH_NORM),
    "BatchNorm beside dropout": (
        lambda: by_items(mlp(nn.BatchNorm1d(6), nn.Dropout()), classes, classes_sum, x=SCALED),
        BATCH_NORM,
    ),
    "BatchNorm without statistics": (
        lambda: by_items(mlp(nn.BatchNorm1d(6, track_running_stats=False)).eval(), classes, classes_sum, x=SCALED),
        BATCH_NORM,
    ),
    "a mean kept": (lambda: by_items(mlp(Centred(), nn.Tanh()), classes, classes_sum), "see each other"),
    "negatives from the batch": (lambda: by_items(mlp(), pairs, lambda *a: pairs(*a) * len(a[2])), SEE),
    "Dice over the batch": (lambda: by_items(mlp(), dice, lambda *a: dice(*a) * len(a[2])), SEE),
    "a balance loss": (
        lambda: by_items(mlp(), lambda *a: classes(*a) + balance(*a), lambda *a: classes_sum(*a) + balance(*a)),
        SUM,
    ),
    "a balance loss, times the count": (
        lambda: by_items(
            mlp(), lambda *a: classes(*a) + balance(*a), lambda *a: classes_sum(*a) + balance(*a) * len(a[2])
        ),
        SEE,
    ),
    "class weights over items": (
        lambda: by_items(
            mlp(),
            lambda logits, y, rows: cross_entropy(logits, y, WEIGHTS),
            lambda logits, y, rows: cross_entropy(logits, y, WEIGHTS, reduction="sum"),
        ),
        FACTOR,
    ),
    "ctc over utterances": (lambda: ctc(divided=False), SUM),
    "labels before the shift": (lambda: shifted(label_count=True), FACTOR),
    "an L2 term in each sum": (lambda: l2(times=False), SUM),
    "one count for two": (lambda: boxes("one"), SUM),
    "a penalty over the batch": (lambda: penalty(over_batch=True), SEE),
    "no float64": (lambda: insisting(torch.float32, classes), SUM),
    "twice the loss": (lambda: by_items(mlp(), classes, lambda *a: 2 * classes_sum(*a)), "2 times that gradient"),
    "a mean for a sum": (lambda: by_items(mlp(), classes, classes), SUM),
}
ROWS = torch.arange(16)


def oracle(model, loss, loss_sum, count, pieces):
    """The relative error of the pieces, by sums written out here."""
    modules = list(model) if isinstance(model, list) else [model]
    for module in modules:
        for one in module.modules():
            one.training = one.training and not isinstance(one, nn.Dropout)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    kept = [buffer.clone() for module in modules for buffer in module.buffers()]
    whole = torch.autograd.grad(loss(ROWS), parameters, allow_unused=True)
    with torch.no_grad():
        for buffer, value in zip((b for m in modules for b in m.buffers()), kept, strict=True):
            buffer.copy_(value)
    sums, counts = [loss_sum(piece) for piece in pieces], [count(piece) for piece in pieces]
    if isinstance(sums[0], dict):
        total = sum(sum(each[key] for each in sums) / sum(each[key] for each in counts) for key in sums[0])
    else:
        total = sum(sums) / sum(counts)
    return relative_error(torch.autograd.grad(total, parameters, allow_unused=True), whole)


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("name", RIGHT)
def test_what_may_be_cut(name, dtype):
    model, loss, loss_sum, count = RIGHT[name]()
    split = check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, count, dtype=dtype)
    assert (split.ok, bool(split), split.buffers) == (True, True, [])
    assert split.error < (1e-6 if dtype is None else 1e-12)
    assert str(split) == split.verdict
    assert split.verdict.startswith("Can be split: 3 pieces")


@pytest.mark.parametrize("name", WRONG)
def test_what_may_not_be_cut(name):
    build, said = WRONG[name]
    expected = oracle(*build(), ROWS.split(SIZES))
    assert expected > 0.003
    model, loss, loss_sum, count = build()
    split = check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, count)
    assert (split.ok, bool(split)) == (False, False)
    assert split.error == pytest.approx(expected, rel=0.001)
    assert said in split.verdict
    assert split.verdict.startswith("Cannot be split like this: ")


def test_the_oracle_agrees_where_cuts_are_right():
    assert [name for name, build in RIGHT.items() if oracle(*build(), ROWS.split(SIZES)) > 1e-6] == []


def test_a_buffer_that_ends_elsewhere_is_named():
    model, loss, loss_sum, count = by_items(mlp(Calls(), nn.Tanh()), classes, classes_sum)
    other = nn.BatchNorm1d(3)  # of no use here, and in training
    split = check_split([model, other], ROWS, loss, ROWS.split(SIZES), loss_sum, count)
    assert (split.ok, split.buffers) == (False, ["0.1.mean"])
    assert split.error < 1e-6
    assert "a forward changes state: these buffers end with other values: 0.1.mean" in split.verdict


class DropPath(nn.Module):
    """As timm's and torchvision's: whole items, drawn by hand."""

    def forward(self, x):
        return x * (torch.rand(len(x), 1) > 0.5) / 0.5 if self.training else x


class Functional(nn.Module):
    """Dropout in a module whose training mode does more."""

    def __init__(self, centred):
        super().__init__()
        self.centred = centred

    def forward(self, x):
        x = dropout(x, 0.5, training=self.training)
        return x - x.mean(0) if self.centred and self.training else x


class Memory(nn.Module):
    """Recurrent layers with a dropout of their own, and attention's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(6, 6, 2, dropout=0.5), nn.GRU(6, 6, 2, dropout=0.5)])
        self.attention = nn.TransformerEncoderLayer(6, 2, 8)

    def forward(self, x):
        x = self.attention(torch.stack([x, x.sin()]))
        for layer in self.layers:
            x = layer(x)[0]
        return scaled_dot_product_attention(x.swapaxes(0, 1), x.swapaxes(0, 1), x.swapaxes(0, 1), None, 0.5)[:, 0]


@pytest.mark.parametrize(
    ("layer", "ok", "note"),
    [
        (nn.Dropout(), True, "(Dropout was left out.)"),
        (nn.AlphaDropout(), True, "(Dropout was left out.)"),
        (nn.RReLU(), True, "(Dropout was left out.)"),
        (Memory(), True, "(Dropout was left out.)"),
        (Functional(centred=False), True, "(Dropout was left out.)"),
        (Functional(centred=True), False, "(Dropout was left out.)"),
        (DropPath(), True, "DropPath, which draws random numbers, was in eval mode"),
        (nn.Sequential(nn.Dropout(), DropPath(), nn.BatchNorm1d(6)), False, "DropPath, which draws"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_dropout_is_left_out_and_hides_nothing(layer, ok, note):
    model, loss, loss_sum, count = by_items(mlp(layer), classes, classes_sum)
    split = check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, count)
    assert split.ok is ok
    assert note in split.verdict


class MixStyle(nn.Module):
    """Draws, and in training lets items see each other."""

    def forward(self, x):
        if not self.training:
            return x
        return 0.7 * x + 0.3 * x[torch.randperm(len(x))]


class TwoForms(nn.Module):
    """Draws, and gives no loss in eval mode."""

    def forward(self, x):
        return x + torch.randn(6) if self.training else {}["losses"]


def noisy(source):
    model = mlp()
    return by_items(model, *(lambda z, y, r, f=f: f(z + source(z), y, r) for f in (classes, classes_sum)))


def stateful():
    model, state = mlp(), [torch.zeros(1, 5)]

    def total(rows):
        logits = model(X[rows]) + state[0]
        state[0] = logits.detach()[-1:]
        return cross_entropy(logits, Y[rows], reduction="sum")

    return model, lambda rows: total(rows) / len(rows), total, len


def at_the_optimum():
    model = nn.Linear(8, 1).double()
    x, y = X.double(), X.double().sum(1, keepdim=True).cos()
    rows = torch.cat([x, torch.ones(16, 1)], 1)
    best = torch.linalg.lstsq(rows, y).solution
    with torch.no_grad():
        model.weight.copy_(best[:8].T)
        model.bias.copy_(best[8])
    return model, *(lambda r, how=how: mse_loss(model(x[r]), y[r], reduction=how) for how in ("mean", "sum")), len


class Kernel(torch.autograd.Function):
    """Insists on a dtype, as a kernel does that is written for one."""

    @staticmethod
    def forward(x, dtype):
        assert x.dtype == dtype, f"{dtype} only"
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def insisting(dtype, total):
    def of(function):
        return lambda logits, targets, rows: function(Kernel.apply(logits, dtype), targets, rows)

    return by_items(mlp().to(dtype), of(classes), of(total), x=X.to(dtype))


own = torch.Generator().manual_seed(0)
CANNOT_TELL = {
    "noise in the loss": (lambda: noisy(torch.randn_like), "Draw them with the batch"),
    "Python's random": (lambda: noisy(lambda z: random.random() * Y[: len(z), None] % 3), "Draw them with the batch"),
    "NumPy's random": (lambda: noisy(lambda z: torch.tensor(np.random.rand(*z.shape)).float()), "Draw them"),
    "a generator of its own": (lambda: noisy(lambda z: torch.randn(z.shape, generator=own)), "called again"),
    "a state": (stateful, "called again"),
    "noise that mixes": (lambda: by_items(mlp(MixStyle(), nn.Tanh()), classes, classes_sum), "MixStyle, which draws"),
    "no loss in eval mode": (lambda: by_items(mlp(TwoForms()), classes, classes_sum), "in eval mode the loss fails"),
    "the optimum": (at_the_optimum, "as small as the rounding of its parts"),
    "no gradient": (lambda: by_items(mlp(), *[lambda *a: 0 * classes(*a)] * 2), "is 0"),
    "not finite": (lambda: by_items(mlp(), lambda *a: classes(*a) * torch.inf, classes_sum), "is not finite"),
    "no float64": (
        lambda: insisting(torch.bfloat16, classes_sum),
        "in float64 the loss fails (AssertionError: torch.bfloat16 only)",
    ),
}


@pytest.mark.parametrize("name", CANNOT_TELL)
def test_when_it_cannot_be_told(name):
    build, said = CANNOT_TELL[name]
    model, loss, loss_sum, count = build()
    split = check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, count)
    assert (split.ok, bool(split)) == (None, False)
    assert split.verdict.startswith("Cannot tell: ")
    assert said in split.verdict


@pytest.mark.parametrize("wrong", [False, True])
def test_sixteen_bits_are_compared_in_float64(wrong):
    model, loss, loss_sum, count = by_items(mlp().bfloat16(), classes, classes_sum, x=X.bfloat16())
    split = check_split(model, ROWS, loss, ROWS.split(1), loss_sum, (lambda rows: 2) if wrong else count)
    assert split.ok == (not wrong)
    assert split.error == pytest.approx(0.5) if wrong else split.error < 1e-12
    assert ("In torch.bfloat16 rounding makes it" in split.verdict) == (not wrong)


def test_rounding_is_no_fault():
    # At the least squares optimum items cancel: in float32 nothing is left of the gradient but rounding.
    model, x = at_the_optimum()[0].float(), torch.cat([X, X.sum(1, keepdim=True).cos()], 1)

    def loss(rows, reduction="mean"):
        return mse_loss(model(rows[:, :8]), rows[:, 8:], reduction=reduction)

    whole = torch.autograd.grad(loss(x), model.weight)
    pieces = torch.autograd.grad(sum(loss(piece, "sum") for piece in x.split(SIZES)) / 16, model.weight)
    assert relative_error(pieces, whole) > 1e-3
    split = check_split(model, x, loss, x.split(SIZES), lambda rows: loss(rows, "sum"), len)
    assert split.ok
    assert split.error < 1e-5
    assert "compared in float64" in split.verdict


def test_llamas_float32_norm_is_no_fault():
    class Norm(nn.Module):
        def forward(self, x):
            wide = x.to(torch.float32)
            return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    model, loss, loss_sum, count = by_items(mlp(Norm()).double(), classes, classes_sum, x=X.double())
    split = check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, count)
    assert split.ok
    assert split.error < 1e-9


def test_pieces_that_are_not_the_batch():
    model, loss, loss_sum, count = by_items(mlp(), classes, classes_sum)
    split = check_split(model, ROWS, loss, ROWS.split(SIZES)[:2], loss_sum, count)
    assert "the pieces count 11 and it counts 16" in split.verdict
    model, loss, loss_sum, count = by_items(mlp(), pairs, lambda *a: pairs(*a) * len(a[2]))
    split = check_split(model, tuple(ROWS), lambda t: loss(torch.stack(t)), ROWS.split(SIZES), loss_sum, count)
    assert split.verdict.endswith("Items see each other, or a term is not a sum over items.")


def test_pairs_of_one_have_no_gradient():
    model, loss, loss_sum, count = by_items(mlp(), pairs, lambda *a: pairs(*a) * len(a[2]))
    split = check_split(model, ROWS, loss, ROWS.split(1), loss_sum, count)
    assert split.verdict.endswith("The pieces have no gradient at all.")


@pytest.mark.parametrize("fails", ["", "loss", "loss_sum", "count"])
def test_everything_is_put_back(fails):
    model = mlp(nn.BatchNorm1d(6), nn.Dropout(), Calls())
    model[0].weight.grad = torch.ones(6, 8)
    model[3].eval()
    _, loss, loss_sum, count = by_items(model, classes, classes_sum)

    def state():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return [
            [(name, id(t), t.data_ptr(), t.tolist()) for name, t in tensors],
            [(id(parameter.grad), parameter.grad_fn) for parameter in model.parameters()],
            [(module.training, len(module._forward_hooks)) for module in model.modules()],
            (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
            torch.get_default_dtype(),
        ]

    def failing(function, name):
        calls = []

        def call(rows):
            random.random()
            np.random.rand()
            calls.append(function(rows))
            if fails == name:  # buffers have moved
                raise KeyError("mine")
            return calls[-1]

        return call

    before, error = state(), None
    try:
        check_split(
            model,
            ROWS,
            failing(loss, "loss"),
            ROWS.split(SIZES),
            failing(loss_sum, "loss_sum"),
            failing(count, "count"),
        )
    except KeyError as caught:
        error = caught
    assert state() == before
    assert (error is not None) == bool(fails)


def test_what_accumulate_refuses_is_refused():
    model, loss, loss_sum, count = by_items(mlp(), classes, classes_sum)
    with pytest.raises(ValueError, match="window is empty"):
        check_split(model, ROWS, loss, [], loss_sum, count)
    with pytest.raises(ValueError, match="reduction"):
        check_split(model, ROWS, loss, [ROWS], lambda rows: model(X[rows]), count)
    with pytest.raises(TypeError, match="model must be a module"):
        check_split(model.parameters(), ROWS, loss, [ROWS], loss_sum, count)


def test_it_agrees_with_what_accumulate_leaves():
    build, _ = WRONG["negatives from the batch"]
    model, loss, loss_sum, count = build()
    split = check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, count)
    accumulate(model, ROWS.split(SIZES), loss_sum, count)
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss(ROWS).backward()
    assert relative_error(found, [parameter.grad for parameter in model.parameters()]) == pytest.approx(
        split.error, rel=1e-4
    )


# --- what other people's models do ---


class Standing(nn.Module):
    """Adds up what it sees, keeps a best value that is not there yet, and a buffer that starts as None."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(6, dtype=torch.complex64))
        self.register_buffer("best", torch.tensor(torch.nan))
        self.register_buffer("later", None)

    def forward(self, x):
        self.total = self.total + (x - x).detach().sum(0) + 1e-9
        self.total = self.total - 1e-9
        self.later = torch.zeros(())
        return x


class Rotary(nn.Module):
    """Keeps a table by length, as rotary embeddings do, and puts a parameter in another's place, as VQ-VAEs do."""

    def __init__(self):
        super().__init__()
        self.table, self.tables = None, {}
        self.codes = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x):
        if self.table is None or len(self.table) < len(x):
            self.table = self.tables[len(x)] = torch.ones(len(x), 6)
        self.codes = nn.Parameter(self.codes.data.clone(), requires_grad=False)
        return x * self.table[: len(x)].to(x.dtype) * self.codes


class Shadow(nn.Module):
    """A frozen copy that follows its original in each forward."""

    def __init__(self):
        super().__init__()
        self.original, self.copy = nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            self.copy.weight.lerp_(self.original.weight, 0.1)
        return self.original(x)


class Reentrant(nn.Module):
    """Reentrant checkpointing runs backward of its own, which torch.autograd.grad never enters."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=True)


class Eight(nn.Module):
    """Rounds to 8 bits by the largest number of the batch."""

    def forward(self, x):
        scale = 448 / x.detach().abs().max()
        return x + ((x * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale - x).detach()


def masked():
    """A hook that keeps half of the weights where they are."""
    model = mlp()

    def keep(weight):
        weight.grad[:2] = 0

    model[2].weight.register_post_accumulate_grad_hook(keep)
    return by_items(model, classes, classes_sum)


def two_towers(factor):
    one, other = mlp(), mlp()

    def parts(rows):
        return cross_entropy(one(X[rows]), Y[rows]), pairs(other(X[rows]), Y[rows], rows)

    def loss(rows):
        first, second = parts(rows)
        return first + factor * second

    return [one, other], loss, lambda rows: loss(rows) * len(rows), len


def complex_numbers(factor=1):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, dtype=torch.cfloat))
    target = (X @ torch.ones(8)).to(torch.cfloat)

    def total(rows):
        return (X[rows].to(torch.cfloat) @ weight - target[rows]).abs().square().sum()

    return nn.ParameterList([weight]), lambda r: total(r) / len(r), lambda r: factor * total(r), len


def sparse(count):
    torch.manual_seed(0)
    model = nn.Embedding(5, 3, sparse=True)
    return model, lambda r: model(Y[r]).square().mean(), lambda r: model(Y[r]).square().sum(), count


class Checkpointed(nn.Module):
    """Runs forward again in the backward pass, where autograd leaves modes of functions behind."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.inner = reentrant, nn.Sequential(nn.Linear(6, 6), nn.Dropout(), Upcast(), nn.Linear(6, 6))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Upcast(nn.Module):
    """Computes in float32 whatever comes, as Llama's norm does."""

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def freezing():
    """A generator's loss that turns its discriminator off."""
    model, judge = mlp(), nn.Linear(5, 1)

    def loss(rows):
        judge.requires_grad_(False)
        return softplus(-judge(model(X[rows]))).mean()

    return [model, judge], loss, lambda rows: loss(rows) * len(rows), len


@pytest.mark.parametrize(
    ("build", "ok", "said"),
    [
        *(
            (lambda r=r, c=c: by_items(mlp(Checkpointed(r)), classes, classes_sum, c), c is len, "Dropout was left out")
            for r in (True, False)
            for c in (len, lambda rows: 2 * len(rows))
        ),
        (freezing, True, ""),
        (lambda: by_items(mlp(Standing()), classes, classes_sum), True, ""),
        (lambda: by_items(mlp(Rotary()), classes, classes_sum), True, ""),
        (lambda: by_items(mlp(Shadow()), classes, classes_sum), False, "other values: 1.copy.weight"),
        (lambda: by_items(mlp(Reentrant()), classes, classes_sum), True, ""),
        (lambda: by_items(mlp(Eight()), classes, classes_sum), False, ""),
        (masked, True, ""),
        (lambda: two_towers(3e-7), False, "Over the whole gradient the error is small"),
        (complex_numbers, True, ""),
        (lambda: complex_numbers(-1), False, "-1 times that gradient, in the opposite direction"),
        (lambda: sparse(lambda r: 3 * len(r)), True, ""),
        (lambda: sparse(len), False, "3 times that gradient, in the same direction"),
        (lambda: by_items(mlp(), pairs, lambda *a: {"a": pairs(*a) * len(a[2])}, lambda r: {"a": len(r)}), False, SEE),
        (lambda: by_items(mlp(), classes, classes, lambda r: 1), False, "the pieces count 3 and it counts 1"),
    ],
)
def test_other_peoples_models(build, ok, said):
    model, loss, loss_sum, count = build()
    modules = model if isinstance(model, list) else [model]
    attributes = [{**vars(module)} for one in modules for module in one.modules()]
    before = [{**one.state_dict()} for one in modules]
    split = check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, count)
    assert split.ok is ok, split
    assert said in split.verdict
    assert [{**vars(module)} for one in modules for module in one.modules()] == attributes
    for one, state in zip(modules, before, strict=True):
        after = one.state_dict()
        assert after.keys() == state.keys()
        assert all(after[name] is not None and after[name].data_ptr() == state[name].data_ptr() for name in state)


def test_a_frozen_batch_norm_is_not_named():
    model, loss, loss_sum, count = by_items(mlp(), pairs, lambda *a: pairs(*a) * len(a[2]))
    split = check_split([model, nn.BatchNorm1d(3)], ROWS, loss, ROWS.split(SIZES), loss_sum, count)
    assert "BatchNorm" not in split.verdict


def test_what_is_not_the_models_is_left_alone():
    model, judge = mlp(), nn.Linear(5, 1)
    judge.weight.grad = torch.ones(1, 5)

    def loss(batch, reduction="mean"):
        return mse_loss(judge(model(batch["x"])), batch["more"]["y"], reduction=reduction)

    class Batch(MutableMapping):  # that shares what is in it with its copies
        def __init__(self, inner):
            self.inner = inner

        def __getitem__(self, key):
            return self.inner[key]

        def __setitem__(self, key, value):
            self.inner[key] = value

        def __delitem__(self, key):
            del self.inner[key]

        def __iter__(self):
            return iter(self.inner)

        def __len__(self):
            return len(self.inner)

    batch = Batch({"x": X, "more": {"y": X[:, :1]}})
    random_before = torch.get_rng_state()

    def pieces():
        for rows in DataLoader(ROWS, batch_size=5):  # which draws a seed
            yield Batch({"x": X[rows], "more": {"y": X[rows, :1]}})

    split = check_split(model, batch, loss, pieces(), lambda b: loss(b, "sum"), lambda b: 2 * len(b["x"]))
    assert (split.ok, round(split.error, 3)) == (False, 0.5)
    full_batch_gradient(model, batch, loss, dtype=torch.float64)
    assert (judge.weight.grad.tolist(), judge.bias.grad) == ([[1.0] * 5], None)
    assert batch["x"] is X
    assert torch.equal(torch.get_rng_state(), random_before)


def test_accumulate_is_as_before_after_a_check():
    model, loss, loss_sum, count = by_items(mlp(nn.BatchNorm1d(6)), classes, classes_sum)
    check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, count)
    optimizers = {each: torch.optim.SGD([each], lr=0.1) for each in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for each in model.parameters():
        each.register_post_accumulate_grad_hook(step)
    with pytest.warns(UserWarning, match="BatchNorm"), pytest.raises(RuntimeError, match="backward pass"):
        accumulate(model, ROWS.split(SIZES), loss_sum, count)
    before = model[0].weight.clone()
    with pytest.raises(RuntimeError, match="these weights are put back"):
        check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, count)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("model", "dtype", "error", "said"),
    [
        (nn.LazyLinear(5), None, ValueError, "'weight' has no data yet"),
        (nn.Linear(8, 5, device="meta"), None, ValueError, "'weight' has no data yet"),
        (nn.Linear(8, 5).requires_grad_(False), None, ValueError, "no trainable parameter"),
        (nn.Linear(8, 5), "float64", ValueError, "torch.float64, but 'float64'"),
        (nn.Linear(8, 5), torch.int64, ValueError, "torch.int64"),
        (nn.Linear(8, 5), torch.complex64, ValueError, "torch.complex64"),
    ],
)
def test_what_cannot_be_borrowed_is_refused(model, dtype, error, said):
    _, loss, loss_sum, count = by_items(model, classes, classes_sum)
    with pytest.raises(error, match=re.escape(said)):
        check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, count, dtype=dtype)
    with pytest.raises(error, match=re.escape(said)):
        full_batch_gradient(model, ROWS, loss, dtype=dtype)


def test_compiled_models_get_a_verdict():
    model = torch.compile(mlp(), backend="eager")
    _, loss, loss_sum, count = by_items(model, classes, classes_sum)
    assert check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, count).ok
    assert check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, lambda rows: 1).ok is False


def test_a_loss_may_take_labels_out_of_its_batch():
    model = mlp()

    def loss(batch, reduction="mean"):
        return cross_entropy(model(batch["x"]), batch.pop("labels"), reduction=reduction)

    def dicts(rows):
        return {"x": X[rows], "labels": Y[rows]}

    batch, pieces = dicts(ROWS), [dicts(rows) for rows in ROWS.split(SIZES)]
    for count, ok in ((lambda b: len(b["x"]), True), (lambda b: 1, False)):
        assert check_split(model, batch, loss, pieces, lambda b: loss(b, "sum"), count).ok is ok
        assert [list(each) for each in (batch, *pieces)] == [["x", "labels"]] * 4


def test_it_works_where_gradients_are_off():
    model, loss, loss_sum, count = by_items(mlp(), classes, classes_sum)
    with torch.no_grad():
        assert check_split(model, ROWS, loss, ROWS.split(SIZES), loss_sum, count)
