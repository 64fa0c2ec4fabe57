"""Lesson 2, accumulate: the questions, their oracles and their known mistakes."""

from functools import wraps

import torch
from torch.nn.functional import cross_entropy

from gradaccum.exercises.material import at_most_bytes, classifier, joined, measure_memory, samples, weights
from gradaccum.exercises.question import Property, Question

# --------------------------------------------------------------------- 2.1: what .grad holds


def number_held(answer, case):
    found = answer(case["events"])
    if found is not None and not hasattr(found, "__float__"):
        return f"an object of type {type(found).__name__}"
    return 0.0 if found is None else float(found)


def torch_holds(case):
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for event in case["events"]:
        if event == "clear":
            weight.grad = None
        else:
            (event * weight).backward()
    return 0.0 if weight.grad is None else weight.grad.item()


def events_like(*patterns):
    """Draw a gradient for each g, and clear at each bar. Quarters, so that every order of adding is exact."""

    def drawn(pattern, draw):
        sizes = draw.sample(range(1, 40), len(pattern))  # no two the same
        numbers = [draw.choice([-1, 1]) * size / 4 for size in sizes]
        return ["clear" if sign == "|" else number for sign, number in zip(pattern, numbers, strict=True)]

    return lambda draw: [{"events": drawn(pattern, draw)} for pattern in patterns]


def since(events):
    """Return the gradients since the last clear."""
    return [event for i, event in enumerate(events) if "clear" not in events[i:]]


def the_mean(events):
    """The gradients are averaged; backward() adds each to .grad, and nothing divides by their number."""
    return sum(since(events)) / max(1, len(since(events)))


def the_last(events):
    """Only the last gradient is left; backward() does not write over .grad, it adds to it."""
    return sum(since(events)[-1:])


def k_times_one(events):
    """One gradient is taken k times, which is right where all are equal; each backward() adds a gradient of its own."""
    return len(since(events)) * sum(since(events)[:1])


def without_clears(events):
    """A clear changes nothing here; it empties .grad, and what was collected before it is gone."""
    return sum(event for event in events if event != "clear")


def one_undone(events):
    """A clear takes back only the latest gradient here; it empties .grad of all that was collected."""
    held = []
    for event in events:
        held = held[:-1] if event == "clear" else [*held, event]
    return sum(held)


def up_to_the_clear(events):
    """What came before a clear is counted here; a clear forgets that, and what comes later is held."""
    return without_clears(events[: events.index("clear")] if "clear" in events else events)


def cleared_late(events):
    """A clear at the end does nothing here; it empties .grad at once, not at the next backward()."""
    return sum(since(events[:-1] if events[-1] == "clear" else events))


def holds(name, *patterns):
    return Property(name, 1, events_like(*patterns), number_held, torch_holds, tried="held({events})")


HELD = Question(
    "2.1",
    "What .grad holds",
    (
        holds("without a clear, all gradients add up", "ggg", "gggg", "g", "gg", "ggggggggg"),
        holds("after a clear, only what comes later is held", "gg|gg", "gg|g|g", "ggg|", "|gg", "g||gg", "g|g|g|"),
    ),
    (the_mean, the_last, k_times_one, without_clears, one_undone, up_to_the_clear, cleared_late),
)

# --------------------------------------------------------------------- 2.2 and 2.3: the update of a window


def shaped(*shapes):
    """Draw cases: how many windows, of how many micro-batches, of how many samples."""

    def cases(draw):
        names = ("windows", "accumulation_steps", "size")
        drawn = [{"seed": draw.randrange(10**6), "learning_rate": draw.randrange(5, 30) / 100} for _ in shapes]
        return [dict(zip(names, shape, strict=True)) | each for shape, each in zip(shapes, drawn, strict=True)]

    return cases


def prepared(case):
    """Make the model, its optimizer and the windows of a case."""
    k, model = case["accumulation_steps"], classifier(case["seed"])
    micro_batches = samples([case["size"]] * k * case["windows"], case["seed"])
    windows = [micro_batches[i : i + k] for i in range(0, len(micro_batches), k)]
    windows += windows[:-1]  # as in a second epoch: an answer may not spoil its data
    return model, torch.optim.SGD(model.parameters(), lr=case["learning_rate"]), windows


