"""4.4: repair a loop that clips and moves the schedule inside the window, and logs something else than its loss."""

from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_04


def epoch_seen(answer, case):
    """An epoch, as the optimizer and the caller see it: what each step gets, and what comes back."""
    import torch

    model, size, seed = material.classifier(case["seed"]), case["size"], case["seed"]
    windows = [material.samples([size] * length, seed + i) for i, length in enumerate(case["windows"])]
    optimizer = torch.optim.SGD(model.parameters(), lr=case["lr"])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    gradients, rates = {}, []

    def note(*_):  # after the step and not before it: a closure makes the gradients in the step
        gradients[f"at update {len(rates) + 1} the gradient"] = material.gradient(model)
        rates.append(optimizer.param_groups[0]["lr"])

    optimizer.register_step_post_hook(note)
    found = answer(model, optimizer, schedule, windows, case["max_norm"])
    found = list(found) if hasattr(found, "__iter__") else found
    one_by_one = found if isinstance(found, list) else []
    seen = {
        "gradients": gradients,
        # The next rate too: it shows whether the schedule went on after the last update.
        "rates": {"learning rates": [*rates, optimizer.param_groups[0]["lr"]]},
        "losses": {"logged": [*map(material.plain_number, one_by_one)] or material.plain_number(found)},
        "graphs": ["graph" if getattr(each, "requires_grad", False) else "no graph" for each in one_by_one],
        "updates": {"updates": len(rates), "gradients left": any(material.gradient(model))},
    }
    return seen[case["what"]]


def on_large_batches(model, optimizer, schedule, windows, max_norm):
    for inputs, targets in map(material.joined, windows):
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


def epoch_peak(answer, case):
    import torch

    model, micro_batches = material.classifier(case["seed"]), material.samples([64] * 5, case["seed"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

    def train():
        found = answer(model, optimizer, schedule, [micro_batches[:4], micro_batches[4:]], 1.0)
        if hasattr(found, "__iter__"):
            list(found)  # it may be a generator

    return material.peak_beyond_start(train, model, micro_batches)


def one_at_a_time(case):
    return 2 * epoch_peak(trains(), case)


# Where the rate is 0, and in a single window, no fault of one window reaches the next.
STILL = ([3, 3], 4, 0.05, 0.0), ([4, 4, 1], 2, 100.0, 0.0), ([2, 2, 2, 1], 1, 0.1, 0.0), ([1, 1], 3, 0.2, 0.0)
ALONE = ([3], 4, 0.2, 0.5), ([1], 3, 0.1, 0.5)
MOVING = ([3, 3], 4, 0.05, 0.5), ([4, 4, 1], 2, 100.0, 0.5), ([1, 1], 3, 0.2, 0.5)


def about(what, points, name, *rows):
    """Make a property of one of the things that are seen."""
    cases = lesson_04.table("windows size max_norm lr what", *[(*row, what) for row in rows])
    tried = "windows of {windows} micro-batches, each of size {size}, max_norm {max_norm}"
    return Property(name, points, cases, epoch_seen, lambda case: epoch_seen(on_large_batches, case), tried)


def train_windows(model, optimizer, schedule, windows, max_norm):
    """Train for one epoch, and return the mean loss of each window."""
    losses = []
    for window in windows:
        for inputs, targets in window:
            loss = cross_entropy(model(inputs), targets) / len(window)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


QUESTION = Question(
    "Repair: once per update",
    (
        about("gradients", 1, "each step gets the window's whole gradient, clipped once", *STILL),
        about("rates", 1, "the schedule moves on once for each update", *MOVING),
        about("losses", 1, "what is logged is the mean loss over each window", *STILL, *ALONE),
        about("graphs", 1, "nothing that is logged holds a graph", *STILL),
        about("updates", 0, "there is one step for each window, and the gradients are cleared", *MOVING),
        Property(
            lesson_04.PEAK,
            0,
            lambda draw: [{"seed": draw.randrange(10**6)}],
            epoch_peak,
            one_at_a_time,
            "windows of 4 and 1 micro-batches, each of size 64",
            judge=material.at_most_bytes,
            by_value=False,
        ),
    ),
    given=train_windows,
)


def trains(write=lambda shares, _: sum(shares).item(), divisor=len, clips="window", moves="window"):
    """Make the loop with one thing changed; `write` makes of a window's divided losses what is logged."""

    def train(model, optimizer, schedule, windows, max_norm):
        losses = []
        for window in windows:
            shares = []
            for inputs, targets in window:
                shares.append(cross_entropy(model(inputs), targets) / divisor(window))
                shares[-1].backward()
                if clips == "micro-batch":
                    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                if moves == "micro-batch":
                    schedule.step()
            if clips == "window":
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            if moves == "window":
                schedule.step()
            losses.append(write(shares, losses))
        if moves == "epoch":
            schedule.step()
        return losses

    return train


clipped_inside = mistake(
    "Clipping after each micro-batch cuts the sum again and again, so its direction is wrong even where its norm is "
    "right; clip once, when the window's gradient is complete."
)(trains(clips="micro-batch"))

not_clipped = mistake(
    "The step gets a gradient that was not clipped; clip after the last backward() of the window, and before the step."
)(trains(clips="never"))

schedule_inside = mistake("The schedule moves on with each micro-batch, so it runs too fast; step it once per update.")(
    trains(moves="micro-batch")
)

schedule_at_the_end = mistake("The schedule moves on once for the whole epoch; step it once for each update.")(
    trains(moves="epoch")
)

schedule_stands = mistake("The schedule never moves on; step it once for each update.")(trains(moves="never"))

last_share = mistake("This is only the last micro-batch's loss, divided by the window's length; add up those of all.")(
    trains(lambda shares, _: shares[-1].item())
)

last_loss = mistake("This is the loss of the last micro-batch alone; the window's is the mean over all of them.")(
    trains(lambda shares, _: shares[-1].item() * len(shares))
)

divided_again = mistake("The losses are divided by the window's length twice; they have been divided, so add them up.")(
    trains(lambda shares, _: sum(shares).item() / len(shares))
)

never_divided = mistake("This is the sum of the micro-batches' mean losses instead of their mean; divide once.")(
    trains(lambda shares, _: sum(shares).item() * len(shares))
)

keeps_the_graph = mistake(
    "The loss is right, but holds its graph as long as it is kept; log `.item()` or `.detach()`."
)(trains(lambda shares, _: sum(shares)))

added_on = mistake("The sum is never set back, so each window's loss contains those before; start each window at 0.")(
    trains(lambda shares, losses: sum(shares).item() + sum(losses[-1:]))
)

division_removed = mistake("The gradients are not divided any more, so they are too large; that part was right.")(
    trains(lambda shares, _: sum(shares).item() / len(shares), divisor=lambda window: 1)
)
