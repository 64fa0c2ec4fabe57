"""The graded exercises: `check` or `attempt` an answer, show the `scorecard` or a `solution`, `reset` a cell.

`card` draws the results, to share. The module `progress` saves points over a restart.

Each question is a file in `questions/`, with its properties, their oracles and its known mistakes.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import traceback
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.getipython import get_ipython
from IPython.display import Code, display

from gradaccum.exercises import progress, stale
from gradaccum.exercises.cards import Row, Score, Scorecard
from gradaccum.exercises.judge import grade
from gradaccum.exercises.question import Answer, Question, known_mistakes
from gradaccum.exercises.run import SECONDS, TimeUp, at_most
from gradaccum.interrupts import say_stopped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Score", "Scorecard", "attempt", "card", "check", "find", "questions_of", "reset", "scorecard", "solution"]

# The questions are the files of this folder: a new question is only a new file.
_FILES = [re.fullmatch(r"q(\d+)_(\d+)\.py", path.name) for path in Path(__file__).with_name("questions").glob("q*.py")]
_NUMBERS = sorted((int(match[1]), int(match[2])) for match in _FILES if match)
IDENTIFIERS = tuple(f"{lesson}.{number}" for lesson, number in _NUMBERS)
LESSONS = tuple(sorted({lesson for lesson, _ in _NUMBERS}))
# Generated from the notebooks' sources, where each answer is written once. An instructor may delete it.
ANSWERS = Path(__file__).with_name("answers.json")
# Generated too: for each exercise its lesson's title, its difficulty and its first sentence.
ABOUT = Path(__file__).with_name("about.json")
_scores: dict[str, Score] = {}


def questions_of(lesson: int) -> tuple[Question, ...]:
    """Return the questions of a lesson, in order.

    Example:
        >>> [question.id for question in questions_of(3)]
        ['3.1', '3.2', '3.3']
    """
    if lesson not in LESSONS:
        raise ValueError(f"There is no lesson {lesson!r} with exercises: choose one of {LESSONS}.")
    return tuple(find(each) for each in IDENTIFIERS if each.startswith(f"{lesson}."))


def find(identifier: str) -> Question:
    """Return a question by its id, such as "3.2".

    Raises:
        ValueError: there is no such question; the message lists the questions of the lesson.

    Example:
        >>> find("3.2").points
        2
    """
    if identifier in IDENTIFIERS:
        return _loaded(identifier)
    head = f"{str(identifier).partition('.')[0]}."
    near = [each for each in IDENTIFIERS if each.startswith(head)] or [f"{lesson}.1" for lesson in LESSONS]
    raise ValueError(f"There is no exercise {identifier!r}: choose one of {', '.join(near)}.")


@cache
def _loaded(identifier: str) -> Question:
    module = importlib.import_module(f"{__name__}.questions.q{identifier.replace('.', '_')}")
    question: Question = module.QUESTION
    return replace(question, id=identifier, mistakes=known_mistakes(vars(module)))


def check(identifier: str, answer: Answer) -> Score:
    """Grade an answer and return its score; an answer never makes it raise, so that Run All continues.

    The data is drawn from a seed, 0 unless the environment variable GRADACCUM_SEED sets another for a class.

    Args:
        identifier: the id of the question, such as "3.2".
        answer: the function that you wrote.

    Returns:
        A `Score`: a float, the number of points, which a notebook shows as a card.

    Raises:
        ValueError: there is no such exercise.

    Example:
        >>> check("3.2", lambda reduction, sizes: len(sizes))
        1.0
    """
    say_stopped()
    score = Score(grade(find(identifier), answer, os.environ.get("GRADACCUM_SEED", "0")))
    _scores[identifier] = score
    score.stale = stale.note(answer)
    progress.keep(identifier, score.outcome.points, answer)
    if progress.is_on():  # only in a learner's notebook, not on a grader's cards
        score.so_far = scorecard(int(identifier.partition(".")[0])).so_far
    return score


def attempt(function: Answer, *args: Any, **kwargs: Any) -> None:
    """Call a function and print its result, or its error in one line, so that Run All continues.

    Example:
        >>> attempt(max, 3, 4)
        4
        >>> attempt(len, 3)
        TypeError: object of type 'int' has no len()
    """
    say_stopped()
    try:
        with at_most(SECONDS):
            if (value := function(*args, **kwargs)) is not None:
                print(value)
    except NotImplementedError:
        print("Not written yet.")
    except TimeUp:
        print(f"Stopped after {SECONDS:g} seconds: does a loop never end?")
    except Exception as error:
        frames = [each for each in traceback.extract_tb(error.__traceback__) if "ipykernel" in each.filename]
        lines = [f"line {each.lineno} of {each.name}: {each.line}" for each in frames]
        print("\n".join([*lines, f"{type(error).__name__}: {error}"]))


def scorecard(lesson: int) -> Scorecard:
    """Return a table of the points in a lesson's exercises: since the notebook was started, and the best saved.

    Example:
        >>> scorecard(3).possible
        11
    """
    return Scorecard(questions_of(lesson), _scores, progress.known(), progress.counted())


def card(lesson: int | None = None) -> Figure:
    """Draw a card to share: the best points in a lesson's exercises, or in all, and the hardest exercise solved.

    To save it, right-click it or call `exercises.card(3).savefig("card.png")`: 1200 by 630 pixels. It is not sent.

    Returns:
        A figure; its label (`figure.get_label()`) describes it, for an alt text.

    Example:
        >>> [round(100 * inches) for inches in card(3).get_size_inches()]
        [1200, 630]
    """
    from gradaccum.exercises.sharing import drawn  # imports matplotlib, which a check does not need

    questions = [each for one in (LESSONS if lesson is None else [lesson]) for each in questions_of(one)]
    return drawn(lesson, Scorecard(questions, _scores, progress.known()), json.loads(ABOUT.read_text("utf-8")))


def solution(identifier: str) -> None:
    """Show the worked solution of an exercise; try it yourself first."""
    display(Code(_stored(identifier, "solution"), language="python"))


def reset(identifier: str) -> None:
    """Restore the original answer cell of an exercise, and clear its saved points.

    Replace the content of its answer cell with `exercises.reset("3.2")` and run it: the cell gets its original text.
    Outside of a notebook the text is printed.

    Example:
        >>> reset("3.2")  # doctest: +ELLIPSIS
        def divisor(reduction, sizes):
        ...
            raise NotImplementedError
    """
    text, shell, question = _stored(identifier, "start"), get_ipython(), find(identifier)
    row = Row(question, _scores.pop(identifier, None), progress.forget(identifier))
    if shell is None:
        print(text)
    else:
        shell.set_next_input(text, replace=True)
        is_clear = row.best and identifier not in progress.known()  # a read-only file keeps them
        cleared = f", and its {row.best} of {question.points} points are cleared" if is_clear else ""
        print(f"{identifier} is reset{cleared}.")


def _stored(identifier: str, what: str) -> str:
    question = find(identifier)
    if not ANSWERS.exists():
        raise FileNotFoundError("The worked solutions are not part of this installation: ask your instructor.")
    found: str = json.loads(ANSWERS.read_text("utf-8"))[question.id][what]
    return found
