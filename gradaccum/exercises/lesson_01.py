"""Lesson 1, the naive loop: the questions, their oracles and their known mistakes."""

from numbers import Real

import torch
from torch.nn.functional import cross_entropy

from gradaccum.exercises.material import gradient, measure_memory, token_model, weights
from gradaccum.exercises.question import Difference, Property, Question


def batches_of(shapes, seed):
    """Draw inputs and targets, both of shape (rows, length), for each shape."""
    draw = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(7, (2, *shape), generator=draw)) for shape in shapes]


def mean_loss(model, inputs, targets):
    """The mean loss, token by token."""
    pairs = zip(inputs.flatten(), targets.flatten(), strict=True)
    losses = [-model(token[None])[0].log_softmax(0)[target] for token, target in pairs]
    return sum(losses) / len(losses)


def kind(value):
    if isinstance(value, torch.Tensor):
        return "a tensor that holds its graph" if value.requires_grad else "a tensor"
    if isinstance(value, Real) and not isinstance(value, bool):
        return "a float"
    return "nothing" if value is None else f"an object of type {type(value).__name__}"


def a_float(case):
    return "a float"


def number(value):
    """The number that an answer gave, in whatever form; in words where it gave none."""
    try:
        return kind(value) if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return kind(value)


def loss_of(model, inputs, targets, reduction="mean"):
    """For the mistakes, whose loss is right but where they say so."""
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction=reduction)


# --------------------------------------------------------------------- 1.1: one training step

OPTIMIZERS = {
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
}


def start(case):
    model = token_model(case["seed"])
    batches = batches_of(case["shapes"], case["seed"])
    batches += batches[:-1]  # as in a second epoch: an answer may not spoil its data
    return model, OPTIMIZERS[case["optimizer"]](model.parameters()), batches


def moved(model, case):
    before = weights(token_model(case["seed"]))
    return {"the weights moved by": [now - then for now, then in zip(weights(model), before, strict=True)]}


def move(answer, case):
    model, optimizer, batches = start(case)
    for inputs, targets in batches:
        answer(model, optimizer, inputs, targets)
    return moved(model, case)


def right_move(case):
    model, optimizer, batches = start(case)
    parameters = list(model.parameters())
    for inputs, targets in batches:
        found = torch.autograd.grad(mean_loss(model, inputs, targets), parameters)
        for parameter, this_alone in zip(parameters, found, strict=True):
            parameter.grad = this_alone
        optimizer.step()
    return moved(model, case)


def returned(form):
    """Make a probe that calls the answer once and writes down what came back: its number, or its kind."""

    def probe(answer, case):
        model, optimizer, [batch] = start(case)
        return form(answer(model, optimizer, *batch))

    return probe


def loss_before(case):
    model, _, [batch] = start(case)
    return mean_loss(model, *batch).item()


def with_each_optimizer(*runs):
    def cases(draw):
        return [
            {"optimizer": name, "shapes": run, "seed": draw.randrange(10**6)} for run in runs for name in OPTIMIZERS
        ]

    return cases


def update(model, optimizer, loss):
    """For the mistakes whose update is right."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def with_its_graph(model, optimizer, inputs, targets):
    """The loss comes back as a tensor, which holds its graph; loss.item() makes it a float."""
    return update(model, optimizer, loss_of(model, inputs, targets))


def detached(model, optimizer, inputs, targets):
    """The loss holds no graph any more, but it still is a tensor; loss.item() makes it a float."""
    return update(model, optimizer, loss_of(model, inputs, targets)).detach()


def nothing_returned(model, optimizer, inputs, targets):
    """Nothing comes back; the function has to return the loss, as a float."""
    update(model, optimizer, loss_of(model, inputs, targets))


def loss_afterwards(model, optimizer, inputs, targets):
    """The loss that comes back was computed again after the update; return the one that backward() started from."""
    update(model, optimizer, loss_of(model, inputs, targets))
    return loss_of(model, inputs, targets).item()


def summed(model, optimizer, inputs, targets):
    """The losses of all tokens are added up, so loss and gradient grow with the batch; take cross_entropy's mean."""
    return update(model, optimizer, loss_of(model, inputs, targets, "sum")).item()


def divided_by_rows(model, optimizer, inputs, targets):
    """The sum is divided by the rows; the mean is over all tokens, and each row holds several."""
    return update(model, optimizer, loss_of(model, inputs, targets, "sum") / len(targets)).item()


