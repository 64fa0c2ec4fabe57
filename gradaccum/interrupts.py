"""The message when a learner stops a cell: one sentence, instead of a traceback through code that is not theirs."""

from __future__ import annotations

from typing import Any

from IPython.core.getipython import get_ipython

STOPPED = "Stopped. Run the cell again to start it over."


def say_stopped() -> None:
    """Show one sentence instead of a traceback when a cell is interrupted; outside IPython this does nothing.

    The cell still fails, so no later cell is run. Handlers that are already set are kept. Functions that may take long
    call this; no import does, so importing changes nothing in IPython.

    Example:
        >>> say_stopped()
    """
    shell = get_ipython()
    if shell is not None and not shell.custom_exceptions:
        shell.set_custom_exc((KeyboardInterrupt,), _show)


def _show(shell: Any, kind: type[BaseException], error: Any, trace: Any, tb_offset: int | None = None) -> None:
    error.args = (STOPPED,)
    error._render_traceback_ = lambda: [STOPPED]  # IPython's own hook
    shell.showtraceback((kind, error, trace))
