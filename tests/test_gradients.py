"""`relative_error` and `full_batch_gradient`: what the other tests and the exercises call "equal"."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradaccum import full_batch_gradient, relative_error

inf, nan = math.inf, math.nan
one, two = torch.ones(2), torch.full((2,), 2.0)


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([two], [one], 1.0),
        ([torch.tensor([3.0, 8.0]), None], [torch.tensor([3.0, 4.0]), torch.zeros(1)], 0.8),  # one norm over all
        ([torch.tensor([0.0]), torch.tensor([4.0])], [torch.tensor([3.0]), torch.tensor([4.0])], 0.6),
        (two, one, 1.0),
        (torch.tensor(3.0), torch.tensor(2.0), 0.5),
        (None, one, 1.0),
        ([None], [None], 0.0),
        ([], [], 0.0),
        ([torch.zeros(2), None], [None, torch.zeros(3)], 0.0),
        ([one], [None], inf),
        ([one], [torch.zeros(2)], inf),
        ([torch.tensor([nan])], [torch.ones(1)], nan),
        ([torch.tensor([nan])], [torch.zeros(1)], nan),
        ([torch.ones(1)], [torch.tensor([nan])], nan),
        ([torch.tensor([inf])], [torch.tensor([inf])], nan),
        ([torch.tensor([inf])], [torch.ones(1)], inf),
        ([two.to_sparse()], [one], 1.0),
        ([one], [two.to_sparse()], 0.5),
        ([two.to_sparse()], [one.to_sparse()], 1.0),
        ([None], [one.to_sparse()], 1.0),
        ([one.to_sparse()], [None], inf),
        ([two.bfloat16()], [one.half()], 1.0),
        ([two.long()], [one], 1.0),
        ([None], [one.clone().requires_grad_()], 1.0),
        ([nn.Parameter(two)], [one.clone().requires_grad_()], 1.0),
        ([torch.arange(6.0).view(2, 3).T], [torch.arange(6.0).view(2, 3).T.contiguous()], 0.0),
        ([torch.arange(6.0)[::2]], [torch.tensor([0.0, 2.0, 4.0])], 0.0),
        ([torch.tensor([1.0 + 1j])], [torch.tensor([1.0])], 1.0),
        ([torch.tensor([3e38])], [torch.tensor([1e38])], 2.0),  # its square is beyond float32
        ((tensor for tensor in [two]), (tensor for tensor in [one]), 1.0),
    ],
)
def test_relative_error(actual, expected, error):
    result = relative_error(actual, expected)
    assert type(result) is float
    assert result == pytest.approx(error, rel=1e-6, nan_ok=True)


def test_relative_error_is_computed_in_float64():
    close = torch.tensor([1 + 1e-14], dtype=torch.float64)
    assert relative_error(close, torch.ones(1)) == pytest.approx(1e-14, rel=0.01)


@pytest.mark.parametrize(
    ("actual", "expected", "error", "given"),
    [
        (torch.ones(3), torch.ones(3, 1), ValueError, "(3,) in actual and (3, 1) in expected"),
        (torch.ones(3), torch.ones(1), ValueError, "(3,) in actual and (1,) in expected"),
        (torch.ones(()), torch.ones(1), ValueError, "() in actual and (1,) in expected"),
        ([one, torch.ones(2, 3)], [one, torch.ones(3, 2)], ValueError, "Tensor 1 has shape (2, 3)"),
        ([one], [one, one], ValueError, "1 tensors and expected 2"),
        ([one, None], [one], ValueError, "2 tensors and expected 1"),
        ([one, 2.0], [one, one], TypeError, "2.0"),
        ([one], ["a"], TypeError, "expected must hold tensors or None, but 'a' is a str"),
        ({"weight": one}, [one], TypeError, "'weight'"),
        (1.0, one, TypeError, "float"),
        (one, nn.Linear(1, 1), TypeError, "Linear"),
    ],
)
def test_relative_error_refuses(actual, expected, error, given):
    with pytest.raises(error) as caught:
        relative_error(actual, expected)
    assert given in str(caught.value)


class Noisy(nn.Module):
    """Two layers of dropout, BatchNorm, a buffer replaced by each forward, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2), nn.Dropout(0.2))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.unused = nn.Linear(2, 2)
        self.layers[3].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.layers(x)


