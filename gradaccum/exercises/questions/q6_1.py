"""6.1: the peak of one update as a formula, against the measured one."""

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_06


def peak_by_formula(answer, case):
    with material.in_float32():  # an answer may make the model, or measure
        return material.plain_number(answer(*case.values()))


def real_peak(case):
    return lesson_06.measured_peak("SGD", *case.values())


def windows_of(*sizes_and_steps):
    """Draw shapes whose worst moment is the loss's backward: more tokens than the width, a larger vocabulary still."""

    def cases(draw):
        found = []
        for fewest, most, *steps in sizes_and_steps:
            k, length, width, vocabulary = draw.choice(steps), *map(draw.randint, (8, 3, 20), (12, 6, 39))
            shape = {"rows": draw.randint(fewest, most) * k, "length": length, "width": width, "vocabulary": vocabulary}
            found.append({**shape, "accumulation_steps": k})  # in the order in which an answer takes them
        return found

    return cases


def peak(name, points, *sizes_and_steps):
    tried = "{rows} rows of {length} tokens, width {width}, vocabulary {vocabulary}, {accumulation_steps} micro-batches"
    return Property(name, points, windows_of(*sizes_and_steps), peak_by_formula, real_peak, tried)


QUESTION = Question(
    "The peak, to the byte",
    (
        peak("the measured peak of a single micro-batch", 1, (1, 1, 1), (2, 5, 1), (6, 12, 1)),
        peak("the measured peak of several micro-batches", 2, (4, 8, 2), (2, 6, 3), (1, 1, 4, 5), (2, 5, 6, 7, 8)),
    ),
)


def total(shape, numbers=None, **times):
    """Add up the parts of the peak, some of them taken more or fewer times; `numbers` are the model's."""
    rows, length, width, vocabulary, k = shape
    tokens, weights = rows * length, 4 * (numbers or 2 * vocabulary * width + vocabulary)
    parts = {
        "weights": weights,
        "state": weights,
        "gradients": weights * (k > 1),
        "inputs": 16 * tokens,
        "embedding": 4 * tokens * width / k,
        "logits": 12 * tokens * vocabulary / k,
        "loss": 8,
    }
    return round(sum(times.get(name, 1) * held for name, held in parts.items()))


no_copy = mistake(
    "With several micro-batches one number for each weight is missing, most likely the collected gradient: one copy "
    "stays while the next micro-batch runs."
)(lambda *shape: total(shape, gradients=0))
copy_at_one_too = mistake(
    "A copy of the gradients is counted for a single micro-batch too; there nothing has been collected before."
)(lambda *shape: total(shape, state=2 if shape[-1] == 1 else 1))
one_copy_more = mistake(
    "One number too many is counted for each weight: either the gradients of the running micro-batch, which do "
    "not exist yet at its worst moment, or a second number of the optimizer, but momentum keeps one."
)(lambda *shape: total(shape, state=2))
copies = mistake(
    "The more micro-batches, the more copies of the gradients are counted; all micro-batches are added up in one."
)
copy_for_each = copies(lambda *shape: total(shape, gradients=shape[-1]))
copy_for_each_further = copies(lambda *shape: total(shape, gradients=shape[-1] - 1))
large = mistake(
    "Activations of all tokens of the update are counted; only one micro-batch runs at a time, and the "
    "embedding's output and the logits are those of its tokens."
)
large_batch = large(lambda *shape: total(shape, embedding=shape[-1], logits=shape[-1]))
large_batch_logits = large(lambda *shape: total(shape, logits=shape[-1]))
large_batch_embedding = large(lambda *shape: total(shape, embedding=shape[-1]))
rows_of_each = mistake("The rows are taken for those of one micro-batch; they are the whole window's.")(
    lambda rows, *others: total((rows * others[-1], *others))
)
rows_for_tokens = mistake("The rows are taken for the tokens; each row has as many tokens as it is long.")(
    lambda rows, length, *others: total((rows, 1, *others))
)
inputs_of_one = mistake(
    "The inputs are those of one micro-batch; those of the whole window are in memory all the time."
)(lambda *shape: total(shape, inputs=1 / shape[-1]))
targets_forgotten = mistake(
    "Only half of the inputs' bytes are counted; inputs and targets are both in memory, and a token id has 8 bytes."
)(lambda *shape: total(shape, inputs=1 / 2))

three = mistake(
    "Tensors of tokens times vocabulary are too few or too many; the loss's backward holds three at its worst moment."
)
logits_once = three(lambda *shape: total(shape, logits=1 / 3))
logits_twice = three(lambda *shape: total(shape, logits=2 / 3))
logits_four_times = three(lambda *shape: total(shape, logits=4 / 3))
end = mistake("The last bytes are missing: 4 of the loss, and 4 of one number that it keeps.")
no_loss = end(lambda *shape: total(shape, loss=0))
loss_alone = end(lambda *shape: total(shape, loss=1 / 2))
no_embedding = mistake("The embedding's output is missing: a micro-batch's tokens times the width.")(
    lambda *shape: total(shape, embedding=0)
)
no_state = mistake("The optimizer's state is missing: momentum keeps one number for each weight.")(
    lambda *shape: total(shape, state=0)
)
no_bias = mistake("The linear layer's bias is missing, one number for each token of the vocabulary, in every copy.")(
    lambda *shape: total(shape, 2 * shape[2] * shape[3])
)
one_table = mistake("Vocabulary times width is counted once; the embedding and the linear layer have as many each.")(
    lambda *shape: total(shape, (shape[2] + 1) * shape[3])
)
numbers = mistake("Numbers are counted instead of bytes: 4 bytes for each float32, and 8 for each token id.")(
    lambda *shape: total(shape, inputs=1 / 2) // 4
)
