"""Give points for the observed results and name the mistake, by comparison with the oracles; no answer is run here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from gradaccum.exercises.compare import Difference, Plain, agree, short
from gradaccum.exercises.question import Answer, Case, Mistake, Property, Question
from gradaccum.exercises.run import Observed, Seen, observe, quietly, watch
from gradaccum.exercises.weighing import Weights, weigh

LEFT = "the arguments are left as they were"
AGAIN = "This counts once what worked in the given code works again."
SAME = "For the same reason, named below."
UNKNOWN = "There may be more: fix this first, then run the check again."


class Result(NamedTuple):
    """The result of one property. `passed` is None if it was not tried or does not count."""

    name: str
    points: int
    passed: bool | None
    tried: str = ""
    difference: Difference | None = None
    problem: str = ""
    weights: Weights | None = None  # of the case in `tried`


@dataclass
class Outcome:
    """The outcome of an answer: points, results by property, and the sentences for the card."""

    question: Question
    points: int
    results: list[Result]
    note: str = ""  # why there are no points at all: not written, not changed ...
    mistake: str = ""  # the sentence of the recognized mistake
    said: str = ""  # what the gradient shows, if no mistake is recognized
    printed: str = ""
    recognized: Mistake | None = None


def grade(question: Question, answer: Answer, seed: int | str = 0) -> Outcome:
    """Run the probes on an answer, then judge the results."""
    return judge(question, observe(question, answer, seed), seed)


def judge(question: Question, observed: Observed, seed: int | str = 0) -> Outcome:
    """Compare the observed results with the oracle, give points and name the mistake; the answer is not run here."""
    last = observed.seen[-1][-1]
    if last.problem in ("not written", "not changed", "finished", "stopped"):
        untried = [Result(each.name, each.points, None) for each in question.properties]
        return Outcome(question, 0, untried, last.text, printed=observed.printed)
    with quietly():  # the oracle draws the same model as the probe
        return _judged_whole(question, observed, seed)


def _judged_whole(question: Question, observed: Observed, seed: int | str) -> Outcome:
    seen = observed.seen + [[] for _ in question.properties[len(observed.seen) :]]
    verdicts = [
        _judged(each, cases, seen, _expected(question, index, seed))
        for index, (each, cases, seen) in enumerate(zip(question.properties, question.cases(seed), seen, strict=True))
    ]
    held = {verdict.name for verdict in verdicts if verdict.passed}
    results: list[Result] = []
    for verdict, each in zip(verdicts, question.properties, strict=True):
        if verdict.passed and each.after and each.after not in held:
            verdict = verdict._replace(passed=None, problem=f"This counts once the following holds: {each.after}.")
        elif verdict.problem and verdict.problem in [result.problem for result in results]:
            verdict = verdict._replace(problem="The same error.")
        results.append(verdict)
    points = sum(result.points for result in results if result.passed)
    outcome = Outcome(question, points, results, printed=observed.printed)
    if any(result.passed is False and result.points == 0 for result in results):
        outcome.points = 0
        outcome.note = "Something that worked in the given code no longer does: fix that first."
        results[:] = [one._replace(passed=None, problem=AGAIN) if one.passed else one for one in results]
    if changed := next((one.changed for each in seen for one in each if one.changed), ""):
        results.append(Result(LEFT, -1, False, problem=changed))
        outcome.points = max(0, outcome.points - 1)
    passed = [verdict.passed for verdict in verdicts]
    if False in passed:
        outcome.recognized, outcome.mistake = _recognized(question, seen, passed, seed)
        if outcome.recognized and outcome.mistake == outcome.recognized.sentence:  # it explains every failed row
            _say_once(results)
        _weigh(outcome, seen, seed)
    return outcome


def _say_once(results: list[Result]) -> None:
    """Keep only the details of the first row that differs: others would look like further mistakes."""
    differing = [index for index, one in enumerate(results) if one.passed is False and one.difference]
    for index in differing[1:]:
        results[index] = results[index]._replace(tried="", difference=None, problem=SAME)


def _weigh(outcome: Outcome, seen: list[list[Seen]], seed: int | str) -> None:
    """Add the weights to the failed rows, and their explanation if no mistake is recognized."""
    question, everything = outcome.question, list[Weights | None]()
    for index, (each, cases) in enumerate(zip(question.properties, question.cases(seed), strict=True)):
        if each.parts is None or outcome.results[index].difference is None:
            continue
        wanted = _expected(question, index, seed)
        wrong = [
            (case, one.value)
            for case, one, right in zip(cases, seen[index], wanted, strict=False)
            if not one.problem and each.judge(one.value, right)
        ]
        found = [weigh(each.parts(*one)) for one in (wrong[:1] if outcome.mistake else wrong)]
        if found[0] and found[0].got:
            outcome.results[index] = outcome.results[index]._replace(weights=found[0])
        everything += found
    # A kind that differs between cases is a coincidence.
    kinds = {each and each.kind for each in everything}
    if len(kinds) == 1 and (first := everything[0]) and first.sentence and not outcome.mistake:
        outcome.said = f"{first.name}: {first.sentence}" if first.name else first.sentence


def _judged(each: Property, cases: list[Case], seen: list[Seen], expected: list[Plain]) -> Result:
    found: Result | None = None
    for case, one, wanted in zip(cases, seen, expected, strict=False):
        tried = each.tried.format(**{name: short(value) for name, value in case.items()})
        if one.problem:
            return found or Result(each.name, each.points, False, one.tried or tried, problem=one.text)
        difference = each.judge(one.value, wanted)
        if difference and found is None:
            found = Result(each.name, each.points, False, tried, difference)
        # A factor in one case but not in another is a coincidence, and would mislead the learner.
        if found and found.difference and difference and not difference.relation.startswith("exactly"):
            relation = found.difference.relation
            kept = "" if relation.startswith("exactly") else relation
            found = found._replace(difference=found.difference._replace(relation=kept))
    return found or Result(each.name, each.points, True if len(seen) == len(cases) else None)


@lru_cache(maxsize=256)
def _expected(question: Question, index: int, seed: int | str) -> list[Plain]:
    each = question.properties[index]
    return [each.expected(case) for case in question.cases(seed)[index]]


# ------------------------------------------------------------------------------------------------- which mistake


def _recognized(
    question: Question, seen: list[list[Seen]], passed: list[bool | None], seed: int | str
) -> tuple[Mistake | None, str]:
    """Return the mistake that fails where the answer fails, with the same values, or the first of two that do together.

    A mistake is ruled out if it fails where the answer does not, or in another way: a message about something that the
    answer does right is worse than none.
    """
    failed = {index for index, held in enumerate(passed) if held is False}
    explains: list[tuple[Mistake, set[int]]] = []
    for known in question.mistakes.values():
        theirs = _explained(question, known, seen, passed, seed)
        if theirs == failed:
            return known, known.sentence
        if theirs:
            explains.append((known, theirs))
    if question.given:
        unrepaired = Mistake(question.given, "The bug of the given code is still there.")
        if _explained(question, unrepaired, seen, passed, seed) == failed:
            return unrepaired, unrepaired.sentence
    for first, theirs in explains:
        for second, others in explains:
            if theirs | others == failed and min(theirs) < min(others):
                return first, f"{first.sentence} And one more: {second.sentence}"
    by_value = {index for index in failed if question.properties[index].by_value}
    surest = next((known for known, theirs in explains if theirs & by_value), None)
    return surest, f"{surest.sentence} {UNKNOWN}" if surest else ""


def _explained(
    question: Question, known: Mistake, seen: list[list[Seen]], passed: list[bool | None], seed: int | str
) -> set[int]:
    """Return the properties in which a mistake fails like the answer; none if it fails anywhere in another way."""
    tried = [index for index, held in enumerate(passed) if held is not None]
    found = set()
    for index in sorted(tried, key=lambda index: passed[index] is not False):  # the first rules out most mistakes
        each, theirs = question.properties[index], _seen_of(question, known, index, seed)
        same = passed[index] is False and _same(each, seen[index], theirs)
        if same and each.by_value:  # then the verdict is the same too
            found.add(index)
        elif _judged(each, _cases(question, index, seed), theirs, _expected(question, index, seed)).passed is False:
            if not same:
                return set()
            found.add(index)
    return found


@lru_cache(maxsize=4096)
def _seen_of(question: Question, known: Mistake, index: int, seed: int | str) -> list[Seen]:
    return watch(question.properties[index], _cases(question, index, seed), known.answer)


@lru_cache(maxsize=256)
def _cases(question: Question, index: int, seed: int | str) -> list[Case]:
    return question.cases(seed)[index]  # drawn once for all mistakes: they are only read, and `watch` copies them


def _same(each: Property, ours: list[Seen], theirs: list[Seen]) -> bool:
    if [(one.problem, one.changed) for one in ours] != [(one.problem, one.changed) for one in theirs]:
        return False
    return not each.by_value or all(
        repr(one.value) == repr(other.value) or agree(one.value, other.value) is None
        for one, other in zip(ours, theirs, strict=True)
    )
