"""2.3: one update by the gradient of a batch's summed loss, a few rows at a time."""

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_02
from gradaccum.exercises.questions.pieces_02 import FACTORS, LOOPS, MEAN, by_most_rows, made, mean, summed
from gradaccum.exercises.weighing import Gradient, own_gradients, scaled, weigh


def moved_by_steps(answer, case):
    model, optimizer, batches = material.run_of_batches(case)
    before = material.weights(model)
    for inputs, targets in batches:
        answer(model, optimizer, inputs, targets, case["most_rows"])
    return material.moved(model, before)


def moved_by_sums(case):
    model, _, batches = material.run_of_batches(case)
    return lesson_02.moved_by_hand(model, batches, summed, case)


def parts(case, got):
    """Read the gradient from the weights, as a sum over pieces of most_rows; an answer may have cut otherwise."""
    model, _, [batch] = material.run_of_batches(case)
    pieces = dict(enumerate(by_most_rows(*batch, case["most_rows"]), start=1))
    sums, right = own_gradients(model, pieces, summed), dict.fromkeys(pieces, 1.0)
    held = scaled(-1 / case["learning_rate"], got["weights moved by"])
    name = "Against the sum over each piece of most_rows rows"
    each = Gradient(held, sums, right, counts={}, name=name, unit="piece")
    if (found := weigh([each])) and found.got:
        yield each


def at_once(answer, case):
    """Note the most rows that went through the model, and, of large pieces, whether many hold more than one does."""
    from functools import partial

    most, rows, peaks = case["most_rows"], [0], []
    # Of a few rows, the activations are hardly more than a copy of the gradients.
    for one in (case | {"rows": most}, case) if most >= 64 else (case,):
        model, optimizer, [batch] = material.run_of_batches(one)
        model[0].register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[:-1].numel()))
        run = partial(answer, model, optimizer, *batch, most)
        peaks.append(material.peak_beyond_start(run, model, optimizer, batch))
    return {
        "rows in one forward:": max(rows) if max(rows) > most else f"at most {most}",
        "held at a time:": f"{'more than' if peaks[-1] > 1.4 * peaks[0] else 'what'} one piece needs",
    }


def at_most(case):
    return {"rows in one forward:": f"at most {case['most_rows']}", "held at a time:": "what one piece needs"}


def shaped(*shapes):
    """Draw cases: rows, of one batch or of several, and most_rows."""

    def cases(draw):
        drawn = [{"seed": draw.randrange(10**6), "learning_rate": draw.randrange(5, 30) / 1000} for _ in shapes]
        return [{"rows": rows, "most_rows": most} | each for (rows, most), each in zip(shapes, drawn, strict=True)]

    return cases


ONE = "a call makes one update, by the gradient of the summed loss of all rows"
TRIED = "{rows} rows, most_rows = {most_rows}"
MANY_TRIED = "calls with {rows} rows, then the same calls again, without the last, most_rows = {most_rows}"
ONE_SHAPES = (10, 4), (9, 3), (11, 2), (3, 8), (5, 5), (6, 1)
MANY_SHAPES = ([5, 8, 4], 3), ([4, 4], 2), ([1, 9, 2, 6], 5)
LARGE_SHAPES = (10, 4), (11, 4), (5, 1), (3, 8), (279, 64)  # 64 goes 4 times into 279, and 4 pieces would be larger
QUESTION = Question(
    "A batch that does not fit",
    (
        Property(ONE, 1, shaped(*ONE_SHAPES), moved_by_steps, moved_by_sums, TRIED, parts=parts),
        Property(
            "each of several calls makes the update of its own rows alone",
            1,
            shaped(*MANY_SHAPES),
            moved_by_steps,
            moved_by_sums,
            MANY_TRIED,
        ),
        Property(
            "at most most_rows rows, and their activations, are in the model at a time",
            1,
            shaped(*LARGE_SHAPES),
            at_once,
            at_most,
            TRIED,
            after=ONE,
        ),
    ),
)

MISTAKES = {name: mistake(sentence)(made(factor)) for name, sentence, factor in FACTORS}
MISTAKES |= {name: mistake(sentence)(made(**options)) for name, sentence, options in LOOPS}
MISTAKES |= {
    f"{name}_and_mean": mistake(f"{sentence} And one more: {MEAN}")(made(mean, **options))
    for name, sentence, options in LOOPS
    if name not in ("overlapping", "cleared_before_step", "freed_graph", "whole_batch", "number_rounded_down")
}


@mistake(
    "More is held at a time than one piece needs: by one backward() at the end, by retain_graph=True, by a list of "
    "losses or outputs, or by a copy of the whole batch; call backward() for each piece and keep nothing of it."
)
def one_backward(model, optimizer, inputs, targets, most_rows):
    sum(summed(model, piece) for piece in by_most_rows(inputs, targets, most_rows)).backward()
    optimizer.step()
    optimizer.zero_grad()
