"""The parts of a question: properties, each with a probe and an oracle, and known mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from gradaccum import full_batch_gradient
from gradaccum.accumulation import accumulate, windows
from gradaccum.exercises.compare import Difference, Plain, agree
from gradaccum.exercises.weighing import Gradient
from gradaccum.memory import plan_micro_batches, predict_memory

Case = dict[str, Plain]
Answer = Callable[..., Any]

FINISHED: tuple[Answer, ...] = (windows, accumulate, full_batch_gradient, plan_micro_batches, predict_memory)
"""The module's finished functions, which an answer may not call unless the question allows it."""


@dataclass(frozen=True)
class Mistake:
    """A known wrong answer, and the message that names it to the learner. It is called like the answer.

    Attributes:
        answer: the wrong answer, as code.
        sentence: what is wrong and what to do; it must be true of every answer that fails in the same way.
    """

    answer: Answer
    sentence: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrong answer."""
        return self.answer(*args, **kwargs)


def mistake(sentence: str) -> Callable[[Answer], Mistake]:
    """Return a decorator that turns a wrong answer into a known mistake.

    Example:
        >>> @mistake("The sum comes back; divide it by the number of items.")
        ... def summed(values):
        ...     return sum(values)
        >>> summed([1, 2]), summed.sentence
        (3, 'The sum comes back; divide it by the number of items.')
    """
    return lambda answer: Mistake(answer, sentence)


def known_mistakes(names: Mapping[str, object]) -> dict[str, Mistake]:
    """Return the mistakes among a file's names, in the order written, including those in dicts.

    Example:
        >>> list(known_mistakes({"summed": mistake("...")(sum), "more": {"largest": mistake("...")(max)}, "x": 1}))
        ['summed', 'largest']
    """
    found: dict[str, Mistake] = {}
    for name, value in names.items():
        some = value if isinstance(value, dict) and not name.startswith("_") else {name: value}
        found |= {key: each for key, each in some.items() if isinstance(each, Mistake)}
    return found


@dataclass(frozen=True)
class Property:
    """A property of every right answer, worth some points.

    Attributes:
        name: the property, for the card: "unequal micro-batches give the full batch's gradient".
        points: its points. In a repair, 0 for what the given code already does: breaking that costs all points.
        cases: draws the data from a seeded generator, as plain data; the same in every process.
        probe: runs the learner's function on one case, and returns plain data. It may run where its file cannot be
            imported, so it uses only `material` and its own imports.
        expected: the oracle: returns the expected plain data of a case, in a slow and simple way.
        tried: what was tried, for the card, with the case's fields: "micro-batches of {sizes} samples".
        judge: compares the two; returns None if they agree.
        after: the name of another property; this one counts only if that one holds too.
        by_value: whether a mistake is recognized by the value here, or only by failing here (bytes).
        parts: takes a case and the probe's result, and returns its gradients and their correct composition, in
            order: if one of them is wrong, the card shows the weights of its micro-batches.
    """

    name: str
    points: int
    cases: Callable[[Random], list[Case]]
    probe: Callable[[Answer, Case], Plain]
    expected: Callable[[Case], Plain]
    tried: str
    judge: Callable[[Plain, Plain], Difference | None] = agree
    after: str = ""
    by_value: bool = True
    parts: Callable[[Case, Plain], Iterable[Gradient]] | None = None


@dataclass(frozen=True)
class Question:
    """A graded question. Its file sets title and properties; `exercises.find` adds `id` and `mistakes`.

    Attributes:
        title: the title in the notebook's heading.
        properties: the properties that an answer must have.
        given: for "find the bug": the code that the learner starts from, itself a mistake.
        forbidden: finished functions of the module that the answer must not call.
        id: lesson and number, such as "3.2", from the name of the file.
        mistakes: the known mistakes by name, in the order of the file.
    """

    title: str
    properties: tuple[Property, ...]
    given: Answer | None = None
    forbidden: tuple[Answer, ...] = FINISHED
    id: str = ""
    mistakes: Mapping[str, Mistake] = field(default_factory=dict, compare=False)

    @property
    def points(self) -> int:
        """The points of all properties."""
        return sum(each.points for each in self.properties)

    def cases(self, seed: int | str) -> list[list[Case]]:
        """Draw the cases of each property."""
        return [each.cases(Random(f"{seed}/{self.id}/{each.name}")) for each in self.properties]
