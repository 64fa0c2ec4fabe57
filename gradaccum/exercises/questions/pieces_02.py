"""Steps over a batch that is cut into pieces, the right one and those that go wrong: how, and the sentence of each."""

from types import SimpleNamespace

from torch.nn.functional import cross_entropy


def summed(model, piece):
    return cross_entropy(model(piece[0]), piece[1], reduction="sum")


def by_most_rows(inputs, targets, most_rows):
    return list(zip(inputs.split(most_rows), targets.split(most_rows), strict=True))


STEP, CLEAR = "step", "zero_grad"


def made(factor=lambda at: 1, cut=by_most_rows, first=(), before=(), after=(), last=(STEP, CLEAR), total=False):
    """Make a step: how its losses are weighted, how the batch is cut, and what the optimizer does when."""

    def delayed_step(model, optimizer, inputs, targets, most_rows):
        def act(names):
            for name in names:
                getattr(optimizer, name)()

        act(first)
        pieces, so_far = cut(inputs, targets, most_rows), 0.0
        for piece in pieces:
            at = SimpleNamespace(size=len(piece[0]), rows=len(inputs), most=most_rows, pieces=len(pieces))
            act(before)
            loss = factor(at) * summed(model, piece)
            so_far = so_far + loss
            (so_far if total else loss).backward(retain_graph=total == "retained")
            act(after)
        act(last)

    return delayed_step


def mean(at):
    return 1 / at.size


MEAN = (
    "Each loss is the mean over its piece, which cross_entropy takes by itself, so rows of a shorter piece count for "
    'more; ask for the sum, reduction="sum".'
)
FACTORS = [  # name, sentence, what the sum over a piece is multiplied by
    ("mean_of_each", MEAN, mean),
    (
        "mean_over_pieces",
        f"{MEAN} And one more: it is divided by the number of pieces.",
        lambda at: mean(at) / at.pieces,
    ),
    (
        "sum_over_pieces",
        "The summed losses are divided by the number of pieces; a sum needs no factor, whatever its pieces.",
        lambda at: 1 / at.pieces,
    ),
    (
        "mean_over_all",
        "The update uses the mean over all rows, which is smaller than the sum by their number; a sum needs no factor.",
        lambda at: 1 / at.rows,
    ),
    (
        "sum_over_most_rows",
        "The summed losses are divided by most_rows; a sum needs no factor, whatever its pieces.",
        lambda at: 1 / at.most,
    ),
    (
        "mean_times_most_rows",
        "Each mean is multiplied by most_rows, which is too much for a shorter piece; ask for the sum.",
        lambda at: at.most / at.size,
    ),
]
LOOPS = [  # name, sentence, how the loop is made
    (
        "last_dropped",
        "The last, shorter piece is dropped: whole pieces are counted, and the rows that are left belong to the sum.",
        {"cut": lambda x, y, most: [each for each in by_most_rows(x, y, most) if len(each[0]) == most]},
    ),
    (
        "range_ends_early",
        "The last piece is dropped, a full one too: a range of starts ends before the number it is given, so give it "
        "the number of rows.",
        {"cut": lambda x, y, most: by_most_rows(x, y, most)[:-1]},
    ),
    (
        "overlapping",
        "Rows are in several pieces: a piece starts at every row; the starts are most_rows apart.",
        {"cut": lambda x, y, most: [(x[i : i + most], y[i : i + most]) for i in range(len(x))]},
    ),
    (
        "stepped_each_time",
        "There is a step for every piece; the batch makes one step, after its last piece.",
        {"after": (STEP, CLEAR), "last": ()},
    ),
    (
        "stepped_and_collected",
        "There is a step for every piece, each with all gradients collected so far; the batch makes one step, "
        "after its last piece.",
        {"after": (STEP,), "last": (CLEAR,)},
    ),
    (
        "stepped_and_never_cleared",
        "There is a step for every piece, and nothing is ever cleared; the batch makes one step, and one clear.",
        {"after": (STEP,), "last": ()},
    ),
    (
        "not_cleared",
        "Nothing is cleared between two calls, so a step uses the gradients of all earlier batches once more; clear "
        "once per call.",
        {"last": (STEP,)},
    ),
    (
        "cleared_inside",
        "Only the last piece reaches the step: the gradients before it are cleared or overwritten, or backward() is "
        "called for it alone; call it for each, and clear right after the step.",
        {"before": (CLEAR,), "last": (STEP,)},
    ),
    (
        "cleared_before_step",
        "The weights do not move: nothing calls optimizer.step(), the gradients are cleared before it can read them, "
        "or no backward reaches the weights; step after the last backward(), then clear.",
        {"last": (CLEAR, STEP)},
    ),
    (
        "one_call_late",
        "The step comes before backward(), so it moves the weights by the gradients of the call before; first "
        "backward() for each piece, then the step.",
        {"first": (STEP, CLEAR), "last": ()},
    ),
    (
        "running_total",
        "backward() starts from a running total, so the first pieces are added again with each later one; call it on "
        "this piece's own loss.",
        {"total": "retained"},
    ),
    (
        "freed_graph",
        "A backward() meets a graph that an earlier one has freed: call it once for each piece, on that piece's own "
        "loss and not on a running total, which retain_graph=True would count several times.",
        {"total": "freed"},
    ),
    (
        "whole_batch",
        "The whole batch goes through the model at once, so all its activations are in memory; cut the rows "
        "first, and give the model one piece at a time.",
        {"cut": lambda x, y, most: [(x, y)]},
    ),
    (
        "number_rounded_down",
        "The pieces are made by their number, rounded down, so they have more than most_rows rows; cut by size, as "
        "split(most_rows) does, or round the number up.",
        {"cut": lambda x, y, most: list(zip(*[each.chunk(max(1, len(x) // most)) for each in (x, y)], strict=True))},
    ),
    (
        "as_many_pieces",
        "The batch is cut into most_rows pieces, as chunk(most_rows) does; most_rows is the size of a piece, as "
        "split(most_rows) takes it.",
        {"cut": lambda x, y, most: list(zip(x.chunk(most), y.chunk(most), strict=True))},
    ),
]
