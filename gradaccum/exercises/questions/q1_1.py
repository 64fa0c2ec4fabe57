"""1.1: one training step of the naive loop."""

import torch
from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions.lesson_01 import loss_of, mean_loss


def weights_moved(answer, case):
    model, batches = material.token_model(case["seed"]), material.token_batches(case["shapes"], case["seed"])
    optimizer, before = material.optimizer_for(model, case["optimizer"]), material.weights(model)
    for inputs, targets in batches + batches[:-1]:  # as in a second epoch: an answer may not spoil its data
        answer(model, optimizer, inputs, targets)
    return material.moved(model, before)


def right_move(case):
    def assign_gradient(model, optimizer, inputs, targets):
        parameters = list(model.parameters())
        found = torch.autograd.grad(mean_loss(model, inputs, targets), parameters)
        for parameter, this_alone in zip(parameters, found, strict=True):
            parameter.grad = this_alone
        optimizer.step()

    return weights_moved(assign_gradient, case)


def returned(answer, case):
    model, [batch] = material.token_model(case["seed"]), material.token_batches(case["shapes"], case["seed"])
    found = answer(model, material.optimizer_for(model, case["optimizer"]), *batch)
    return material.number(found) if case["what"] == "number" else material.kind(found)


def loss_before(case):
    [batch] = material.token_batches(case["shapes"], case["seed"])
    return mean_loss(material.token_model(case["seed"]), *batch).item()


def with_each_optimizer(*runs, **more):
    def cases(draw):
        return [
            {"optimizer": name, "shapes": run, "seed": draw.randrange(10**6)} | more
            for run in runs
            for name in ("SGD with momentum", "Adam")
        ]

    return cases


TRIED = "{optimizer}, batches of [rows, tokens in a row] {shapes}"
AGAIN = ", then the same batches again, without the last"
ONE_UPDATE = "one call makes the update of the loop"
SEVERAL = "several calls in a row make one update each, from their own batch alone"
ONE_BATCH, SMALL = ([[3, 4]], [[1, 5]]), ([[2, 3]], [[1, 1]])
QUESTION = Question(
    "One training step",
    (
        Property(ONE_UPDATE, 1, with_each_optimizer(*ONE_BATCH), weights_moved, right_move, TRIED),
        Property(SEVERAL, 1, with_each_optimizer([[2, 3], [1, 5], [3, 1]]), weights_moved, right_move, TRIED + AGAIN),
        Property(
            "the loss from before the update comes back",
            1,
            with_each_optimizer(*SMALL, what="number"),
            returned,
            loss_before,
            TRIED,
        ),
        Property(
            "what comes back is a float",
            1,
            with_each_optimizer(*SMALL, what="kind"),
            returned,
            lambda case: "a float",
            TRIED,
            after=ONE_UPDATE,
        ),
    ),
)


def update(model, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@mistake("A tensor is returned, which keeps its graph; return loss.item(), which is a float.")
def with_its_graph(model, optimizer, inputs, targets):
    return update(model, optimizer, loss_of(model, inputs, targets))


@mistake("The returned loss has no graph, but it is still a tensor; return loss.item(), which is a float.")
def detached(model, optimizer, inputs, targets):
    return update(model, optimizer, loss_of(model, inputs, targets)).detach()


@mistake("Nothing is returned; return the loss, as a float.")
def nothing_returned(model, optimizer, inputs, targets):
    update(model, optimizer, loss_of(model, inputs, targets))


@mistake("The returned loss was computed again after the update; return the loss that backward() started from.")
def loss_afterwards(model, optimizer, inputs, targets):
    update(model, optimizer, loss_of(model, inputs, targets))
    return loss_of(model, inputs, targets).item()


@mistake("The losses of all tokens are added up, so loss and gradient grow with the batch; take cross_entropy's mean.")
def summed(model, optimizer, inputs, targets):
    return update(model, optimizer, loss_of(model, inputs, targets, "sum")).item()


@mistake("The sum is divided by the rows; the mean is over all tokens, and each row holds several.")
def divided_by_rows(model, optimizer, inputs, targets):
    return update(model, optimizer, loss_of(model, inputs, targets, "sum") / len(targets)).item()


@mistake("cross_entropy's mean is divided by the rows once more; it is the mean over all tokens already.")
def divided_again(model, optimizer, inputs, targets):
    return update(model, optimizer, loss_of(model, inputs, targets) / len(targets)).item()


@mistake(
    "Logits and targets are shifted by one position against each other; here each target already belongs to the "
    "logits at its own position, so use all of both."
)
def shifted_again(model, optimizer, inputs, targets):
    logits = model(inputs)[:, :-1]
    return update(model, optimizer, cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())).item()


@mistake("cross_entropy expects the logits as the model returns them, and applies the softmax itself; leave yours out.")
def softmax_first(model, optimizer, inputs, targets):
    probabilities = model(inputs).softmax(-1)
    return update(model, optimizer, cross_entropy(probabilities.flatten(0, 1), targets.flatten())).item()


@mistake(
    "The logits have the shape that cross_entropy expects, but a reshape has mixed the scores of several tokens; "
    "flatten the first two dimensions, or swap the last two with transpose(1, 2)."
)
def reshaped(model, optimizer, inputs, targets):
    logits = model(inputs)
    rows, length, vocabulary = logits.shape
    return update(model, optimizer, cross_entropy(logits.reshape(rows, vocabulary, length), targets)).item()


@mistake(
    "The gradients of earlier batches are still in .grad, and the new one is added to them; call zero_grad() once in "
    "every step."
)
def not_cleared(model, optimizer, inputs, targets):
    loss = loss_of(model, inputs, targets)
    loss.backward()
    optimizer.step()
    return loss.item()


@mistake(
    "The weights never move; step() uses what backward() left in .grad, so call backward(), then step(), and no "
    "zero_grad() between the two."
)
def never_moves(model, optimizer, inputs, targets):
    loss = loss_of(model, inputs, targets)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


@mistake(
    "The step comes before backward(), so it uses the gradient of the previous batch; call backward() first, "
    "then step()."
)
def one_batch_late(model, optimizer, inputs, targets):
    loss = loss_of(model, inputs, targets)
    optimizer.step()
    optimizer.zero_grad()
    loss.backward()
    return loss.item()


@mistake("One call makes two steps with the same gradient; call step() once per batch.")
def stepped_twice(model, optimizer, inputs, targets):
    loss = update(model, optimizer, loss_of(model, inputs, targets))
    optimizer.step()
    return loss.item()


@mistake(
    "The optimizer's state is lost between calls, as with a new optimizer in every call; use the given optimizer "
    "as it is."
)
def new_optimizer(model, optimizer, inputs, targets):
    optimizer.state.clear()
    return update(model, optimizer, loss_of(model, inputs, targets)).item()


@mistake(
    "The weights move by the learning rate times the gradient, as with plain SGD, whatever the optimizer; call "
    "the given optimizer's step()."
)
def moved_by_sgd(model, optimizer, inputs, targets):
    plain_sgd = torch.optim.SGD(model.parameters(), lr=optimizer.param_groups[0]["lr"])
    return update(model, plain_sgd, loss_of(model, inputs, targets)).item()
