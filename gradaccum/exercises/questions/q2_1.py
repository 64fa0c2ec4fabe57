"""2.1: what one weight's .grad holds after some calls of backward() and zero_grad()."""

import torch

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake


def number_held(answer, case):
    return material.number(answer(case["events"]))


def torch_holds(case):
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for event in case["events"]:
        if event == "clear":
            weight.grad = None
        else:
            (event * weight).backward()
    return 0.0 if weight.grad is None else weight.grad.item()


def events_like(*patterns):
    """Draw a gradient for each g, and clear at each bar; two of each, so that no factor is found by chance."""

    def drawn(pattern, draw):
        sizes = draw.sample(range(1, 40), len(pattern))  # no two the same, and every order of adding is exact
        numbers = [draw.choice([-1, 1]) * size / 4 for size in sizes]
        return ["clear" if sign == "|" else number for sign, number in zip(pattern, numbers, strict=True)]

    return lambda draw: [{"events": drawn(pattern, draw)} for pattern in patterns * 2]


def holds(name, *patterns):
    return Property(name, 1, events_like(*patterns), number_held, torch_holds, tried="held({events})")


QUESTION = Question(
    "What .grad holds",
    (
        holds("without a clear, all gradients add up", "ggg", "gggg", "g", "gg", "ggggggggg"),
        holds("after a clear, only what comes later is held", "gg|gg", "gg|g|g", "ggg|", "|gg", "g||gg", "g|g|g|"),
    ),
)


def since(events):
    """Return the gradients since the last clear."""
    return [event for i, event in enumerate(events) if "clear" not in events[i:]]


@mistake("The gradients are averaged; backward() adds each to .grad, and nothing divides by their number.")
def the_mean(events):
    return sum(since(events)) / max(1, len(since(events)))


@mistake(the_mean.sentence)
def the_mean_of_nothing(events):
    return sum(since(events)) / len(since(events))


@mistake("Only the last gradient is left; backward() does not write over .grad, it adds to it.")
def the_last(events):
    return sum(since(events)[-1:])


@mistake("One gradient is taken k times, which is right only if all are equal; each backward() adds its own gradient.")
def k_times_one(events):
    return len(since(events)) * sum(since(events)[:1])


@mistake("A clear changes nothing here; it empties .grad, and what was collected before it is gone.")
def without_clears(events):
    return sum(event for event in events if event != "clear")


@mistake("A clear takes back only the latest gradient here; it empties .grad of all that was collected.")
def one_undone(events):
    held = []
    for event in events:
        held = held[:-1] if event == "clear" else [*held, event]
    return sum(held)


@mistake("Gradients before a clear are counted here; a clear discards them, and only later gradients are kept.")
def up_to_the_clear(events):
    return sum(events[: events.index("clear")] if "clear" in events else events)


@mistake("A clear at the end does nothing here; it empties .grad at once, not at the next backward().")
def cleared_late(events):
    return sum(since(events[:-1] if events[-1] == "clear" else events))


@mistake("The function returned None each time: print only shows a value, so use return.")
def nothing_returned(events):
    print(sum(since(events)))


@mistake("None is returned if .grad is empty at the end; return 0 then.")
def none_if_empty(events):
    return sum(since(events)) if since(events) else None


@mistake("Everything after the first clear is counted; a later clear empties .grad again.")
def after_the_first_clear(events):
    later = events[events.index("clear") + 1 :] if "clear" in events else events
    return sum(event for event in later if event != "clear")


@mistake("Only the first event is counted, as when the return is inside the loop; return after the last event.")
def first_event_alone(events):
    return sum(since(events[:1]))


@mistake("The mean over all gradients is taken, those before a clear too; backward() adds, a clear empties .grad.")
def the_mean_of_all(events):
    numbers = [event for event in events if event != "clear"]
    return sum(numbers) / len(numbers)
