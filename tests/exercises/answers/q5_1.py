"""5.1: further right answers, which must get full points, and wrong ones, which must not."""

from fractions import Fraction

import torch

RIGHT = [
    lambda counts: torch.tensor(counts, dtype=torch.float32) / sum(counts),
    lambda counts: (Fraction(count, sum(counts)) for count in counts),
    lambda counts: tuple(torch.tensor(counts) * (1 / sum(counts))),
]
WRONG = [
    lambda counts: None,
    lambda counts: [count // sum(counts) for count in counts],
    lambda counts: [str(count / sum(counts)) for count in counts],
    lambda counts: sum(counts),
    lambda counts: [round(count / sum(counts), 2) for count in counts],
    lambda counts: [count / sum(counts) / len(counts) for count in counts],
    lambda counts: [bool(count) / sum(map(bool, counts)) for count in counts],
    lambda counts: torch.softmax(torch.tensor(counts, dtype=torch.float64), dim=0),
]
