"""1.2: a bug hunt: the loss of an epoch holds every batch's graph."""

from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.compare import Difference
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions.lesson_01 import loss_of, mean_loss


def returned(answer, case):
    model = material.token_model(case["seed"])
    found = answer(model, material.token_batches([case["shape"]] * case["batches"], case["seed"]))
    return material.number(found) if case["what"] == "number" else material.kind(found)


def mean_of_all(case):
    model = material.token_model(case["seed"])
    batches = material.token_batches([case["shape"]] * case["batches"], case["seed"])
    return sum(mean_loss(model, *batch).item() for batch in batches) / len(batches)


def left_behind(answer, case):
    import torch

    model = material.token_model(case["seed"])
    batches = material.token_batches([case["shape"]] * case["batches"], case["seed"])
    with torch.enable_grad():
        model(batches[0][0]).square().sum().backward()  # .grad holds something
    answer(model, batches)
    able = torch.is_grad_enabled() and all(parameter.requires_grad for parameter in model.parameters())
    data = [token for pair in batches for tokens in pair for token in tokens.flatten().tolist()]
    return {
        "weights": material.weights(model),
        ".grad": material.gradient(model),
        "training can go on:": able,
        "batches": data,
    }


def peaks(answer, case):
    model = material.token_model(case["seed"])
    batches = material.token_batches([case["shape"]] * case["batches"], case["seed"])
    fewer = batches[: case["fewer"]]
    return [
        material.peak_beyond_start(lambda some=some: answer(model, some), model, batches) for some in (fewer, batches)
    ]


def stays_flat(got, growth):
    fewer, more = got
    grown = f"{fewer:,} bytes, and with more batches {more:,} bytes"
    return None if more <= growth * fewer else Difference("as many bytes whatever the number of batches", grown)


def epochs(**more):
    def cases(draw):
        shapes = [(3, 4, 2), (1, 2, 5), (5, 1, 1), (draw.randrange(11, 14), 2, 1)]
        return [{"batches": n, "shape": shape, "seed": draw.randrange(10**6)} | more for n, *shape in shapes]

    return cases


def epoch_loss(model, batches):
    """Return the mean loss over all batches, as a float."""
    total = 0
    for inputs, targets in batches:
        logits = model(inputs)
        total += cross_entropy(logits.flatten(0, 1), targets.flatten())
    return total / len(batches)


EACH = "{batches} batches, each of [rows, tokens in a row] {shape}"
QUESTION = Question(
    "Find the bug: the loss of an epoch",
    (
        Property("the mean over all batches comes back", 0, epochs(what="number"), returned, mean_of_all, EACH),
        Property(
            "weights, .grad and batches stay as they were, and training can go on",
            0,
            epochs(),
            left_behind,
            lambda case: left_behind(lambda model, batches: None, case),
            EACH,
        ),
        Property("what comes back is a float", 1, epochs(what="kind"), returned, lambda case: "a float", EACH),
        Property(
            "the memory does not grow with the number of batches",
            2,
            lambda draw: [{"fewer": 4, "batches": 16, "shape": [16, 8], "seed": draw.randrange(10**6)}],
            peaks,
            lambda case: 1.5,  # a list of numbers may grow; with the graphs it would be four times as much
            "{fewer} batches, then {batches}, each of [rows, tokens in a row] {shape}",
            judge=stays_flat,
            by_value=False,
        ),
    ),
    given=epoch_loss,
)


@mistake(
    "The losses are added up as tensors, so the sum keeps the graph of every batch; make each a float inside the loop, "
    "with .item()."
)
def added_as_tensors(model, batches):
    return sum(loss_of(model, *batch) for batch in batches) / len(batches)


@mistake(
    "Something large is kept for all batches at once: their graphs, their logits, or all of them joined into one "
    "batch; convert each batch's loss to a float inside the loop, and keep nothing else."
)
def float_at_the_end(model, batches):
    return (sum(loss_of(model, *batch) for batch in batches) / len(batches)).item()


@mistake("The returned value has no graph, but it is still a tensor; .item() makes it a float.")
def added_detached(model, batches):
    return sum(loss_of(model, *batch).detach() for batch in batches) / len(batches)


@mistake("Only the last batch's loss is returned; add up the losses of all batches, and divide by their number.")
def last_batch_alone(model, batches):
    return loss_of(model, *batches[-1]).item()


@mistake("The sum of the batches' losses is returned; their mean is that sum divided by the number of batches.")
def not_divided(model, batches):
    return sum(loss_of(model, *batch).item() for batch in batches)


@mistake("A backward() frees the graph, but it fills .grad, and this function only measures; a float holds no graph.")
def backward_to_free(model, batches):
    total = 0.0
    for batch in batches:
        loss = loss_of(model, *batch)
        loss.backward()
        total += loss.item()
    return total / len(batches)


@mistake(
    "Afterwards .grad is empty, and it may have held something that training needs; this function only measures, so "
    "no backward() and no zero_grad(): a float holds no graph."
)
def gradients_cleared(model, batches):
    model.zero_grad()
    return not_divided(model, batches) / len(batches)


@mistake("Only the first batch is counted, as when the return is inside the loop; return after the last batch.")
def first_batch_divided(model, batches):
    return loss_of(model, *batches[0]).item() / len(batches)


@mistake("Only the last batch is counted, as when each loss takes the place of the sum; add it to the sum, with +=.")
def last_batch_divided(model, batches):
    return loss_of(model, *batches[-1]).item() / len(batches)


@mistake("The losses are divided by the number of batches twice; once makes their mean.")
def divided_twice(model, batches):
    return not_divided(model, batches) / len(batches) ** 2


@mistake(
    "The losses are divided by the number of tokens; each is a mean over its tokens already, so divide by batches."
)
def divided_by_tokens(model, batches):
    return not_divided(model, batches) / sum(targets.numel() for _, targets in batches)


@mistake(
    "Each loss is divided by the number of batches so far, which is the right divisor only for the last; add the "
    "losses up and divide by the number of batches."
)
def divided_by_those_so_far(model, batches):
    return sum(loss_of(model, *batch).item() / (i + 1) for i, batch in enumerate(batches))
