"""Copy the notebooks that work/ lacks, for a learner to write in: python tools/work.py.

Only the standard library is used: Binder and a Python of the user's own run this too.
"""

import hashlib
import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ".copied.json"  # in work/: the digest that each copy's original had


def copy_notebooks(notebooks: Path, work: Path) -> list[str]:
    """Copy what `work` lacks, and keep what is there; return the copies of which there is a newer edition."""
    try:
        record = dict(json.loads((work / RECORD).read_bytes()))
    except (OSError, ValueError, TypeError):
        record = {}  # none yet, or a broken one: then the copies count as today's
    before, older = dict(record), []
    for path in sorted([*notebooks.glob("[0-9]*.ipynb"), *notebooks.glob("exercises/[0-9]*.ipynb")]):
        name, data = path.relative_to(notebooks).as_posix(), path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if not os.path.lexists(work / name):
            # JupyterLab would write its kernel's version, and call the notebook changed. All else stays to the byte.
            version = rb'("pygments_lexer": "ipython3",\s+"version": ")[^"]*'
            write_new(work / name, re.sub(version, rb"\g<1>" + sys.version.split()[0].encode(), data))
            record[name] = digest
        elif record.setdefault(name, digest) != digest:
            older.append(name)
    if record != before:
        (work / RECORD).write_text(json.dumps(record, indent=1), "utf-8")
    return older


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # somebody was quicker: theirs stays
        file = path.open("xb")
        try:
            with file:
                file.write(data)
        except BaseException:
            path.unlink()
            raise


def main() -> str | None:
    """Make the copies; return the sentence that ends the program, or None if all went well."""
    try:
        older = copy_notebooks(ROOT / "notebooks", ROOT / "work")
    except OSError as error:  # a full disk, or a folder that cannot be written
        return f"Stopped: {error}."
    if older:
        advice = "yours in work/ stay; to get one, rename yours, then run the same command again"
        print(f"There are newer editions of {', '.join(older)}: {advice}.", flush=True)
    return None


if __name__ == "__main__":
    sys.exit(main())
