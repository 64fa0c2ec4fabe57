"""What the questions of lesson 6 share: real updates of the lesson's model, measured, and the right loop and plan."""

from functools import cache

import torch
from torch.nn.functional import cross_entropy

from gradaccum.data import random_tokens
from gradaccum.exercises import material
from gradaccum.memory import measure_memory


def backward_of(model, window):
    for inputs, targets in window:
        targets = targets.flatten()
        (cross_entropy(model(inputs).flatten(0, 1), targets) / len(window)).backward()


def update(model, optimizer, window):
    """One update as in lesson 6."""
    backward_of(model, window)
    optimizer.step()
    optimizer.zero_grad()


def after_one_update(optimizer, rows, length, width, vocabulary, accumulation_steps):
    """Make the lesson's model in float32, its optimizer and a window, and run the first update."""
    model = material.token_model(0, vocabulary, width).float()
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, **options)
    shape = {"batch_size": rows // accumulation_steps, "length": length, "vocabulary": vocabulary}
    known = model, made, list(random_tokens(accumulation_steps, **shape))
    update(*known)
    return known


@cache
def measured_peak(*case):
    known = after_one_update(*case)
    with measure_memory(*known) as memory:
        update(*known)
    return memory.peak_bytes


@cache
def measured_parts(optimizer, *shape):
    """Measure what 6.3 hands out, in an update of one micro-batch."""
    model, made, window = known = after_one_update(optimizer, *shape, 1)
    with measure_memory(*known) as backward:
        backward_of(model, window)
    with measure_memory(*known) as step:
        made.step()
    return {
        "gradients": sum(4 * parameter.numel() for parameter in model.parameters()),
        "activations": backward.peak_bytes - backward.start_bytes,
        "temporaries": step.peak_bytes - step.start_bytes,
    }
