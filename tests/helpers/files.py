"""The project's files and notebooks: what git tracks or would, and the lessons in their order."""

import os
import shutil
import subprocess
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
START = "00_start_here"
# Written out, so that a lesson that got lost is noticed.
LESSONS = [START, "01_naive_loop", "02_accumulate", "03_normalize", "04_windows", "05_unequal_micro_batches"]
LESSONS += ["06_gpu_memory"]
EXERCISES = [f"exercises/{stem[:2]}_exercises" for stem in LESSONS[1:]]
NAMES = [*LESSONS, *EXERCISES]


def project_files():
    """Every file that git tracks or would, so that the tests fail before the commit."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in map(Path, sorted(set(filter(None, listed.split("\0"))))) if (ROOT / path).is_file()]


def text_of(path):
    """A file's text, or None for what is no text."""
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def clone(folder):
    """Copy the project's files, as `git clone` would after the next commit; links stay links."""
    for path in project_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path, follow_symlinks=False)
    return folder


def contents(folder):
    """What a folder holds, by name: the bytes of files, where links lead, False for folders."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def laid_out(notebook):
    """A notebook as the bytes of its file."""
    return (nbformat.writes(notebook) + "\n").encode()
