"""What the questions of lesson 2 share: updates moved by hand, and what goes wrong in the update of a window."""

import torch
from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, known_mistakes, mistake
from gradaccum.exercises.weighing import Gradient, own_gradients, scaled


def shaped(*shapes):
    """Draw cases: how many windows, of how many micro-batches, of how many samples."""

    def cases(draw):
        names = ("windows", "accumulation_steps", "size")
        drawn = [{"seed": draw.randrange(10**6), "learning_rate": draw.randrange(5, 30) / 100} for _ in shapes]
        return [dict(zip(names, shape, strict=True)) | each for shape, each in zip(shapes, drawn, strict=True)]

    return cases


def moved_by_hand(model, batches, loss, case):
    """Move the weights by the learning rate times the gradient of each batch's loss."""
    before, parameters = material.weights(model), list(model.parameters())
    for batch in batches:
        gradients = torch.autograd.grad(loss(model, batch), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= case["learning_rate"] * gradient
    return material.moved(model, before)


def sum_of_means(model, window):
    return sum(cross_entropy(model(inputs), targets) for inputs, targets in window)


def moved_by_sums(case):
    model, _, windows = material.run_of_windows(case)
    return moved_by_hand(model, windows, sum_of_means, case)


def parts(case, got):
    """Read the gradient of a single window from the weights; with more, these have changed in between."""
    model, _, [window] = material.run_of_windows(case)
    held = scaled(-1 / case["learning_rate"], got["weights moved by"])
    means = own_gradients(model, dict(enumerate(window, start=1)))
    yield Gradient(held, means, dict.fromkeys(means, 1.0), counts={}, name="In the whole update")


def moves(name, points, probe, tried, *shapes):
    several = "{windows}" in tried
    again = "windows" if "{accumulation_steps}" in tried else "micro-batches"
    tried = f"{tried} of size {{size}}{f', then the same {again} again, without the last' if several else ''}"
    return Property(name, points, shaped(*shapes), probe, moved_by_sums, tried, parts=None if several else parts)


ONE_WINDOW = "one window makes one update, by the sum of its gradients"
ONE_TRIED = "one window of {accumulation_steps} micro-batches"
MANY_TRIED = "{windows} windows, each of {accumulation_steps} micro-batches"
ONE_SHAPES = (1, 4, 3), (1, 2, 5), (1, 7, 1), (1, 8, 64)  # windows, k and the size: no single number serves them all
MANY_SHAPES = (2, 3, 4), (4, 2, 3), (3, 5, 1)


def collect(model, micro_batches, factor=1.0):
    for inputs, targets in micro_batches:
        (factor * cross_entropy(model(inputs), targets)).backward()


def loop(delayed_step):
    """Make a loop over many windows from the step of one."""

    def train(model, optimizer, micro_batches, accumulation_steps):
        for start in range(0, len(micro_batches), accumulation_steps):
            delayed_step(model, optimizer, micro_batches[start : start + accumulation_steps])

    return train


@mistake(
    "Only the last micro-batch of a window reaches the step: the gradients before it are cleared or overwritten, or "
    "backward() is called for it alone; call it for each, and clear right after the step."
)
def cleared_inside(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
    optimizer.step()


@mistake(
    "Nothing is cleared between two windows, so a step uses the gradients of all earlier windows once more; clear once "
    "per window."
)
def not_cleared(model, optimizer, micro_batches):
    collect(model, micro_batches)
    optimizer.step()


@mistake(
    "The weights do not move: nothing calls optimizer.step(), the gradients are cleared before it can read them, or no "
    "backward reaches the weights; step after a window's last backward(), then clear."
)
def cleared_before_step(model, optimizer, micro_batches):
    collect(model, micro_batches)
    optimizer.zero_grad()
    optimizer.step()


@mistake("There is a step for every micro-batch; a window makes one step, after its last micro-batch.")
def stepped_each_time(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


@mistake(
    "There is a step for every micro-batch, each with all gradients collected so far; a window makes one step, "
    "after its last micro-batch."
)
def stepped_and_collected(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()


@mistake(
    "The update uses the mean over the window, which is k times smaller than the sum asked for here; the "
    "division comes in lesson 3."
)
def divided(model, optimizer, micro_batches):
    collect(model, micro_batches, 1 / len(micro_batches))
    optimizer.step()
    optimizer.zero_grad()


@mistake(
    "Each loss is divided by the number of micro-batches so far; leave the division out: the update uses the sum "
    "here, and the division comes in lesson 3."
)
def divided_by_those_so_far(model, optimizer, micro_batches):
    for i, (inputs, targets) in enumerate(micro_batches):
        (cross_entropy(model(inputs), targets) / (i + 1)).backward()
    optimizer.step()
    optimizer.zero_grad()


@mistake(
    "Each loss is a sum over its samples, so the update is as many times too large as a micro-batch has samples; take "
    "the mean of each micro-batch, as cross_entropy does by itself."
)
def summed_samples(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets, reduction="sum").backward()
    optimizer.step()
    optimizer.zero_grad()


@mistake(
    "The mean over a micro-batch is divided by its number of samples once more; nothing is divided here: the update "
    "uses the sum of the micro-batches' means."
)
def divided_by_samples(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(targets)).backward()
    optimizer.step()
    optimizer.zero_grad()


@mistake(
    "backward() starts from a running total, so the first micro-batches are added again with each later one; call it "
    "on this micro-batch's own loss."
)
def running_total(model, optimizer, micro_batches, retain_graph=True):
    total = 0.0
    for inputs, targets in micro_batches:
        total = total + cross_entropy(model(inputs), targets)
        total.backward(retain_graph=retain_graph)
    optimizer.step()
    optimizer.zero_grad()


@mistake(
    "A backward() meets a graph that an earlier one has freed: call it once for each micro-batch, on that "
    "micro-batch's own loss and not on a running total, which retain_graph=True would count several times."
)
def freed_graph(model, optimizer, micro_batches):
    running_total(model, optimizer, micro_batches, retain_graph=False)


@mistake("There is a step for every micro-batch, and nothing is ever cleared; a window makes one step, and one clear.")
def stepped_and_never_cleared(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def with_division(each):
    """Make the mistake that divides too: the update of plain SGD is the same if the learning rate is divided."""

    def also_divided(model, optimizer, micro_batches):
        optimizer.param_groups[0]["lr"] /= len(micro_batches)
        each(model, optimizer, micro_batches)
        optimizer.param_groups[0]["lr"] *= len(micro_batches)

    return mistake(f"{each.sentence} And one more: it is divided by k too; leave that to lesson 3.")(also_divided)


and_divided = {
    "cleared_inside_and_divided": with_division(cleared_inside),
    "not_cleared_and_divided": with_division(not_cleared),
    "stepped_each_time_and_divided": with_division(stepped_each_time),
}
OF_A_WINDOW = known_mistakes(globals())
