"""A learner's copies in work/: whole, right, never written over, and told of a newer edition."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import test_project
import work
from build import METADATA
from files import NAMES, ROOT, clone, contents, laid_out

posix = pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file as Linux does")


@pytest.fixture
def originals(tmp_path, monkeypatch):
    """Two small notebooks in notebooks/, by name, beside what is not to be copied."""
    monkeypatch.setattr(work, "ROOT", tmp_path)
    info = '"pygments_lexer": "ipython3",\n   "version": "3.0.0"'  # in a cell it is text, as an output it is data
    data = nbformat.v4.new_output("display_data", {"application/json": {"version": "3.0.0", "language_info": {}}})
    cells = [nbformat.v4.new_code_cell(f"'é' # {info}", outputs=[data], id="one")]
    notebooks, folder = {}, tmp_path / "notebooks"
    for name in ("00_page.ipynb", "exercises/01_page.ipynb"):
        notebooks[name] = nbformat.v4.new_notebook(cells=cells, metadata=METADATA | {"title": "é"})
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(laid_out(notebooks[name]))
    for name in (".ipynb_checkpoints/00_page-checkpoint.ipynb", "source/00_page.py", "exercises/INSTRUCTOR.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return notebooks


def copies(folder):
    return {name: data for name, data in contents(folder / "work").items() if name.endswith(".ipynb")}


def test_a_copy_names_the_python_that_runs_it(tmp_path, originals):
    assert work.main() is None
    for notebook in originals.values():
        notebook.metadata.language_info.version = sys.version.split()[0]
    assert copies(tmp_path) == {name: laid_out(notebook) for name, notebook in originals.items()}


def test_a_copy_is_never_written_over(tmp_path, originals, monkeypatch, capsys):
    assert work.main() is None
    made = copies(tmp_path)
    mine, gone = tmp_path / "work" / "00_page.ipynb", tmp_path / "work" / "exercises" / "01_page.ipynb"
    mine.write_text("my answer")
    (mine.parent / "my own.ipynb").write_text("mine too")
    gone.unlink()
    written = mine.stat().st_mtime_ns
    assert work.main() is None
    kept = {"00_page.ipynb": b"my answer", "my own.ipynb": b"mine too"}
    assert copies(tmp_path) == kept | {"exercises/01_page.ipynb": made["exercises/01_page.ipynb"]}
    with monkeypatch.context() as patch:
        patch.setattr(work.os.path, "lexists", lambda path: False)  # as if it came between the look and the writing
        assert work.main() is None
    assert mine.read_text() == "my answer"
    assert mine.stat().st_mtime_ns == written
    assert "newer" not in capsys.readouterr().out


def test_a_newer_edition_is_told_in_a_line(tmp_path, originals, capsys):
    def told():
        assert work.main() is None
        return capsys.readouterr().out

    lesson, exercise = (tmp_path / "notebooks" / name for name in originals)
    assert told() == ""
    made = copies(tmp_path)
    exercise.write_bytes(exercise.read_bytes().replace(b'"one"', b'"two"'))
    for _ in range(2):  # until it is heeded
        line = told()
        assert line.startswith("There are newer editions of exercises/01_page.ipynb: yours in work/ stay; ")
        assert line.count("\n") == 1
        assert copies(tmp_path) == made
    (tmp_path / "work" / "exercises" / "01_page.ipynb").rename(tmp_path / "work" / "exercises" / "mine.ipynb")
    assert told() == told() == ""
    assert b'"two"' in copies(tmp_path)["exercises/01_page.ipynb"]
    for number, broken in enumerate((b"", b"\xff", b"[1]", b"5", b'{"00_page')):
        (tmp_path / "work" / work.RECORD).write_bytes(broken)
        assert told() == ""
        lesson.write_bytes(lesson.read_bytes() + b" " * number + b"\n")
        assert told().startswith("There are newer editions of 00_page.ipynb: ")


@posix
def test_a_copy_is_made_whole_or_not_at_all(tmp_path, originals):
    import resource

    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "work.py", tmp_path / "tools")
    limit = len(laid_out(originals["00_page.ipynb"])) - 10

    def run(**options):
        command = [sys.executable, "tools/work.py"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, **options)

    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    for size, told in ((full, r"Stopped: .*File too large.*\.\n"), ({}, "")):
        done = run(**size)
        assert re.fullmatch(told, done.stderr), done
        assert done.stdout == ""
        assert set(copies(tmp_path)) == (set() if told else set(originals))
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "work").write_text("a file of mine")
    assert re.fullmatch(r"Stopped: .*work'\.\n", run().stderr)
    assert (tmp_path / "work").read_text() == "a file of mine"


def test_every_copy_is_right_and_links_on(tmp_path, monkeypatch):
    folder = clone(tmp_path)
    monkeypatch.setattr(work, "ROOT", folder)
    monkeypatch.setattr(test_project, "ROOT", folder)
    assert work.main() is None
    found = copies(folder)
    assert found.keys() == {f"{name}.ipynb" for name in NAMES}
    for name, data in found.items():
        wanted = nbformat.read(folder / "notebooks" / name, as_version=4)
        wanted.metadata.language_info.version = sys.version.split()[0]
        assert data == laid_out(wanted)
        page = Path("work") / name
        assert list(test_project.broken_links(page, test_project.markdown_of(page))) == []