def test_full_batch_gradient_equals_autograd_by_hand():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(4, (6,))
    y[2] = -100
    expected = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))  # one batch, one mean
    window = [(x[:1], y[:1]), (x[1:3], y[1:3]), (x[3:], y[3:])]

    def loss_sum(batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="sum")

    for count in (lambda b: (b[1] >= 0).sum(), lambda b: int((b[1] >= 0).sum())):
        with torch.no_grad():  # a graph is made whatever mode the caller is in
            actual = full_batch_gradient(model, iter(window), loss_sum, count)
        assert [gradient.dtype for gradient in actual] == [torch.float64] * 4
        assert relative_error(actual, expected) < 1e-14


class Pair(NamedTuple):
    x: Tensor
    rest: dict


@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
def test_float64_on_request(grad_dtype):
    model = nn.Linear(3, 2).bfloat16()
    if grad_dtype:
        for parameter in model.parameters():
            parameter.grad_dtype = grad_dtype
    before = [parameter.grad_dtype for parameter in model.parameters()]
    x, scale, labels = torch.randn(4, 3), torch.rand(4, 1), torch.tensor([0, 1, 1, 0])
    window = [Pair(x[i : i + 2], {"list": [(scale[i : i + 2], "text")], "labels": labels[i : i + 2]}) for i in (0, 2)]

    def loss_sum(batch):
        assert type(batch) is Pair
        (weight, text), kept = batch.rest["list"][0], batch.rest["labels"]
        assert (batch.x.dtype, weight.dtype, kept.dtype, text) == (torch.float64, torch.float64, torch.int64, "text")
        return cross_entropy(model(batch.x) * weight, kept, reduction="sum")

    actual = full_batch_gradient(model, window, loss_sum, lambda batch: len(batch.x), dtype=torch.float64)
    exact = nn.Linear(3, 2).double()
    exact.load_state_dict(model.state_dict())
    loss = cross_entropy(exact(x.double()) * scale.double(), labels)
    assert [gradient.dtype for gradient in actual] == [torch.float64] * 2
    assert relative_error(actual, torch.autograd.grad(loss, list(exact.parameters()))) < 1e-14
    assert [parameter.dtype for parameter in model.parameters()] == [torch.bfloat16] * 2
    assert [parameter.grad_dtype for parameter in model.parameters()] == before
    assert window[0].x.dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("error", [None, KeyError("mine")])
def test_full_batch_gradient_leaves_everything_as_it_was(dtype, training, error):
    torch.manual_seed(0)
    model = Noisy().train(training)
    model.layers[0].weight.grad = torch.ones(8, 3)
    window = [torch.randn(4, 3), torch.randn(2, 3)]
    live = model(window[0]).square().sum()  # a graph of the caller's, alive all the while

    def state():
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        return {
            "tensors": {name: (id(t), t.data_ptr(), t.dtype, t.requires_grad) for name, t in tensors.items()},
            "values": [tensor.detach().clone().flatten().tolist() for tensor in tensors.values()],
            "grad": [id(parameter.grad) for parameter in model.parameters()],
            "random": torch.get_rng_state().tolist(),
            "training": [module.training for module in model.modules()],
            "saved": list(model.state_dict()),
        }

    calls = []

    def loss_sum(x):
        calls.append(x)
        loss = model(x).square().sum()
        if error and len(calls) % 2 == 0:
            raise error
        return loss

    before, results = state(), []
    for _ in range(2):
        if error:
            with pytest.raises(KeyError) as caught:
                full_batch_gradient(model, window, loss_sum, len, dtype=dtype)
            assert caught.value is error
        else:
            results.append(full_batch_gradient(model, window, loss_sum, len, dtype=dtype))
        assert state() == before
    assert len(calls) == 4
    if not error:
        first, second = results
        names = [name for name, _ in model.named_parameters()]
        without = {name for name, gradient in zip(names, first, strict=True) if gradient is None}
        assert without == {"layers.3.bias", "unused.weight", "unused.bias"}
        assert relative_error(first, second) == 0.0  # dropout drew the same numbers
    live.backward()
    assert model.layers[0].weight.grad.dtype == torch.float32


def test_full_batch_gradient_refuses_a_window_of_nothing():
    model = nn.Linear(1, 1)
    for window, given in (([], "0 micro-batches"), ([torch.ones(0, 1)], "1 micro-batches")):
        with pytest.raises(ValueError, match=given):
            full_batch_gradient(model, window, lambda x: model(x).sum(), len)
