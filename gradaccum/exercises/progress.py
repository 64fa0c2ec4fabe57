"""Save a learner's points over a restart, with a date and a digest of the answer, in the learner's own file.

The learner can see the file. It is never sent, and grading does not read it: points come only from a check.
Nothing is saved if GRADACCUM_PROGRESS is "off", outside of a notebook, or if a program runs the notebook.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import linecache
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from IPython.core.getipython import get_ipython

SWITCH = "GRADACCUM_PROGRESS"
COPIES = ".copied.json"  # written by make.py into the folder of a learner's copies, whatever its name
FORMAT = 1  # of the file; a file with another format is not changed
PATIENCE, STALE = 0.8, 10.0  # seconds: to wait for another notebook's lock; after which a lock is stale
HERE: Path | None = None
with suppress(OSError):  # the folder was deleted
    HERE = Path.cwd()  # a kernel starts in its notebook's folder; an answer may change it


class Kept(NamedTuple):
    """The saved record of an exercise: the best points, their day and answer, and the points of the last check."""

    best: int
    on: str
    answer: str
    last: int


KINDS = {"best": int, "on": str, "answer": str, "last": int}
_session: dict[str, Kept] = {}  # since the notebook was started, with or without a file
_unwritten: set[str] = set()


def is_on() -> bool:
    """Return whether points are saved: only in a notebook that is not run by a grader or another program."""
    shell = get_ipython()
    if shell is None or os.environ.get(SWITCH, "").strip().lower() == "off":
        return False
    # nbclient, nbconvert and nbgrader keep a kernel's history in memory: no person types there.
    return str(getattr(shell.history_manager, "hist_file", "")) != ":memory:"


def place() -> Path | None:
    """Return the file: in the folder of the learner's copies if the notebook is there, otherwise in Jupyter's data."""
    for folder in [HERE, *HERE.parents][:4] if HERE else []:
        if os.path.isfile(folder / COPIES):
            return folder / "progress.json"
    try:
        from jupyter_core.paths import jupyter_data_dir
    except ImportError:
        return None
    return Path(jupyter_data_dir()) / "gradaccum" / "progress.json"


def known() -> dict[str, Kept]:
    """Return the best record of each exercise, from this session or from the file."""
    found, path = dict(_session), place() if is_on() else None
    for name, entry in ((_read(path) if path else None) or {}).items():
        kept = _kept(entry)
        if kept and (name not in found or kept.best >= found[name].best):
            found[name] = kept
    return found


def keep(identifier: str, points: int, answer: object) -> None:
    """Save the points of a check, silently if the file cannot be written; 0 points are not saved."""
    if not points and identifier not in known():
        return
    new = Kept(points, date.today().isoformat(), digest(answer), points)
    _session[identifier] = _merged(_session.get(identifier), new)
    _unwritten.add(identifier)

    def add(entries: dict[str, Any]) -> None:
        for each in _unwritten:
            entries[each] = _merged(_kept(entries.get(each)), _session[each])._asdict()

    if _changed(add):
        _unwritten.clear()


def forget(identifier: str) -> Kept | None:
    """Delete the record of an exercise, here and in the file, and return it."""
    kept = known().get(identifier)
    _session.pop(identifier, None)
    _unwritten.discard(identifier)
    if kept:
        _changed(lambda entries: entries.pop(identifier, None))
    return kept


def counted() -> str:
    """Return a sentence that says what a scorecard counts, and where it is saved."""
    path = place() if is_on() else None
    if path is None:
        off = f" ({SWITCH} is off)" if os.environ.get(SWITCH) else ""
        return f"The best check of each exercise since the notebook was started counts; nothing is saved{off}."
    shown = _shown(path)
    if _read(path) is None:
        why = f"{shown} cannot be read, and is not changed until you move it"
    elif _unwritten:
        why = f"{shown} cannot be written"
    else:
        what = "points, day and a short fingerprint of the answer, for you alone"
        return f"The best check of each exercise counts, in earlier sessions too: {shown} keeps {what}."
    return f"The best check of each exercise since the notebook was started counts; nothing is saved: {why}."


def digest(answer: object) -> str:
    """Return eight hexadecimal digits that identify a version of an answer; "" if its source is not known.

    Example:
        >>> len(digest(digest)), digest(len)
        (8, '')
    """
    if type(answer) is not FunctionType:  # reading the attributes of another object may run any code
        return ""
    code = answer.__code__
    try:
        lines = inspect.getblock(linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :])
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:8] if lines else ""
    except Exception:  # the cell was changed since, or is not text
        return ""


# ------------------------------------------------------------------------------------------------------- the file


def _merged(old: Kept | None, new: Kept) -> Kept:
    return new if old is None or new.best > old.best else old._replace(last=new.last)


def _kept(entry: object) -> Kept | None:
    """Return one entry, None if it is not valid."""
    if isinstance(entry, dict) and all(type(entry.get(name)) is kind for name, kind in KINDS.items()):
        return Kept(*(entry[name] for name in KINDS))
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """Return the file's entries: an empty dict if there is no file, None if the file must not be changed."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(found, dict) and found.get("format") == FORMAT
    return found["exercises"] if ours and isinstance(found.get("exercises"), dict) else None


def _changed(change: Callable[[dict[str, Any]], object]) -> bool:
    """Change the file's entries, atomically and under a lock; return whether that was possible."""
    path = place() if is_on() else None
    if path is None:
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if (entries := _read(path)) is None:
                return False
            change(entries)
            draft = path.with_name(f"{path.name}.part")
            try:
                draft.write_text(json.dumps({"format": FORMAT, "exercises": entries}, indent=1) + "\n", "utf-8")
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
    except OSError:  # a full disk, a folder that cannot be written, another notebook that takes too long
        return False
    return True


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lock the file against other notebooks; raise FileExistsError if that takes too long."""
    lock, until = path.with_name(f"{path.name}.lock"), time.monotonic() + PATIENCE
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except (FileExistsError, PermissionError) as error:
            is_taken = isinstance(error, FileExistsError) or os.name == "nt"  # Windows: the lock is being deleted
            if not is_taken or time.monotonic() > until:
                raise
        with suppress(OSError):
            if time.time() - lock.stat().st_mtime > STALE:  # its process was killed
                lock.unlink()
        time.sleep(0.01)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()


def _shown(path: Path) -> str:
    """Return the path for display, without the user's name."""
    if os.path.isfile(path.with_name(COPIES)):
        return f"{path.parent.name}/{path.name}"
    home = os.path.expanduser("~")
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)