def not_cleared(model, optimizer, inputs, targets):
    """The gradients of earlier batches are still in .grad, and the new one is added to them; call zero_grad() once in
    every step.
    """
    loss = loss_of(model, inputs, targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def never_moves(model, optimizer, inputs, targets):
    """The weights never move; step() uses what backward() left in .grad, so call backward(), then step(), and no
    zero_grad() between the two.
    """
    loss = loss_of(model, inputs, targets)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


def one_batch_late(model, optimizer, inputs, targets):
    """The step comes before backward(), so it moves the weights by the gradient of the batch before; call backward()
    first, then step().
    """
    loss = loss_of(model, inputs, targets)
    optimizer.step()
    optimizer.zero_grad()
    loss.backward()
    return loss.item()


TRIED = "{optimizer}, batches of [rows, tokens in a row] {shapes}"
AGAIN = ", then all but the last once more"
ONE_UPDATE = "one call makes the update of the loop"
SEVERAL = "several calls in a row make one update each, from their own batch alone"
one_batch, small = with_each_optimizer([[3, 4]], [[1, 5]]), with_each_optimizer([[2, 3]], [[1, 1]])
STEP = Question(
    "1.1",
    "One training step",
    (
        Property(ONE_UPDATE, 1, one_batch, move, right_move, TRIED),
        Property(SEVERAL, 1, with_each_optimizer([[2, 3], [1, 5], [3, 1]]), move, right_move, TRIED + AGAIN),
        Property("the loss from before the update comes back", 1, small, returned(number), loss_before, TRIED),
        Property("what comes back is a float", 1, small, returned(kind), a_float, TRIED, after=ONE_UPDATE),
    ),
    (
        with_its_graph,
        detached,
        nothing_returned,
        loss_afterwards,
        summed,
        divided_by_rows,
        not_cleared,
        never_moves,
        one_batch_late,
    ),
)

# --------------------------------------------------------------------- 1.2: the loss of an epoch


def epoch_loss(model, batches):
    """Return the mean loss over all batches, as a float."""
    total = 0
    for inputs, targets in batches:
        logits = model(inputs)
        total += cross_entropy(logits.flatten(0, 1), targets.flatten())
    return total / len(batches)


def epochs(draw):
    shapes = [(3, 4, 2), (1, 2, 5), (5, 1, 1), (draw.randrange(12, 17), 2, 1)]
    return [{"batches": n, "shape": shape, "seed": draw.randrange(10**6)} for n, *shape in shapes]


def epoch(case):
    return token_model(case["seed"]), batches_of([case["shape"]] * case["batches"], case["seed"])


def epoch_returned(form):
    return lambda answer, case: form(answer(*epoch(case)))


def mean_of_all(case):
    model, batches = epoch(case)
    return sum(mean_loss(model, *batch).item() for batch in batches) / len(batches)


def left_behind(answer, case):
    model, batches = epoch(case)
    with torch.enable_grad():
        mean_loss(model, *batches[0]).backward()  # .grad holds something
    answer(model, batches)
    able = torch.is_grad_enabled() and all(parameter.requires_grad for parameter in model.parameters())
    data = [token for pair in batches for tokens in pair for token in tokens.flatten().tolist()]
    return {"weights": weights(model), ".grad": gradient(model), "training can go on:": able, "batches": data}


def untouched(case):
    return left_behind(lambda model, batches: None, case)


def peaks(answer, case):
    """The most bytes held beyond the start, for fewer and for more batches."""
    model, batches = epoch(case)
    found = []
    for some in (batches[: case["fewer"]], batches):
        with measure_memory(model, batches) as memory:
            answer(model, some)
        found.append(memory.peak_bytes - memory.start_bytes)
    return found


def allowed_growth(case):
    """A list of numbers may grow; with the graphs it would be as many times as there are more batches."""
    return 1.5


def stays_flat(got, growth):
    fewer, more = got
    grown = f"{fewer:,} bytes, and with more batches {more:,} bytes"
    return None if more <= growth * fewer else Difference("as many bytes whatever the number of batches", grown)


def added_as_tensors(model, batches):
    """The losses are added up as tensors, so the sum keeps the graph of every batch; make each a float inside the loop,
    with .item().
    """
    return sum(loss_of(model, *batch) for batch in batches) / len(batches)


def float_at_the_end(model, batches):
    """What comes back is a float, but something large is kept of every batch until the end; make each batch's loss a
    float inside the loop, and keep nothing else.
    """
    return added_as_tensors(model, batches).item()


def added_detached(model, batches):
    """The graphs are gone, but what comes back still is a tensor; .item() makes it a float."""
    return sum(loss_of(model, *batch).detach() for batch in batches) / len(batches)


def last_batch_alone(model, batches):
    """Only the last batch's loss comes back; add up the losses of all batches, and divide by their number."""
    return loss_of(model, *batches[-1]).item()


def not_divided(model, batches):
    """The sum of the batches' losses comes back; their mean is that sum divided by the number of batches."""
    return sum(loss_of(model, *batch).item() for batch in batches)


def backward_to_free(model, batches):
    """A backward() frees the graph, but it fills .grad, and this function only measures; a float holds no graph."""
    for batch in batches:
        loss_of(model, *batch).backward()
    return not_divided(model, batches) / len(batches)


EACH = "{batches} batches, each of [rows, tokens in a row] {shape}"
EPOCH = Question(
    "1.2",
    "Find the bug: the loss of an epoch",
    (
        Property("the mean over all batches comes back", 0, epochs, epoch_returned(number), mean_of_all, EACH),
        Property(
            "weights, .grad and batches stay as they were, and training can go on",
            0,
            epochs,
            left_behind,
            untouched,
            EACH,
        ),
        Property("what comes back is a float", 1, epochs, epoch_returned(kind), a_float, EACH),
        Property(
            "the memory does not grow with the number of batches",
            2,
            lambda draw: [{"fewer": 4, "batches": 16, "shape": [16, 8], "seed": draw.randrange(10**6)}],
            peaks,
            allowed_growth,
            "{fewer} batches, then {batches}, each of [rows, tokens in a row] {shape}",
            judge=stays_flat,
            by_value=False,
        ),
    ),
    (added_as_tensors, float_at_the_end, added_detached, last_batch_alone, not_divided, backward_to_free),
    given=epoch_loss,
)

# --------------------------------------------------------------------- 1.3: the noise of another batch


def prediction(answer, case):
    return number(answer(case["noise"], case["batch_size"], case["new_batch_size"]))


def one_over_square_root(case):
    noise_of_one_row = case["noise"] * case["batch_size"] ** 0.5
    return noise_of_one_row / case["new_batch_size"] ** 0.5


def measured_at(*pairs):
    def cases(draw):
        noises = [draw.uniform(0.2, 3.0) for _ in pairs]
        return [
            {"noise": one, "batch_size": n, "new_batch_size": new} for one, (n, new) in zip(noises, pairs, strict=True)
        ]

    return cases


def one_over_size(noise, batch_size, new_batch_size):
    """The noise is divided by how many times larger the batch is; it falls as one over the square root of that."""
    return noise * batch_size / new_batch_size


def wrong_way_round(noise, batch_size, new_batch_size):
    """The two sizes are the wrong way round, so that the larger batch is the noisier one; it is the quieter one."""
    return noise * (new_batch_size / batch_size) ** 0.5


def squared(noise, batch_size, new_batch_size):
    """This is the square of the noise; the noise itself falls as one over the square root of the batch size."""
    return noise**2 * batch_size / new_batch_size


def as_if_of_one_row(noise, batch_size, new_batch_size):
    """The noise given is taken for that of one row; it is that of batch_size rows, so what counts is how many times
    larger the new batch is.
    """
    return noise / new_batch_size**0.5


def unchanged(noise, batch_size, new_batch_size):
    """The noise comes back as it was given; a larger batch is quieter."""
    return noise


ASKED = "noise {noise} with batches of {batch_size}, predicted for batches of {new_batch_size}"
one_row, any_size = measured_at((1, 50), (1, 2), (1, 1)), measured_at((8, 128), (32, 6), (6, 15), (7, 7))
NOISE = Question(
    "1.3",
    "The noise of another batch",
    (
        Property("from one row to a batch", 1, one_row, prediction, one_over_square_root, ASKED),
        Property("from any batch to a larger or smaller one", 1, any_size, prediction, one_over_square_root, ASKED),
    ),
    (one_over_size, wrong_way_round, squared, as_if_of_one_row, unchanged),
)

QUESTIONS = (STEP, EPOCH, NOISE)
