"""README's recipes, run as they are there, beside loops that see each window as one batch."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, l1_loss, softplus

from gradaccum import accumulate, relative_error, windows

README = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
LOOP = "\nfor window in" + BLOCK.search(README)[1].partition("\nfor window in")[2]
RECIPES = dict(re.findall(r"<details><summary>(.*?)</summary>\n(.*?)</details>", README, re.DOTALL))
TWO, SAM, GAN, PENALTY, EVALUATION, EMA = RECIPES
SIZES = [5, 1, 3, 2, 4, 2, 6, 1, 3]  # windows of 11, 13 and 3 items


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Halved(nn.Module):  # a dropout that draws nothing: a window and its pieces lose the same
    def forward(self, x):
        return x * torch.tensor([0.0, 2.0]).repeat(4) if self.training else x


class Detector(nn.Linear):
    def forward(self, x):
        return super().forward(x).split([3, 4], dim=1)


def names_for(title, inner=None):
    """Return what README's sentences introduce."""

    def micro_batch(n):
        x, classes = torch.randn(n, 6), torch.randint(3, (n,)) * (n not in (1, 3))  # some micro-batches have no box
        others = {GAN: x, TWO: (x, classes, torch.randn(n, 4)), PENALTY: (x, torch.randn(n, 6) + 1, torch.rand(n, 1))}
        return others.get(title, (x, classes))

    torch.manual_seed(0)
    inner = Halved() if title == EVALUATION else inner or nn.Identity()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), inner, nn.Linear(8, 1 if title in (GAN, PENALTY) else 3))
    model = Detector(6, 7) if title == TWO else model
    generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
    both = nn.ModuleList([model, generator])
    optimizer, other = (torch.optim.SGD(each.parameters(), 0.05, momentum=0.9) for each in both)
    used = {each.__name__: each for each in (torch, accumulate, windows, cross_entropy, l1_loss, softplus)}
    return used | {
        **{"model": model, "optimizer": optimizer, "rho": 0.5, "decay": 0.9, "evaluate_every": 1, "width": 4},
        **{"discriminator": model, "discriminator_optimizer": optimizer, "generator_optimizer": other},
        **{"loader": [micro_batch(n) for n in SIZES], "held_out": [micro_batch(n) for n in (4, 2, 1)]},
        **{"loss_sum": lambda each: cross_entropy(model(each[0]), each[1], reduction="sum"), "generator": generator},
        **{"count": lambda each: len(each[0]), "trained": list((both if title == GAN else model).parameters())},
    }


def run(title, *changes, inner=None, **others):
    """Run a recipe as README has it but for `changes` (old, new); return its names and how far the weights moved."""
    names = names_for(title, inner) | others
    before = [each.detach().clone() for each in names["trained"]]
    (code,) = BLOCK.findall(RECIPES[title])
    code += LOOP if "windows(" not in code else ""
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    torch.manual_seed(1)
    exec(code, names)
    after = names["average"].parameters() if title == EMA else names["trained"]
    return names, [new.detach() - old for new, old in zip(after, before, strict=True)]


def loss_of(title, model, batch):
    """Return the loss of one batch, as anybody writes it who has the memory."""
    if title == TWO:
        logits, found = model(batch[0])
        boxes = l1_loss(found, batch[2], reduction="none").sum(1)[batch[1] > 0]
        return cross_entropy(logits, batch[1]) + (5 * boxes.mean() if len(boxes) else 0)
    if title == PENALTY:
        real, fake, share = batch
        slopes = vmap(grad(lambda x: model(x).squeeze()))(share * real + (1 - share) * fake)
        return model(fake).mean() - model(real).mean() + 10 * ((slopes.norm(dim=1) - 1) ** 2).mean()
    weights = dict(model.named_parameters())
    if title == SAM:
        slopes = torch.autograd.grad(loss_of("here", model, batch), list(weights.values()))
        norm = torch.cat([each.flatten() for each in slopes]).norm() + 1e-12
        weights = {name: old + 0.5 * slope / norm for (name, old), slope in zip(weights.items(), slopes, strict=True)}
    return cross_entropy(functional_call(model, weights, batch[0]), batch[1])


def step(optimizer, module, loss):
    optimizer.zero_grad()  # another module's loss may have left something
    loss.backward(inputs=list(module.parameters()))
    optimizer.step()


def by_large_batches(title, *, alone=False, decay=lambda k: 0.9):
    """Return how far one batch a window moves the weights; with `alone`, SAM climbs for each micro-batch."""
    names, averages = names_for(title), None
    model, generator = names["model"], names["generator"]
    before = [each.detach().clone() for each in names["trained"]]
    torch.manual_seed(1)
    for window in (names["loader"][start : start + 4] for start in (0, 4, 8)):
        if title == GAN:
            noise, real = torch.cat([torch.randn(len(each), 4) for each in window]), torch.cat(window)
            losses = softplus(-model(real)) + softplus(model(generator(noise).detach()))
            step(names["optimizer"], model, losses.mean())
            step(names["generator_optimizer"], generator, softplus(-model(generator(noise))).mean())
            continue
        batches = window if alone else merged(window, 4)[0]
        losses = [len(batch[0]) * loss_of(title, model, batch) for batch in batches]
        step(names["optimizer"], model, sum(losses) / sum(len(batch[0]) for batch in batches))
        now, d = [each.detach().clone() for each in names["trained"]], decay(len(window)) if title == EMA else 0
        averages = [d * old + (1 - d) * new for old, new in zip(averages or now, now, strict=True)]
    return [new.detach() - old for new, old in zip(averages or names["trained"], before, strict=True)]


