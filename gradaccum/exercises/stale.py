"""Detect a check of an older version of an answer, whose newest cell ended in an error."""

from __future__ import annotations

import ast
import linecache
import re
import warnings
from types import FunctionType

from IPython.core.getipython import get_ipython


def note(answer: object) -> str:
    """Return the sentence for the card if a later cell that defines the answer ended in an error, "" if not."""
    shell = get_ipython()
    if shell is None or shell.history_manager is None or type(answer) is not FunctionType:
        return ""
    name, code = answer.__name__, answer.__code__
    if code.co_name != name or shell.user_ns.get(name) is not answer:
        return ""
    raw, run = shell.history_manager.input_hist_raw, shell.history_manager.input_hist_parsed
    own = "".join(linecache.getlines(code.co_filename)).strip()
    here = max((number for number, cell in enumerate(run) if own and cell.strip() == own), default=len(run))
    last = max((number for number, cell in enumerate(raw) if re.search(rf"^def {name}\(", cell, re.M)), default=0)
    # A learner who assigns the name to an older function knows that it is older.
    given_back = any(re.search(rf"^{name} *[=:]", cell, re.M) for cell in raw[last:])
    if here >= last or given_back or not _failed(run[last], name):
        return ""
    return f"Your last cell with `def {name}(` ended in an error: this is about the version before it."


def _failed(cell: str, name: str) -> bool:
    """Return whether a cell does not compile or, since the function is not from it, failed before its definition."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(cell, "", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except (SyntaxError, ValueError):
        return True
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.parse(cell).body)
