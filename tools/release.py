"""Make the exercise notebooks from their sources: the learner's without answers, the solved ones for the tests.

nbgrader's own steps take the answers out and mark the cells, so that an instructor can use the same notebooks.
"""

from __future__ import annotations

import inspect
import json
import re

import nbformat
from nbformat import NotebookNode
from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, ClearSolutions, ComputeChecksums, LockCells
from traitlets.config import Config

from gradaccum.exercises import ABOUT as ABOUT
from gradaccum.exercises import ANSWERS as ANSWERS
from gradaccum.exercises import find
from gradaccum.exercises.question import Question

# What stands in the place of an answer; without nbgrader's "YOUR CODE HERE", which the heading says better.
STUB = Config({"ClearSolutions": {"code_stub": {"python": "raise NotImplementedError"}}})
MARKS = re.compile(r"\n *### (BEGIN|END) SOLUTION")
LOCKED = {"grade": False, "locked": True, "solution": False}


def question_of(cell: NotebookNode) -> Question:
    """Return the question that `answer-3-1` or `check-3-1` belongs to."""
    _, lesson, number = cell.id.split("-")
    return find(f"{lesson}.{number}")


def marked(notebook: NotebookNode) -> NotebookNode:
    """Add nbgrader's metadata, which follows from a cell's name, to a notebook with the answers."""
    for cell in notebook.cells:
        role = cell.id.partition("-")[0]
        if role == "answer":
            given = {"grade": False, "locked": False, "solution": True}
        elif role == "check":
            points = question_of(cell).points
            given = {"grade": True, "locked": True, "solution": False, "points": points}
        elif cell.id == "setup":
            given = LOCKED
        else:
            continue
        grading = {"grade_id": cell.id, "schema_version": 3, "task": False}
        cell.metadata["nbgrader"] = nbformat.from_dict(grading | given)
    return notebook


def as_given(notebook: NotebookNode) -> NotebookNode:
    """Put the given code of each "find the bug" in the place of its repaired one."""
    for cell in notebook.cells:
        if cell.id.startswith("answer-"):
            given = question_of(cell).given
            if given is not None:
                cell.source = inspect.getsource(given).strip()
    return notebook


def released(notebook: NotebookNode) -> NotebookNode:
    """Take the answers out of a marked notebook, as `nbgrader generate_assignment` does."""
    before = LockCells(), ClearSolutions(config=STUB)
    after = ClearOutput(), CheckCellMetadata(), ComputeChecksums()
    resources = {"unique_key": "", "notebook_id": ""}
    for step in before:
        notebook, resources = step.preprocess(notebook, resources)
    notebook = as_given(notebook)
    for step in after:
        notebook, resources = step.preprocess(notebook, resources)
    return notebook


def without_marks(source: str) -> str:
    """Return an answer cell as a person would write it."""
    return MARKS.sub("", source).strip()


def answers(notebooks: list[tuple[NotebookNode, NotebookNode]]) -> str:
    """Write down, for each question, its worked solution and what its cell held at the start."""
    found = {}
    for solved, release in notebooks:
        for cell, start in zip(solved.cells, release.cells, strict=True):
            if cell.id.startswith("answer-"):
                texts = {"solution": without_marks(cell.source), "start": start.source.strip()}
                found[question_of(cell).id] = texts
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def about(notebooks: list[tuple[NotebookNode, NotebookNode]]) -> str:
    """Write down of each question its lesson's title, its difficulty, and the sentence that says why it matters."""
    found = {}
    for notebook, _ in notebooks:
        lesson = notebook.cells[0].source.splitlines()[0].partition(". ")[2]
        for cell in notebook.cells:
            if cell.id.startswith("exercise-"):
                difficulty, why = re.findall(r"\n\ndifficulty (\d)/5 .*\n\n(.+)", cell.source)[0]
                found[question_of(cell).id] = {"lesson": lesson, "difficulty": int(difficulty), "why": why}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"
