"""1.3: further right answers, which must get full points, and wrong ones, which must not."""

import math
from fractions import Fraction

import numpy as np
import torch

RIGHT = [
    lambda noise, batch_size, new_batch_size: noise / math.sqrt(new_batch_size / batch_size),
    lambda noise, batch_size, new_batch_size: torch.tensor(noise) * (batch_size / new_batch_size) ** 0.5,
    lambda noise, batch_size, new_batch_size: np.sqrt(noise**2 * batch_size / new_batch_size),
    lambda noise, batch_size, new_batch_size: np.array(noise * math.sqrt(batch_size / new_batch_size)),
    lambda noise, batch_size, new_batch_size: noise * math.exp(math.log(batch_size / new_batch_size) / 2),
    lambda noise, batch_size, new_batch_size: noise * Fraction(batch_size, new_batch_size) ** 0.5,
]
WRONG = [
    lambda noise, batch_size, new_batch_size: noise / max(new_batch_size // batch_size, 1) ** 0.5,
    lambda noise, batch_size, new_batch_size: noise / 2 if new_batch_size > batch_size else noise * 2,
    lambda noise, batch_size, new_batch_size: str(noise * (batch_size / new_batch_size) ** 0.5),
    lambda noise, batch_size, new_batch_size: None,
]
NAMED = [
    (lambda noise, batch_size, new_batch_size: noise / (new_batch_size / batch_size) ** 1 / 2, "halved"),
    (lambda noise, batch_size, new_batch_size: noise / 2 ** math.log2(new_batch_size / batch_size), "one_over_size"),
    (lambda noise, batch_size, new_batch_size: math.sqrt(noise) * batch_size / new_batch_size,),
    (lambda noise, batch_size, new_batch_size: noise / max(new_batch_size // batch_size, 1) ** 0.5,),
]
