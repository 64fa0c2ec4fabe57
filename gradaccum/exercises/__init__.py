"""The graded exercises: `check` an answer, try it, see the `scorecard`, open the `solution`, or `reset` a cell.

One file per exercise notebook holds its questions, their oracles and their known mistakes: `lesson_01.py` and so on.
"""

from __future__ import annotations

import importlib
import json
import os
import traceback
from pathlib import Path
from typing import Any

from IPython.core.getipython import get_ipython
from IPython.display import Code, display

from gradaccum.exercises.cards import Score, Scorecard
from gradaccum.exercises.checking import grade
from gradaccum.exercises.question import Answer, Question
from gradaccum.interrupts import say_stopped

__all__ = ["Score", "Scorecard", "attempt", "check", "find", "questions", "reset", "scorecard", "solution"]

LESSONS = (1, 2, 3, 4, 5, 6)
# Made from the notebooks' sources, where each answer stands once. An instructor may delete it.
ANSWERS = Path(__file__).with_name("answers.json")
_scores: dict[str, Score] = {}


def questions(lesson: int) -> tuple[Question, ...]:
    """Return the questions of a lesson, in order.

    Example:
        >>> [question.id for question in questions(3)]
        ['3.1', '3.2', '3.3']
    """
    if lesson not in LESSONS:
        raise ValueError(f"There is no lesson {lesson!r} with exercises: choose one of {LESSONS}.")
    found: tuple[Question, ...] = importlib.import_module(f"gradaccum.exercises.lesson_{lesson:02}").QUESTIONS
    return found


def find(identifier: str) -> Question:
    """Return a question by its id, such as "3.2".

    Raises:
        ValueError: there is no such question; the message lists those of the lesson.

    Example:
        >>> find("3.2").points
        2
    """
    head = str(identifier).partition(".")[0]
    lesson = int(head) if head.isdecimal() else 0
    known = questions(lesson) if lesson in LESSONS else ()
    for question in known:
        if question.id == identifier:
            return question
    ids = ", ".join(each.id for each in known) or ", ".join(f"{n}.1" for n in LESSONS)
    raise ValueError(f"There is no exercise {identifier!r}: there is {ids}.")


def check(identifier: str, answer: Answer) -> Score:
    """Grade an answer and return the card; it never raises because of the answer, so that Run All goes on.

    The data is drawn from a seed, 0 unless the environment variable GRADACCUM_SEED names another for a class.

    Args:
        identifier: the question's, "3.2".
        answer: the function that you wrote.

    Returns:
        A `Score`: a float, whose text is the bare number of points.

    Raises:
        ValueError: there is no such exercise.

    Example:
        >>> check("3.2", lambda reduction, sizes: len(sizes))
        1.0
    """
    say_stopped()
    score = Score(grade(find(identifier), answer, os.environ.get("GRADACCUM_SEED", "0")))
    _scores[score.outcome.question.id] = score
    return score


def attempt(function: Answer, *args: Any, **kwargs: Any) -> None:
    """Print what a call returns, if anything, or in a line what is wrong; for trying where Run All must go on.

    Example:
        >>> attempt(max, 3, 4)
        4
        >>> attempt(len, 3)
        TypeError: object of type 'int' has no len()
    """
    say_stopped()
    try:
        if (value := function(*args, **kwargs)) is not None:
            print(value)
    except NotImplementedError:
        print("Not written yet.")
    except Exception as error:
        frames = [each for each in traceback.extract_tb(error.__traceback__) if "ipykernel" in each.filename]
        lines = [f"line {each.lineno} of {each.name}: {each.line}" for each in frames]
        print("\n".join([*lines, f"{type(error).__name__}: {error}"]))


def scorecard(lesson: int) -> Scorecard:
    """Show the points of a lesson's exercises since the notebook was started, and what to do next.

    Example:
        >>> scorecard(3).possible
        11
    """
    return Scorecard(questions(lesson), _scores)


def solution(identifier: str) -> None:
    """Show the worked solution of an exercise: read it once you have tried."""
    display(Code(_stored(identifier, "solution"), language="python"))


def reset(identifier: str) -> None:
    """Put an exercise back to how it came.

    Replace everything in its answer cell by `exercises.reset("3.2")` and run that: the cell becomes what it was.
    Outside of a notebook the text is printed.

    Example:
        >>> reset("3.2")  # doctest: +ELLIPSIS
        def divisor(reduction, sizes):
        ...
            raise NotImplementedError
    """
    text, shell = _stored(identifier, "start"), get_ipython()
    if shell is None:
        print(text)
    else:
        shell.set_next_input(text, replace=True)


def _stored(identifier: str, what: str) -> str:
    question = find(identifier)
    if not ANSWERS.exists():
        raise FileNotFoundError("The worked solutions are not part of this installation: ask your instructor.")
    found: str = json.loads(ANSWERS.read_text("utf-8"))[question.id][what]
    return found
