"""5.5: what to sum and what to count, for five losses as people write them."""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.compare import Difference
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import losses_05
from gradaccum.exercises.questions.losses_05 import (
    RIGHT,
    errors,
    kept,
    of_known,
    of_lines,
    squares,
    tokens,
    with_weights,
)


def nones(answer, case):
    windows = {loss: material.rows_for(loss, case["counts"], case["seed"]) for loss in material.LOSSES}
    kinds = material.kinds_of(answer, material.three_outputs(case["seed"]), windows)
    return {"None": [loss for loss in kinds if kinds[loss] == "None"], "matched": kinds["matched"]}


def the_one(got, expected):
    listed = ", ".join(f"`{loss}`" for loss in got["None"]) or "no loss"
    return None if got["None"] == expected else Difference("None for one loss", f"None for {listed}")


def pieces(answer, case):
    window = material.rows_for(case["loss"], case["counts"], case["seed"])
    return material.accumulated(answer, case["loss"], material.three_outputs(case["seed"]), window)


def whole(case):
    model, window = material.three_outputs(case["seed"]), material.rows_for(case["loss"], case["counts"], case["seed"])
    loss = losses_05.WHOLE[case["loss"]](model, losses_05.joined(window))
    loss.backward()
    return {"gradient": material.gradient(model), "loss": loss.item()}


def about(loss, name):
    def cases(draw):
        drawn = [[draw.randrange(1, 4) for _ in range(rows)] for rows in draw.sample([1, 2, 4], 3)]
        shapes = [[3, 1], [2]], drawn, [[0, 0], [2, 3, 0]]
        seeds = (draw.randrange(10**6) for _ in shapes)
        return [
            {"loss": loss, "counts": counts, "rows": [*map(len, counts)], "seed": seed}
            for counts, seed in zip(shapes, seeds, strict=True)
        ]

    tried = "`{loss}`, micro-batches of {rows} rows"
    tried += "" if loss == "decayed" else "; in each row so many entries of y count: {counts}"
    return Property(f"`{loss}`: {name}", 1, cases, pieces, whole, tried)


QUESTION = Question(
    "Which sum, which count",
    (
        Property(
            "None comes back for the loss that no sum and no count can give, and for no other",
            1,
            lambda draw: [{"counts": [[3, 2, 1]], "seed": draw.randrange(10**6)}],
            nones,
            lambda case: ["matched"],
            "each loss with a micro-batch of three rows",
            judge=the_one,
        ),
        about("weighted", "the pieces give the whole batch's loss and gradient, also where one has no target"),
        about("masked", "the pieces give the whole batch's loss and gradient, also where nothing of one is known"),
        about("by_line", "the pieces give the whole batch's loss and gradient, also where a line has no target"),
        about("decayed", "the pieces give the whole batch's loss and gradient"),
    ),
    forbidden=(),
)


def but(sentence, **losses):
    """Make the mistake that is right but for these losses."""
    return mistake(sentence)(lambda loss, model, micro_batch: (RIGHT | losses)[loss](model, *micro_batch))


def habit(name, sentence, losses, changed):
    """Make a mistake for each of some losses and one for all of them, from what makes another pair of the right one."""
    wrong = {loss: lambda model, x, y, loss=loss: changed(RIGHT[loss](model, x, y), y) for loss in losses}
    each = {f"{name}_{loss}": but(sentence.format(f"For `{loss}`"), **{loss: wrong[loss]}) for loss in losses}
    return each | {f"{name}_all": but(sentence.format("For " + ", ".join(f"`{loss}`" for loss in losses)), **wrong)}