def moved(model, before):
    return {"weights moved by": [now - then for now, then in zip(weights(model), before, strict=True)]}


def moved_by_loop(answer, case):
    model, optimizer, windows = prepared(case)
    before = weights(model)
    answer(model, optimizer, [pair for window in windows for pair in window], case["accumulation_steps"])
    return moved(model, before)


def moved_by_steps(answer, case):
    model, optimizer, windows = prepared(case)
    before = weights(model)
    for window in windows:
        answer(model, optimizer, window)
    return moved(model, before)


def moved_by_sums(case):
    """Move the weights by hand: the learning rate times the gradient of the sum of a window's losses."""
    model, _, windows = prepared(case)
    before, parameters = weights(model), list(model.parameters())
    for window in windows:
        loss = sum(cross_entropy(model(inputs), targets) for inputs, targets in window)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= case["learning_rate"] * gradient
    return moved(model, before)


def collect(model, micro_batches, factor=1.0):
    for inputs, targets in micro_batches:
        (factor * cross_entropy(model(inputs), targets)).backward()


def divided(model, optimizer, micro_batches):
    """The update uses the mean over the window, which is k times smaller than the sum that is asked for here; it is
    lesson 3 that divides.
    """
    collect(model, micro_batches, 1 / len(micro_batches))
    optimizer.step()
    optimizer.zero_grad()


def cleared_inside(model, optimizer, micro_batches):
    """Only the last micro-batch of a window reaches the step: either the gradients are cleared for each micro-batch, or
    backward() is called for the last one alone; call it for each, and clear once per window.
    """
    for inputs, targets in micro_batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def not_cleared(model, optimizer, micro_batches):
    """Nothing is cleared between two windows, so a step uses the gradients of all earlier windows once more; clear once
    per window.
    """
    collect(model, micro_batches)
    optimizer.step()


def cleared_before_step(model, optimizer, micro_batches):
    """The weights do not move: either nothing calls optimizer.step(), or the gradients are cleared before it can read
    them; step after a window's last backward(), then clear.
    """
    collect(model, micro_batches)
    optimizer.zero_grad()
    optimizer.step()


def stepped_each_time(model, optimizer, micro_batches):
    """There is a step for every micro-batch; a window makes one, after its last micro-batch."""
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def stepped_and_collected(model, optimizer, micro_batches):
    """There is a step for every micro-batch, each by all that was collected so far; a window makes one, after
    its last micro-batch.
    """
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()


OF_A_WINDOW = cleared_inside, not_cleared, cleared_before_step, stepped_each_time, stepped_and_collected, divided

# --------------------------------------------------------------------- 2.2: the delayed loop


def train(model, optimizer, micro_batches, accumulation_steps):
    """Make one update after every `accumulation_steps` micro-batches."""
    for step, (inputs, targets) in enumerate(micro_batches):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()


def stepped_early(model, optimizer, micro_batches, accumulation_steps):
    """The step comes after the first micro-batch of a window; the loop counts from 0, so the last one of a window is
    where step + 1 is a multiple of accumulation_steps.
    """
    for step, (inputs, targets) in enumerate(micro_batches):
        cross_entropy(model(inputs), targets).backward()
        if step % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()


def stepped_late(model, optimizer, micro_batches, accumulation_steps):
    """The step of a window comes only when the next window begins, so the last window never makes one; step right after
    a window's last backward().
    """
    for step, (inputs, targets) in enumerate(micro_batches):
        if step % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()


def in_a_loop(delayed_step):
    """Make a loop over many windows from the step of one; its sentence stays."""

    @wraps(delayed_step)
    def loop(model, optimizer, micro_batches, accumulation_steps):
        for start in range(0, len(micro_batches), accumulation_steps):
            delayed_step(model, optimizer, micro_batches[start : start + accumulation_steps])

    return loop


