"""6.3: further right answers, which must get full points, and wrong ones, which must not."""

import numpy as np
import torch


def ledger(gradients, activations, temporaries, accumulation_steps):
    """Walks through the update, moment by moment."""

    def peak(steps):
        held, worst = 0, 0
        for _ in range(steps):
            worst, held = max(worst, held + activations), gradients
        return max(worst, held + temporaries)

    return float(peak(accumulation_steps) - peak(1))


def by_cases(gradients, activations, temporaries, accumulation_steps):
    if accumulation_steps == 1 or activations <= temporaries:
        return 0
    return min(gradients, activations - temporaries)


def clipped(gradients, activations, temporaries, accumulation_steps):
    return np.clip(activations - temporaries, 0, gradients) * (accumulation_steps != 1)


def in_the_middle(gradients, activations, temporaries, accumulation_steps):
    return sorted([0, activations - temporaries, gradients * min(1, accumulation_steps - 1)])[1]


def of_tensors(gradients, activations, temporaries, accumulation_steps):
    step = torch.tensor(gradients + temporaries)
    kept = torch.tensor(gradients if accumulation_steps > 1 else 0)
    return torch.maximum(activations + kept, step) - step.clamp(min=activations)


def step_forgotten(gradients, activations, temporaries, accumulation_steps):
    return min(gradients, activations) if accumulation_steps > 1 else 0


def beyond_the_step(gradients, activations, temporaries, accumulation_steps):
    return max(0, activations - gradients - temporaries) if accumulation_steps > 1 else 0


def collected_anew(gradients, activations, temporaries, accumulation_steps):
    step = gradients + temporaries
    return max(activations + (accumulation_steps - 1) * gradients, step) - max(activations, step)


def copy_or_nothing(gradients, activations, temporaries, accumulation_steps):
    return gradients if activations + gradients > gradients + temporaries and accumulation_steps > 1 else 0


RIGHT = [ledger, by_cases, clipped, in_the_middle, of_tensors]
WRONG = [
    beyond_the_step,
    lambda *held: str(by_cases(*held)),
    lambda *held: [by_cases(*held)],
    lambda *held: -by_cases(*held),
    lambda *held: by_cases(*held) if held[3] > 2 else 0,
    lambda *held: by_cases(*held) / max(1, held[1]),
    lambda *held: max(held[0] + held[2], held[1]),
]
NAMED = [
    (step_forgotten, "always_a_copy"),
    (lambda *held: (held[3] > 1) * (held[1] - held[2]), "beyond_a_copy", "below_zero"),
    (lambda *held: (held[3] > 1) * min(held[0], held[1] - held[2]), "below_zero"),
    (lambda *held: (held[3] > 1) * max(0, held[1] - held[2]), "beyond_a_copy"),
    (lambda *held: held[0] if held[1] >= held[0] + held[2] else 0, "at_one_too", "all_or_nothing"),
    (copy_or_nothing, "whole_where_it_changes"),
    (collected_anew, "for_each_step"),
]
