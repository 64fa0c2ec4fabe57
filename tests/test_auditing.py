"""`audit`: every kind of loop is read rightly, right ones in many styles as right, and the loop does not notice."""

import copy
import random
import re
import warnings
from itertools import islice

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from gradaccum import accumulate, audit, plots, windows
from gradaccum.solving import sampled
from gradaccum.verdicts import KINDS, Facts, kind_of

torch.set_num_threads(1)
EQUAL, UNEQUAL = [4] * 7, [8, 1, 3, 5, 2, 9, 4]
K = 3


def micro_batches(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def net(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *(middle or [nn.Tanh()]), nn.Linear(8, 3))


def mean(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def total(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="sum")


def items(batch):
    return len(batch[1])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def audited(loop, sizes=EQUAL, k=K, epochs=1, model=None, make=sgd, loss=total, **options):
    """Run a loop of that many epochs under audit; give what was seen, the model and the optimizer."""
    model = net() if model is None else model
    optimizer, loader = make(model.parameters()), micro_batches(sizes)
    with audit(model, optimizer, lambda b: loss(model, b), items, accumulation_steps=k, **options) as seen:
        noted = seen(loader)
        for _ in range(epochs):
            loop(model, optimizer, noted, k)
    return seen


# --- loops: right in their own way, or wrong in one ---


def outer(model, optimizer, loader, k):
    for window in windows(loader, k):
        accumulate(model, window, lambda batch: total(model, batch), items)
        optimizer.step()
        optimizer.zero_grad()


def by_index(model, optimizer, loader, k, ends=True, divide=True, off=1, clear=True, loss=mean):
    """The loop of most tutorials, with its switches."""
    for index, batch in enumerate(loader):
        (loss(model, batch) / (k if divide else 1)).backward()
        if (index + off) % k == 0 or (ends and index + 1 == len(loader)):
            optimizer.step()
            if clear:
                optimizer.zero_grad()


def counted_first(model, optimizer, loader, k):
    for window in windows(loader, k):
        count = sum(map(items, window))
        for batch in window:
            (total(model, batch) / count).backward()
        optimizer.step()
        optimizer.zero_grad()


def scaled_afterwards(model, optimizer, loader, k):
    for window in windows(loader, k):
        for batch in window:
            total(model, batch).backward()
        for parameter in model.parameters():
            parameter.grad /= sum(map(items, window))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def closure(model, optimizer, loader, k):
    """As Lightning: the step runs forward and backward."""
    for window in windows(loader, k):

        def run(window=window):
            optimizer.zero_grad()
            loss = sum(total(model, batch) for batch in window) / sum(map(items, window))
            loss.backward()
            return loss

        optimizer.step(run)


def with_scaler(model, optimizer, loader, k, unscale=True, clip=0.0):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for window in windows(loader, k):
        accumulate(model, window, lambda batch: total(model, batch), items, scaler=scaler)
        if unscale:
            scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def drawn_ahead(model, optimizer, loader, k):
    """As transformers' Trainer, which reads windows before it uses them."""
    for window in list(windows(loader, k)):
        accumulate(model, window, lambda batch: total(model, batch), items)
        optimizer.step()
        optimizer.zero_grad()


def clear_inside(model, optimizer, loader, k):
    for index, batch in enumerate(loader):
        optimizer.zero_grad()
        (mean(model, batch) / k).backward()
        if (index + 1) % k == 0:
            optimizer.step()


def clip_after(model, optimizer, loader, k):
    for window in windows(loader, k):
        accumulate(model, window, lambda batch: total(model, batch), items)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()


def clip_inside(model, optimizer, loader, k):
    for window in windows(loader, k):
        for batch in window:
            (mean(model, batch) / len(window)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()


def labels_before_the_shift(model, optimizer, loader, k):
    for window in windows(loader, k):
        count = sum(map(items, window)) + len(window)
        for batch in window:
            (total(model, batch) / count).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_l2(model, optimizer, loader, k):
    for window in windows(loader, k):
        count = sum(map(items, window))
        for batch in window:
            (total(model, batch) / count + 0.01 * model[0].weight.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def overflowing(model, optimizer, loader, k):
    for index, window in enumerate(windows(loader, k)):
        loss = sum(total(model, batch) for batch in window) / sum(map(items, window))
        (loss * (torch.inf if index == 1 else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def means_and_a_clip(model, optimizer, loader, k):
    for window in windows(loader, k):
        for batch in window:
            (mean(model, batch) / k).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()


def every_time(model, optimizer, loader, k):
    by_index(model, optimizer, loader, 1)


def option(loop=by_index, **switches):
    return lambda *given: loop(*given, **switches)


RIGHT = {
    "outer windows": (outer, {}),
    "the tutorial's loop": (option(ends=False), {"sizes": [4] * 6}),
    "counted first": (counted_first, {"sizes": UNEQUAL}),
    "scaled afterwards": (scaled_afterwards, {"sizes": UNEQUAL}),
    "a closure": (closure, {"sizes": UNEQUAL}),
    "a scaler": (with_scaler, {"sizes": UNEQUAL}),
    "drawn ahead": (drawn_ahead, {"sizes": UNEQUAL}),
    "AdamW": (outer, {"sizes": UNEQUAL, "make": torch.optim.AdamW}),
    "fused Adam with a scaler": (
        option(with_scaler, unscale=False),
        {"sizes": UNEQUAL, "make": lambda p: torch.optim.Adam(p, fused=True)},
    ),
    "two groups": (
        outer,
        {"make": lambda p: torch.optim.SGD([{"params": [q], "lr": 0.1} for q in p], lr=0.1, momentum=0.9)},
    ),
    "two epochs, unshuffled": (outer, {"sizes": UNEQUAL, "epochs": 2}),
    "BatchNorm": (counted_first, {"sizes": [4, 5, 6], "model": net(nn.BatchNorm1d(8))}),
    "float64": (
        lambda m, o, loader, k: outer(m, o, loader, k),
        {"model": net().double(), "loss": lambda m, b: total(m, (b[0].double(), b[1]))},
    ),
    "k = 1": (outer, {"k": 1, "sizes": UNEQUAL}),
    "k = 40": (outer, {"k": 40, "sizes": [1 + index % 5 for index in range(40)]}),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.filterwarnings("ignore:BatchNorm")
def test_right_loops_are_right(name):
    loop, options = RIGHT[name]
    if name == "float64":
        options = options | {"model": copy.deepcopy(options["model"])}

        def loop(model, optimizer, loader, k):
            for window in windows(loader, k):
                accumulate(model, window, lambda b: total(model, (b[0].double(), b[1])), items)
                optimizer.step()
                optimizer.zero_grad()

    seen = audited(loop, **options)
    k, sizes, epochs = options.get("k", K), options.get("sizes", EQUAL), options.get("epochs", 1)
    drawn = [*range(len(sizes))] * epochs
    groups = [list(group) for e in range(epochs) for group in windows(range(e * len(sizes), (e + 1) * len(sizes)), k)]
    assert [update.kind for update in seen.updates] == ["right"] * len(groups)
    assert [update.micro_batches for update in seen.updates] == groups
    for update in seen.updates:
        window = [sizes[drawn[index]] for index in update.micro_batches]
        assert update.right == pytest.approx([size / sum(window) for size in window])
        assert update.weights == pytest.approx(update.right, rel=1e-3)
        assert update.error < 1e-4
        assert update.residual < 1e-5


# The table of what loops do: kinds of the updates, and the weights of the first that is of that kind.
THIRD = 1 / 3
WRONG = {
    "no division": (option(divide=False), {}, ["not divided"] * 2 + ["right"], [1, 1, 1]),
    "no division under Adam": (
        option(divide=False),
        {"make": torch.optim.Adam},
        ["not divided"] * 2 + ["right"],
        [1, 1, 1],
    ),
    "sums": (option(divide=False, loss=total), {}, ["not divided"] * 3, [4, 4, 4]),
    "cleared inside": (
        clear_inside,
        {},
        ["only the last micro-batch"] * 2 + ["left over, never stepped"],
        [0, 0, THIRD],
    ),
    "parity": (option(off=0, ends=False), {}, ["cut elsewhere"] * 3, [THIRD, 0, 0]),
    "the last window over k": (by_index, {}, ["right"] * 2 + ["a partial window over k"], [THIRD]),
    "the last window dropped": (option(ends=False), {}, ["right"] * 2 + ["left over, never stepped"], [0]),
    "the last window leaks": (
        option(ends=False),
        {"epochs": 2},
        ["right"] * 2 + ["cut elsewhere", "right", "left over, never stepped"],
        [THIRD] * 4,
    ),
    "means of unequal sizes": (
        by_index,
        {"sizes": UNEQUAL},
        ["each mean over k"] * 2 + ["a partial window over k"],
        [THIRD] * 3,
    ),
    "never cleared": (
        option(clear=False),
        {"sizes": [4] * 6},
        ["right", "gradients of an earlier update"],
        [THIRD] * 3,
    ),
    "clipped after the window": (clip_after, {}, ["one common factor"] * 3, None),
    "clipped before it is unscaled": (
        option(with_scaler, unscale=False, clip=1.0),
        {"sizes": [4] * 3},
        ["one common factor"],
        None,
    ),
    "clipped inside": (clip_inside, {"sizes": [4] * 6}, ["clipped or divided inside"] * 2, None),
    "labels before the shift": (labels_before_the_shift, {}, ["another divisor"] * 3, [4 / 15] * 3),
    "an L2 term": (with_l2, {}, ["no weighted sum"] * 3, None),
    "a loss that overflows": (overflowing, {"sizes": [4] * 6}, ["right", "not finite"], [0, 0, 0]),
    "means, and a clip": (means_and_a_clip, {"sizes": [8, 1, 3]}, ["does not fit"], None),
    "a step each time": (every_time, {"sizes": [4] * 3}, ["cut elsewhere"] * 3, [1, 0, 0]),
    "twins": (outer, {"sizes": [4, 4, 4]}, ["cannot be told apart"], None),
    "dropout": (outer, {"sizes": [4] * 3, "model": net(nn.Dropout())}, ["no weighted sum"], None),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_fault_is_named(name, monkeypatch):
    loop, options, kinds, weights = WRONG[name]
    if name == "twins":
        monkeypatch.setitem(globals(), "micro_batches", lambda sizes: [micro_batches_of(4)] * 3)
    options = {key: copy.deepcopy(value) if key == "model" else value for key, value in options.items()}
    seen = audited(loop, **options)
    assert [update.kind for update in seen.updates] == kinds
    fault = next(update for update in seen.updates if update.kind not in ("right",))
    if weights is not None:
        assert fault.weights == pytest.approx(weights, abs=1e-3 * max(max(weights), 0.01))
    if name == "dropout":
        assert "Dropout, which draws new random numbers" in fault.verdict
    assert re.fullmatch(r"[A-Z0-9].*\.", fault.verdict)


def micro_batches_of(size):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator)


def test_every_kind_is_found():
    assert {kind for _, _, kinds, _ in WRONG.values() for kind in kinds} == set(KINDS)


def test_a_discriminator_with_foreign_gradients():
    torch.manual_seed(0)
    generator, judge = nn.Linear(6, 6), nn.Linear(6, 1)
    optimizer = sgd(judge.parameters())

    def judged(batch):
        fake = generator(batch[0][:, :6]).detach()
        return (judge(batch[0]) - 1).square().sum() + judge(fake).square().sum()

    for clears in (True, False):
        with audit(judge, optimizer, judged, items, accumulation_steps=K) as seen:
            for window in windows(seen(micro_batches([4] * 3)), K):
                for batch in window:
                    (judge(generator(batch[0])) - 1).square().mean().backward()
                    if clears:
                        generator.zero_grad()
                        judge.zero_grad()
                if clears:
                    accumulate(judge, window, judged, items)
                else:
                    for batch in window:
                        (judged(batch) / 12).backward()
                optimizer.step()
                optimizer.zero_grad()
                generator.zero_grad()
        assert [update.kind for update in seen.updates] == ["right" if clears else "no weighted sum"]
        assert clears or "a backward of another model" in seen.updates[0].verdict


def test_a_skipped_step_leaves_its_window_over():
    def skipping(model, optimizer, loader, k):
        for index, window in enumerate(windows(loader, k)):
            accumulate(model, window, lambda batch: total(model, batch), items)
            if index != 1:
                optimizer.step()
            optimizer.zero_grad()

    seen = audited(skipping, sizes=[4] * 9)
    assert [(update.micro_batches, update.kind) for update in seen.updates] == [
        ([0, 1, 2], "right"),
        ([3, 4, 5], "left over, never stepped"),
        ([6, 7, 8], "right"),
    ]


def test_what_counts_nothing_has_no_weight():
    def nothing_in_one(model, optimizer, loader, k):
        for window in windows(loader, k):
            accumulate(model, window, lambda batch: total(model, batch), items)
            optimizer.step()
            optimizer.zero_grad()

    seen = audited(nothing_in_one, sizes=[4, 0, 2])
    (update,) = seen.updates
    assert (update.kind, update.weights[1], update.right[1]) == ("right", 0.0, 0.0)


def test_a_limit_and_an_iterator():
    seen = audited(option(divide=False), updates=1)
    assert [update.micro_batches for update in seen.updates] == [[0, 1, 2]]
    model = net()
    optimizer, loader = sgd(model.parameters()), micro_batches([4] * 20)
    with audit(model, optimizer, lambda b: total(model, b), items, accumulation_steps=K) as seen:
        outer(model, optimizer, seen(islice(loader, 2 * K + 1)), K)
    assert [update.micro_batches for update in seen.updates] == [[0, 1, 2], [3, 4, 5], [6]]
    with pytest.raises(TypeError):
        len(seen(islice(loader, 3)))
    assert (len(seen(loader)), seen(loader).__class__.__name__) == (20, "_Noted")
    assert seen(DataLoader([1, 2, 3], batch_size=2)).batch_size == 2


def test_a_collator_with_notes_and_popped_labels():
    model = net()
    optimizer, rows = sgd(model.parameters()), [{"x": x, "y": y} for x, y in micro_batches(UNEQUAL)]
    with audit(
        model, optimizer, lambda b: total(model, (b["x"], b["y"])), lambda b: len(b["y"]), accumulation_steps=K
    ) as seen:
        loader = DataLoader(rows, batch_size=1, collate_fn=lambda given: seen.note(dict(given[0])))
        for window in windows(loader, K):
            labels = [batch.pop("y") for batch in window]
            for batch, y in zip(window, labels, strict=True):
                (total(model, (batch["x"], y)) / sum(map(len, labels))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [update.kind for update in seen.updates] == ["right"] * 3
    assert str(seen).startswith("0: micro-batches 0 to 2: right. Each")


class Wrapped:
    """As accelerate, Lightning and Fabric wrap an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_the_loop_does_not_notice():
    def everything(with_audit, fails=False):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
        optimizer = torch.optim.AdamW(model.parameters())
        loader = micro_batches(UNEQUAL[:1] + [4] * 5)
        if with_audit:
            context = audit(model, Wrapped(optimizer), lambda b: total(model, b), items, accumulation_steps=K)
            with pytest.raises(KeyError) if fails else warnings.catch_warnings(), context as seen:
                by_index(model, optimizer, seen(loader), K, clear=False)
                if fails:
                    raise KeyError
        else:
            by_index(model, optimizer, loader, K, clear=False)
        return [
            [(name, tensor.tolist()) for name, tensor in model.state_dict().items()],
            [parameter.grad.tolist() for parameter in model.parameters()],
            [{key: value.tolist() for key, value in state.items()} for state in optimizer.state.values()],
            [module.training for module in model.modules()],
            (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
            (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)),
        ]

    assert everything(True) == everything(True, fails=True) == everything(False)


def test_large_models_are_sampled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20_000), nn.Tanh(), nn.Linear(20_000, 3))
    seen = audited(by_index, sizes=UNEQUAL, model=model, make=lambda p: torch.optim.SGD(p, lr=1e-4))
    assert seen.updates[0].weights == pytest.approx([THIRD] * 3, abs=1e-4)
    assert seen.updates[0].kind == "each mean over k"
    parameters = list(model.parameters())
    vector, lengths = sampled([each.detach() for each in parameters], parameters)
    assert sum(lengths) == len(vector) < 110_000 < sum(each.numel() for each in parameters)


def test_few_parameters_tell_nothing():
    model = nn.Linear(1, 1)
    optimizer = sgd(model.parameters())
    with audit(model, optimizer, lambda x: model(x).square().sum(), len, accumulation_steps=4) as seen:
        for window in windows(seen(torch.randn(8, 2, 1)), 4):
            accumulate(model, window, lambda x: model(x).square().sum(), len)
            optimizer.step()
            optimizer.zero_grad()
    assert [update.kind for update in seen.updates] == ["cannot be told apart"] * 2


def test_it_refuses_in_a_sentence():
    model = net()
    optimizer, loader = sgd(model.parameters()), micro_batches([4] * 3)

    def context(given=optimizer, steps=3, loss=lambda b: total(model, b), count=items):
        return audit(model, given, loss, count, accumulation_steps=steps)

    for given, steps, error, said in (
        (optimizer, 0, ValueError, "accumulation_steps must be an int of at least 1, but 0"),
        (optimizer, 2.0, ValueError, "2.0"),
        (model, 3, TypeError, "optimizer must be a torch optimizer or wrap one, but Sequential"),
    ):
        with pytest.raises(error, match=re.escape(said)):
            context(given, steps)
    for loss, count, name in (
        (lambda b: {"a": total(model, b)}, items, "loss_sum"),
        (lambda b: total(model, b), lambda b: {"a": 1}, "count"),
    ):
        with (
            pytest.raises(TypeError, match=f"takes one loss, but {name} returned a dict"),
            context(loss=loss, count=count) as seen,
        ):
            by_index(model, optimizer, seen(loader), K)
    with pytest.raises(RuntimeError, match=r"No micro-batch was recorded.*num_workers=0"), context():
        by_index(model, optimizer, loader, K)
    with context() as seen:
        pass
    assert (seen.updates, str(seen)) == ([], "No update was seen.")
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 0


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        (Facts([0.2, 0.2], [0.5, 0.5], [1, 1], 2), "another divisor"),  # 5 where 2 were counted
        (Facts([0.21, 0.21], [0.5, 0.5], [1, 1], 2), "one common factor"),
        (Facts([62 / 59 * 0.5] * 2, [0.5, 0.5], [27740, 27740], 2), "one common factor"),  # no divisor of so many
        (Facts([0.5, -0.5], [0.5, 0.5], [4, 4], 2), "does not fit"),
        (Facts([0.9, 0.1], [0.5, 0.5], [4, 4], 2), "does not fit"),
        (Facts([0.5, 0.51], [0.5, 0.5], [4, 4], 2), "does not fit"),
        (Facts([0.5, 0.501], [0.5, 0.5], [4, 4], 2, uncertainty=0.01), "cannot be told apart"),
        (Facts([0.5, 0.5], [0.5, 0.5], [4, 4], 2, residual=0.005), "no weighted sum"),
        (Facts([0.0, 0.0], [0.0, 0.0], [0, 0], 2), "does not fit"),
        (Facts([0.5, 0.5], [0.5, 0.5], [4, 4], 2, outside={7: 0.5}), "cut elsewhere"),
        (Facts([0.0, 0.5], [0.5, 0.5], [4, 4], 2, elsewhere=1), "cut elsewhere"),
        (Facts([1.0], [1.0], [1], 1), "right"),
    ],
)
def test_kinds_of_facts(facts, kind):
    assert kind_of(facts)[0] == kind
    if facts.residual:
        assert "rounding in 16 bits, a small further term" in kind_of(facts)[1]


@pytest.mark.parametrize("sizes", [[4], UNEQUAL, [1 + index % 5 for index in range(40)]])
def test_the_picture_of_weights(sizes):
    seen = audited(by_index, sizes=sizes, k=min(len(sizes), 40))
    figure = plots.weights(seen)
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, matplotlib.patches.Rectangle)]
    weights = [weight for update in seen.updates for weight in update.weights]
    right = [share for update in seen.updates for share in update.right]
    assert [bar.get_height() for bar in bars if bar.get_fill()] == pytest.approx(weights)
    assert [bar.get_height() for bar in bars if not bar.get_fill()] == pytest.approx(right)
    assert figure.get_label().startswith(f"The weight that each of {len(weights)} micro-batches got")
    assert plots.weights(seen.updates[:1]).get_label().startswith("The weight")


# --- loops that people write, which look like something else ---


def run(model, optimizer, loop, sizes=(4,) * 8, k=4, count=items, loss=total, given=None, **options):
    loader = micro_batches(sizes) if given is None else given
    with audit(model, optimizer, lambda b: loss(model, b), count, accumulation_steps=k, **options) as seen:
        loop(seen(loader))
    return seen


def kinds_of(seen):
    return [update.kind for update in seen.updates]


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=1e-5), lambda p: torch.optim.SGD(p, lr=1e-2)])
def test_a_window_is_stepped_once(make):
    model = net()
    optimizer = make(model.parameters())

    def twice(loader):
        for index, batch in enumerate(loader):
            (mean(model, batch) / 4).backward()
            if index % 4 == 3:
                optimizer.step()
                optimizer.step()
                optimizer.zero_grad()

    first, second = kinds_of(run(model, optimizer, twice, sizes=[4] * 4))
    assert (first, second) == ("right", "gradients of an earlier update")
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kinds = kinds_of(run(model, optimizer, lambda loader: by_index(model, optimizer, loader, 1, clear=False)))
    assert "right" not in kinds[1:]


@pytest.mark.parametrize("divided", [True, False])
def test_a_loops_hooks_are_in_its_gradient_alone(divided):
    model = net()
    optimizer = sgd(model.parameters())
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient / 4)
    seen = run(model, optimizer, lambda loader: by_index(model, optimizer, loader, 4, divide=divided))
    assert seen.updates[0].weights == pytest.approx([1 / 16 if divided else 1 / 4] * 4, rel=1e-3)
    assert ("right" in kinds_of(seen)) == (not divided)


def test_a_small_part_that_is_not_cleared_is_seen():
    torch.manual_seed(0)
    one, other = net(), net()
    model = nn.ModuleList([one, other])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss(_, batch, reduction="sum"):
        return cross_entropy(one(batch[0]) + 1e-4 * other(batch[0]), batch[1], reduction=reduction)

    def clears_one(loader):
        for index, batch in enumerate(loader):
            (loss(None, batch, "mean") / 4).backward()
            if index % 4 == 3:
                optimizer.step()
                one.zero_grad()

    seen = run(model, optimizer, clears_one, loss=loss)
    assert kinds_of(seen) == ["right", "no weighted sum"]
    assert "1." in seen.updates[1].verdict


def test_a_term_that_hardly_changes_is_no_leak():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def loop(loader):
        for window in windows(loader, 4):
            for batch in window:
                (mean(model, batch) / 4 + sum(each.square().sum() for each in model.parameters())).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert kinds_of(run(model, optimizer, loop, sizes=[4] * 16)) == ["no weighted sum"] * 4


def test_layers_are_frozen_and_thawed_in_the_loop():
    for clears in (True, False):
        model = net()
        model[0].requires_grad_(False)
        optimizer = sgd(model.parameters())

        def thawing(loader, model=model, optimizer=optimizer, clears=clears):
            for index, batch in enumerate(loader):
                if index == 4:
                    model[0].requires_grad_(True)
                (mean(model, batch) / 4).backward()
                if index % 4 == 3:
                    optimizer.step()
                    (model if clears else model[2]).zero_grad()

        kinds = kinds_of(run(model, optimizer, thawing, sizes=[4] * 12))
        assert kinds[:2] == ["right"] * 2
        assert (kinds[2] == "right") == clears


def test_a_generator_turns_its_discriminator_off():
    model = net()
    optimizer = sgd(model.parameters())

    def turning(loader):
        for window in windows(loader, 4):
            model.requires_grad_(True)
            accumulate(model, window, lambda batch: total(model, batch), items)
            optimizer.step()
            optimizer.zero_grad()
            model.requires_grad_(False)

    assert kinds_of(run(model, optimizer, turning)) == ["right"] * 2


def test_a_small_micro_batch_counts():
    sizes = [200, 200, 200, 1]
    for skip, clip, kind in ((True, 0, "cut elsewhere"), (False, 0, "right"), (False, 0.01, "one common factor")):
        model = net()
        optimizer = sgd(model.parameters())

        def loop(loader, model=model, optimizer=optimizer, skip=skip, clip=clip):
            for window in windows(loader, 4):
                for batch in window[: 3 if skip else 4]:
                    (total(model, batch) / 601).backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()

        assert kinds_of(run(model, optimizer, loop, sizes)) == [kind]


def test_a_scaler_skips_a_window_that_overflows():
    model, loader = net(), micro_batches([4] * 12)
    loader[5] = (loader[5][0] * torch.inf, loader[5][1])
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", init_scale=256.0)

    def loop(noted):
        for index, batch in enumerate(noted):
            scaler.scale(mean(model, batch) / 4).backward()
            if index % 4 == 3:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

    seen = run(model, optimizer, loop, given=loader)
    assert [(update.micro_batches[0], update.kind) for update in seen.updates] == [
        (0, "right"),
        (4, "left over, never stepped"),
        (8, "right"),
    ]


def test_a_step_in_backward_is_none_of_ours():
    def states(with_audit):
        model = net()
        optimizers = {each: torch.optim.Adam([each]) for each in model.parameters()}

        def step(parameter):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for each in model.parameters():
            each.register_post_accumulate_grad_hook(step)
        first = optimizers[model[0].weight]

        def loop(loader):
            for batch in loader:
                mean(model, batch).backward()

        if with_audit:
            assert "right" not in kinds_of(run(model, first, loop))
        else:
            loop(micro_batches([4] * 8))
        return [
            [value.tolist() for value in state.values()] for one in optimizers.values() for state in one.state.values()
        ]

    assert states(True) == states(False)


class Growing(nn.Module):
    """Registers its buffer anew when it has to be longer, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(2, 1))

    def forward(self, x):
        if len(self.table) < len(x):
            self.register_buffer("table", torch.ones(len(x), 1))
            self.extra = nn.Identity()
        return x * self.table[: len(x)]


def test_buffers_grow_and_layers_come():
    model = net(Growing())
    optimizer = sgd(model.parameters())
    seen = run(model, optimizer, lambda loader: outer(model, optimizer, loader, 4), sizes=[1, 2, 4, 8, 3, 16, 2, 1])
    assert kinds_of(seen) == ["right"] * 2


def test_a_gradient_that_is_zero_tells_nothing():
    model = net()
    nn.init.zeros_(model[2].weight)
    optimizer = sgd(model[0].parameters())

    def loop(loader):
        for window in windows(loader, 4):
            accumulate(model, window, lambda batch: total(model, batch), items)
            optimizer.step()
            model.zero_grad()

    assert kinds_of(run(model, optimizer, loop)) == ["cannot be told apart"] * 2


@pytest.mark.parametrize("seed", range(5))
def test_a_dropped_window_and_a_shuffled_epoch(seed):
    loader, order = micro_batches([4] * 6), torch.Generator().manual_seed(seed)
    model = net()
    optimizer = sgd(model.parameters())
    with audit(model, optimizer, lambda b: total(model, b), items, accumulation_steps=4) as seen:
        for _ in range(2):
            shuffled = [loader[index] for index in torch.randperm(6, generator=order).tolist()]
            by_index(model, optimizer, seen(shuffled), 4, ends=False)
            optimizer.zero_grad()
    assert [(update.micro_batches, update.kind) for update in seen.updates] == [
        ([0, 1, 2, 3], "right"),
        ([4, 5], "left over, never stepped"),
        ([6, 7, 8, 9], "right"),
        ([10, 11], "left over, never stepped"),
    ]


def test_a_script_module_trains_on():
    def losses(with_audit):
        model = torch.jit.script(net())
        optimizer = sgd(model.parameters())
        if with_audit:
            assert kinds_of(run(model, optimizer, lambda loader: outer(model, optimizer, loader, 4))) == ["right"] * 2
        else:
            outer(model, optimizer, micro_batches([4] * 8), 4)
        found = []
        for _ in range(3):
            outer(model, optimizer, micro_batches([4] * 8, seed=1), 4)
            found.append(total(model, micro_batches([9])[0]).item())
        return found

    assert losses(True) == losses(False)


class Tied(nn.Module):
    """One weight under two names, an attribute on it, and a small part."""

    def __init__(self, scale=1e-3):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Parameter(torch.randn(6, 6) / 3)
        self.other, self.one.gain = self.one, 2.0
        self.head, self.small, self.scale = nn.Linear(6, 3), nn.Linear(6, 3), scale

    def forward(self, x):
        x = torch.tanh(torch.tanh(x @ self.one * self.one.gain) @ self.other)
        return self.head(x) + self.scale * self.small(x)


@pytest.mark.parametrize("scale", [1e-3, 1e-5])
@pytest.mark.parametrize("loses", [False, True])
def test_weights_in_a_closure_and_a_lost_part(scale, loses):
    model, temperature = Tied(scale), nn.Parameter(torch.tensor(1.5))
    parameters = [*model.parameters(), temperature]
    optimizer = torch.optim.Adam(parameters, lr=0.01)

    def loss(_, batch):
        penalty = sum(each.square().sum() for each in parameters)
        return cross_entropy(model(batch[0] * temperature), batch[1], reduction="sum") + 0.01 * len(batch[1]) * penalty

    def only_data(_, batch):
        return cross_entropy(model(batch[0] * temperature), batch[1], reduction="sum")

    for each in (loss, only_data):

        def loop(loader, each=each):
            for window in windows(loader, 4):
                for batch in window:
                    (each(None, batch) / 16).backward()
                if loses:
                    model.small.zero_grad()
                optimizer.step()
                optimizer.zero_grad()

        assert kinds_of(run(model, optimizer, loop, loss=each)) == ["no weighted sum" if loses else "right"] * 2


def test_a_bias_that_a_norm_takes_off_is_no_fault():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6 if n == 0 else 16, 16), nn.BatchNorm1d(16), nn.ReLU()) for n in range(3)]
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    optimizer = sgd(model.parameters())
    loader = [(0.003 * x, y) for x, y in micro_batches([8, 5, 9, 4, 6, 7])]
    seen = run(model, optimizer, lambda given: counted_first(model, optimizer, given, 3), given=loader, k=3)
    assert kinds_of(seen) == ["right"] * 2


def test_equal_epochs_with_a_skipped_step():
    model, loader = net(), micro_batches([4] * 4)
    optimizer = sgd(model.parameters())
    with audit(model, optimizer, lambda b: total(model, b), items, accumulation_steps=4) as seen:
        for epoch in range(3):
            for window in windows(seen(loader), 4):
                accumulate(model, window, lambda b: total(model, b), items)
                if epoch:
                    optimizer.step()
                optimizer.zero_grad()
    assert [(update.micro_batches[0], update.kind) for update in seen.updates] == [
        (0, "left over, never stepped"),
        (4, "right"),
        (8, "right"),
    ]


def test_lbfgs_moves_inside_its_step():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    (update,) = run(model, optimizer, lambda loader: closure(model, optimizer, loader, 4), sizes=[4] * 4).updates
    assert update.kind == "no weighted sum"
    assert "LBFGS, which changes parameters inside its step" in update.verdict


def test_two_passes_over_a_window_are_two_updates():
    model = net()
    optimizer = sgd(model.parameters())

    def loop(loader):
        for window in windows(loader, 4):
            for _ in range(2):
                accumulate(model, window, lambda batch: total(model, batch), items)
                optimizer.step()
                optimizer.zero_grad()

    assert kinds_of(run(model, optimizer, loop)) == ["right"] * 4


def test_two_optimizers_share_a_model():
    model = net()
    one, other = sgd(model[0].parameters()), sgd(model[2].parameters())

    def loop(loader):
        for window in windows(loader, 4):
            accumulate(model, window, lambda batch: total(model, batch), items)
            other.step()
            one.step()
            model.zero_grad()

    assert kinds_of(run(model, other, loop)) == ["right"] * 2
    seen = run(model, one, loop)
    assert "the step of another optimizer, if it came first" in seen.updates[0].verdict


def test_an_empty_micro_batch_hides_no_fault():
    model = net()
    optimizer = sgd(model.parameters())

    def loop(loader):
        for window in windows(loader, 2):
            accumulate(model, window, lambda batch: total(model, batch), items)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()

    assert kinds_of(run(model, optimizer, loop, sizes=[0, 5, 3, 0], k=2)) == ["one common factor"] * 2


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"updates": 0}, ValueError, "updates must be None or an int of at least 1, but 0"),
        ({"updates": "a"}, ValueError, "but 'a'"),
        ({"count": lambda b: None}, TypeError, "count must return the number of items"),
        ({"count": lambda b: -3}, ValueError, "-3"),
        ({"count": lambda b: True}, TypeError, "True"),
        ({"count": lambda b: torch.ones(2)}, TypeError, "shape (2,)"),
        ({"count": None}, TypeError, "count must be a function of a micro-batch, but NoneType"),
        ({"loss": lambda m, b: m(b[0])}, ValueError, "use a reduction"),
    ],
)
def test_what_it_is_given_is_looked_at(options, error, said):
    model = net()
    optimizer = sgd(model.parameters())
    with pytest.raises(error, match=re.escape(said)):
        run(model, optimizer, lambda loader: outer(model, optimizer, loader, 4), **options)
    assert len(optimizer._optimizer_step_pre_hooks) == 0


def test_it_can_be_used_again():
    model = net()
    optimizer = sgd(model.parameters())
    context = audit(model, optimizer, lambda b: total(model, b), items, accumulation_steps=2, updates=1)
    for _ in range(2):
        with context as seen:
            outer(model, optimizer, seen(micro_batches([4] * 40)), 2)
            assert len(seen._drawn) <= 3
        assert [(update.micro_batches, update.kind) for update in seen.updates] == [([0, 1], "right")]
        assert (seen._drawn, seen._steps) == ([], [])
    copy.copy(seen(micro_batches([1])))