def moves(name, points, probe, tried, *shapes):
    again = ", then all but the last once more" if "{windows}" in tried else ""
    return Property(name, points, shaped(*shapes), probe, moved_by_sums, f"{tried} of size {{size}}{again}")


ONE_WINDOW = "one window makes one update, by the sum of its gradients"
ONE_TRIED = "one window of {accumulation_steps} micro-batches"
MANY_TRIED = "{windows} windows, each of {accumulation_steps} micro-batches"
ONE_SHAPES = (1, 4, 3), (1, 2, 5), (1, 7, 1), (1, 8, 64)  # windows, k and the size: no single number serves them all
MANY_SHAPES = (2, 3, 4), (4, 2, 3), (3, 5, 1)

REPAIR = Question(
    "2.2",
    "The gradients that got lost",
    (
        moves(ONE_WINDOW, 1, moved_by_loop, ONE_TRIED, *ONE_SHAPES),
        moves(
            "so does each of several windows, and nothing is left over from the one before",
            2,
            moved_by_loop,
            MANY_TRIED,
            *MANY_SHAPES,
        ),
        moves(
            "with accumulation_steps=1, every micro-batch makes its own update",
            0,
            moved_by_loop,
            "accumulation_steps=1 and {windows} micro-batches",
            (5, 1, 3),
            (3, 1, 1),
        ),
    ),
    (*map(in_a_loop, OF_A_WINDOW), stepped_early, stepped_late),
    given=train,
)

# --------------------------------------------------------------------- 2.3: the step of one window


def step_peak(answer, case):
    model, optimizer, [window] = prepared(case)
    with measure_memory(model, optimizer, window) as memory:
        answer(model, optimizer, window)
    return memory.peak_bytes - memory.start_bytes


def one_at_a_time(case):
    """Twice what a plain loop holds beyond its start: the large batch's graph holds many times as much."""
    return 2 * step_peak(divided, case)


def not_stepped(model, optimizer, micro_batches):
    collect(model, micro_batches)


def last_alone(model, optimizer, micro_batches):
    for inputs, targets in micro_batches:
        loss = cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def summed_samples(model, optimizer, micro_batches):
    """Each loss is a sum over its samples, so the update is as many times too large as a micro-batch has samples; take
    the mean of each micro-batch, as cross_entropy does by itself.
    """
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets, reduction="sum").backward()
    optimizer.step()
    optimizer.zero_grad()


def one_backward(model, optimizer, micro_batches):
    """The update is right, but the graphs of all micro-batches are held at once, so the memory is that of the large
    batch; call backward() for each micro-batch, which frees its graph.
    """
    sum(cross_entropy(model(inputs), targets) for inputs, targets in micro_batches).backward()
    optimizer.step()
    optimizer.zero_grad()


def joined_again(model, optimizer, micro_batches):
    inputs, targets = joined(micro_batches)
    (len(micro_batches) * cross_entropy(model(inputs), targets)).backward()
    optimizer.step()
    optimizer.zero_grad()


# By what they do to the weights, or by their memory, these cannot be told apart from those.
not_stepped.__doc__, last_alone.__doc__ = cleared_before_step.__doc__, cleared_inside.__doc__
joined_again.__doc__ = one_backward.__doc__

STEP = Question(
    "2.3",
    "The delayed step",
    (
        moves(ONE_WINDOW, 1, moved_by_steps, ONE_TRIED, *ONE_SHAPES, (1, 1, 4)),
        moves(
            "each of several calls makes the update of its own window alone",
            1,
            moved_by_steps,
            MANY_TRIED,
            *MANY_SHAPES,
        ),
        Property(
            "one micro-batch's activations are held at a time",
            1,
            shaped((1, 8, 64)),
            step_peak,
            one_at_a_time,
            tried=f"{ONE_TRIED} of size {{size}}",
            judge=at_most_bytes,
            after=ONE_WINDOW,
            by_value=False,
        ),
    ),
    (*OF_A_WINDOW, last_alone, not_stepped, summed_samples, one_backward, joined_again),
)

QUESTIONS = (HELD, REPAIR, STEP)
