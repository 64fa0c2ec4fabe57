"""What is predicted, against the measurement of real updates, closed forms, and every micro-batch tried."""

import copy
import sys
import warnings
from functools import partial
from itertools import product

import build as builder
import nbformat
import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from gradaccum import accumulate
from gradaccum.memory import ROLES, measure_memory, plan_micro_batches, predict_memory
from gradaccum.memory.libraries import WORKSPACE
from gradaccum.memory.plan import _budget_bytes, _Search
from gradaccum.models import GPT, embedding_linear

LENGTH, VOCABULARY = 4, 60


def mlp():
    return nn.Sequential(nn.Embedding(VOCABULARY, 24), nn.Linear(24, 40), nn.ReLU(inplace=True), nn.Linear(40, 60))


class Checkpointed(GPT):
    def forward(self, tokens):
        x = self.token_embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


def tied():
    model = GPT(VOCABULARY, context=LENGTH, width=16, layers=1)
    model.head.weight = model.token_embedding.weight
    return model


MODELS = {
    "lesson": partial(embedding_linear, VOCABULARY, 32),
    "mlp": mlp,
    "gpt": tied,
    "checkpointed": partial(Checkpointed, VOCABULARY, LENGTH, 16, 2),
}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False),
    "momentum foreach": partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "adam": partial(torch.optim.Adam, foreach=False),
    "adam foreach": partial(torch.optim.Adam, foreach=True),
    "adamw": torch.optim.AdamW,
    "adamw foreach": partial(torch.optim.AdamW, foreach=True),
    "adamw fused": partial(torch.optim.AdamW, fused=True),
}


def build(model, optimizer, sizes):
    torch.manual_seed(0)
    made = MODELS[model]()
    window = [torch.randint(VOCABULARY, (2, size, LENGTH)) for size in sizes]
    return made, OPTIMIZERS[optimizer](made.parameters()), window


