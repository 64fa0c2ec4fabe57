"""Run an answer safely: it may raise, print, hang or interfere, and the probes record plain data only."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import linecache
import signal
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # an optimizer's first step imports it, which takes seconds: not in an answer's time
from IPython.utils.capture import capture_output
from torch import Tensor, nn

from gradaccum.exercises.compare import Plain
from gradaccum.exercises.question import Answer, Case, Property, Question

SECONDS = 10.0
"""The time limit of an answer for one property."""


VALUES = " (values)"  # suffix of names whose values are too long to show


class Seen(NamedTuple):
    """The result of a probe for one case: plain data, or a problem and its text."""

    value: Plain = None
    problem: str = ""  # "not written", "finished", "too long", "stopped", or the exception
    text: str = ""
    changed: str = ""  # how the answer modified its arguments, in a sentence
    tried: str = ""  # in a case of several calls, the call that failed, for the card


class TimeUp(BaseException):
    """The time limit is over. Not an Exception, so that an answer's own `except Exception` does not catch it."""


class Told(Exception):
    """Raised by a probe to reject a result, with the card's sentence as its text."""


_trying: ContextVar[tuple[str, dict[str, str]]] = ContextVar("_trying", default=("", {}))


def trying(what: str, **advice: str) -> None:
    """Record, in a probe, the current call, for the card, and advice to add to errors by their type."""
    _trying.set((what, advice))


@dataclass
class Observed:
    """The results of the probes: for each property a list of `Seen`, which ends at the first problem."""

    seen: list[list[Seen]]
    printed: str = ""


def observe(question: Question, answer: Answer, seed: int | str = 0, seconds: float = SECONDS) -> Observed:
    """Run an answer on every case of a question, in float64, and record plain data; nothing is compared here."""
    if not callable(answer):
        text = (
            f"{question.id} takes a function, but {shown(answer, 80)} was given: pass the function without calling it."
        )
        return Observed([[Seen(problem="TypeError", text=text)]])
    if question.given is not None and _is_unchanged(answer, question.given):
        text = "Not changed yet: this is still the given code. Did the changed cell run, and with the same name?"
        return Observed([[Seen(problem="not changed", text=text)]])
    observed = Observed([])
    with quietly() as captured:
        for each, cases in zip(question.properties, question.cases(seed), strict=True):
            observed.seen.append(watch(each, cases, answer, question.forbidden, seconds))
            if observed.seen[-1][-1].problem in ("not written", "finished", "too long", "stopped"):
                break
    observed.printed = f"{captured.stdout}{captured.stderr}"[:2000]
    return observed


def watch(
    each: Property, cases: list[Case], answer: Answer, forbidden: tuple[Answer, ...] = (), seconds: float = SECONDS
) -> list[Seen]:
    """Run an answer on the cases of one property, up to the first problem; call it inside `quietly`."""
    seen: list[Seen] = []
    codes = {finished.__code__: finished.__name__ for finished in forbidden}
    called: set[str] = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in codes:
            called.add(codes[frame.f_code])

    before = sys.getprofile()
    before = before if callable(before) else None  # cProfile's, under %prun, cannot be set again
    try:
        with at_most(seconds):
            for case in cases:
                torch.default_generator.manual_seed(0)  # not torch.manual_seed, which also seeds every device
                torch.set_grad_enabled(True)  # whatever the answer did in the case before
                changed: list[str] = []
                trying("")
                sys.setprofile(profile)
                try:
                    seen.append(Seen(plain(each.probe(_guarded(answer, changed), copy.deepcopy(case)))))
                except NotImplementedError as error:
                    missing = Seen(problem="not written", text="Not written yet.")
                    seen.append(missing if _is_stub(error, answer) else _explained(error, answer))
                except (TimeUp, KeyboardInterrupt):
                    raise
                except BaseException as error:  # SystemExit too: an answer must not end the kernel
                    seen.append(_explained(error, answer))
                finally:
                    sys.setprofile(before)
                if changed:
                    seen[-1] = seen[-1]._replace(changed=changed[0])
                if seen[-1].problem:
                    break
    except TimeUp:
        seen.append(Seen(problem="too long", text=f"Stopped after {seconds:g} seconds: does a loop never end?"))
    except KeyboardInterrupt:
        seen.append(Seen(problem="stopped", text="You stopped this check."))
    if called:
        text = f"This calls gradaccum's own `{min(called)}`, which you are asked to write yourself."
        seen = [Seen(problem="finished", text=text)]
    return seen


