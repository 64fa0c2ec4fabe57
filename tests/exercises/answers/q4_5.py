"""4.5: further right answers, which must get full points, and wrong ones, which must not."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy
import torch

import gradaccum

RIGHT = [
    lambda n, k, epochs: math.ceil(n / k) * epochs,
    lambda n, k, epochs: float((n + k - 1) // k * epochs),
    lambda n, k, epochs: (n // k + (n % k > 0)) * epochs,
    lambda n, k, epochs: ((n - 1) // k + 1) * epochs,
    lambda n, k, epochs: sum((step + 1) % k == 0 or step == n - 1 for step in range(n)) * epochs,
    lambda n, k, epochs: torch.tensor(len(range(0, n, k)) * epochs),
    lambda n, k, epochs: torch.tensor([len(range(n)[::k])]) * epochs,
    lambda n, k, epochs: epochs * len(gradaccum.windows(range(n), k)),
    lambda n, k, epochs: Fraction(-(-n // k)) * epochs,
    lambda n, k, epochs: Decimal(-(-n // k)) * epochs,
    lambda n, k, epochs: numpy.ceil(n / k) * epochs,
    lambda n, k, epochs: numpy.int64(-(-n // k) * epochs),
]
WRONG = [
    lambda n, k, epochs: n * k * epochs,
    lambda n, k, epochs: int(n / k + 0.99) * epochs,
    lambda n, k, epochs: int(n / k + 0.9) * epochs,
    lambda n, k, epochs: math.ceil(n / (k * epochs)),
    lambda n, k, epochs: (n // k + 1) * epochs if n > k else epochs,
    lambda n, k, epochs: str(-(-n // k) * epochs),
    lambda n, k, epochs: [-(-n // k) * epochs],
    lambda n, k, epochs: None,
]
NAMED = [
    (lambda n, k, epochs: math.ceil(n / k * epochs), "ceil_of_all"),
    (lambda n, k, epochs: (n + k) // k * epochs, "always_one_more"),
    (lambda n, k, epochs: (n // k + (n % k == 0)) * epochs, "always_one_more", "floor"),
    (lambda n, k, epochs: n // k * epochs + 1, "one_more_at_the_end", ...),
    (lambda n, k, epochs: int(n / k + 0.9) * epochs,),
    (lambda n, k, epochs: -(-n // k) * epochs - 1,),
]
