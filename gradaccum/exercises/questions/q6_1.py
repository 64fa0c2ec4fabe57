"""6.1: the peak of one update as a formula, against the measured one."""

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_06

NAMES = "rows", "length", "width", "vocabulary", "accumulation_steps"


def peak_by_formula(answer, case):
    names = "rows", "length", "width", "vocabulary", "accumulation_steps"
    return material.plain_number(answer(*(case[name] for name in names)))


def real_peak(case):
    return lesson_06.measured_peak("SGD", *(case[name] for name in NAMES))


def windows_of(*rows_and_steps):
    """Draw shapes whose worst moment is the loss's backward: more tokens than the width, a larger vocabulary still."""

    def cases(draw):
        return [
            {
                "rows": rows,
                "length": draw.randrange(8, 13),
                "width": draw.randrange(3, 7),
                "vocabulary": draw.randrange(20, 40),
                "accumulation_steps": steps,
            }
            for rows, steps in rows_and_steps
        ]

    return cases


def peak(name, points, *rows_and_steps):
    tried = ", ".join(f"{each.replace('_', ' ')} {{{each}}}" for each in NAMES)
    return Property(name, points, windows_of(*rows_and_steps), peak_by_formula, real_peak, tried)


QUESTION = Question(
    "The peak, to the byte",
    (
        peak("the measured peak of a single micro-batch", 1, (1, 1), (5, 1), (9, 1)),
        peak("the measured peak of several micro-batches", 2, (12, 2), (15, 3), (4, 4), (21, 7)),
    ),
)


def parts(rows, length, width, vocabulary, accumulation_steps):
    tokens, held = rows * length, 4 * (2 * vocabulary * width + vocabulary)
    at_once = tokens // accumulation_steps
    return {
        "weights": held,
        "state": held,
        "gradients": held * (accumulation_steps > 1),
        "inputs": 16 * tokens,
        "embedding": 4 * at_once * width,
        "logits": 12 * at_once * vocabulary,
        "loss": 8,
    }


def total(shape, **changed):
    return sum((parts(*shape) | changed).values())


@mistake("The collected gradients are missing: with more than one micro-batch, one copy stays while the next one runs.")
def no_copy(*shape):
    return total(shape, gradients=0)


@mistake("A copy of the gradients is counted for a single micro-batch too; there nothing has been collected before.")
def copy_at_one_too(*shape):
    return total(shape, gradients=parts(*shape)["weights"])


@mistake("Each micro-batch has a copy of the gradients of its own; they are all added up in one.")
def copy_for_each(*shape):
    return total(shape, gradients=shape[4] * parts(*shape)["gradients"])


@mistake("The activations are those of all tokens of the update; what runs at a time is one micro-batch.")
def large_batch(*shape):
    whole = parts(*shape[:4], 1)
    return total(shape, embedding=whole["embedding"], logits=whole["logits"])


@mistake("The inputs are those of one micro-batch; the whole window's are there all the time.")
def inputs_of_one(*shape):
    return total(shape, inputs=parts(*shape)["inputs"] // shape[4])


@mistake("The inputs have half of their bytes; inputs and targets are both there, and a token id has 8 bytes.")
def targets_forgotten(*shape):
    return total(shape, inputs=parts(*shape)["inputs"] // 2)


TOO_FEW = mistake(
    "Too few tensors of tokens times vocabulary; the loss's backward holds three of them at its worst moment."
)
logits_once = TOO_FEW(lambda *shape: total(shape, logits=parts(*shape)["logits"] // 3))
logits_twice = TOO_FEW(lambda *shape: total(shape, logits=parts(*shape)["logits"] // 3 * 2))


@mistake("The optimizer's state is missing: momentum keeps one number for each weight.")
def no_state(*shape):
    return total(shape, state=0)


@mistake(
    "The linear layer's bias is missing, one number for each token of the vocabulary, wherever weights are counted."
)
def no_bias(*shape):
    held = parts(*shape)["weights"] - 4 * shape[3]
    return total(shape, weights=held, state=held, gradients=held * (shape[4] > 1))


@mistake("The last 8 bytes are missing: the loss, and one number that it keeps.")
def no_loss(*shape):
    return total(shape, loss=0)


@mistake("The rows are taken for the tokens; each row has as many tokens as it is long.")
def rows_for_tokens(*shape):
    rows, _, *others = shape
    return total((rows, 1, *others))
