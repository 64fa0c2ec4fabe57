"""A progress bar that leaves no output: a line on a terminal, a separate display in a notebook."""

from __future__ import annotations

import html
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Shown(io.StringIO):
    """A file that shows the last line written to it in a notebook display: the given one, or a new one.

    A stream would not work: Jupyter saves everything written to it in the notebook. A blank line clears a new display;
    the remaining output has no data, which nbval treats as no output.
    """

    def __init__(self, handle: Any = None) -> None:
        super().__init__()
        self._handle, self._own = handle, None

    def write(self, text: str) -> int:
        """Show this text in place of the previous one."""
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
    """Yield a function to call at each operation; if tqdm is installed, a bar is shown after two seconds.

    Example:
        >>> with progress("predicting") as tick:
        ...     tick(micro_batch=8)
    """
    try:
        from tqdm import tqdm  # the plain bar: a widget would stay in the notebook
    except ImportError:
        yield lambda **state: None
        return
    # In a notebook stderr is shown in red. `"disable": None` is silent in a log file.
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
    options: dict[str, Any] = {"file": Shown()} if in_notebook else {"disable": None}
    with tqdm(desc=what, unit=" operations", delay=2, leave=False, miniters=1, **options) as bar:

        def tick(**state: object) -> None:
            if state:
                bar.set_postfix(state, refresh=False)
            bar.update()

        yield tick
