"""What each update of a loop of lesson 4 should be made of, at the weights that it starts from."""

import torch
from torch.nn.utils import vector_to_parameters

from gradaccum.exercises import material
from gradaccum.exercises.questions import lesson_04
from gradaccum.exercises.weighing import Gradient, own_gradients, scaled


def parts(case, got):
    """Follow an answer's own path, as `material.trained` noted it; any micro-batch may be in an update, if wrongly."""
    model = material.classifier(case["seed"])
    numbers, size = range(1, case["number"] + 1), case["size"]
    micro_batches = dict(zip(numbers, material.samples([size] * len(numbers), case["seed"]), strict=True))
    windows = lesson_04.right_lists(numbers, case["k"]) * case["epochs"]
    for update, (window, (held, after)) in enumerate(zip(windows, got["each update"], strict=False), start=1):
        right, name = dict.fromkeys(window, 1 / len(window)), f"In update {update}"
        means = own_gradients(model, micro_batches)
        yield Gradient(held, means, right, dict.fromkeys(numbers, size), case["k"], name)
        if scaled(1, after) is None:
            return
        vector_to_parameters(torch.tensor(after), model.parameters())
