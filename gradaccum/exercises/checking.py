"""Grade an answer: probes run it and note plain data, judges compare that with the oracle and name the mistake."""

from __future__ import annotations

import copy
import inspect
import linecache
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # an optimizer's first step imports it, which takes seconds: not while an answer is timed
from IPython.utils.capture import capture_output

from gradaccum.exercises.question import Answer, Case, Difference, Plain, Property, Question, agree, short

SECONDS = 10.0
"""How long an answer may take for one property."""


class Seen(NamedTuple):
    """What a probe saw for one case: plain data, or what went wrong and how to say it."""

    value: Plain = None
    problem: str = ""  # "not written", "finished", "too long", "stopped", or the exception
    text: str = ""


class TimeUp(BaseException):
    """No Exception, so that an answer's own `except Exception` does not swallow it."""


@dataclass
class Observed:
    """What the probes saw: for each property a list of `Seen`, shorter than its cases once something went wrong."""

    seen: list[list[Seen]]
    printed: str = ""


class Result(NamedTuple):
    """One property of one answer. `passed` is None where it was not tried or does not count."""

    name: str
    points: int
    passed: bool | None
    tried: str = ""
    difference: Difference | None = None
    problem: str = ""


@dataclass
class Outcome:
    """What became of an answer: points, the results by property, and the sentences for the card."""

    question: Question
    points: int
    results: list[Result]
    note: str = ""  # what rules out points altogether: not written, not changed ...
    mistake: str = ""  # what this looks like
    printed: str = ""
    recognized: Answer | None = None


def grade(question: Question, answer: Answer, seed: int | str = 0) -> Outcome:
    """Run the probes, then the judges."""
    return judge(question, observe(question, answer, seed), seed)


def observe(question: Question, answer: Answer, seed: int | str = 0, seconds: float = SECONDS) -> Observed:
    """Run an answer on every case of a question, in float64, and write down plain data; nothing is compared here."""
    if not callable(answer):
        text = f"{question.id} takes a function, but {answer!r:.80} was given: name the function without calling it."
        return Observed([[Seen(problem="TypeError", text=text)]])
    if question.given is not None and _is_unchanged(answer, question.given):
        return Observed([[Seen(problem="not changed", text="Not changed yet: this is the code as it was given.")]])
    observed = Observed([])
    with _quietly() as captured, torch.random.fork_rng(devices=[]):
        for each, cases in zip(question.properties, question.cases(seed), strict=True):
            observed.seen.append(_watch(question, each, cases, answer, seconds))
            if observed.seen[-1][-1].problem in ("not written", "finished", "too long", "stopped"):
                break
    observed.printed = f"{captured.stdout}{captured.stderr}"[:2000]
    return observed


def _watch(question: Question, each: Property, cases: list[Case], answer: Answer, seconds: float) -> list[Seen]:
    seen: list[Seen] = []
    forbidden = {finished.__code__: finished.__name__ for finished in question.forbidden}
    called: set[str] = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in forbidden:
            called.add(forbidden[frame.f_code])

    before = sys.getprofile()
    try:
        with _at_most(seconds):
            for case in cases:
                torch.manual_seed(0)
                torch.set_grad_enabled(True)  # whatever the answer did in the case before
                sys.setprofile(profile)
                try:
                    seen.append(Seen(each.probe(answer, copy.deepcopy(case))))
                except NotImplementedError as error:
                    missing = Seen(problem="not written", text="Not written yet.")
                    seen.append(missing if _is_stub(error, answer) else _explained(error, answer))
                except (TimeUp, KeyboardInterrupt):
                    raise
                except BaseException as error:  # SystemExit too: an answer must not end the kernel
                    seen.append(_explained(error, answer))
                finally:
                    sys.setprofile(before)
                if seen[-1].problem:
                    break
    except TimeUp:
        seen.append(Seen(problem="too long", text=f"Stopped after {seconds:g} seconds: does a loop never end?"))
    except KeyboardInterrupt:
        seen.append(Seen(problem="stopped", text="You stopped this check."))
    if called:
        text = f"This calls gradaccum's finished `{min(called)}`, which is what you are asked to write: write it out."
        seen = [Seen(problem="finished", text=text)]
    return seen


@contextmanager
def _quietly() -> Iterator[Any]:
    """Catch what the answer prints, shows and warns of; let what it makes be float64; leave no setting changed."""
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_default_dtype(torch.float64)  # so that an answer's own zeros(()) does not round
    try:
        with torch.enable_grad(), warnings.catch_warnings(), capture_output() as captured:
            warnings.simplefilter("ignore")
            yield captured
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the block when the time is over, where the system can: not on Windows, not in a thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    # It rings again every second, in case the answer swallows the first with a bare `except:`.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_unchanged(answer: Answer, given: Answer) -> bool:
    """Tell whether an answer is the given code, but for comments, layout and docstrings."""

    def essence(code: Any) -> tuple[Any, ...]:
        inner = [essence(each) if hasattr(each, "co_code") else each for each in code.co_consts]
        plain = [each for each in inner if not isinstance(each, str)]  # a docstring among them
        return code.co_code, code.co_names, code.co_varnames, repr(plain)

    # Compiled by itself, as in a cell: beside a module's imports Python compiles some calls otherwise.
    alone = compile(inspect.getsource(given), "", "exec").co_consts[0]
    return hasattr(answer, "__code__") and essence(answer.__code__) == essence(alone)


