"""A bar for a long wait that leaves nothing behind: a line on a terminal, a display of its own in a notebook."""

from __future__ import annotations

import html
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Shown(io.StringIO):
    """A file that shows the last line written to it in a display of the notebook: one given, or one of its own.

    A stream would not do: Jupyter keeps all that was written to it in the notebook's file. A blank line empties its
    own; what stays of that is an output without data, in which nbval sees no difference to none.
    """

    def __init__(self, handle: Any = None) -> None:
        super().__init__()
        self._handle, self._own = handle, None

    def write(self, text: str) -> int:
        """Show this in the place of what was shown before."""
        from IPython.display import HTML, display

        if line := text.strip():
            if self._handle is None:
                self._handle = self._own = display({}, raw=True, display_id=True)
            self._handle.update(HTML(f"<pre>{html.escape(line)}</pre>"))
        elif self._own is not None:
            self._own.update({}, raw=True)
        return len(text)


@contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """Give a function to call at each operation; where tqdm is installed a bar shows after two seconds, until the end.

    Example:
        >>> with progress("predicting") as tick:
        ...     tick(micro_batch=8)
    """
    try:
        from tqdm import tqdm  # the plain one: a widget would stay behind in the notebook's file
    except ImportError:
        yield lambda **state: None
        return
    # In a notebook stderr would be a red strip. None: silent in a log file.
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
    options: dict[str, Any] = {"file": Shown()} if in_notebook else {"disable": None}
    with tqdm(desc=what, unit=" operations", delay=2, leave=False, miniters=1, **options) as bar:

        def tick(**state: object) -> None:
            if state:
                bar.set_postfix(state, refresh=False)
            bar.update()

        yield tick
