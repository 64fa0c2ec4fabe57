"""6.3: what accumulation adds to a peak, against what was measured in real updates."""

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_06

NAMES = "gradients", "activations", "temporaries", "accumulation_steps"


def real_updates(*kinds):
    """Draw a width for each: an optimizer, the rows, the smallest and the largest width, and the micro-batches."""

    def cases(draw):
        found = []
        for optimizer, rows, narrow, wide, steps in kinds:
            of = [optimizer, rows, 5, draw.randrange(narrow, wide + 1), 20]
            found.append({"update": of, **lesson_06.measured_parts(*of), "accumulation_steps": steps})
        return found

    return cases


def cost(answer, case):
    names = "gradients", "activations", "temporaries", "accumulation_steps"
    return material.plain_number(answer(*(case[name] for name in names)))


def measured_cost(case):
    """Measure one update of k micro-batches and one of a single one; the further micro-batches' inputs are left out."""
    optimizer, rows, length, *model = case["update"]
    k = case["accumulation_steps"]
    many, one = (lesson_06.measured_peak(optimizer, rows * steps, length, *model, steps) for steps in (k, 1))
    return many - one - 16 * rows * length * (k - 1)


def costs(name, *kinds):
    tried = ", ".join(f"{each.replace('_', ' ')} {{{each}}}" for each in NAMES)
    return Property(name, 1, real_updates(*kinds), cost, measured_cost, tried)


QUESTION = Question(
    "What accumulation costs",
    (
        costs(
            "what is measured, where the backward pass is the worst moment",
            *(("SGD", 4, 6, 30, 2), ("AdamW", 4, 4, 11, 5), ("AdamW", 4, 4, 11, 1), ("SGD", 3, 6, 30, 1)),
        ),
        costs(
            "what is measured, where the optimizer's step is the worst moment",
            *(("AdamW", 4, 17, 40, 2), ("AdamW", 1, 8, 40, 3), ("AdamW", 4, 17, 40, 6), ("AdamW", 1, 8, 40, 1)),
        ),
    ),
)


def larger_moment(gradients, activations, temporaries, kept):
    return max(activations + kept, gradients + temporaries)


@mistake("A whole copy is counted even where the optimizer's step is the worst moment; the gradients are there anyway.")
def always_a_copy(gradients, activations, temporaries, accumulation_steps):
    return gradients if accumulation_steps > 1 else 0


@mistake("A single micro-batch is charged too; it is what the cost is counted from, so it costs nothing.")
def at_one_too(gradients, activations, temporaries, accumulation_steps):
    held = gradients, activations, temporaries
    return larger_moment(*held, kept=gradients) - larger_moment(*held, kept=0)


@mistake("A copy is counted for each further micro-batch; they are all added up in one.")
def for_each_step(gradients, activations, temporaries, accumulation_steps):
    return (accumulation_steps - 1) * gradients


@mistake("The cost is a whole copy or nothing; it may be less than a copy, where the worst moment changes.")
def all_or_nothing(gradients, activations, temporaries, accumulation_steps):
    copy = activations >= gradients + temporaries and accumulation_steps > 1
    return gradients if copy else 0


@mistake(
    "The optimizer's step is counted without the gradients that it reads; they are there with one micro-batch too."
)
def step_without_gradients(gradients, activations, temporaries, accumulation_steps):
    kept = gradients if accumulation_steps > 1 else 0
    return max(activations + kept, temporaries) - max(activations, temporaries)


@mistake("This is what is held at the worst moment; asked for is how much more that is than with one micro-batch.")
def whole_peak(gradients, activations, temporaries, accumulation_steps):
    return larger_moment(gradients, activations, temporaries, gradients if accumulation_steps > 1 else 0)
