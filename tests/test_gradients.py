"""`relative_error` and `full_batch_gradient`: what the other tests and the exercises call "equal"."""

import math
import random
from collections import UserDict, namedtuple
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradaccum import full_batch_gradient, relative_error

inf, nan = math.inf, math.nan
Pair = namedtuple("Pair", ["x", "rest"])
one, two, zero = torch.ones(2), torch.full((2,), 2.0), torch.zeros(2)


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([torch.tensor([3.0, 8.0]), None], [torch.tensor([3.0, 4.0]), torch.zeros(1)], 0.8),  # one norm over all
        (torch.tensor(3.0), torch.tensor(2.0), 0.5),
        (None, one, 1.0),
        ([None, None, zero], [None, zero, None], 0.0),
        ([], [], 0.0),
        ([one], [None], inf),
        ([one], [zero], inf),
        ([nan * one], [one], nan),
        ([nan * one], [zero], nan),
        ([one], [nan * one], nan),
        ([two.to_sparse()], [one.to_sparse()], 1.0),
        ([None, one], [one.to_sparse(), None], math.sqrt(2)),
        ([two.bfloat16()], [one.half()], 1.0),
        ([two.long()], [nn.Parameter(one)], 1.0),
        ([torch.arange(6.0).view(2, 3).T], [torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])], 0.0),
        ([torch.tensor([1.0 + 1j])], [torch.tensor([1.0])], 1.0),
        ([torch.tensor([3e38])], [torch.tensor([1e38])], 2.0),  # its square is beyond float32
        ([torch.tensor([1 + 1e-9], dtype=torch.float64)], [torch.ones(1)], 1e-9),  # and this is below it
        ((tensor for tensor in [two]), (tensor for tensor in [one]), 1.0),
    ],
)
def test_relative_error(actual, expected, error):
    result = relative_error(actual, expected)
    assert type(result) is float
    assert result == pytest.approx(error, rel=1e-6, abs=0, nan_ok=True)


@pytest.mark.parametrize(
    ("actual", "expected", "error", "given"),
    [
        (torch.ones(3), torch.ones(3, 1), ValueError, "(3,) in actual and (3, 1) in expected"),
        ([one, torch.ones(2, 3)], [one, torch.ones(3, 2)], ValueError, "Tensor 1 has shape (2, 3)"),
        ([one], [one, one], ValueError, "1 tensors and expected 2"),
        ([one, None], [one], ValueError, "2 tensors and expected 1"),
        ([one], ["a"], TypeError, "expected must contain tensors or None, but 'a' is a str"),
        ({"weight": one}, [one], TypeError, "'weight'"),
        (1.0, one, TypeError, "float"),
    ],
)
def test_relative_error_refuses(actual, expected, error, given):
    with pytest.raises(error) as caught:
        relative_error(actual, expected)
    assert given in str(caught.value)


@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
def test_float64_equals_autograd_by_hand(grad_dtype):
    model = nn.Linear(3, 2).bfloat16()
    if grad_dtype:
        model.weight.grad_dtype = grad_dtype
    before = [(parameter.dtype, parameter.grad_dtype) for parameter in model.parameters()]
    x, scale, labels = torch.randn(4, 3), torch.rand(4, 1), torch.tensor([0, 1, 1, 0])
    given = UserDict(rest=Pair(x, {"list": [(scale, "text")], "labels": labels}))
    weights = torch.tensor([0.25, 4.0])  # the loss's own, in float32

    def loss(batch):
        assert (type(batch), type(batch["rest"])) == (UserDict, Pair)
        x, rest = batch["rest"]
        (scale, text), kept = rest["list"][0], rest["labels"]
        assert (x.dtype, scale.dtype, kept.dtype, text) == (torch.float64, torch.float64, torch.int64, "text")
        logits = model(x.float()) * scale  # and asked for by the loss, as Llama's norm does
        assert logits.dtype == torch.zeros(1).dtype == torch.float64
        return cross_entropy(logits, kept, weights)

    with torch.no_grad():  # a graph is made whatever mode the caller is in
        actual = full_batch_gradient(model, given, loss, dtype=torch.float64)
    exact = nn.Linear(3, 2).double()
    exact.load_state_dict(model.state_dict())
    mean = cross_entropy(exact(x.double()) * scale.double(), labels, weights.double())
    assert [gradient.dtype for gradient in actual] == [torch.float64] * 2
    assert relative_error(actual, torch.autograd.grad(mean, list(exact.parameters()))) < 1e-14
    assert [(parameter.dtype, parameter.grad_dtype) for parameter in model.parameters()] == before
    assert (given["rest"].x.dtype, torch.get_default_dtype()) == (torch.float32, torch.float32)


