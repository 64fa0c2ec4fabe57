"""What is kept over a restart: where, for whom, how safely, that no mark is read from it; and the card to share."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import build
import nbformat
import pytest
from traitlets.config import Config

from gradaccum import exercises
from gradaccum.exercises import check, progress, scorecard

ROOT = Path(__file__).resolve().parents[2]
OTHERS = {"1.1": {"best": 3, "on": "2026-01-02", "answer": "0123abcd", "last": 1}}
FORGED = {"3.2": {"best": 99, "on": "<b>", "answer": "<b>", "last": 99}}


def right(reduction, sizes):
    return len(sizes) if reduction == "mean" else sum(sizes)


def half(reduction, sizes):
    return len(sizes)


def shell(history="history.sqlite"):
    return SimpleNamespace(history_manager=SimpleNamespace(hist_file=history), set_next_input=lambda *_, **__: None)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of a learner whose notebook lies in their folder of copies, in a session that has just begun."""
    folder = tmp_path / "copies"
    (folder / "exercises").mkdir(parents=True)
    (folder / ".copied.json").touch()
    monkeypatch.setattr(progress, "HERE", folder / "exercises")
    for module in (progress, exercises):
        monkeypatch.setattr(module, "get_ipython", shell)
    monkeypatch.delenv(progress.SWITCH)
    restart(monkeypatch)
    return folder / "progress.json"


def restart(monkeypatch):
    for where, name, empty in ((exercises, "_scores", {}), (progress, "_session", {}), (progress, "_unwritten", set())):
        monkeypatch.setattr(where, name, empty)


def write(file, entries):
    file.write_text(json.dumps({"format": progress.FORMAT, "exercises": entries}))


def entries(file):
    return json.loads(file.read_text())["exercises"]


def test_the_best_check_outlasts_a_restart(file, monkeypatch):
    said = "So far, best checks counted: 1 of 3 exercises of this lesson, 2 of 11 points."
    assert said in check("3.2", right)._repr_html_()
    check("3.2", half)
    assert "1 of 2  3.2 Sum or mean; best: 2 of 2 on 20" in repr(scorecard(3))
    assert "copies/progress.json keeps points" in repr(scorecard(3))
    restart(monkeypatch)
    card = scorecard(3)
    assert (card.points, card.solved) == (2, 1)
    assert "kept from an earlier session: 2 of 2 on 20" in repr(card)
    assert entries(file)["3.2"]["answer"] == progress.digest(right)
    told = ", 1 at the last check"
    assert told in repr(card)
    assert told in card._repr_html_()


def test_another_process_keeps_in_jupyters_folder(file, tmp_path, monkeypatch):
    script = "from IPython.core.interactiveshell import InteractiveShell as Shell; Shell.instance()\n"
    script += "from gradaccum.exercises import check; print(check('3.2', lambda reduction, sizes: len(sizes)).report)"
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    own = os.environ | {"IPYTHONDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=own, capture_output=True, text=True)
    assert done.stdout.endswith("\nSo far, best checks counted: 0 of 3 exercises of this lesson, 1 of 11 points.\n"), (
        done.stderr
    )
    monkeypatch.setattr(progress, "HERE", tmp_path)
    assert (scorecard(3).points, progress.place()) == (1, tmp_path / "data" / "gradaccum" / "progress.json")


def test_two_notebooks_at_once_lose_nothing(file):
    script = f"""import runpy, sys, types
own = runpy.run_path({progress.__file__!r})["keep"].__globals__
own.update(get_ipython=lambda: types.SimpleNamespace(history_manager=None), HERE=own["Path"]({str(file.parent)!r}))
(own["HERE"] / f"ready.{{sys.argv[1]}}").touch()
while len([*own["HERE"].glob("ready.*")]) < 2:
    pass
for number in range(100):
    own["keep"](f"{{sys.argv[1]}}.{{number}}", 1, len)
assert not own["_unwritten"]"""
    writers = [subprocess.Popen([sys.executable, "-c", script, name]) for name in "12"]
    assert [each.wait() for each in writers] == [0, 0]
    assert len(entries(file)) == 200
    assert [path.name for path in file.parent.glob("progress*")] == ["progress.json"]


def test_a_lock_nobody_releases_is_waited_out(file):
    lock = file.with_name("progress.json.lock")
    lock.touch()
    check("3.2", right)
    assert not file.exists()
    os.utime(lock, (0, 0))  # its process was killed long ago
    progress.keep("1.1", 1, half)
    assert set(entries(file)) == {"1.1", "3.2"}, "what could not be written before is written now"


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", '{"format": 2, "exercises": {}}', '{"exercises": {}}', "\xff"])
def test_a_file_that_is_not_ours_is_left_alone(file, text):
    file.write_text(text, "latin-1")
    assert check("3.2", right) == scorecard(3).points == 2
    assert file.read_text("latin-1") == text
    assert "nothing is saved: copies/progress.json cannot be read, and is not changed" in repr(scorecard(3))


def test_other_entries_stay_and_odd_ones_are_void(file):
    write(file, others := OTHERS | {"9.9": "?", "3.1": {"best": "4"}, "3.3": [5]})
    check("3.2", right)
    assert entries(file).pop("3.2")["best"] == scorecard(3).points == 2
    assert entries(file) | others == entries(file)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
def test_a_check_works_where_nothing_is_writable(file, monkeypatch, error, capsys):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(error, os.strerror(error))))
    assert check("3.2", right) == 2
    assert capsys.readouterr() == ("", "")
    assert "nothing is saved: copies/progress.json cannot be written." in repr(scorecard(3))
    assert not [*file.parent.glob("progress*")]