@contextmanager
def quietly() -> Iterator[Any]:
    """Capture an answer's output and warnings, set the default dtype to float64, and restore all settings."""
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_default_dtype(torch.float64)  # so that an answer's own zeros(()) does not round
    gc.freeze()  # so that an answer's gc.collect() does not scan all of torch, 0.15 s per call
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.enable_grad(),
            warnings.catch_warnings(),
            capture_output() as captured,
        ):
            warnings.simplefilter("ignore")
            yield captured
    finally:
        gc.unfreeze()
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the block after `seconds`, if possible: not on Windows, and not in a thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    # It fires again every second, in case a bare `except:` of the answer catches the first.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------ what it was given is left as it was


def _guarded(answer: Answer, changed: list[str]) -> Answer:
    """Wrap the answer to record what it modifies of its arguments, other than weights and gradients."""
    code = _code_of(answer)
    names = code.co_varnames[: code.co_argcount] if code else ()

    # No functools.wraps: an odd attribute of the answer's would be copied too, and could raise.
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [*zip([*names, *map(str, range(len(names), len(args)))], args, strict=False), *kwargs.items()]
        before = _state(given)
        found = answer(*args, **kwargs)
        if type(found) is types.GeneratorType:  # its body has not run yet
            return _then(found, functools.partial(_note_changes, given, before, changed))
        _note_changes(given, before, changed)
        return found

    return call


def _then(values: Iterator[Any], end: Any) -> Iterator[Any]:
    yield from values
    end()


def _note_changes(given: list[tuple[str, Any]], before: dict[str, Any], changed: list[str]) -> None:
    after = _state(given)
    different = [name for name in before | after if before.get(name, "missing") != after.get(name, "missing")]
    if different:
        name, what = different[0].removesuffix(VALUES), "has other values"
        if name == different[0]:
            what = f"is {after.get(name, 'missing')} and was {before.get(name, 'missing')}"
        changed.append(f"Afterwards {name} {what}: leave the arguments as they were.")


def _code_of(answer: Answer) -> types.CodeType | None:
    try:
        code = getattr(answer, "__code__", None)
    except Exception:  # `__code__` may be a property that raises
        return None
    return code if isinstance(code, types.CodeType) else None


def _state(given: list[tuple[str, Any]]) -> dict[str, Any]:
    """Describe the arguments of an answer: data by value, models by everything except weights and gradients."""
    found: dict[str, Any] = {"gradients being recorded": torch.is_grad_enabled()}
    for name, value in given:
        _describe(f"`{name}`", value, found)
    return found


def _describe(name: str, value: object, found: dict[str, Any]) -> None:
    if isinstance(value, nn.Module):
        for path, module in value.named_modules():
            found[f"{name}{'.' * bool(path)}{path} in training mode"] = module.training
        for path, parameter in value.named_parameters():
            found[f"{name}.{path}.requires_grad"] = parameter.requires_grad
            found[f"{name}.{path}.dtype"] = parameter.dtype
        for path, buffer in value.named_buffers():
            _describe(f"{name}.{path}", buffer, found)
    elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        found[f"{name}.shape"] = list(value.shape)
        found[f"{name}.requires_grad"] = value.requires_grad
        found[f"{name}{VALUES}"] = value.tolist()  # creates no tensor, which memory measurement would see
    elif isinstance(value, list | tuple):
        found[f"len of {name}"] = len(value)
        if set(map(type, value)) <= {int, float, str}:  # thousands, perhaps
            found[f"{name}{VALUES}"] = repr(value)
            return
        for index, item in enumerate(value):
            _describe(f"{name}[{index}]", item, found)
    elif isinstance(value, int | float | str):
        found[f"{name}{VALUES}"] = repr(value)


