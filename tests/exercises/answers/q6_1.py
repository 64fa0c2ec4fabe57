"""6.1: further right answers, which must get full points, and wrong ones, which must not."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from gradaccum import data, models
from gradaccum.memory import measure_memory


def measures(rows, length, width, vocabulary, accumulation_steps, updates=2, optimizer=torch.optim.SGD, momentum=0.9):
    model = models.embedding_linear(vocabulary, width)
    optimizer = optimizer(model.parameters(), lr=0.1, **({"momentum": momentum} if momentum else {}))
    shape = {"batch_size": rows // accumulation_steps, "length": length, "vocabulary": vocabulary}
    window = list(data.random_tokens(accumulation_steps, **shape))
    for _ in range(updates):
        with measure_memory(model, optimizer, window) as memory:
            for inputs, targets in window:
                targets = targets.flatten()
                (cross_entropy(model(inputs).flatten(0, 1), targets) / len(window)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return memory.peak_bytes


def reads_the_model(rows, length, width, vocabulary, accumulation_steps):
    model, tokens = models.embedding_linear(vocabulary, width), torch.zeros(2, rows, length, dtype=torch.long)
    held = sum(parameter.nbytes for parameter in model.parameters())
    output = model(tokens[0, : rows // accumulation_steps])
    embedded = output.nbytes // vocabulary * width
    return held * (2 if accumulation_steps == 1 else 3) + tokens.nbytes + embedded + 3 * output.nbytes + 8


def counts_numbers_as_floats(rows, length, width, vocabulary, accumulation_steps):
    n = rows / accumulation_steps * length
    copies = 2.0 if accumulation_steps == 1 else 3.0
    numbers = copies * vocabulary * (2 * width + 1) + n * (width + 3 * vocabulary) + 2
    return torch.tensor(4 * numbers + 2 * 8 * rows * length)


def by_element_size(rows, length, width, vocabulary, accumulation_steps):
    number, token_id = torch.zeros(()).element_size(), torch.zeros((), dtype=torch.long).element_size()
    weights = np.prod([vocabulary, 2 * width + 1])
    tokens = np.array([rows * length, rows * length / accumulation_steps])
    activations = number * (tokens[1] * (width + 3 * vocabulary) + 2)
    return number * weights * (2 + min(accumulation_steps - 1, 1)) + 2 * token_id * tokens[0] + activations


def fixed_length(rows, length, width, vocabulary, accumulation_steps):
    return counts_numbers_as_floats(rows, 20, width, vocabulary, accumulation_steps)


def no_bias_in_the_state(*shape):
    return counts_numbers_as_floats(*shape) - 4 * shape[3]


def more_by(change):
    """Add bytes by (tokens, micro-batch's tokens, width, vocabulary, k) to the right ones."""

    def answer(rows, length, width, vocabulary, k):
        right = counts_numbers_as_floats(rows, length, width, vocabulary, k)
        return right + change(rows * length, rows * length // k, width, vocabulary, k)

    return answer


RIGHT = [measures, reads_the_model, counts_numbers_as_floats, by_element_size]
WRONG = [
    fixed_length,
    no_bias_in_the_state,
    lambda *shape: str(int(counts_numbers_as_floats(*shape))),
    lambda *shape: counts_numbers_as_floats(*shape) / 1024,
    lambda *shape: measures(*shape, updates=1),
    lambda *shape: measures(*shape, optimizer=torch.optim.AdamW, momentum=0),
    more_by(lambda tokens, n, width, vocabulary, k: 4 * n * width),
    more_by(lambda tokens, n, width, vocabulary, k: 4 * vocabulary * (2 * width + 1) * (k > 2)),
]
NAMED = [
    (lambda *shape: measures(*shape, momentum=0), "no_state"),
    (lambda rows, *others: measures(rows * others[-1], *others), "rows_of_each"),
    (more_by(lambda tokens, n, width, vocabulary, k: 4 * vocabulary * (2 * width + 1)), "one_copy_more"),
    (more_by(lambda tokens, n, width, vocabulary, k: 4 * (tokens - n) * width), "large_batch_embedding"),
    (more_by(lambda tokens, n, width, vocabulary, k: 12 * (tokens - n) * vocabulary), "large_batch_logits"),
    (more_by(lambda tokens, n, width, vocabulary, k: -8 * tokens), "targets_forgotten"),
    (more_by(lambda tokens, n, width, vocabulary, k: -4 * vocabulary * width * (2 + (k > 1))), "one_table"),
    (more_by(lambda tokens, n, width, vocabulary, k: -8 * tokens - 8),),
    (no_bias_in_the_state,),
]
# Mutants of the reference answer that are right too, and why.
EQUIVALENT = {
    "5: tokens // accumulation_steps -> tokens / accumulation_steps": "it divides the rows, and so the tokens"
}
