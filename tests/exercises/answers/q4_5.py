"""4.5: further right answers, which must get full points, and wrong ones, which must not."""

import math
from fractions import Fraction

import numpy
import torch

import gradaccum

RIGHT = [
    lambda n, k, epochs: math.ceil(n / k) * epochs,
    lambda n, k, epochs: float((n + k - 1) // k * epochs),
    lambda n, k, epochs: torch.tensor(len(range(0, n, k)) * epochs),
    lambda n, k, epochs: epochs * len(gradaccum.windows(range(n), k)),
    lambda n, k, epochs: Fraction(-(-n // k)) * epochs,
    lambda n, k, epochs: numpy.int64(-(-n // k) * epochs),
]
WRONG = [
    lambda n, k, epochs: round(n / k) * epochs,
    lambda n, k, epochs: n * k * epochs,
    lambda n, k, epochs: -(-n // k) + epochs,
    lambda n, k, epochs: int(n / k + 0.99) * epochs,
    lambda n, k, epochs: str(-(-n // k) * epochs),
    lambda n, k, epochs: None,
]
