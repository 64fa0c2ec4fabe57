"""6.1: further right answers, which must get full points, and wrong ones, which must not."""

import torch
from torch.nn.functional import cross_entropy

from gradaccum.memory import measure_memory
from gradaccum.models import embedding_linear


def measures(rows, length, width, vocabulary, accumulation_steps):
    model = embedding_linear(vocabulary, width).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = torch.zeros(2, rows, length, dtype=torch.int64).split(rows // accumulation_steps, dim=1)
    window = [(inputs.clone(), targets.clone()) for inputs, targets in batches]
    for _ in range(2):
        with measure_memory(model, optimizer, window) as memory:
            for inputs, targets in window:
                targets = targets.flatten()
                (cross_entropy(model(inputs).flatten(0, 1), targets) / len(window)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return memory.peak_bytes


def counts_numbers_as_floats(rows, length, width, vocabulary, accumulation_steps):
    n = rows / accumulation_steps * length
    copies = 2.0 if accumulation_steps == 1 else 3.0
    numbers = copies * vocabulary * (2 * width + 1) + n * (width + 3 * vocabulary) + 2
    return torch.tensor(4 * numbers + 2 * 8 * rows * length)


def embedding_of_the_window(rows, length, width, vocabulary, accumulation_steps):
    """Lets only the logits shrink with the micro-batch."""
    right = counts_numbers_as_floats(rows, length, width, vocabulary, accumulation_steps)
    return right + 4 * width * length * (rows - rows // accumulation_steps)


def fixed_length(rows, length, width, vocabulary, accumulation_steps):
    return counts_numbers_as_floats(rows, 20, width, vocabulary, accumulation_steps)


RIGHT = [measures, counts_numbers_as_floats]
WRONG = [embedding_of_the_window, fixed_length, lambda *shape: str(int(counts_numbers_as_floats(*shape)))]
# Mutants of the reference answer that are right too, and why.
EQUIVALENT = {
    "5: tokens // accumulation_steps -> tokens / accumulation_steps": "it divides the rows, and so the tokens"
}