# ------------------------------------------------------------------------------------------- plain data, safe words


_EXACTLY: dict[type, Any] = {int: int.__int__, float: float.__float__, str: str.__str__}
_ITEMS: dict[type, Any] = {list: list.__iter__, tuple: tuple.__iter__}


def plain(value: Any) -> Plain:
    """Return plain JSON data: an instance of a subclass is converted to its base type."""
    given = type(value)  # isinstance would read the value's `__class__`
    if given in (type(None), bool):
        return value
    for kind, exactly in _EXACTLY.items():
        if issubclass(given, kind):
            return exactly(value)
    for kind, items in _ITEMS.items():
        if issubclass(given, kind):
            return [plain(item) for item in items(value)]
    if issubclass(given, dict):
        return {plain(key): plain(item) for key, item in dict.items(value)}
    raise TypeError(f"This gave {shown(value, 80)}, which is not a number, a text or a list of them.")


def shown(value: object, most: int) -> str:
    """Return the repr of a value, or its type if `__repr__` raises: a check must not raise."""
    try:
        return f"{value!r:.{most}}"
    except (TimeUp, KeyboardInterrupt):
        raise
    except BaseException:
        return f"an object of type {type(value).__name__}"


def _is_unchanged(answer: Answer, given: Answer) -> bool:
    """Return whether an answer is the given code, except for comments, layout and docstrings."""

    def essence(code: Any) -> tuple[Any, ...]:
        inner = [essence(each) if hasattr(each, "co_code") else each for each in code.co_consts]
        without_texts = [each for each in inner if not isinstance(each, str)]  # a docstring among them
        return code.co_code, code.co_names, code.co_varnames, repr(without_texts)

    # Compiled alone, as in a cell: next to a module's imports Python compiles some calls differently.
    alone = compile(inspect.getsource(given), "", "exec").co_consts[0]
    code = _code_of(answer)
    return code is not None and essence(code) == essence(alone)


def _learners_frames(error: BaseException, answer: Answer) -> tuple[list[tuple[int, str]], bool]:
    """Return the lines of the learner's code in a traceback, and whether the error was raised there."""
    code, found, here = _code_of(answer), [], False
    for frame, number in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        here = (code is not None and name == code.co_filename) or "ipykernel" in Path(name).parent.name
        if here:
            found.append((number, linecache.getline(name, number).strip()))
    return found, here


def _is_stub(error: BaseException, answer: Answer) -> bool:
    return _learners_frames(error, answer)[1]  # torch raises NotImplementedError too, but not in the learner's code


def _cut(line: str, most: int = 300) -> str:
    """Shorten a long line at the end of a sentence, or of a word."""
    if len(line) <= most:
        return line
    end = line[:most].rfind(". ") + 1
    return line[:end] if end else f"{line[:most].rpartition(' ')[0] or line[:most]} ..."


def _explained(error: BaseException, answer: Answer) -> Seen:
    kind, (frames, _) = type(error).__name__, _learners_frames(error, answer)
    tried, advice = _trying.get()
    if isinstance(error, Told):
        return Seen(problem=str(error), text=str(error), tried=tried)
    try:
        lines = str(error).strip().splitlines()
    except (TimeUp, KeyboardInterrupt):
        raise
    except BaseException:
        lines = []
    text = problem = f"{kind}: {_cut(lines[0])}" if lines else kind
    if frames:
        number, line = frames[-1]
        text = f"Line {number}{f', `{line}`' if line else ''}: {problem}"
    if kind in advice:
        text += f"{'' if text.endswith(('.', '!', '?')) else '.'} {advice[kind]}"
    return Seen(problem=problem, text=text, tried=tried)
