"""5.2: one update with the mean loss over all targets of a window of padded text."""

from torch.nn.utils import clip_grad_norm_

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, known_mistakes, mistake
from gradaccum.exercises.questions import lesson_05, mistakes_05
from gradaccum.exercises.questions.lesson_05 import TRIED, by_count, window_of
from gradaccum.exercises.weighing import scaled


def last_step(answer, case):
    """Step through the window before, if there is one, then through this one: the same list, if they are equal."""
    model, updates = material.steep_model(case["seed"]), []
    optimizer = material.plain_sgd(model, momentum=0.5)
    optimizer.register_step_post_hook(lambda *_: updates.append(1))
    windows = {str(each): material.padded_text(each, case["seed"]) for each in (case["before"], case["counts"])}
    for counts in filter(None, (case["before"], case["counts"])):
        updates.clear()
        start = material.weights(model)
        loss = answer(model, optimizer, windows[str(counts)])
    change = [after - before for after, before in zip(material.weights(model), start, strict=True)]
    # As a word, a nan is equal to another one, so that a mistake can be recognized by it.
    change = "not a number" if "nan" in str(change) else change
    found = {"updates": len(updates), "change of the weights": change, "loss": material.returned_mean(loss)}
    return {name: found[name] for name in case["compared"]}


def full_batch_step(case):
    model = material.steep_model(case["seed"])
    optimizer = material.plain_sgd(model, momentum=0.5)
    for counts in filter(None, (case["before"], case["counts"])):
        start = material.weights(model)
        optimizer.zero_grad()
        loss = lesson_05.mean_over_targets(model, material.padded_text(counts, case["seed"]))
        loss.backward()
        optimizer.step()
    change = [after - before for after, before in zip(material.weights(model), start, strict=True)]
    found = {"updates": 1, "change of the weights": change, "loss": loss.item()}
    return {name: found[name] for name in case["compared"]}


def parts(case, got):
    """Of the first step alone: it has no momentum yet, and the rate 1."""
    if not case["before"] and got.get("updates") == 1:
        yield from lesson_05.parts(case, scaled(-1, got["change of the weights"]))


def step_peak(answer, case):
    """Measure what a step holds at most, with so large a vocabulary that activations are much more than the text."""
    model, window = material.token_model(case["seed"], 40), material.padded_text(case["counts"], case["seed"], 40)
    optimizer = material.plain_sgd(model)
    return material.peak_beyond_start(lambda: answer(model, optimizer, window), model, window)


def one_at_a_time(case):
    """Twice what the plain loop holds beyond its start: the whole window's graphs hold several times as much."""
    return 2 * step_peak(material.update_with(by_count), case)


UPDATE = {"before": [], "compared": ["updates", "change of the weights"]}


def seconds(draw):
    others = window_of([[2], [2]], [[1, 3], [2, 2]], **UPDATE | {"before": [[3], [3]]})
    return others(draw) + window_of([[3, 1], [2]], **UPDATE | {"before": [[3, 1], [2]]})(draw)


FULL = "the update is that of the mean loss over all targets of the window"
TWICE = "a window with {before} targets, then one with {counts}, the same list if these are equal"
QUESTION = Question(
    "The token-weighted step",
    (
        Property(
            FULL,
            2,
            lambda draw: lesson_05.unequal(draw, **UPDATE),
            last_step,
            full_batch_step,
            TRIED,
            parts=parts,
        ),
        Property(
            "a micro-batch without any target changes nothing",
            1,
            window_of([[3, 1], [0, 0], [2]], [[0], [4]], [[5, 1], [2], [0]], **UPDATE),
            last_step,
            full_batch_step,
            TRIED,
            parts=parts,
        ),
        Property(
            "the mean loss over all targets is returned",
            1,
            window_of([[4, 2], [1]], [[3, 1], [0, 0], [2]], before=[], compared=["loss"]),
            last_step,
            full_batch_step,
            TRIED,
        ),
        Property(
            "the next window starts afresh, and the same one does in the next epoch",
            1,
            seconds,
            last_step,
            full_batch_step,
            TWICE,
        ),
        Property(
            "one micro-batch's activations are held at a time",
            1,
            window_of([[20] * 4] * 8),
            step_peak,
            one_at_a_time,
            "8 micro-batches of 4 rows with 20 targets each",
            judge=material.at_most_bytes,
            after=FULL,
            by_value=False,
        ),
    ),
)

in_a_step = {
    name: mistake(each.sentence)(material.update_with(each.answer))
    for name, each in known_mistakes(vars(mistakes_05)).items()
}


@mistake("The gradients of one window are still there in the next; clear them once per window.")
def not_cleared(model, optimizer, micro_batches):
    mean = by_count(model, micro_batches)
    optimizer.step()
    return mean


def without_clearing(each):
    def step(model, optimizer, micro_batches):
        mean = each.answer(model, micro_batches)
        optimizer.step()
        return mean

    return mistake(f"{each.sentence} And one more: {not_cleared.sentence}")(step)


never_cleared = {
    f"{name}_and_not_cleared": without_clearing(getattr(mistakes_05, name))
    for name in ("mean_of_means", "mean_of_means_but_empty", "own_counts", "not_divided", "padding_counted")
}


@mistake("The gradients were collected, but the weights did not move: call optimizer.step() at the end of the window.")
def not_stepped(model, optimizer, micro_batches):
    return by_count(model, micro_batches)


@mistake("The weights move at every micro-batch, so the next one uses a changed model; step once, after the window.")
def stepped_inside(model, optimizer, micro_batches):
    mean = 0.0
    for each in micro_batches:
        optimizer.zero_grad()
        loss = material.token_loss(model, each) / material.target_count(*micro_batches)
        loss.backward()
        optimizer.step()
        mean += loss.item()
    optimizer.zero_grad()
    return mean


@mistake(
    "The step moves nothing: the gradients are cleared before optimizer.step(), or no backward reaches the weights."
)
def cleared_before_the_step(model, optimizer, micro_batches):
    mean = by_count(model, micro_batches)
    optimizer.zero_grad()
    optimizer.step()
    return mean


@mistake("A gradient with a norm above 1 is scaled down, as by clipping; there is no clipping in this exercise.")
def clipped(model, optimizer, micro_batches):
    optimizer.zero_grad()
    mean = by_count(model, micro_batches)
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return mean
