"""A class of 12, honest, wrong and broken, through nbgrader as it is, with the settings that the exercises bring."""

import copy
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import build
import nbformat
import pytest
import release

ROOT = Path(__file__).resolve().parents[1]
EXERCISES = ROOT / "notebooks" / "exercises"
STEM = "03_exercises"
POINTS = {"3.1": 4, "3.2": 2, "3.3": 5}


def cell_of(notebook, name):
    return next(cell for cell in notebook.cells if cell.id == name)


def answered(*numbers):
    """The learner's notebook with the worked answers to these questions."""
    notebook = nbformat.read(EXERCISES / f"{STEM}.ipynb", as_version=4)
    solved = build.read_source(build.sources()[f"exercises/{STEM}"])
    for number in numbers:
        name = f"answer-3-{number}"
        cell_of(notebook, name).source = release.without_marks(cell_of(solved, name).source)
    return notebook


def replaced(name, source, *numbers):
    notebook = answered(*numbers)
    cell_of(notebook, name).source = source
    return notebook


def with_copy(name):
    """A cell copied in JupyterLab: another cell id, the same nbgrader metadata."""
    notebook = answered(1, 2, 3)
    original = cell_of(notebook, name)
    twin = copy.deepcopy(original)
    twin.id = f"{name}-copy"
    notebook.cells.insert(notebook.cells.index(original), twin)
    return notebook


def with_metadata(change):
    notebook = answered(1)
    for cell in notebook.cells:
        change(cell)
    return notebook


def without(name):
    notebook = answered(1, 2)
    notebook.cells.remove(cell_of(notebook, name))
    return notebook


def skip(cell):
    if cell.id.startswith("check-"):
        cell.metadata["tags"] = ["skip-execution"]


def new_schema(cell):
    if "nbgrader" in cell.metadata:
        cell.metadata["nbgrader"]["schema_version"] = 99


NOISY = """import sys, warnings

def divisor(reduction, sizes):
    warnings.warn("not sure")
    print("to stderr", file=sys.stderr)
    return len(sizes) if reduction == "mean" else sum(sizes)
"""
ENDLESS = "def divisor(reduction, sizes):\n    while True:\n        pass\n"
CLASS = {
    "all_right": (lambda: answered(1, 2, 3), 11),
    "first_two": (lambda: answered(1, 2), 6),
    "untouched": (lambda: answered(), 0),
    "half_a_question": (lambda: replaced("answer-3-2", "def divisor(reduction, sizes):\n    return len(sizes)", 1), 5),
    "copied_answer": (lambda: with_copy("answer-3-1"), 11),
    "copied_check": (lambda: with_copy("check-3-1"), 11),
    "deleted_check": (lambda: without("check-3-2"), 6),
    "skips_the_checks": (lambda: with_metadata(skip), 4),
    "foreign_schema": (lambda: with_metadata(new_schema), 4),
    "noisy": (lambda: replaced("answer-3-2", NOISY, 1), 6),
    "no_python": (lambda: replaced("answer-3-2", "def divisor(reduction, sizes)\n    return 1", 1, 3), 9),
    "endless": (lambda: replaced("answer-3-2", ENDLESS, 1, 3), 9),
}


def nbgrader(course, *arguments):
    # nbgrader calls `alembic` by its name: its folder has to be on the path, as in an activated environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ours = {"PATH": path, "JUPYTER_PREFER_ENV_PATH": "1", "GRADACCUM_SEED": "a class of its own"}
    environment = {**os.environ, **ours, "JUPYTER_DATA_DIR": str(course / "data")}
    del environment["GRADACCUM_PROGRESS"]  # the settings have it
    command = [sys.executable, "-m", "nbgrader", *arguments]
    result = subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stderr


@pytest.mark.slow
def test_a_class_of_twelve(tmp_path):
    course = tmp_path / "course"
    (course / "source" / STEM).mkdir(parents=True)
    shutil.copy(EXERCISES / "nbgrader_config.py", course)
    shutil.copy(EXERCISES / f"{STEM}.ipynb", course / "source" / STEM)
    nbgrader(course, "generate_assignment", STEM)
    handed_out = nbformat.read(course / "release" / STEM / f"{STEM}.ipynb", as_version=4)
    ours = nbformat.read(EXERCISES / f"{STEM}.ipynb", as_version=4)
    assert [cell.source for cell in handed_out.cells] == [cell.source for cell in ours.cells]

    assert len(CLASS) == 12
    for student, (make, _) in CLASS.items():
        folder = course / "submitted" / student / STEM
        folder.mkdir(parents=True)
        nbformat.write(make(), folder / f"{STEM}.ipynb")
    nbgrader(course, "autograde", STEM)
    nbgrader(course, "generate_feedback", STEM)
    nbgrader(course, "export")

    with (course / "grades.csv").open() as file:
        grades = {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)}
    assert grades == {student: points for student, (_, points) in CLASS.items()}
    assert not [*course.rglob("progress.json*")]
    page = (course / "feedback" / "half_a_question" / STEM / f"{STEM}.html").read_text(encoding="utf-8")
    assert "the number of micro-batches is the divisor of a mean" in page.lower()
