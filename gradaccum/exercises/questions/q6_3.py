"""6.3: what accumulation adds to a peak, against what was measured in real updates."""

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_06


def real_updates(*kinds):
    """Draw a width for each: an optimizer, the rows, the smallest and the largest width, and some numbers of steps."""

    def cases(draw):
        found = []
        for optimizer, rows, narrow, wide, *steps in kinds:
            of = [optimizer, rows, 5, draw.randint(narrow, wide), 20]
            found.append({"update": of, **lesson_06.measured_parts(*of), "accumulation_steps": draw.choice(steps)})
        return found

    return cases


def cost(answer, case):
    _, *held_and_steps = case.values()  # in the order in which an answer takes them
    return material.plain_number(answer(*held_and_steps))


def measured_cost(case):
    """Measure one update of k micro-batches and one of a single one; the further micro-batches' inputs are left out."""
    optimizer, rows, length, *model = case["update"]
    k = case["accumulation_steps"]
    many, one = (lesson_06.measured_peak(optimizer, rows * steps, length, *model, steps) for steps in (k, 1))
    return many - one - 16 * rows * length * (k - 1)


def costs(name, *kinds):
    names = "gradients", "activations", "temporaries", "accumulation_steps"
    tried = ", ".join(f"{each.replace('_', ' ')} {{{each}}}" for each in names)
    return Property(name, 1, real_updates(*kinds), cost, measured_cost, tried)


QUESTION = Question(
    "What accumulation costs",
    (
        costs(
            "what is measured, where the backward pass is the worst moment",
            *(("SGD", 4, 6, 30, 2), ("AdamW", 4, 4, 11, 3, 5, 7), ("AdamW", 4, 4, 11, 1), ("SGD", 3, 6, 30, 1)),
        ),
        costs(
            "what is measured, where the optimizer's step is the worst moment",
            *(("AdamW", 4, 17, 40, 2), ("AdamW", 1, 8, 40, 3, 4), ("AdamW", 4, 17, 40, 6, 8), ("AdamW", 1, 8, 40, 1)),
        ),
    ),
)


def more(gradients, activations, temporaries, kept):
    """Return how much higher the peak is with so much kept."""
    step = gradients + temporaries
    return max(activations + kept, step) - max(activations, step)


always_a_copy = mistake(
    "A whole copy is counted even where the optimizer's step is the worst moment; the gradients are there anyway."
)(lambda gradients, activations, temporaries, k: gradients if k > 1 else 0)
always_and_at_one = mistake(
    "A whole copy is counted always; a single micro-batch costs nothing, and where the optimizer's step is the worst "
    "moment, the gradients are there anyway."
)(lambda gradients, activations, temporaries, k: gradients)
at_one_too = mistake("A single micro-batch has a cost here; the cost is relative to it, so its own cost is 0.")(
    lambda gradients, activations, temporaries, k: more(gradients, activations, temporaries, gradients)
)
copies = mistake("A copy is counted for each micro-batch, or for each further one; they are all added up in one.")
for_each_step = copies(lambda gradients, activations, temporaries, k: (k - 1) * gradients)
for_each = copies(lambda gradients, activations, temporaries, k: k * gradients)
for_each_step_at_worst = copies(
    lambda gradients, activations, temporaries, k: more(gradients, activations, temporaries, (k - 1) * gradients)
)
for_each_at_worst = copies(
    lambda gradients, activations, temporaries, k: more(gradients, activations, temporaries, k * gradients)
)
free = mistake(
    "Accumulation is taken to be free; where the backward pass is the worst moment, the collected gradients add to it."
)(lambda *held: 0)
all_or_nothing = mistake(
    "If the step is the worst moment with one micro-batch and the backward pass with several, nothing is "
    "counted; the cost is then a part of a copy: what the backward pass needs beyond the step."
)(lambda gradients, activations, temporaries, k: gradients * (activations >= gradients + temporaries and k > 1))
whole_where_it_changes = mistake(
    "If the step is the worst moment with one micro-batch and the backward pass with several, a whole copy is "
    "counted; the cost is then a part of it: what the backward pass needs beyond the step."
)(lambda gradients, activations, temporaries, k: gradients * (activations > temporaries and k > 1))
beyond_a_copy = mistake("The cost is larger than a copy of the gradients, and no more than one copy is kept.")(
    lambda gradients, activations, temporaries, k: max(activations - temporaries, 0) * (k > 1)
)
below_zero = mistake("The cost is negative where the step is the worst moment; it is 0 there.")(
    lambda gradients, activations, temporaries, k: min(activations - temporaries, gradients) * (k > 1)
)
step_without_gradients = mistake(
    "The optimizer's step is counted without the gradients that it reads; they are there with one micro-batch too."
)(lambda gradients, activations, temporaries, k: more(0, activations, temporaries, gradients * (k > 1)))
whole_peak = mistake("This is the peak itself; return how much larger it is than with one micro-batch.")(
    lambda gradients, activations, temporaries, k: max(activations + gradients * (k > 1), gradients + temporaries)
)
