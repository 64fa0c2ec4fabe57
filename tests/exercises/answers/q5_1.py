"""5.1: further right answers, which must get full points, and wrong ones, which must not."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

RIGHT = [
    lambda counts: torch.tensor(counts, dtype=torch.float32) / sum(counts),
    lambda counts: (Fraction(count, sum(counts)) for count in counts),
    lambda counts: (Decimal(count) / sum(counts) for count in counts),
    lambda counts: np.array(counts) / np.mean(counts) / len(counts),
    lambda counts: torch.nn.functional.normalize(torch.tensor(counts, dtype=torch.float32), p=1, dim=0),
    lambda counts: {index: count / sum(counts) for index, count in enumerate(counts)}.values(),
    lambda counts: tuple(torch.tensor(counts) * (1 / sum(counts))),
]
WRONG = [
    lambda counts: None,
    lambda counts: [count // sum(counts) for count in counts],
    lambda counts: [str(count / sum(counts)) for count in counts],
    lambda counts: sum(counts),
    lambda counts: [round(count / sum(counts), 2) for count in counts],
    lambda counts: sorted(count / sum(counts) for count in counts),
    lambda counts: [count / (sum(counts) + 1e-3) for count in counts],
    lambda counts: [counts.pop(0) / total for total in [sum(counts)] for _ in range(len(counts))],
    lambda counts: torch.softmax(torch.tensor(counts, dtype=torch.float64), dim=0),
]
NAMED = [
    (lambda counts: np.array(counts) / np.mean(counts), "times_k"),
    (lambda counts: torch.tensor(counts), "counts_alone"),
    (lambda counts: [count and 1 / count for count in counts], "own_counts"),
    (lambda counts: [count / sum(counts) / len(counts) for count in counts], "divided_by_k_too"),
    (lambda counts: [count / len(counts) for count in counts], "divided_by_k"),
    (lambda counts: [bool(count) / sum(map(bool, counts)) for count in counts], "equal_weights"),
    (lambda counts: [max(count, 1) / sum(counts) for count in counts],),
]
WEIGHED = [
    (torch.tensor, "s 11, 214, 39, 58 and should have 0.0342, 0.665, 0.121, 0.18.", "Each item got the weight 1"),
    (lambda counts: [n / (sum(counts) + 1) for n in counts], "s 0.0341, 0.663,", "divided by 323, where 322 items"),
    (lambda counts: [count / sum(counts) for count in counts[:-1]], "", ""),
    (lambda counts: [float("nan")] * len(counts), "", ""),
    (lambda counts: [10**400] * len(counts), "", ""),
]
