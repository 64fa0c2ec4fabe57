"""5.5: further right answers, which must get full points, and wrong ones, which must not."""

import math

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, log_softmax, logsigmoid, mse_loss

from gradaccum.exercises.questions.losses_05 import RIGHT as PAIRS
from gradaccum.exercises.questions.losses_05 import by_line, decayed, masked, weighted


def but(**losses):
    """The right answer, but for some losses: functions of model, x and y."""
    return lambda loss, model, micro_batch: (PAIRS | losses)[loss](model, *micro_batch)


def squares(model):
    return sum(each.square().sum() for each in model.parameters())


# ----------------------------------------------------------------------------------------------------------- right


def means_times_counts(loss, model, micro_batch):
    """Calls the loss that is given, wherever its mean is a number."""
    _, y = micro_batch
    match loss:
        case "weighted":
            count = model.class_weights[y[y != -100]].sum()
            return (weighted(model, micro_batch) if count else model(micro_batch[0]).sum() * 0) * count, count
        case "masked":
            return masked(model, micro_batch) * len(y), len(y)
        case "by_line":
            return by_line(model, micro_batch) * len(y), len(y)
        case "decayed":
            return decayed(model, micro_batch) * y.numel(), y.numel()


def entry_by_entry(loss, model, micro_batch):
    """Takes no reduction of torch's, and no call for the whole micro-batch."""
    total, count = torch.zeros(()), 0
    if loss == "matched":
        return
    for x, y in zip(*micro_batch, strict=True):
        z, kept = model(x), y >= 0
        if loss == "weighted":
            for logits, target in zip(z[kept], y[kept], strict=True):
                total = total - model.class_weights[target] * log_softmax(logits, 0)[target]
                count += model.class_weights[target].item()
            total = total + 0 * z.sum()
        elif loss == "masked":
            losses = -torch.where(y == 1, logsigmoid(z), logsigmoid(-z))
            total, count = total + losses[kept].sum(), count + losses.numel()
        elif loss == "by_line":
            mean = cross_entropy(z[kept], y[kept]) if kept.any() else 0 * z.sum()
            total, count = total + mean, count + 1
        else:
            total, count = total + ((z - y) ** 2 + 0.1 * squares(model)).sum(), count + len(y)
    return [total, count]


def terms_of_their_own(model, x, y):
    return {"fit": mse_loss(model(x), y, reduction="sum"), "size": 0.1 * squares(model)}, {"fit": y.numel(), "size": 1}


def weights_at_every_target(model, x, y):
    """Pads the classes by one more, of weight 0, in the place of -100."""
    weights = torch.cat([model.class_weights, model.class_weights.new_zeros(1)])
    targets = torch.where(y == -100, 3, y)
    losses = cross_entropy(model(x).transpose(1, 2), y, reduction="none")
    return (losses * weights[targets]).sum(), weights[targets].sum()


def other_units(loss, model, micro_batch):
    """Counts in thirds, or in thousands, and scales the sum alike."""
    pair = PAIRS[loss](model, *micro_batch)
    return pair and (pair[0] / 3000, float(pair[1]) / 3000)


def lines_by_matrix(model, x, y):
    mask = (y != -100).double()
    losses = cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view_as(y)
    return ((losses * mask).sum(-1) / torch.maximum(mask.sum(-1), torch.ones(()))).sum(), torch.tensor(y.shape[0])


def lines_with_target(model, x, y):
    some = (y >= 0).any(dim=1)
    return by_line(model, (x[some], y[some])) * some.sum() if some.any() else 0 * model(x).sum(), y.shape[0]


def penalty_scaled_up(model, x, y):
    error = ((model(x) - y) ** 2).mean(dim=1)
    return (error + 0.1 * squares(model)).sum(), error.numel()


RIGHT = [
    means_times_counts,
    entry_by_entry,
    other_units,
    but(decayed=terms_of_their_own),
    but(weighted=weights_at_every_target),
    but(by_line=lines_by_matrix),
    but(by_line=lines_with_target),
    but(decayed=penalty_scaled_up),
    but(
        masked=lambda model, x, y: (
            binary_cross_entropy_with_logits(model(x), y, (y > -1).double(), reduction="sum"),
            math.prod(y.shape),
        )
    ),
]

# ----------------------------------------------------------------------------------------------------------- wrong


def ignored_not_left_out(loss, model, micro_batch):
    """Sums everything, counts everything."""
    x, y = micro_batch
    z = model(x)
    if loss == "weighted":
        return cross_entropy(z.flatten(0, 1), y.flatten(), weight=model.class_weights, reduction="sum"), y.numel()
    if loss == "masked":
        return binary_cross_entropy_with_logits(z, y.clamp(min=0), reduction="sum"), y.numel()
    if loss == "by_line":
        return cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum"), y.numel()
    return mse_loss(z, y, reduction="sum") + 0.1 * squares(model), y.numel()