def merged(loader, accumulation_steps):
    return [[[*map(torch.cat, zip(*window, strict=True))]] for window in windows(loader, accumulation_steps)]


def over_k(model, window, loss_sum, count):
    """Divide each micro-batch's own mean by k, and refuse nothing."""
    for each in window:
        sums, counts = loss_sum(each), count(each)
        pairs = [(sums[key], counts[key]) for key in sums] if isinstance(sums, dict) else [(sums, counts)]
        sum(one / max(int(n), 1) / len(window) for one, n in pairs).backward()


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_moves_as_large_batches_do(title):
    right = by_large_batches(title)
    assert relative_error(run(title)[1], right) < 1e-12
    assert relative_error(run(title, accumulate=over_k)[1], right) > 0.1  # the pieces are unequal enough


def test_careless_versions_are_as_far_off_as_said():
    def by_hand(model, window, loss_sum, count):
        (sum(map(loss_sum, window)) / sum(map(count, window))).backward()

    each = "slopes.flatten(1).norm(dim=1) - 1).square().sum()  #"
    norm = (each, "slopes.norm() - 1).square() * len(real)  #")
    mean = (each, "slopes.norm(dim=1).mean() - 1).square() * len(real)  #")
    every_time = run(EMA, ("average.up", "for _ in window: average.up"))[1]
    assert relative_error(every_time, by_large_batches(EMA, decay=lambda k: 0.9**k)) < 1e-12
    for title, said, moved, *right in [
        (TWO, "One count for both is {} % off", run(TWO, ("(micro_batch[1] > 0).sum()}", "len(micro_batch[1])}"))[1]),
        (TWO, "two means over k {} %", run(TWO, accumulate=over_k)[1]),
        (SAM, "here {} % off", by_large_batches(SAM, alone=True)),
        (GAN, "steps with it: {} % off", run(GAN, ("discriminator.zero_grad()", "pass"), accumulate=by_hand)[1]),
        (PENALTY, "penalties in this sum is {} % off", run(PENALTY, (each, each.replace("sum", "mean")))[1]),
        (PENALTY, "split, they are {} % and", run(PENALTY, norm)[1], run(PENALTY, norm, windows=merged)[1]),
        (PENALTY, "% and {} % off", run(PENALTY, mean)[1], run(PENALTY, mean, windows=merged)[1]),
        (EVALUATION, "without dropout: {} % off", run(EVALUATION, ("model.train()", "pass"))[1]),
        (EMA, "makes it `decay ** k`: {} % off", every_time),
    ]:
        error = relative_error(moved, *right or [by_large_batches(title)])
        assert said.format(f"{100 * error:.0f}") in RECIPES[title]


def test_a_gan_frozen_or_detached_is_the_same():
    graphless = re.search(r"    with torch.no_grad.*\n.*generator.noise.", RECIPES[GAN])[0]
    frozen, thawed = (f"    discriminator.requires_grad_({value})\n" for value in (False, True))
    around = [(line, one + line) for one, line in ((frozen, "    accumulate(gen"), (thawed, "    generator_optimizer"))]
    for changes in ([(graphless, "    fake = generator(noise).detach()")], around):
        assert relative_error(run(GAN, *changes)[1], run(GAN)[1]) < 1e-15


def test_sam_is_back_after_an_error():
    counts, names = iter(SIZES[:4]), names_for(SAM)  # none for the second pass
    before = names["model"][0].weight.detach().clone()
    with pytest.raises(StopIteration):
        exec(BLOCK.search(RECIPES[SAM])[1], names | {"count": lambda each: next(counts)})
    assert torch.equal(names["model"][0].weight, before)


def test_an_evaluation_is_over_all_items(capsys):
    names, _ = run(EVALUATION)
    (((x, classes),),) = merged(names["held_out"], 3)
    assert f"update 3: {cross_entropy(names['model'].eval()(x), classes):.4f}\n" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Using backward")
def test_what_is_refused_warned_of_and_not_seen():
    for title, line in ((SAM, "model.zero_grad()"), (GAN, "discriminator.zero_grad()")):
        with pytest.raises(ValueError, match=re.search('"(has a .grad, left by .*?)"', RECIPES[GAN])[1]):
            run(title, (line, "pass"))
    slopes = "(slopes,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)"
    by_backward = "model(between).sum().backward(create_graph=True); slopes = between.grad"
    assert relative_error(run(PENALTY, (slopes, by_backward))[1], by_large_batches(PENALTY)) > 0.1  # and no error
    with pytest.warns(UserWarning, match="BatchNorm"):
        names, _ = run(SAM, inner=nn.BatchNorm1d(8), loader=[(torch.randn(4, 6), torch.arange(4) % 3)] * 4)
    assert names["model"][2].num_batches_tracked == 8