CUT = ("weighted", "masked", "by_line", "decayed")
HABITS = {
    **habit(
        "rows",
        "{} the sum is divided by the number of rows, and its mean divides by something else: compare the two.",
        ("weighted", "masked", "decayed"),
        lambda pair, y: (pair[0], len(y)),
    ),
    **habit(
        "entries",
        "{} the sum is divided by the number of all entries of y, padding too, and its mean divides by something else: "
        "compare the two.",
        ("weighted", "by_line"),
        lambda pair, y: (pair[0], y.numel()),
    ),
    **habit(
        "mean",
        "{} the mean of the micro-batch is returned instead of its sum, and is divided once more.",
        CUT,
        lambda pair, y: (pair[0] / pair[1], pair[1]),
    ),
    **habit(
        "one",
        "{} each micro-batch counts for 1, whatever is in it: that is the mean of means.",
        CUT,
        lambda pair, y: (pair[0] / pair[1], 1),
    ),
    **habit(
        "none",
        "{} None or nothing is returned, but the loss can be cut, since its divisor is known before any forward.",
        CUT,
        lambda pair, y: None,
    ),
}
cut_too = but(
    "Each row of `matched` looks for its partner among all rows of the batch, and a micro-batch has only some of "
    "them: no sum and no count makes up for the others, so return None.",
    matched=lambda model, x, y: (cross_entropy(model(x) @ y.T, torch.arange(len(x)), reduction="sum"), len(x)),
)
targets_counted = but(
    "For `weighted` the sum is divided by the number of targets; with class weights the mean divides by something "
    "else: compare the two for a batch of three targets.",
    weighted=lambda model, x, y: (with_weights(model, x, y), len(kept(y))),
)
mean_by_targets = but(
    "For `weighted` the mean is multiplied by the number of targets, and it was not divided by that; over no target it "
    "is nan, too.",
    weighted=lambda model, x, y: (with_weights(model, x, y, "mean") * len(kept(y)), len(kept(y))),
)
classes_counted = but(
    "For `weighted` the count is the sum of the classes' weights, the same for every micro-batch; each target of it "
    "brings the weight of its own class.",
    weighted=lambda model, x, y: (with_weights(model, x, y), model.class_weights.sum()),
)
padding_weighed = but(
    "For `weighted` the padding is counted as if it were a target of class 0; only where y is not -100 is a target.",
    weighted=lambda model, x, y: (with_weights(model, x, y), model.class_weights[y.clamp(min=0)].sum()),
)
unweighted = but(
    "For `weighted` the class weights are left out, of the sum and of the count.",
    weighted=lambda model, x, y: (tokens(model, x, y, reduction="sum"), len(kept(y))),
)
weighed_at_padding = but(
    "For `weighted` the class weights are looked up where y is -100 too, and there is no such class: leave those out.",
    weighted=lambda model, x, y: (with_weights(model, x, y), model.class_weights[y].sum()),
)
mean_of_nothing = but(
    "For `weighted` a mean is multiplied by its count, and over no target it is nan, which stays nan times 0; a sum "
    "over no target is 0.",
    weighted=lambda model, x, y: (
        with_weights(model, x, y, "mean") * model.class_weights[kept(y)].sum(),
        model.class_weights[kept(y)].sum(),
    ),
)
known_counted = but(
    "For `masked` the sum is divided by what is known; look again at its mean: does `weight=` change what that divides "
    "by?",
    masked=lambda model, x, y: (of_known(model, x, y), (y >= 0).sum()),
)
unknown_too = but(
    "For `masked` unknown labels are learned as 0; their weight in the sum must be 0.",
    masked=lambda model, x, y: (binary_cross_entropy_with_logits(model(x), y.clamp(min=0), reduction="sum"), y.numel()),
)
tokens_counted = but(
    "For `by_line` each target counts the same, so a long line counts more than a short one; in this loss each "
    "line counts the same.",
    by_line=lambda model, x, y: (tokens(model, x, y, reduction="sum"), len(kept(y))),
)
lines_summed = but(
    "For `by_line` the losses of a line are added up; each line brings the mean over its own targets.",
    by_line=lambda model, x, y: (tokens(model, x, y, reduction="sum"), len(y)),
)
lines_by_length = but(
    "For `by_line` the losses of a line are divided by its length with the padding; divide by its targets.",
    by_line=lambda model, x, y: (tokens(model, x, y, reduction="none").mean(1).sum(), len(y)),
)
lines_by_targets = but(
    "For `by_line` the means of the lines are divided by the number of targets; divide by the number of lines.",
    by_line=lambda model, x, y: (of_lines(model, x, y).sum(), len(kept(y))),
)
empty_divided = but(
    "For `by_line` a line without a target is 0 / 0, which is nan; the loss that is given divides it by 1.",
    by_line=lambda model, x, y: ((tokens(model, x, y, reduction="none").sum(1) / (y >= 0).sum(1)).sum(), len(y)),
)
empty_left_out = but(
    "For `by_line` a line without a target is not counted; its loss is 0, and the mean over the lines counts it.",
    by_line=lambda model, x, y: (of_lines(model, x, y).sum(), losses_05.has_target(y).sum()),
)
penalty_once = but(
    "For `decayed` each micro-batch adds the penalty once, and the count then divides it: too little of it is left. "
    "All of it has to be there after the division.",
    decayed=lambda model, x, y: (errors(model, x, y) + squares(model), y.numel()),
)
penalty_by_rows = but(
    "For `decayed` the penalty is multiplied by the number of rows and divided by that of entries; use the same "
    "number for both.",
    decayed=lambda model, x, y: (errors(model, x, y) + len(y) * squares(model), y.numel()),
)
no_penalty = but(
    "For `decayed` the penalty is missing; it is not a sum over items, but it has a gradient.",
    decayed=lambda model, x, y: (errors(model, x, y), y.numel()),
)
by_rows = but(
    "For `decayed` the squared errors are divided by the number of rows; `mse_loss` divides by that of all entries.",
    decayed=lambda model, x, y: (errors(model, x, y) + len(y) * squares(model), len(y)),
)
