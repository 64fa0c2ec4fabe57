"""The questions: right answers get full points, wrong ones lose some, and each known mistake gets its own sentence.

`pytest -k q3_1` runs what belongs to exercise 3.1.
"""

import ast
import copy
import importlib.util
import inspect
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import build
import mistakes
import pytest
import release
from mutants import mutants

from gradaccum import exercises
from gradaccum.exercises.judge import UNKNOWN, grade, judge
from gradaccum.exercises.run import Observed, Seen, observe

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "gradaccum" / "exercises" / "questions"
ANSWERS = Path(__file__).with_name("answers")
each_seed = pytest.mark.parametrize("seed", [0, pytest.param("spring", marks=pytest.mark.slow)])
QUESTIONS = [exercises.find(each) for each in exercises.IDENTIFIERS]
# A group is one process's own with --dist loadgroup: what a question's mistakes do is then computed once.
each_question = pytest.mark.parametrize(
    "question",
    [
        pytest.param(each, id=name, marks=pytest.mark.xdist_group(name))
        for each in QUESTIONS
        for name in [f"q{each.id.replace('.', '_')}"]
    ],
)


def lesson_of(question):
    return int(question.id.split(".")[0])


@cache
def source_of(lesson):
    (path,) = (build.SOURCE / "exercises").glob(f"{lesson:02}_*.py")
    return release.marked(build.read_source(path))


@cache
def release_of(lesson):
    return release.released(copy.deepcopy(source_of(lesson)))


def cell(notebook, role, question):
    return next(cell for cell in notebook.cells if cell.id == f"{role}-{question.id.replace('.', '-')}")


@cache
def set_up(lesson):
    return next(cell.source for cell in source_of(lesson).cells if cell.id == "setup")


def checked_name(question):
    call = ast.parse(cell(source_of(lesson_of(question)), "check", question).source).body[-1].value
    assert call.func.id == "check"
    assert call.args[0].value == question.id
    return call.args[1].id


def worked(question):
    """The source of the worked answer."""
    return cell(source_of(lesson_of(question)), "answer", question).source


def defined(question, source):
    """Run an answer's source after the set-up cell, as a learner does."""
    namespace = {}
    exec(set_up(lesson_of(question)), namespace)
    exec(compile(source, f"<answer {question.id}>", "exec"), namespace)
    return namespace[checked_name(question)]


@cache
def corpus(question):
    """The answers to a question that its check has to tell apart: RIGHT, WRONG, NAMED, WEIGHED, EQUIVALENT mutants."""
    path = ANSWERS / f"q{question.id.replace('.', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"answers_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return SimpleNamespace(**({"WRONG": [], "NAMED": [], "WEIGHED": [], "EQUIVALENT": {}} | vars(module)))


def explained(outcome):
    return exercises.Score(outcome).report


@each_question
def test_the_reference_answer_gets_full_points(question):
    answer = defined(question, worked(question))
    for seed in range(5):
        outcome = grade(question, answer, seed)
        assert outcome.points == question.points, explained(outcome)


@each_question
def test_the_start_earns_nothing_and_says_so(question):
    start = cell(release_of(lesson_of(question)), "answer", question).source
    outcome = grade(question, defined(question, start))
    assert outcome.points == 0
    assert outcome.note.startswith("Not changed yet" if question.given else "Not written yet")
    assert all(result.passed is None for result in outcome.results)


@each_question
@each_seed
def test_right_answers_get_full_points(question, seed):
    answers = corpus(question).RIGHT
    assert len(answers) >= 2
    for answer in answers:
        outcome = grade(question, answer, seed)
        assert outcome.points == question.points, f"{answer}\n{explained(outcome)}"


@each_question
@each_seed
def test_wrong_answers_lose_points(question, seed):
    answers = corpus(question).WRONG
    assert len(answers) >= 2
    for answer in answers:
        assert grade(question, answer, seed).points < question.points, answer


@each_question
@each_seed
def test_each_known_mistake_gets_its_sentence(question, seed):
    assert len(question.mistakes) >= 3
    for name, mistake in question.mistakes.items():
        assert mistake.sentence.endswith((".", "?")), name
        assert mistake.sentence[0].isupper() or mistake.sentence.startswith(("backward()", "cross_entropy")), name
        outcome = grade(question, mistake.answer, seed)
        assert outcome.points < question.points, name
        assert outcome.mistake == mistake.sentence, f"{name}\n{explained(outcome)}"


@each_question
@each_seed
def test_names_are_those_that_are_true(question, seed):
    """NAMED pairs an answer with the names of its mistakes: none where no sentence is true, `...` for one more."""
    for answer, *names in corpus(question).NAMED:
        outcome = grade(question, answer, seed)
        assert outcome.points < question.points, answer
        said = " And one more: ".join(question.mistakes[name].sentence for name in names if name is not ...)
        said += f" {UNKNOWN}" if ... in names else ""
        assert outcome.mistake == said, f"{answer}\n{explained(outcome)}"


