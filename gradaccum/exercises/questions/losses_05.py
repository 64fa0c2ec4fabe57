"""The losses of 5.5, word for word as in the notebook, and the parts that they are cut into."""

import torch
import torch.nn.functional as F
from torch.nn.functional import cross_entropy

from gradaccum import data
from gradaccum.exercises import material


def weighted(model, batch):
    """Some classes matter more. y: (rows, length), and -100 is padding."""
    x, y = batch
    logits = model(x).flatten(0, 1)
    return cross_entropy(logits, y.flatten(), weight=model.class_weights)


def masked(model, batch):
    """Several labels for each row. y: (rows, labels), and -1 is unknown."""
    x, y = batch
    known = (y >= 0).to(x.dtype)
    return F.binary_cross_entropy_with_logits(model(x), y.clamp(min=0), weight=known)


def by_line(model, batch):
    """Each line counts alike. y: (rows, length), and -100 is padding."""
    x, y = batch
    losses = cross_entropy(model(x).transpose(1, 2), y, reduction="none")
    targets = (y != data.IGNORED).sum(dim=1).clamp(min=1)
    return (losses.sum(dim=1) / targets).mean()


def decayed(model, batch):
    """Squared error, and a penalty on large weights. y: (rows, outputs)."""
    x, y = batch
    squares = sum(p.square().sum() for p in model.parameters())
    return F.mse_loss(model(x), y) + 0.1 * squares


def matched(model, batch):
    """Each row of x looks for its own y in the batch. y: (rows, width)."""
    x, y = batch
    return cross_entropy(model(x) @ y.T, torch.arange(len(x)))


WHOLE = {each.__name__: each for each in (weighted, masked, by_line, decayed, matched)}


def joined(window):
    """Join micro-batches into one batch, text padded to one length."""
    if window[0][1].dtype != torch.int64:
        return material.joined(window)
    length = max(y.shape[1] for _, y in window)
    more = [(x, y, length - y.shape[1]) for x, y in window]
    return material.joined([(F.pad(x, (0, 0, 0, n)), F.pad(y, (0, n), value=data.IGNORED)) for x, y, n in more])


def kept(y):
    return y[y != data.IGNORED]


def has_target(y):
    return (y != data.IGNORED).any(dim=1)


def tokens(model, x, y, **options):
    return cross_entropy(model(x).transpose(1, 2), y, **options)


def with_weights(model, x, y, reduction="sum"):
    return tokens(model, x, y, weight=model.class_weights, reduction=reduction)


def of_lines(model, x, y):
    return tokens(model, x, y, reduction="none").sum(1) / (y != data.IGNORED).sum(1).clamp(min=1)


def of_known(model, x, y, reduction="sum"):
    known = (y >= 0).to(x.dtype)
    return F.binary_cross_entropy_with_logits(model(x), y.clamp(min=0), weight=known, reduction=reduction)


def squares(model):
    return 0.1 * sum(each.square().sum() for each in model.parameters())


def errors(model, x, y):
    return (model(x) - y).square().sum()


RIGHT = {
    "weighted": lambda model, x, y: (with_weights(model, x, y), model.class_weights[kept(y)].sum()),
    "masked": lambda model, x, y: (of_known(model, x, y), y.numel()),
    "by_line": lambda model, x, y: (of_lines(model, x, y).sum(), len(y)),
    "decayed": lambda model, x, y: (errors(model, x, y) + y.numel() * squares(model), y.numel()),
    "matched": lambda model, x, y: None,
}
