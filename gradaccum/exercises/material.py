"""What the questions share: a small model, windows of data, and gradients as plain numbers. All in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gradaccum.exercises.question import Difference
from gradaccum.memory import measure_memory
from gradaccum.models import embedding_linear

Batch = tuple[Tensor, Tensor]


def classifier(seed: int) -> nn.Sequential:
    """Make a model that takes samples of 3 numbers to the logits of 3 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def samples(sizes: Sequence[int], seed: int) -> list[Batch]:
    """Draw micro-batches of these sizes: inputs of shape (size, 3), targets of shape (size,).

    Example:
        >>> [inputs.shape[0] for inputs, targets in samples([4, 1, 3], seed=0)]
        [4, 1, 3]
    """
    draw = torch.Generator().manual_seed(seed)
    options = {"generator": draw, "dtype": torch.float64}
    return [(torch.randn(n, 3, **options), torch.randint(3, (n,), generator=draw)) for n in sizes]  # type: ignore[call-overload]


def token_model(seed: int, vocabulary: int = 7, width: int = 4) -> nn.Sequential:
    """Make the lesson's model on a few tokens."""
    torch.manual_seed(seed)
    return embedding_linear(vocabulary, width).double()


def joined(window: Sequence[Batch]) -> Batch:
    """Join micro-batches into the one batch that they make together."""
    return torch.cat([inputs for inputs, _ in window]), torch.cat([targets for _, targets in window])


def gradient(model: nn.Module) -> list[float]:
    """Return all of `.grad` as one list of numbers, zeros where it is None."""
    held = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return _numbers(held)


def weights(model: nn.Module) -> list[float]:
    """Return all parameters as one list of numbers."""
    return _numbers(list(model.parameters()))


def plain_number(value: object) -> object:
    """Make a number of any kind a float; leave what is none, such as a text, for the card to show."""
    return float(value) if hasattr(value, "__float__") else value


def at_most(unit: str) -> Callable[[int, int], Difference | None]:
    """Make the judge of an amount that must not be larger than expected."""
    return lambda got, limit: None if got <= limit else Difference(f"at most {limit:,} {unit}", f"{got:,} {unit}")


at_most_bytes = at_most("bytes beyond the start")


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    found: list[float] = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).tolist()
    return found


__all__ = [
    "Batch",
    "at_most",
    "at_most_bytes",
    "classifier",
    "gradient",
    "joined",
    "measure_memory",
    "plain_number",
    "samples",
    "token_model",
    "weights",
]