def lengths_as_lesson_5_counts(loss, model, micro_batch):
    """Counts the targets that are not ignored, whatever the loss."""
    pair = PAIRS[loss](model, *micro_batch)
    return pair and (pair[0], (micro_batch[1] != -100).sum())


def one_loss_so_far(loss, model, micro_batch):
    if loss == "by_line":
        return PAIRS[loss](model, *micro_batch)
    raise NotImplementedError


def falls_through(loss, model, micro_batch):
    if loss in ("weighted", "decayed"):
        return PAIRS[loss](model, *micro_batch)


def sum_of_weights(model, x, y):
    losses = cross_entropy(model(x).transpose(1, 2), y, model.class_weights, reduction="none")
    return losses, model.class_weights[y[y >= 0]].sum()


WRONG = [
    lambda loss, model, micro_batch: None,
    lambda loss, model, micro_batch: (0, 1),
    lambda loss, model, micro_batch: (None, None),
    lambda loss, model, micro_batch: (model(micro_batch[0]).sum(), len(micro_batch[0])),
    lambda loss, model, micro_batch: PAIRS[loss](model, *micro_batch) or (None, None),
    lambda loss, model, micro_batch: PAIRS[loss](model, *micro_batch) or (model(micro_batch[0]).sum() * 0, 0),
    lambda loss, model, micro_batch: (PAIRS[loss](model, *micro_batch) or [None])[::-1],
    lambda loss, model, micro_batch: (PAIRS[loss](model, *micro_batch) or [None])[0],
    but(weighted=sum_of_weights),
    but(matched=lambda model, x, y: (cross_entropy(model(x) @ y.T, torch.arange(len(x))) * len(x), len(x))),
    but(matched=lambda model, x, y: (cross_entropy(model(x) @ y.T, torch.arange(len(x))), 1)),
    but(decayed=lambda model, x, y: (mse_loss(model(x), y, reduction="sum") + 0.1 * squares(model).item(), y.numel())),
    but(decayed=lambda model, x, y: (mse_loss(model(x), y, reduction="sum").detach(), y.numel())),
    but(decayed=lambda model, x, y: None, matched=PAIRS["decayed"]),
    but(by_line=lambda model, x, y: (by_line(model, (x, y)) * (y >= 0).any(1).sum(), (y >= 0).any(1).sum())),
    but(masked=lambda model, x, y: (binary_cross_entropy_with_logits(model(x), y, reduction="sum"), y.numel())),
    but(masked=lambda model, x, y: (masked(model, (x, y)) * (y >= 0).sum(), (y >= 0).sum())),
    but(weighted=lambda model, x, y: (PAIRS["weighted"](model, x, y)[0], model.class_weights[y].sum())),
    ignored_not_left_out,
    lengths_as_lesson_5_counts,
    one_loss_so_far,
    falls_through,
]
NAMED = [
    (lambda loss, model, micro_batch: None, "none_all"),
    (but(matched=lambda model, x, y: (cross_entropy(model(x) @ y.T, torch.arange(len(x))), 1)), "cut_too"),
    (but(by_line=lambda model, x, y: (by_line(model, (x, y)), 1)), "one_by_line"),
    (but(by_line=lambda model, x, y: (by_line(model, (x, y)), len(y))), "mean_by_line"),
    (but(weighted=lambda model, x, y: (weighted(model, (x, y)), 1)), "one_weighted"),
    (
        but(
            masked=lambda model, x, y: (masked(model, (x, y)), y.numel()),
            decayed=lambda model, x, y: (decayed(model, (x, y)), y.numel()),
        ),
        *("mean_masked", "mean_decayed"),
    ),
    (
        but(
            by_line=lambda model, x, y: (cross_entropy(model(x).transpose(1, 2), y, reduction="sum"), (y >= 0).sum()),
            decayed=lambda model, x, y: (mse_loss(model(x), y, reduction="sum") + 0.1 * squares(model), y.numel()),
        ),
        *("tokens_counted", "penalty_once"),
    ),
    (
        but(weighted=lambda model, x, y: (PAIRS["weighted"](model, x, y)[0], model.class_weights[y].sum())),
        "weighed_at_padding",
    ),
    (but(weighted=sum_of_weights),),
    (but(masked=lambda model, x, y: (masked(model, (x, y)) * (y >= 0).sum(), (y >= 0).sum())),),
    (one_loss_so_far,),
    (falls_through,),
]
# Mutants of the reference answer that are right too, and why.
EQUIVALENT = {"23: return None -> return": "both return None"}