def loss_sum(model, batch, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum")


def plain(model, optimizer, window, autocast=False):
    for batch in window:
        (loss_sum(model, batch, autocast) / 100).backward()
    optimizer.step()
    optimizer.zero_grad()


def accumulated(model, optimizer, window):
    counts = lambda batch: (batch[1] != 0).sum()  # noqa: E731  # tensors, which are read
    result = accumulate(model, window, partial(loss_sum, model), counts)
    assert result.loss.item() > 0
    optimizer.step()
    optimizer.zero_grad()


STEPS = {"plain": plain, "accumulate": accumulated, "autocast": partial(plain, autocast=True)}


def whole(report):
    assert tuple(report.at_peak) in (ROLES, (*ROLES, "libraries"))
    assert sum(report.at_peak.values()) == report.peak_bytes
    return report.start_bytes, report.peak_bytes, report.end_bytes, report.at_peak


def measured(built, step):
    known = [thing for thing in built if isinstance(thing, nn.Module | torch.optim.Optimizer | list | torch.Tensor)]
    reports = []
    for _ in range(2):
        with measure_memory(*known) as memory:
            step(*built)
        reports.append(whole(memory))
    return reports


GRID = [
    *product(["lesson", "mlp", "gpt"], OPTIMIZERS, ["plain"], [1, 2, 4]),
    *product(MODELS, ["sgd", "adamw foreach"], ["accumulate", "autocast"], [1, 4]),
    *product(["checkpointed"], ["adam"], ["plain"], [1, 2]),
]


@pytest.mark.parametrize(("model", "optimizer"), sorted({row[:2] for row in GRID}))
def test_a_prediction_is_the_measurement(model, optimizer):
    assert len(GRID) == len(set(GRID)) >= 100
    for *made, step, steps in (row for row in GRID if row[:2] == (model, optimizer)):
        make = partial(build, *made, [8 // steps + 3 * (index == 0) for index in range(steps)])
        predicted = predict_memory(make, STEPS[step], device="cpu")
        assert [whole(predicted.first), whole(predicted)] == measured(make(), STEPS[step]), (step, steps)


def amp(scaler_device="cpu", device="cpu"):
    model = nn.Linear(100, 100).to(device)
    scaler = torch.amp.GradScaler(scaler_device, init_scale=2.0)
    return model, torch.optim.Adam(model.parameters()), torch.ones(8, 100, device=device), scaler


def amp_step(model, optimizer, batch, scaler, device="cpu"):
    with torch.autocast(device, torch.float16):
        loss = model(batch).float().sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def hooked():
    model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Dropout(0.5)).to(torch.float64)
    model[0].register_forward_hook(lambda module, given, result: result * 2)
    return model, torch.ones(6, 20, dtype=torch.float64, requires_grad=True)


def hooked_step(model, batch):
    scale = torch.from_numpy(numpy.ones(20))  # NumPy's memory is not counted
    out = model(batch).view(2, 3, 20).mul_(scale) + torch.tensor([1.0] * 20)
    out = scaled_dot_product_attention(out, out[:, :1], out[:, 1:2])
    if out.isnan().any() or out.sum().tolist() != out.sum().item():
        raise ArithmeticError
    out.sum().backward()


def copies():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    model[0].weight.register_hook(lambda gradient: gradient * 2)
    model[1].register_full_backward_hook(lambda module, given, gradients: (given[0] + 1,))
    return model, torch.optim.swa_utils.AveragedModel(model), torch.ones(3, 6)


def copies_step(model, average, batch):
    copy.deepcopy(model)(batch).sum().backward()
    model(batch).sum().backward()
    average.update_parameters(model)


@pytest.mark.parametrize(("make", "step"), [(amp, amp_step), (hooked, hooked_step), (copies, copies_step)])
def test_scaler_clipping_hooks_views_and_copies(make, step):
    predicted = predict_memory(make, step, device="cpu")
    assert [whole(predicted.first), whole(predicted)] == measured(make(), step)


MORE_OPTIMIZERS = {
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, centered=True, momentum=0.9),
    "adamw amsgrad": partial(torch.optim.AdamW, amsgrad=True, maximize=True),
    "adam tensor lr": lambda parameters, **options: torch.optim.Adam(parameters, lr=torch.tensor(0.1)),
    **{
        name: getattr(torch.optim, name)
        for name in ("Adagrad", "Adafactor", "NAdam", "RAdam", "Adadelta", "Adamax", "ASGD", "Rprop")
    },
}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optimizer", MORE_OPTIMIZERS)
def test_further_optimizers(optimizer, foreach):
    def make():
        weights = nn.ParameterList([torch.ones(20, 30), torch.ones(30)])
        return weights, MORE_OPTIMIZERS[optimizer](weights, foreach=foreach), torch.ones(4, 20)

    def step(weights, optimizer, batch):
        (batch @ weights[0] + weights[1]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    predicted = predict_memory(make, step, device="cpu", timeline=True)
    assert [whole(predicted.first), whole(predicted)] == measured(make(), step)
    with measure_memory(*(built := make()), timeline=True) as memory:
        step(*built)
    assert (predicted.first.timeline, predicted.first.largest) == (memory.timeline, memory.largest)
    assert max(map(sum, zip(*predicted.timeline.values(), strict=True))) == predicted.peak_bytes


LOSSES = ["mse_loss", "smooth_l1_loss", "soft_margin_loss", "binary_cross_entropy", "huber_loss", "l1_loss"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_that_keep_all_elements(loss, reduction):
    def step(x, y):
        kept = getattr(functional, loss)(x, y, reduction=reduction)
        torch.autograd.grad(kept.sum(), x)

    make = lambda: (torch.full((5, 7), 0.5, requires_grad=True), torch.ones(5, 7))  # noqa: E731
    predicted = predict_memory(make, step, device="cpu")
    assert [whole(predicted.first), whole(predicted)] == measured(make(), step)


def blocks(*sizes):
    return sum(-(-size // 512) * 512 for size in sizes)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
def test_cuda_rounds_up_on_its_default_path(options):
    def make():
        weights = nn.ParameterList([torch.ones(1000), torch.ones(3)])
        return weights, torch.optim.Adam(weights, **options)

    def step(weights, optimizer):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()

    one = blocks(4000, 12)
    predicted = predict_memory(make, step, device="cuda:1")
    counters = 2 * blocks(4) if "fused" in options else 0  # else on the host
    temporaries = one if options in ({}, {"foreach": True}) else 0 if "fused" in options else 2 * blocks(4000)
    held = {"parameters": one, "gradients": one, "optimizer state": 2 * one + counters}
    held["optimizer temporaries"] = temporaries
    assert whole(predicted.first)[3] == dict.fromkeys((*ROLES, "libraries"), 0) | held
    assert (predicted.first.start_bytes, predicted.start_bytes) == (one, 4 * one + counters)
    assert predicted.device == "cuda"
    assert repr(predicted).startswith(f"Predicted for cuda, second update. Peak memory: {predicted.peak_bytes:,} bytes")


def replaceable():
    return torch.autocast.__init__, torch.amp.GradScaler.__init__, nn.Module._apply, torch.compile, nn.Module.compile


def test_what_names_cuda_is_mapped_and_put_back():
    before, random = replaceable(), torch.get_rng_state()
    on_cuda = predict_memory(partial(amp, "cuda", "cuda"), partial(amp_step, device="cuda"))
    neutral = predict_memory(amp, amp_step)
    assert whole(on_cuda) == whole(neutral)
    assert on_cuda.at_peak["optimizer state"] == 2 * blocks(40000, 400)  # Adam did step
    # The linear layer ran in 16 bits: batch, weight and bias are cast, and the result is half as large.
    forward = predict_memory(partial(amp, "cuda", "cuda"), lambda model, _, batch, scaler: cast_forward(model, batch))
    assert forward.at_peak["activations"] == blocks(1600, 20000, 200, 1600)

    def everywhere():
        with torch.device("cuda"):
            moved = nn.Linear(8, 8).cuda().half()
        return moved, torch.ones(2, 8, pin_memory=True).to("cuda").half(), torch.ones(2, device=torch.device("cuda", 0))

    assert predict_memory(everywhere, lambda *built: None).peak_bytes == 4 * 512
    assert before == replaceable()
    assert torch.equal(random, torch.get_rng_state())


def cast_forward(model, batch):
    with torch.autocast("cuda"):
        return model(batch)


def test_cuda_keeps_bytes_of_dropout_and_norms():
    x = partial(torch.ones, 64, 512, requires_grad=True)
    dropped = predict_memory(lambda: (nn.Dropout(0.1), x()), lambda dropout, x: dropout(x))
    assert dropped.at_peak["activations"] == 64 * 512 * (4 + 1)
    make = lambda: (nn.LayerNorm(512), x(dtype=torch.bfloat16))  # noqa: E731
    assert predict_memory(make, cast_forward).at_peak["activations"] == 64 * 512 * (4 + 4) + 2 * 512


SHAPE = 2, 4, 64, 16  # batch, heads, rows, width


def heads(dtype, count=4, rows=64, width=16):
    return torch.zeros(2, count, rows, width, dtype=dtype, requires_grad=True)


def held_by(build, **options):
    """What the forward of attention holds on CUDA beside its inputs: the sum of the activations."""
    return predict_memory(build, partial(scaled_dot_product_attention, **options)).at_peak["activations"]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_attention_on_cuda_holds_no_scores(dropout_p):
    made = 2 * 4 * 64
    for dtype in (torch.bfloat16, torch.float32):
        build = lambda dtype=dtype: [heads(dtype) for _ in range(3)]  # noqa: E731
        assert held_by(build, dropout_p=dropout_p) == made * 16 * dtype.itemsize + made * 4  # output and logsumexp
        frozen = lambda dtype=dtype: [heads(dtype).detach() for _ in range(3)]  # noqa: E731
        without = made * 4 if dtype == torch.bfloat16 else 0  # only one of the kernels is asked not to make it
        assert held_by(frozen, dropout_p=dropout_p) == made * 16 * dtype.itemsize + without
        masked = lambda dtype=dtype: (*[heads(dtype) for _ in range(3)], torch.ones(2, 1, 64, 64, dtype=torch.bool))  # noqa: E731
        mask = 2 * 64 * 64 * dtype.itemsize
        assert held_by(masked, dropout_p=dropout_p) == made * 16 * dtype.itemsize + made * 4 + mask


def test_attention_without_a_fused_kernel_holds_the_scores():
    build = lambda: (heads(torch.float32, width=15), heads(torch.float32, width=15), heads(torch.float32, width=15))  # noqa: E731
    assert held_by(build) > 2 * 2 * 4 * 64 * 64 * 4
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert held_by(lambda: [heads(torch.float32) for _ in range(3)]) > 2 * 2 * 4 * 64 * 64 * 4


def test_attention_keys_are_expanded_in_backward_alone():
    def peak(count):
        def build():
            return heads(torch.bfloat16), heads(torch.bfloat16, count), heads(torch.bfloat16, count)

        def step(*given):
            scaled_dot_product_attention(*given, enable_gqa=True).sum().backward()

        return predict_memory(build, step).first

    few, all_heads = peak(1), peak(4)
    one = 2 * 64 * 16 * 2  # bytes of the keys of one head
    assert few.start_bytes == all_heads.start_bytes - 2 * 3 * one
    assert few.peak_bytes == all_heads.peak_bytes - 2 * 3 * one - 2 * 3 * one + 2 * 4 * one  # weights, gradients, sums


def test_float32_attention_lies_as_cuda_lays_it():
    strides = []

    def step(attention, x):
        strides.append(scaled_dot_product_attention(x, x, x).transpose(1, 2).is_contiguous())
        attention(x[0], x[0], x[0])

    build = lambda: (nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True), heads(torch.float32))  # noqa: E731
    predict_memory(build, step)
    assert strides == [True, True]
    predict_memory(build, step, device="cpu")
    assert strides == [True, True, False, False]


@pytest.mark.parametrize("norm", [nn.LayerNorm, partial(nn.GroupNorm, 4), nn.BatchNorm1d, nn.RMSNorm])
@pytest.mark.parametrize(("low", "high"), [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_norms_of_16_bits_are_as_measured(norm, low, high):
    def build():
        return norm(16).to(high), torch.zeros(100, 16, dtype=low)

    def step(model, x):
        model(x).sum().backward()
        model.zero_grad()

    with warnings.catch_warnings(action="ignore"):  # torch's, of mixed dtypes
        predicted = predict_memory(build, step, device="cpu")
        assert [whole(predicted.first), whole(predicted)] == measured(build(), step)


def test_norms_keep_float32_statistics_on_cuda():
    def peak(norm):  # 4 bytes for a row, 2 bytes for a number
        return predict_memory(lambda: torch.zeros(512, 1024, dtype=torch.bfloat16), norm).first.peak_bytes

    def trained(x, norm):
        norm(x.requires_grad_(), (1024,)).sum().backward()

    row, x = 512 * 4, 512 * 1024 * 2
    assert peak(lambda x: torch.layer_norm(x, (1024,))) == 2 * x + 2 * row
    assert peak(lambda x: functional.rms_norm(x, (1024,))) == 2 * x + row
    # The input, the output's gradient made whole, and the input's gradient; sum and its gradient are scalars.
    assert peak(partial(trained, norm=functional.rms_norm)) == 3 * x + row + 2 * 512

    def cast(x):  # CUDA's autocast computes it in float32
        with torch.autocast("cuda", torch.bfloat16):
            functional.rms_norm(x, (1024,))

    assert peak(cast) == 5 * x + row


class ByHand(torch.autograd.Function):
    """Checkpointing written out: forward without gradients, and again with them in backward."""

    @staticmethod
    def forward(ctx, block, device, autocast, x):
        ctx.block, ctx.device, ctx.autocast = block, device, autocast
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(ctx.device, torch.bfloat16, enabled=ctx.autocast):
            y = ctx.block(x)
        torch.autograd.backward(y, gradient)
        return None, None, None, x.grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_checkpointing_is_as_written_by_hand(device, autocast):
    peaks = {}
    for kind in (False, True, "by hand"):

        def make():
            wide = [nn.Linear(256, 256) for _ in range(4)]
            block = nn.Sequential(nn.Linear(64, 256), nn.Dropout(0.1), nn.LayerNorm(256), *wide, nn.Linear(256, 64))
            return block, torch.zeros(32, 64, requires_grad=True)

        def step(block, x, kind=kind):
            block.to("cuda" if device == "cuda" else "cpu")
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                for _ in range(2):  # in each other's window
                    y = (
                        ByHand.apply(block, device, autocast, x)
                        if kind == "by hand"
                        else checkpoint(block, x, use_reentrant=kind)
                    )
            y.float().sum().backward()

        peaks[kind] = predict_memory(make, step, device=device).peak_bytes - 2 * WORKSPACE * (device == "cuda")
    assert abs(peaks[False] / peaks["by hand"] - 1) < 0.03, peaks
    assert abs(peaks[True] / peaks["by hand"] - 1) < 0.03, peaks


def test_known_values_stay_known():
    seen = []

    def build():
        mask = torch.ones(2, 4, dtype=torch.bool)
        lengths = torch.tensor([2, 4])
        return mask, lengths, torch.from_numpy(numpy.arange(4)), torch.rand(4)

    def step(mask, lengths, numbers, noise):
        seen.append(bool(mask.all()))
        cut = torch.arange(4) < lengths[:, None]
        seen.append(
            [cut.sum().item(), lengths.max().item(), numbers.tolist(), cut[0].nonzero().shape, noise[cut[0]].shape]
        )
        other = mask.clone()
        other[0, 1] = False
        seen.append(other.tolist())
        other[0, 0] = noise[0] > 0  # from a float: now nothing of it is known
        seen.append(bool(other.all()))

    report = predict_memory(build, step)
    row = [True, True, True, True]
    assert seen[:4] == [True, [6, 4, [0, 1, 2, 3], (2, 1), (2,)], [[True, False, True, True], row], False]
    (guess,) = report.guessed
    assert guess.where.startswith(f"{__file__}:")
    assert guess[1:] == ("bool taken as False", 2)
    assert f"guessed at {guess.where}: bool taken as False, 2 x" in repr(report)


def test_no_guess_is_named_where_none_was():
    report = predict_memory(partial(build, "mlp", "adam", [4, 4]), plain)
    assert report.guessed == []
    assert "guessed" not in repr(report)


def test_an_error_after_a_guess_names_it():
    def step(x):
        [0][int((x > 0).sum())]

    with pytest.raises(IndexError) as caught:
        predict_memory(lambda: torch.rand(3), step)
    (note,) = caught.value.__notes__
    assert f"{__file__}:" in note
    assert "int64 taken as 1" in note


@pytest.mark.parametrize("width", [16, 14])
def test_grouped_mm_in_float32(width):
    if not hasattr(functional, "grouped_mm"):
        pytest.skip("this torch has none")

    def make():
        experts = torch.zeros(3, 16, 16, requires_grad=True)
        return experts, torch.ones(10, 16), torch.tensor([4, 4, 10], dtype=torch.int32)

    def step(experts, x, ends):
        made = functional.grouped_mm(x, experts[..., :width], offs=ends)
        (made if width == 16 else made.detach().square() * experts.sum()).square().sum().backward()

    predicted = predict_memory(make, step, device="cpu")
    assert [whole(predicted.first), whole(predicted)] == measured(make(), step)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_of_16_bits(affine):
    def make():
        return nn.BatchNorm2d(7, affine=affine), torch.ones(2, 7, 4, 4, dtype=torch.bfloat16, requires_grad=True)

    def step(norm, x):
        norm(x).square().sum().backward()

    predicted = predict_memory(make, step, device="cpu")
    assert [whole(predicted.first), whole(predicted)] == measured(make(), step)


LAID_OUT = nn.LayerNorm, nn.BatchNorm1d, nn.InstanceNorm1d, lambda _: nn.Softmax(-1), lambda _: nn.LogSoftmax(-1)


@pytest.mark.parametrize("kind", LAID_OUT)
def test_results_of_permuted_inputs_lie_as_kernels_lay_them(kind):
    def make():
        return nn.Linear(8, 8), kind(8), nn.Linear(8, 8), torch.ones(3, 8, 8)

    def step(before, layer, after, x):
        after(layer(before(x).mT).mT).mT.square().sum().backward()

    predicted = predict_memory(make, step, device="cpu")
    assert [whole(predicted.first), whole(predicted)] == measured(make(), step)


# By torch's source: of 128 rows in groups of 4 channels, three float32 for each channel and two for each group.
@pytest.mark.parametrize(
    ("dtype", "area", "inside"), [("float32", 9, 1792), ("bfloat16", 9, 1792), ("float32", 1, 256)]
)
def test_group_norm_holds_temporaries_in_backward_on_cuda(dtype, area, inside):
    def build():
        x = torch.ones(128, 64, area, requires_grad=True, dtype=getattr(torch, dtype))
        return nn.GroupNorm(16, 64, dtype=x.dtype), x, torch.ones_like(x)

    def step(norm, x, gradient):
        torch.autograd.grad(norm(x), [x, *norm.parameters()], gradient)

    x, one, kept = (128 * 64 * area * 2, 128, 128 * 16 * 2) if dtype == "bfloat16" else (128 * 64 * area * 4, 256, 8192)
    held = 2 * (x + blocks(one)) + x + 2 * kept  # given, the output, mean and deviation
    report = predict_memory(build, step)
    assert report.peak_bytes == held + x + 2 * blocks(one) + 64 * inside


def test_a_schedule_of_floats_is_known():
    def make():
        rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
        widths = (torch.arange(3) * 2.5 + 8).div(8).round().mul(8).int().tolist()
        return nn.Sequential(*(nn.Dropout(rate) for rate in rates if rate > 0)), torch.ones(4, sum(widths)), rates

    predicted = predict_memory(make, lambda layers, x, rates: layers(x), device="cpu")
    assert whole(predicted) == measured(make(), lambda layers, x, rates: layers(x))[1]
    assert predicted.guessed == []
    assert predict_memory(lambda: torch.zeros(2), lambda x: x.sum().item()).guessed  # which may stand for data


def test_what_is_drawn_is_guessed_in_its_range():
    seen = []

    def step(x):
        seen.append(["only one"][int(torch.empty(1).uniform_(0.0, 1.0).item())])  # as detection picks a size
        seen.append([torch.rand(2)[0].item(), torch.empty(2).uniform_(-1, 1)[1].item()])
        seen.append([torch.randint(9, (2,))[0].item(), torch.randint_like(x, 3, 5).max().item()])
        seen.append([torch.randint(3, 5, (2,)).tolist(), torch.randint(5, (1,)).fill_(7).item()])

    report = predict_memory(lambda: torch.ones(3).long(), step)
    assert seen[:4] == ["only one", [0.5, 0.0], [4, 1], [[3, 3], 1]]
    assert report.guessed[0][1:] == ("float32 taken as 0.5", 2)


def test_a_distribution_is_given_what_is_valid():
    def step(scores):
        policy = torch.distributions.Categorical(logits=scores)
        entropy = torch.distributions.Gamma(scores.exp(), 1.0).entropy().sum()
        (policy.log_prob(policy.sample()).sum() * entropy).backward()

    make = lambda: torch.ones(4, 5, requires_grad=True)  # noqa: E731
    predicted = predict_memory(make, step, device="cpu")
    assert [whole(predicted.first), whole(predicted)] == measured((make(),), step)
    assert predicted.guessed == []


def test_what_batch_norm_writes_is_no_longer_known():
    seen = []

    def make():
        norm = nn.BatchNorm1d(2)
        norm.running_mean = torch.tensor([2.0, 3.0])
        return norm, torch.rand(4, 2)

    def step(norm, x):
        seen.append((norm.running_mean[0].item(), norm.num_batches_tracked.item()))
        norm(x)

    (guess,) = predict_memory(make, step, device="cpu").guessed
    assert seen == [(2.0, 0), (1.0, 1)]
    assert (guess.what, guess.times) == ("float32 taken as 1.0", 1)


def test_experts_in_a_loop_are_refused_by_name():
    class Experts(nn.Module):
        config = type("Config", (), {"_experts_implementation": "eager"})

        def forward(self, hit):
            return hit.nonzero()

    with pytest.raises(NotImplementedError, match=r'nonzero.default in Experts .* = "grouped_mm"\.$'):
        predict_memory(lambda: (Experts(), torch.rand(3)), lambda experts, x: experts(x > 0))


def test_what_an_initialization_draws_is_no_guess():
    def make():
        return nn.init.trunc_normal_(torch.empty(5, 5)), torch.rand(4)

    assert predict_memory(make, lambda weight, noise: None).guessed == []
    (guess,) = predict_memory(make, lambda weight, noise: noise.sum().item()).guessed
    assert guess.what == "float32 taken as 1.0"


class AdamW8bit(torch.optim.AdamW):
    pass


def test_8_bit_optimizers_are_refused_by_name():
    def make():
        model = nn.Linear(3, 3)
        return model, AdamW8bit(model.parameters())

    with pytest.raises(NotImplementedError, match=r"AdamW8bit cannot be predicted, .* torch's AdamW"):
        predict_memory(make, lambda model, optimizer: optimizer.step())


class Wrapped(torch.optim.Optimizer):
    """As accelerate makes them: an Optimizer that never ran Optimizer's constructor."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


@pytest.mark.parametrize("wrap", [Wrapped, lambda optimizer: type("Plain", (), {})()])
def test_an_optimizer_in_a_wrapper_is_followed(wrap):
    def make(wrap=wrap):
        model = nn.Linear(30, 30)
        optimizer = torch.optim.Adam(model.parameters(), foreach=False)
        wrapped = wrap(optimizer)
        vars(wrapped)["optimizer"] = optimizer
        return model, wrapped, torch.ones(2, 30)

    def step(model, wrapped, x):
        model(x).sum().backward()
        wrapped.optimizer.step()

    predicted = predict_memory(make, step, device="cpu")
    assert predicted.at_peak["optimizer state"] >= 2 * 4 * 930
    built = make()
    step(*built)
    with measure_memory(*built) as measured:
        step(*built)
    assert whole(measured) == whole(predicted)


def test_workspaces_are_counted_where_matrices_multiply():
    build = lambda: (nn.Linear(8, 8), torch.ones(2, 8))  # noqa: E731
    backward = predict_memory(build, lambda model, x: model(x).sum().backward())
    assert backward.first.at_peak["libraries"] == backward.at_peak["libraries"] == 2 * WORKSPACE
    assert backward.end_bytes - backward.first.start_bytes == 2 * WORKSPACE + blocks(256, 32)
    forward = predict_memory(build, lambda model, x: model(x))
    assert (forward.at_peak["libraries"], forward.start_bytes) == (WORKSPACE, WORKSPACE + blocks(256, 32, 64))
    assert predict_memory(build, lambda model, x: x + 1).at_peak["libraries"] == 0
    assert "libraries" not in predict_memory(build, lambda model, x: model(x), device="cpu").at_peak


def test_nothing_is_allocated():
    resource = pytest.importorskip("resource")  # not there on Windows
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    make = lambda: (nn.Linear(50_000, 50_000, bias=False), torch.ones(4, 50_000))  # noqa: E731
    report = predict_memory(make, lambda model, batch: model(batch).sum().backward())
    # The weight, its gradient, and one more to be added to that.
    assert report.peak_bytes > 3 * 4 * 50_000**2 > 1e10
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000 * (1024 if sys.platform == "darwin" else 1)  # kB, but bytes on a Mac


def test_measuring_around_it_counts_nothing_of_it():
    with measure_memory() as memory:
        predict_memory(lambda: torch.ones(1000), lambda x: x + 1)
    assert memory.peak_bytes == 0


KEPT = []  # of another prediction
predict_memory(lambda: KEPT.append(torch.ones(3)), lambda nothing: None, device="cpu")


def lbfgs():
    weight = nn.Parameter(torch.ones(3))
    return weight, torch.optim.LBFGS([weight])


REAL = nn.Linear(3, 3)
COMPILED = torch.compile(lambda x: x + 1)


def batch():
    return torch.ones(2, 3)


@pytest.mark.parametrize(
    ("make", "step", "device", "error", "said"),
    [
        (3, batch, "cpu", TypeError, "build must be a function, but 3 is of type int"),
        (batch, batch(), "cpu", TypeError, "step must be a function"),
        (batch, batch, "gpu", TypeError, "'gpu' was given"),
        (batch, batch, "mps", NotImplementedError, "not for 'mps'"),
        (lambda: (nn.LSTM(3, 3), batch()), lambda m, x: m(x), "cuda", NotImplementedError, "lstm"),
        (lambda: (nn.RNNCell(3, 3), batch()), lambda m, x: m(x), "cpu", NotImplementedError, "rnn_tanh_cell"),
        (
            lambda: nn.EmbeddingBag(3, 3),
            lambda m: m(torch.ones(2, 3).long()),
            "cpu",
            NotImplementedError,
            "embedding_bag",
        ),
        (lbfgs, lambda weight, optimizer: optimizer.step(weight.sum), "cpu", NotImplementedError, "LBFGS cannot"),
        (batch, lambda x: x + KEPT[0], "cpu", ValueError, r"shape \(3,\) created outside"),
        (lambda: torch.compile(REAL), REAL, "cpu", NotImplementedError, "leave torch.compile out"),
        (lambda: nn.Linear(3, 3).compile(), REAL, "cpu", NotImplementedError, "leave torch.compile out"),
        (batch, COMPILED, "cpu", NotImplementedError, "leave torch.compile out"),
        (
            lambda: (REAL, batch()),
            lambda m, x: m(x),
            "cpu",
            ValueError,
            "created outside of build .*: create the model",
        ),
        (batch, lambda x: REAL.weight.detach(), "cuda", ValueError, r"shape \(3, 3\) created outside"),
        (lambda: nn.Linear(3, 3)(batch()), batch, "cpu", ValueError, "a forward, .* run the forward in step"),
        (batch, lambda x: x[x > 0], "cpu", NotImplementedError, "size depends on values"),
        (batch, lambda x: torch.equal(x, x + 1), "cpu", NotImplementedError, "depends on values"),
        (batch, lambda x: x.to_sparse(), "cpu", NotImplementedError, "size depends on values|dense"),
        (batch, lambda x: 1 / 0, "cuda", ZeroDivisionError, "division"),
    ],
)
def test_what_cannot_be_predicted_is_refused(make, step, device, error, said):
    with pytest.raises(error, match=said) as caught:
        predict_memory(make, step, device=device)
    assert len(str(caught.value)) < 250
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0


def keeping(model, optimizer, window):  # what it should not do: the logits of all micro-batches are kept
    kept = []
    for micro_batch in window:
        kept.append(model(micro_batch[0]))
        cross_entropy(kept[-1].flatten(0, 1), micro_batch[1].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("optimizer", "step", "effective_batch", "device"),
    [("sgd", accumulated, 9, "cpu"), ("adamw", plain, 7, "cuda"), ("sgd", keeping, 7, "cuda")],
)
def test_the_largest_that_fits_of_all(monkeypatch, optimizer, step, effective_batch, device):
    make, peaks = partial(build, "mlp", optimizer), {}
    begin, reports, starts = _Search.__init__, {}, {}

    def knowing(search, *given):  # the plans for all budgets make each prediction once
        begin(search, *given)
        search._reports, search._starts = reports, starts

    monkeypatch.setattr(_Search, "__init__", knowing)
    for size in range(1, effective_batch + 1):
        full, rest = divmod(effective_batch, size)
        report = predict_memory(partial(make, [size] * full + [rest] * (rest > 0)), step, device=device)
        peaks[size] = max(report.peak_bytes, report.first.peak_bytes)
    plan = partial(plan_micro_batches, make, step, effective_batch=effective_batch, device=device)
    for budget in sorted({peak + more for peak in peaks.values() for more in (0, -1)}):
        fits = [size for size in peaks if peaks[size] <= budget]
        if not fits:
            with pytest.raises(ValueError, match=f"the budget {budget:,}; most of it is [a-z ]+, [0-9,]+ bytes"):
                plan(budget=budget)
            continue
        found = plan(budget=budget)
        assert found.peak_bytes == peaks[found.micro_batch] <= budget == found.budget_bytes
        assert found.next_micro_batch_peak_bytes == peaks.get(found.micro_batch + 1)
        assert (found.next_micro_batch_peak_bytes or budget + 1) > budget
        assert sum(found.sizes) == effective_batch
        if step is not keeping:  # of which a larger micro-batch may need less memory, because it has fewer
            assert found.micro_batch == max(fits)


def test_256_holds_with_a_smaller_last_one():
    make, calls = partial(build, "mlp", "sgd"), []

    def noting(sizes):
        calls.append(tuple(sizes))
        return make(sizes)

    budget = 300_000 + 2 * WORKSPACE
    found = plan_micro_batches(noting, plain, effective_batch=256, budget=budget)
    *equal, last = found.sizes
    assert sum(found.sizes) == 256
    assert set(equal) == {found.micro_batch}
    assert 0 < last < found.micro_batch
    assert found.accumulation_steps == len(found.sizes) == 5
    assert f"effective batch 256, the last {last}" in repr(found)
    assert len({sizes for sizes in calls if len(sizes) <= 4}) <= 12  # the longer ones are only built
    assert found.peak_bytes <= found.budget_bytes == budget < found.next_micro_batch_peak_bytes


def test_a_window_that_fits_is_one_micro_batch():
    found = plan_micro_batches(partial(build, "lesson", "sgd"), plain, effective_batch=4, budget="1.5 GB")
    assert (found.sizes, found.next_micro_batch_peak_bytes) == ((4,), None)
    budgets = {"1.5 GB": 15 * 10**8, "24GiB": 24 * 2**30, "512 mib": 2**29, "7 B": 7, 10**9: 10**9}
    assert [_budget_bytes(budget) for budget in budgets] == list(budgets.values())


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"budget": "24 apples"}, ValueError, '"24 GB" or "24 GiB", but \'24 apples\''),
        ({"budget": 1.5}, TypeError, "1.5 was given"),
        ({"budget": 0}, ValueError, "at least 1 byte"),
        ({"effective_batch": 0}, ValueError, "at least 1, but 0"),
        ({"build": 3}, TypeError, "a function of a list of sizes"),
        ({"step": 3}, TypeError, "step must be a function"),
    ],
)
def test_a_plan_refuses_what_is_of_no_use(changed, error, said):
    given = {"build": partial(build, "mlp", "sgd"), "step": plain, "effective_batch": 4, "budget": "1 GB"} | changed
    with pytest.raises(error, match=said):
        plan_micro_batches(given.pop("build"), given.pop("step"), **given)


@pytest.fixture(params=[1e-9, 1e9], ids=["long", "short"])
def bars(request, monkeypatch):
    """Let every prediction count as long, or as short; the bars that are made, and whether they show."""
    tqdm, bars = pytest.importorskip("tqdm"), []

    class Bar(tqdm.tqdm):
        def __init__(self, **options):
            assert options["delay"] == 2
            assert options["disable"] is None  # silent where the output goes into a file
            super().__init__(**options | {"delay": request.param, "mininterval": 0, "ncols": 300, "disable": False})
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    return bars, request.param < 1


def test_a_long_prediction_shows_its_progress(bars, capsys):
    bars, long = bars
    predict_memory(partial(build, "mlp", "sgd", [4]), plain)
    shown = capsys.readouterr().err
    assert bars[0].n > 20
    assert ("predicting" in shown) == long
    assert shown.rstrip("\r").rpartition("\r")[2].strip() == ""  # gone
    found = plan_micro_batches(partial(build, "mlp", "sgd"), plain, effective_batch=9, budget=61_000 + 2 * WORKSPACE)
    shown = capsys.readouterr().err
    assert (f"micro_batch={found.micro_batch}" in shown) == long
    assert (f"last_peak={found.next_micro_batch_peak_bytes:,} bytes" in shown) == long
    assert long or not shown
    assert len(bars) == 2  # one bar for the whole plan
    assert {bar.disable for bar in bars} == {True}  # closed


def test_a_bar_in_a_notebook_leaves_nothing():
    lines = ["import time", "from gradaccum.memory.predict import progress", "with progress('predicting') as tick:"]
    lines += ["    for _ in range(25):", "        time.sleep(0.1)", "        tick()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("\n".join(lines))])
    with builder.kernel(notebook, TQDM_DISABLE="") as client:
        client.coalesce_streams = False  # as Jupyter stores them
        builder.run_cells(client, notebook.cells)
    (shown,) = notebook.cells[0].outputs  # it was there
    assert shown.data == {}


def test_no_prediction_needs_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    make = partial(build, "mlp", "sgd")
    assert predict_memory(partial(make, [4]), plain).peak_bytes > 0
    assert plan_micro_batches(make, plain, effective_batch=4, budget="1 GB").sizes == (4,)
