"""The questions: right answers get full points, wrong ones lose some, and each known mistake gets its own sentence."""

import ast
import copy
import importlib.util
import inspect
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import build
import matrix
import pytest
import release
from mutants import mutants

from gradaccum import exercises
from gradaccum.exercises.checking import Observed, Seen, grade, judge, observe, sentence

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "notebooks" / "source"
each_seed = pytest.mark.parametrize("seed", [0, pytest.param("spring", marks=pytest.mark.slow)])


@cache
def source_of(lesson):
    (path,) = (SOURCES / "exercises").glob(f"{lesson:02}_*.py")
    return release.marked(build.read_source(path))


@cache
def release_of(lesson):
    return release.released(copy.deepcopy(source_of(lesson)))


@cache
def set_up(lesson):
    namespace = {}
    exec(next(cell.source for cell in source_of(lesson).cells if cell.id == "setup"), namespace)
    return namespace


def checked_name(notebook, question):
    cell = next(cell for cell in notebook.cells if cell.id == f"check-{question.id.replace('.', '-')}")
    call = ast.parse(cell.source).body[-1].value
    assert call.func.id == "check"
    assert call.args[0].value == question.id
    return call.args[1].id


def answer_cell(notebook, question):
    return next(cell for cell in notebook.cells if cell.id == f"answer-{question.id.replace('.', '-')}")


def defined(lesson, question, source, notebook=None):
    """Run an answer's source after the set-up cell, as a learner does."""
    namespace = dict(set_up(lesson))
    exec(compile(source, f"<answer {question.id}>", "exec"), namespace)
    return namespace[checked_name(source_of(lesson), question)]


