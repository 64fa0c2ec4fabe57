"""Gradient accumulation in PyTorch: the loop that the notebooks build, and the tools to measure it.

`windows` and `accumulate` are the technique. `check_split` checks whether a loss can be split, and `audit` computes the
weight of each micro-batch in any loop. `full_batch_gradient` and `relative_error` compare gradients.

Importing this package imports torch and nothing else that is slow; `gradaccum.memory` and the other parts are imported
on first use.
"""

import importlib
from typing import TYPE_CHECKING

from gradaccum.accumulation import Accumulated, NonFiniteLoss, Window, Windows, accumulate, windows
from gradaccum.auditing import Audit, Update, audit
from gradaccum.gradients import full_batch_gradient, relative_error
from gradaccum.splits import Split, check_split

__all__ = ["Accumulated", "Audit", "NonFiniteLoss", "Split", "Update", "Window", "Windows", "accumulate", "audit"]
__all__ += ["check_split", "full_batch_gradient", "relative_error", "windows"]
__version__ = "0.1.0"

# Not imported here: some need packages that only the lessons install, and `accumulate` must work with a torch that
# lacks one of the private names that memory uses.
_PARTS = ("data", "exercises", "memory", "models", "plots", "threads", "widgets")

if TYPE_CHECKING:
    from gradaccum import data as data
    from gradaccum import exercises as exercises
    from gradaccum import memory as memory
    from gradaccum import models as models
    from gradaccum import plots as plots
    from gradaccum import threads as threads
    from gradaccum import widgets as widgets
else:  # a type checker that saw `__getattr__` would let any name pass

    def __getattr__(name):
        if name not in _PARTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ImportError as error:  # hasattr() and help() handle only AttributeError
            raise AttributeError(f"{__name__}.{name} cannot be imported: {error}") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS})
