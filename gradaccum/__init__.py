"""Gradient accumulation in PyTorch: the finished loop that the notebooks build, and the meters they use.

`windows` and `accumulate` are the technique; `full_batch_gradient` and `relative_error` say what "equal" means.
Importing this package imports torch and nothing else that is slow.
"""

from gradaccum.accumulation import Accumulated, Windows, accumulate, windows
from gradaccum.gradients import full_batch_gradient, relative_error

__all__ = ["Accumulated", "Windows", "accumulate", "full_batch_gradient", "relative_error", "windows"]
__version__ = "0.1.0"