@cache
def corpus(lesson):
    path = ROOT / "tests" / "answers" / f"lesson_{lesson:02}.py"
    spec = importlib.util.spec_from_file_location(f"answers_{lesson:02}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PRESENT = [n for n in exercises.LESSONS if (ROOT / "tests" / "answers" / f"lesson_{n:02}.py").exists()]
QUESTIONS = [
    pytest.param(n, question, id=f"lesson_{n:02}-{question.id}") for n in PRESENT for question in exercises.questions(n)
]
each_question = pytest.mark.parametrize(("lesson", "question"), QUESTIONS)


def named(functions):
    return [getattr(function, "__name__", repr(function)) for function in functions]


def explained(outcome):
    return exercises.Score(outcome).report


@each_question
def test_the_reference_answer_gets_full_points(lesson, question):
    answer = defined(lesson, question, answer_cell(source_of(lesson), question).source)
    for seed in range(5):
        outcome = grade(question, answer, seed)
        assert outcome.points == question.points, explained(outcome)


@each_question
def test_what_the_learner_starts_from_earns_nothing_and_is_told_so(lesson, question):
    outcome = grade(question, defined(lesson, question, answer_cell(release_of(lesson), question).source))
    assert outcome.points == 0
    assert outcome.note.startswith("Not changed yet" if question.given else "Not written yet")
    assert all(result.passed is None for result in outcome.results)


@each_question
@each_seed
def test_right_answers_get_full_points(lesson, question, seed):
    answers = corpus(lesson).RIGHT[question.id]
    assert len(answers) >= 2
    for answer in answers:
        outcome = grade(question, answer, seed)
        assert outcome.points == question.points, f"{answer}\n{explained(outcome)}"


@each_question
@each_seed
def test_wrong_answers_lose_points(lesson, question, seed):
    answers = corpus(lesson).WRONG[question.id]
    assert len(answers) >= 2
    for answer in answers:
        assert grade(question, answer, seed).points < question.points, answer


@each_question
@each_seed
def test_each_known_mistake_loses_points_and_gets_its_sentence(lesson, question, seed):
    assert len(question.mistakes) >= 3
    for mistake in question.mistakes:
        assert sentence(mistake).endswith((".", "?")), mistake.__name__
        assert sentence(mistake)[0].isupper(), mistake.__name__
        outcome = grade(question, mistake, seed)
        assert outcome.points < question.points, mistake.__name__
        assert outcome.mistake == sentence(mistake), f"{mistake.__name__}\n{explained(outcome)}"


@each_question
def test_in_a_bug_hunt_only_what_the_given_code_fails_carries_points(lesson, question):
    if question.given is None:
        assert all(each.points > 0 for each in question.properties)
        return
    assert question.given.__name__ == checked_name(source_of(lesson), question)
    source = inspect.getsource(question.given) + "    ...\n"  # changed, but not in what it does
    outcome = grade(question, defined(lesson, question, "def " + source.partition("def ")[2].rstrip() + "\n\nx = 0\n"))
    assert outcome.note.startswith("Not changed yet")
    plain = [(each.points > 0) for each in question.properties]
    held = [result.passed for result in grade_as_any(question, question.given).results]
    assert held == [not carries for carries in plain]


def grade_as_any(question, answer):
    return grade(replace(question, given=None), answer)


@pytest.mark.slow
@each_question
def test_every_mutant_of_the_reference_answer_loses_points(lesson, question):
    source = answer_cell(source_of(lesson), question).source
    equivalent = dict(corpus(lesson).EQUIVALENT.get(question.id, {}))
    lived, count = [], 0
    for change, text in mutants(source):
        count += 1
        try:
            answer = defined(lesson, question, text)
        except Exception:
            continue  # it cannot even be defined
        if judge(question, observe(question, answer, 0, seconds=3.0)).points == question.points:
            lived.append(change)
    assert count >= 3
    assert not set(lived) - set(equivalent), f"get full points: {sorted(set(lived) - set(equivalent))}"
    assert not set(equivalent) - set(lived), f"are not equivalent: {sorted(set(equivalent) - set(lived))}"


@each_question
def test_what_the_probes_see_is_plain_data(lesson, question):
    answer = defined(lesson, question, answer_cell(source_of(lesson), question).source)
    json.dumps(question.cases(0))
    observed = observe(question, answer)
    seen = json.loads(json.dumps([[list(one) for one in property] for property in observed.seen]))
    again = Observed([[Seen(*one) for one in property] for property in seen])
    assert judge(question, again).points == question.points


def test_all_lessons_have_questions_and_answers():
    assert list(exercises.LESSONS) == PRESENT
    found = [question for lesson in exercises.LESSONS for question in exercises.questions(lesson)]
    assert 15 <= len(found) <= 22
    assert 55 <= sum(question.points for question in found) <= 75
    assert sum(question.given is not None for question in found) >= 4
    assert sum(len(answers) for n in PRESENT for answers in corpus(n).RIGHT.values()) >= 40


# What goes wrong with accumulation, as the lessons teach it, and the mistake that stands for it.
PITFALLS = {
    "no normalization": "3.1 not_divided",
    "Adam hides a missing normalization": "3.3 with_adam",
    "sum and mean the wrong way round": "3.2 swapped",
    "the last window is divided by k": "4.2 divided_by_k",
    "the last window is dropped": "4.2 leftover_dropped",
    "the last window leaks into the next epoch": "4.2 leftover_leaks",
    "wrong parity": "4.3 given",
    "the mean of means": "5.2 mean_of_means",
    "equal counts hide the mean of means": "5.4 with_equal_counts",
    "padding is counted": "5.2 padding_counted",
    "one backward at the end": "5.3 given",
    "cleared inside the window": "2.2 given",
    "gradients left from before": "1.1 not_cleared",
    "k small steps instead of one": "2.3 stepped_each_time",
    "the logged loss is the last share": "4.4 last_share",
    "the schedule moves with each micro-batch": "4.4 schedule_inside",
    "clipping inside the window": "4.4 clipped_inside",
    "counted in micro-batches": "4.5 in_micro_batches",
    "the copy of the gradients is forgotten": "6.1 no_copy",
    "activations of the large batch": "6.1 large_batch",
    "the effective batch shrinks": "6.2 rounded_down",
    "accumulation always costs a copy": "6.3 always_a_copy",
    "graphs and logits are kept": "6.4 given",
    "losses that hold their graphs": "1.2 given",
}


@pytest.mark.parametrize("pitfall", PITFALLS)
def test_every_pitfall_that_the_lessons_teach_has_its_mistake(pitfall):
    identifier, name = PITFALLS[pitfall].split()
    question = exercises.find(identifier)
    assert question.given if name == "given" else name in named(question.mistakes)


def signature(question, mistake):
    """What a mistake fails and what comes out there: two mistakes with the same cannot be told apart."""
    observed = observe(question, mistake)
    failed = [result.name for result in grade(question, mistake).results if result.passed is False]
    values = [
        repr(seen)
        for each, seen in zip(question.properties, observed.seen, strict=False)
        if each.name in failed and each.by_value
    ]
    return question.id, tuple(failed), tuple(values)


@pytest.mark.slow
def test_the_page_of_mistakes_is_as_made():
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page(), "make it again: python tests/answers/matrix.py"


def test_whoever_is_led_to_the_mistakes_is_warned():
    assert "spoils the exercises" in matrix.PAGE.read_text(encoding="utf-8").split("\n\n")[1]
    for name in ("README.md", "notebooks/exercises/INSTRUCTOR.md"):
        (line,) = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if "MISTAKES.md" in line]
        assert "spoils" in line, name


@pytest.mark.slow
def test_there_are_at_least_30_distinct_signatures_of_failure():
    everything = [question for lesson in exercises.LESSONS for question in exercises.questions(lesson)]
    assert len({signature(question, mistake) for question in everything for mistake in question.mistakes}) >= 30
