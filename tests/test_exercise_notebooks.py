"""The exercise notebooks: as their sources say, without answers, 0 points as they come and all of them once solved."""

import ast
import copy
import re
import sys

import build
import examples
import nbformat
import pytest
import release
from files import NOTEBOOKS
from kernels import assert_as_stored, peak_megabytes, pin

from gradaccum import exercises

FOLDER = NOTEBOOKS / "exercises"
SOURCES = {int(path.stem[:2]): path for path in build.sources().values() if build.is_exercise(path)}
each_lesson = pytest.mark.parametrize("lesson", exercises.LESSONS)


def solved(lesson):
    """The notebook with the worked answers, as a person would have written them."""
    notebook = release.marked(build.read_source(SOURCES[lesson]))
    for cell in notebook.cells:
        if cell.id.startswith("answer-"):
            cell.source = release.without_marks(cell.source)
    return notebook


def handed_out(lesson):
    return nbformat.read(build.made_from(SOURCES[lesson]), as_version=4)


def cells(notebook, role):
    return [cell for cell in notebook.cells if cell.id.startswith(f"{role}-")]


@each_lesson
def test_exercises_are_what_their_source_says(lesson):
    assert build.differences(SOURCES[lesson]) == []
    again = release.released(release.marked(build.read_source(SOURCES[lesson])))
    assert nbformat.writes(again) + "\n" == build.made_from(SOURCES[lesson]).read_text(encoding="utf-8")


def test_worked_solutions_are_the_sources(tmp_path, monkeypatch):
    assert build.keep(build.kept(), build.check) == []
    monkeypatch.setattr(release, "ANSWERS", tmp_path / "answers.json")
    assert len(build.keep(build.kept(), build.check)) == 1
    assert build.keep(build.kept(), build.make) == build.keep(build.kept(), build.check) == []


@each_lesson
def test_every_question_has_cells_points_and_id(lesson):
    notebook = handed_out(lesson)
    ids = [question.id.replace(".", "-") for question in exercises.questions_of(lesson)]
    for role in ("exercise", "answer", "try", "check", "hints"):
        assert [cell.id for cell in cells(notebook, role)] == [f"{role}-{one}" for one in ids]
    for question, text, check in zip(
        exercises.questions_of(lesson), cells(notebook, "exercise"), cells(notebook, "check"), strict=True
    ):
        assert text.source.startswith(f"## Exercise {question.id} {question.title}\n")
        pattern = rf"\n\ndifficulty [1-5]/5 \| \d+ minutes \| {question.points} points?\n"
        assert re.search(pattern, text.source), f"{question.id} has {question.points} points"
        assert "**Example.**" in text.source
        assert check.metadata.nbgrader.points == question.points
        assert check.metadata.nbgrader.grade_id == check.id
        assert re.fullmatch(rf'check\("{re.escape(question.id)}", \w+\)', check.source)
    total = sum(question.points for question in exercises.questions_of(lesson))
    assert f" {total} points" in notebook.cells[0].source
    assert notebook.cells[-2].source == f"exercises.scorecard({lesson})"
    links = re.findall(r"\]\((\S+?)\)", "\n".join(cell.source for cell in notebook.cells))
    assert all((FOLDER / link).exists() for link in links if not link.startswith("http")), links


@each_lesson
def test_a_task_has_five_bullets_and_a_fine_print(lesson):
    for text in cells(handed_out(lesson), "exercise"):
        task, *folded = text.source.split("<details>")
        assert len(re.findall(r"^[-*+] |^\d+[.)] ", text.source, re.M)) <= 5, text.id
        assert all("</details>\n<br>\n\n" in each for each in folded), f"{text.id}: a fold touches what is below it"
        assert [each.partition("\n")[0] for each in folded] in ([], ["<summary>The fine print</summary>"]), text.id
        assert task.count("\n\n- ") == 1 or text.id == "exercise-5-6", f"{text.id}: one list, above the fine print"


@each_lesson
def test_an_exercise_s_minutes_are_enough(lesson):
    """At 200 words and two lines of code a minute, half of them are left to think."""
    notebook = solved(lesson)
    for text in cells(notebook, "exercise"):
        number = text.id.partition("-")[2]
        own = {cell.id.partition("-")[0]: cell.source for cell in notebook.cells if cell.id.endswith(f"-{number}")}
        code = ast.parse(own["answer"]).body[-1].body[1:]  # below the docstring
        lines = code[-1].end_lineno - code[0].lineno + 1
        words = sum(len(own.get(role, "").split()) for role in ("exercise", "losses", "try"))
        minutes = int(re.search(r"\| (\d+) minutes \|", text.source)[1])
        assert minutes >= 2 * (words / 200 + lines / 2), text.id