@each_question
def test_the_weights_are_those_that_it_gave(question):
    """WEIGHED has an answer, the first weights on its card, and what the gradient shows where no name is known."""
    plain = replace(question, given=None, mistakes={})  # to find its name takes most of the time
    for answer, got, said in corpus(question).WEIGHED:
        outcome = grade(plain, answer)
        found = next((str(each.weights) for each in outcome.results if each.weights), "none")
        assert f"got the weight{got}" in found if got else found == "none", f"{answer}\n{explained(outcome)}"
        assert said in outcome.said if said else outcome.said == "", f"{answer}\n{explained(outcome)}"


@each_question
def test_a_bug_hunt_pays_for_what_failed_alone(question):
    if question.given is None:
        assert all(each.points > 0 for each in question.properties)
        return
    assert question.given.__name__ == checked_name(question)
    source = inspect.getsource(question.given) + "    ...\n"  # changed, but not in what it does
    outcome = grade(question, defined(question, "def " + source.partition("def ")[2].rstrip() + "\n\nx = 0\n"))
    assert outcome.note.startswith("Not changed yet")
    plain = [(each.points > 0) for each in question.properties]
    held = [result.passed for result in grade_as_any(question, question.given).results]
    assert held == [not carries for carries in plain]


def grade_as_any(question, answer):
    return grade(replace(question, given=None), answer)


@pytest.mark.slow
@each_question
def test_every_mutant_of_an_answer_loses_points(question):
    source, equivalent = worked(question), corpus(question).EQUIVALENT
    lived, count = [], 0
    for change, text in mutants(source):
        count += 1
        try:
            answer = defined(question, text)
        except Exception:
            continue  # it cannot even be defined
        if judge(question, observe(question, answer, 0, seconds=3.0)).points == question.points:
            lived.append(change)
    assert count >= 3
    assert not set(lived) - set(equivalent), f"get full points: {sorted(set(lived) - set(equivalent))}"
    assert not set(equivalent) - set(lived), f"are not equivalent: {sorted(set(equivalent) - set(lived))}"


@each_question
def test_a_probe_uses_material_alone(question):
    for each in question.properties:
        used = inspect.getclosurevars(each.probe)
        assert set(used.globals) <= {"material"}, each.name
        assert used.nonlocals == {}, each.name


CHILD = """
import json, sys
sys.modules["gradaccum.exercises.questions"] = None  # so that importing it fails
from gradaccum.exercises import material, question, run

def defined(sources, name, **names):
    for source in sources:
        exec(compile(source, "<sent>", "exec"), names)
    return names[name]

found = []
for asked in json.load(sys.stdin):
    answer = defined(*asked["answer"])
    with run.quietly():
        for name, source, cases in asked["properties"]:
            probe = defined([source], name, material=material)
            found.append(run.watch(question.Property("", 0, None, probe, None, ""), cases, answer))
json.dump(found, sys.stdout)
"""


def test_probes_run_without_the_questions():
    asked = []
    for question in QUESTIONS:
        probes = [(each.probe.__name__, inspect.getsource(each.probe)) for each in question.properties]
        properties = [(*probe, cases) for probe, cases in zip(probes, question.cases(0), strict=True)]
        answer = [set_up(lesson_of(question)), worked(question)], checked_name(question)
        asked.append({"answer": answer, "properties": properties})
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = iter(json.loads(done.stdout))
    for question in QUESTIONS:
        observed = Observed([[Seen(*one) for one in next(seen)] for _ in question.properties])
        outcome = judge(question, observed)
        assert outcome.points == question.points, explained(outcome)


def test_every_question_has_its_file_of_answers():
    assert sorted(path.stem for path in ANSWERS.glob("q*.py")) == sorted(path.stem for path in FOLDER.glob("q*.py"))
    assert len(exercises.IDENTIFIERS) >= 3


def test_question_files_are_short():
    lengths = {path.name: len(path.read_text("utf-8").splitlines()) for path in FOLDER.glob("*.py")}
    lines = sorted(length for name, length in lengths.items() if name.startswith("q"))
    print(f"{len(lines)} questions: median {lines[len(lines) // 2]} lines, longest {lines[-1]}")
    assert lines[len(lines) // 2] <= 120
    assert {name: length for name, length in lengths.items() if length > 230} == {}


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
    "class weights are not counted": "5.5 targets_counted",
    "a term that is no sum is divided": "5.5 penalty_once",
    "what sees the whole batch is cut": "5.5 cut_too",
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
def test_every_pitfall_taught_has_its_mistake(pitfall):
    identifier, name = PITFALLS[pitfall].split()
    question = exercises.find(identifier)
    assert question.given if name == "given" else name in question.mistakes


@pytest.mark.slow
def test_the_page_of_mistakes_is_as_made():
    assert mistakes.PAGE.read_text("utf-8") == mistakes.page(), "make it again: python tools/mistakes.py"


def test_whoever_is_led_to_the_mistakes_is_warned():
    assert "spoils the exercises" in mistakes.PAGE.read_text(encoding="utf-8").split("\n\n")[1]
    for name in ("README.md", "notebooks/exercises/INSTRUCTOR.md"):
        (line,) = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if "MISTAKES.md" in line]
        assert "spoils" in line, name