@pytest.mark.parametrize("history", ["off", None, ":memory:"], ids=["nbgrader", "no notebook", "a program runs it"])
def test_a_graded_run_neither_reads_nor_writes(file, monkeypatch, history):
    write(file, FORGED)
    before = file.read_bytes()
    monkeypatch.setattr(progress, "get_ipython", lambda: history and shell(history))
    if history == "off":
        monkeypatch.setenv(progress.SWITCH, "")  # to be put back
        exec((build.NOTEBOOKS / "exercises" / "nbgrader_config.py").read_text(), {"get_config": Config})
    assert scorecard(3).points == 0
    score = check("3.2", half)
    assert (repr(score), score.so_far, file.read_bytes()) == ("1.0", "", before)
    assert "nothing is saved" in repr(scorecard(3))


def test_tests_and_the_builder_keep_nothing(monkeypatch):
    assert os.environ[progress.SWITCH] == "off"
    monkeypatch.delenv(progress.SWITCH)
    cell = nbformat.v4.new_code_cell(f"import os; print(os.environ[{progress.SWITCH!r}])")
    with build.kernel(nbformat.v4.new_notebook(cells=[cell])) as client:
        build.run_cells(client, client.nb.cells)
    assert client.nb.cells[0].outputs[0].text == "off\n"


def test_a_forged_file_changes_no_mark(file):
    marks = [check("3.2", answer).outcome for answer in (right, half)]
    write(file, FORGED)
    assert [check("3.2", answer).outcome for answer in (right, half)] == marks
    assert scorecard(3).points == 2, "never more than there are"
    assert "on &lt;b&gt;" in scorecard(3)._repr_html_()


def test_reset_clears_what_is_kept(file, capsys):
    write(file, OTHERS)
    check("3.2", right)
    exercises.reset("3.2")
    assert (entries(file), scorecard(3).points) == (OTHERS, 0)
    exercises.reset("3.2")
    told = "3.2 is reset, and its 2 of 2 points are cleared.\n3.2 is reset.\n"
    assert capsys.readouterr().out == told


def test_the_card_says_what_was_reached(file):
    assert "Normalize: 0 of 11 points, 0 of 3 exercises solved, 20" in exercises.card(3).get_label()
    write(file, {each: OTHERS["1.1"] | {"best": 4} for each in ("3.1", "3.2", "3.3")})
    figure = exercises.card(3)
    shown = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    for told in (
        "10 of 11 points",
        "2 of 3 exercises solved",
        "2026-01-02",
        "A window without a length",
        "Data that comes as a stream",
    ):
        assert told in shown and told in figure.get_label()  # noqa: PT018
    assert [bar.get_height() for bar in figure.axes[0].patches] == [4, 4, 2, 2, 4, 5]
    for each in exercises.IDENTIFIERS:
        write(file, {each: OTHERS["1.1"] | {"best": 9}})
        figure = exercises.card(int(each[0]))
        boxes = [*(text.get_window_extent() for text in figure.texts), figure.axes[0].get_tightbbox()]
        assert all(box.x0 > 30 and box.x1 < 1170 and box.y0 > 20 for box in boxes), each
        assert not [1 for one in boxes for other in boxes if one is not other and one.overlaps(other)], each