def _learners_frames(error: BaseException, answer: Answer) -> tuple[list[tuple[int, str]], bool]:
    """List the lines of the learner's own code that an error came through, and tell whether it was raised there."""
    mine, found, here = getattr(getattr(answer, "__code__", None), "co_filename", None), [], False
    for frame, number in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        here = name == mine or "ipykernel" in Path(name).parent.name
        if here:
            found.append((number, linecache.getline(name, number).strip()))
    return found, here


def _is_stub(error: BaseException, answer: Answer) -> bool:
    return _learners_frames(error, answer)[1]  # torch raises NotImplementedError too, but not in the learner's code


def _explained(error: BaseException, answer: Answer) -> Seen:
    kind, (frames, _) = type(error).__name__, _learners_frames(error, answer)
    lines = str(error).strip().splitlines()
    text = problem = f"{kind}: {lines[0]:.300}" if lines else kind
    if frames:
        number, line = frames[-1]
        text = f"Line {number}{f', `{line}`' if line else ''}: {problem}"
    return Seen(problem=problem, text=text)


def judge(question: Question, observed: Observed, seed: int | str = 0) -> Outcome:
    """Compare what was seen with the oracle, give the points and name the mistake; the answer is not run here."""
    last = observed.seen[-1][-1]
    if last.problem in ("not written", "not changed", "finished", "stopped"):
        untried = [Result(each.name, each.points, None) for each in question.properties]
        return Outcome(question, 0, untried, last.text, printed=observed.printed)
    with _quietly(), torch.random.fork_rng(devices=[]):  # the oracle draws the same model as the probe
        return _judged_whole(question, observed, seed)


def _judged_whole(question: Question, observed: Observed, seed: int | str) -> Outcome:
    seen = _padded(question, observed)
    verdicts = [_judged(*each) for each in zip(question.properties, question.cases(seed), seen, strict=True)]
    held = {verdict.name for verdict in verdicts if verdict.passed}
    results: list[Result] = []
    for verdict, each in zip(verdicts, question.properties, strict=True):
        if verdict.passed and each.after and each.after not in held:
            verdict = verdict._replace(passed=None, problem=f"Counts once this holds: {each.after}.")
        elif verdict.problem and verdict.problem in [result.problem for result in results]:
            verdict = verdict._replace(problem="The same error.")
        results.append(verdict)
    points = sum(result.points for result in results if result.passed)
    outcome = Outcome(question, points, results, printed=observed.printed)
    if any(result.passed is False and result.points == 0 for result in results):
        outcome.points = 0
        outcome.note = "Something that worked in the given code no longer does: that has to hold first."
    if any(verdict.passed is False for verdict in verdicts):
        outcome.recognized = _recognized(question, observed, [verdict.passed for verdict in verdicts], seed)
        outcome.mistake = sentence(outcome.recognized) if outcome.recognized else ""
    return outcome


def _padded(question: Question, observed: Observed) -> list[list[Seen]]:
    return observed.seen + [[] for _ in question.properties[len(observed.seen) :]]


def _judged(each: Property, cases: list[Case], seen: list[Seen]) -> Result:
    for case, one in zip(cases, seen, strict=False):
        tried = each.tried.format(**{name: short(value) for name, value in case.items()})
        if one.problem:
            return Result(each.name, each.points, False, tried, problem=one.text)
        if difference := each.judge(one.value, each.expected(copy.deepcopy(case))):
            return Result(each.name, each.points, False, tried, difference)
    return Result(each.name, each.points, True if len(seen) == len(cases) else None)


def _recognized(question: Question, observed: Observed, passed: list[bool | None], seed: int | str) -> Answer | None:
    """Find the mistake that is wrong in the same way: everywhere, or else wherever the answer is, or else at first."""
    failed = [index for index, held in enumerate(passed) if held is False]
    drawn, ours = question.cases(seed), _padded(question, observed)
    nearest: list[Answer] = []
    for mistake in (*question.mistakes, *([question.given] if question.given else [])):
        theirs = _padded(question, _observed_mistake(question, mistake, seed))
        verdicts = [_judged(*each).passed for each in zip(question.properties, drawn, theirs, strict=True)]
        same = [i for i in failed if verdicts[i] is False and _same(question.properties[i], ours[i], theirs[i])]
        if same == failed and verdicts == passed:
            return mistake
        fails_more = any(held and other is False for held, other in zip(passed, verdicts, strict=True))
        if failed[0] in same and not fails_more:  # else its sentence would speak of what this answer has right
            nearest.insert(0 if same == failed else len(nearest), mistake)
    return nearest[0] if nearest else None


@lru_cache(maxsize=1024)
def _observed_mistake(question: Question, mistake: Answer, seed: int | str) -> Observed:
    # It may be the given code, and may call anything.
    return observe(replace(question, given=None, forbidden=()), mistake, seed)


def _same(each: Property, ours: list[Seen], theirs: list[Seen]) -> bool:
    if [one.problem for one in ours] != [one.problem for one in theirs]:
        return False
    return not each.by_value or all(
        agree(one.value, other.value) is None for one, other in zip(ours, theirs, strict=True)
    )


def sentence(mistake: Answer) -> str:
    """Return the sentence that names a mistake: its docstring, on one line."""
    return " ".join((mistake.__doc__ or "").split())