def test_a_number_changed_in_place_stays():
    model, seen = nn.Linear(2, 1), torch.zeros(2)

    def loss(x):
        seen.add_(x.mean(0))  # the caller's own tensor, in float32
        seen[0] = 7.0
        return model(x).mean()

    full_batch_gradient(model, torch.ones(3, 2), loss, dtype=torch.float64)
    assert (seen.dtype, seen.tolist()) == (torch.float32, [7.0, 1.0])


class Noisy(nn.Module):
    """Dropout, BatchNorm, a buffer replaced by each forward, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.unused = nn.Linear(2, 2)
        self.layers[3].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.layers(x)


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_full_batch_gradient_changes_nothing(dtype, training, fails):
    torch.manual_seed(0)
    model = Noisy().train(training)
    model.layers[0].weight.grad = torch.ones(8, 3)
    batch = torch.randn(6, 3)
    live = model(batch).square().sum()  # a graph of the caller's, alive all the while

    def state():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return [
            [(name, id(t), t.data_ptr(), t.dtype, t.requires_grad, t.tolist()) for name, t in tensors],
            [id(parameter.grad) for parameter in model.parameters()],
            [module.training for module in model.modules()],
            (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
            torch.get_default_dtype(),
        ]

    def loss(x):
        mean = model(x).square().mean() * (1 + random.random() + np.random.rand())
        model.train(not training)
        model.layers[0].weight.grad = None
        model.layers[3].weight.data.zero_()
        if fails:
            raise KeyError("mine")
        return mean

    before, results = state(), []
    for _ in range(2):
        with pytest.raises(KeyError, match="mine") if fails else nullcontext():
            results.append(full_batch_gradient(model, batch, loss, dtype=dtype))
        assert state() == before
    if not fails:
        without = [name for (name, _), found in zip(model.named_parameters(), results[0], strict=True) if found is None]
        assert without == ["layers.3.bias", "unused.weight", "unused.bias"]
        assert relative_error(*results) == 0.0  # dropout drew the same numbers
    live.backward()
    assert model.layers[0].weight.grad.dtype == torch.float32


def test_the_form_with_a_window_is_refused():
    model = nn.Linear(1, 1)
    for arguments, names in (((len,), {}), ((), {"count": len}), ((len,), {"dtype": torch.float64})):
        with pytest.raises(TypeError, match=r"one batch and your own loss of it.*full_batch_gradient\(model, batch"):
            full_batch_gradient(model, [torch.ones(1, 1)], lambda x: model(x).sum(), *arguments, **names)


@pytest.mark.parametrize(
    ("loss", "error", "said"),
    [
        (lambda model, x: model(x), ValueError, r"shape \(2, 1\)"),
        (lambda model, x: model(x).sum().item(), TypeError, "loss must return a scalar tensor"),
        (lambda model, x: model(x).sum().detach(), ValueError, "without a graph"),
        (lambda model, x: nn.Linear(1, 1)(x).sum(), ValueError, "depends on no trainable parameter"),
    ],
)
def test_full_batch_gradient_refuses(loss, error, said):
    model = nn.Linear(1, 1)
    with pytest.raises(error, match=said):
        full_batch_gradient(model, torch.ones(2, 1), lambda x: loss(model, x))


def test_several_modules_and_a_shared_parameter():
    one, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
    other.weight = one.weight
    x = torch.randn(3, 2)
    found = full_batch_gradient([one, other], x, lambda x: other(one(x)).square().mean())
    expected = torch.autograd.grad(other(one(x)).square().mean(), [one.weight, other.bias])
    assert len(found) == 2
    assert relative_error(found, expected) == 0
    for model in ([], one.weight, [one, "two"]):
        with pytest.raises((TypeError, ValueError), match="model"):
            full_batch_gradient(model, x, len)
