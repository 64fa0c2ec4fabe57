"""3.2: further right answers, which must get full points, and wrong ones, which must not."""

import numpy as np
import torch

RIGHT = [
    lambda reduction, sizes: float(len(sizes)) if reduction == "mean" else float(sum(sizes)),
    lambda reduction, sizes: {"mean": len(sizes), "sum": len(sizes) * sizes[0]}[reduction],
    lambda reduction, sizes: torch.tensor(sizes).sum() if reduction == "sum" else np.size(sizes),
    lambda reduction, sizes: np.sum(sizes) if reduction == "sum" else 1 / (1 / len(sizes)),
]
WRONG = [lambda reduction, sizes: len(sizes) + 1, lambda reduction, sizes: 0]
NAMED = [(lambda reduction, sizes: None, "nothing_returned")]