@each_lesson
def test_no_answer_leaks(lesson):
    notebook = handed_out(lesson)
    text = nbformat.writes(notebook)
    assert "SOLUTION" not in text
    assert all(not cell.get("outputs") for cell in notebook.cells)
    given = "\n".join(cell.source for cell in notebook.cells)
    source = build.read_source(SOURCES[lesson])
    for cell in cells(source, "answer"):
        body = cell.source.partition("### BEGIN SOLUTION")[2].partition("### END SOLUTION")[0]
        lines = [line.strip() for line in body.splitlines() if line.strip()]
        assert lines, f"{cell.id} has no answer between the marks"
        (start,) = [other.source for other in notebook.cells if other.id == cell.id]
        question = release.question_of(cell)
        if question.given is None:
            assert start.endswith("raise NotImplementedError")
        else:
            assert start != release.without_marks(cell.source)
        # A loop's head may stand in another cell; all lines of an answer in a row may not.
        assert "\n".join(lines) not in "\n".join(line.strip() for line in given.splitlines())


def test_a_leak_would_be_noticed():
    notebook = release.marked(build.read_source(SOURCES[3]))
    text = "\n".join(cell.source for cell in release.released(copy.deepcopy(notebook)).cells)
    assert "SOLUTION" in "\n".join(cell.source for cell in notebook.cells)
    assert "SOLUTION" not in text
    assert "parameter.grad /= k" not in text


def scores(notebook):
    found = {}
    for cell in cells(notebook, "check"):
        (result,) = [output for output in cell.outputs if output.output_type == "execute_result"]
        found[release.question_of(cell).id] = float(result.data["text/plain"])
    return found


def run(notebook):
    with build.kernel(notebook) as client:
        build.run_cells(client, notebook.cells)
    return notebook


@each_lesson
def test_as_handed_out_it_runs_and_earns_0_points(lesson):
    notebook = run(handed_out(lesson))
    assert set(scores(notebook).values()) == {0.0}
    for cell in notebook.cells:
        streams = [output.text for output in cell.get("outputs", []) if output.output_type == "stream"]
        assert "Error" not in "".join(streams), f"{cell.id}: {streams}"


# ------------------------------------------------------------------------------------- what the texts say comes out


@each_lesson
def test_a_try_cell_prints_what_it_expects(lesson):
    found = list(examples.expectations(solved(lesson)))
    assert found
    for cell, wanted, got, above in found:
        assert examples.holds(wanted, got, above), f"{cell} expects {wanted} and prints {got}"
        for place in [place for place, letter in enumerate(wanted) if letter.isalnum()]:
            other = wanted[:place] + ("2" if wanted[place] == "1" else "1") + wanted[place + 1 :]
            assert not examples.holds(other, got, above), f"{cell}: {other} would pass for {wanted}"


@each_lesson
def test_an_example_says_what_comes_out(lesson):
    notebooks = solved(lesson), handed_out(lesson)
    for text in cells(notebooks[0], "exercise"):
        number, example = text.id.partition("-")[2], text.source.partition("**Example.**")[2]
        both = {"step": lambda *_: None}, {}
        for names, notebook in zip(both, notebooks, strict=True):
            sources = {cell.id: cell.source for cell in notebook.cells}
            exec(sources["setup"], names)
            exec(sources[f"answer-{number}"], names)
            names["TRY"] = sources[f"try-{number}"]
        calls = re.findall(r"`(\w+\([^`]*\))` is (?:`([^`]+)`|([\d.,]*\d))", example)
        for call, quoted, plain in calls:
            assert eval(call, both[0]) == ast.literal_eval(quoted or plain.replace(",", "")), call
        measure = getattr(examples, f"example_{number.replace('-', '_')}", None)
        for said in measure(*both) if measure else ():
            assert said in example, f"{text.id}: {said}"
        assert calls or measure, f"{text.id}: nothing tests its example"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="pins a kernel and reads its memory as Linux tells it")
@each_lesson
def test_solved_on_one_core_it_has_full_points(lesson):
    """In 900 MB, as on Binder; and from the set-up cell alone, as after a killed kernel, it shows the same again."""
    notebook, questions = solved(lesson), exercises.questions_of(lesson)
    forget = nbformat.v4.new_code_cell("%reset -f", id="forget")  # all names, as a killed kernel does, in no time
    notebook.cells.append(forget)
    full = {question.id: question.points for question in questions}
    with build.kernel(notebook) as client:
        pin(client, 1)
        build.run_cells(client, notebook.cells[:-1])
        peak, first = peak_megabytes(client), copy.deepcopy(notebook)
        for question in questions:
            own = question.id.replace(".", "-")
            names = ["setup", *(f"{role}-{own}" for role in ("losses", "answer", "try", "check"))]
            build.run_cells(client, [forget, *(cell for cell in notebook.cells if cell.id in names)])
    print(f"exercises {lesson}: {peak:.0f} MB")
    assert scores(first) == scores(notebook) == full
    assert_as_stored([cell for cell in first.cells if cell.cell_type == "code"], notebook.cells, "once more")
    assert peak <= 900


@each_lesson
def test_hints_name_headings_that_there_are(lesson):
    (path,) = NOTEBOOKS.glob(f"{lesson:02}_*.ipynb")
    page = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    named = [
        each for cell in cells(handed_out(lesson), "hints") for each in re.findall(r'"([A-Z][^"\n]+)"', cell.source)
    ]
    errors = {"Trying to backward through the graph a second time"}  # what torch says
    for each in set(named) - errors:
        assert re.search(
            rf"^#+ {re.escape(each)}$|\*\*{re.escape(each)}\.\*\*|\[\"{re.escape(each)}\"\]", page, re.M
        ), each
