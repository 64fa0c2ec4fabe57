"""Does a lesson that is wrong fail? Known faults, run as the lessons are, must be reported, each by its cell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]
VIEW = """import ipywidgets
moves = []
slider = ipywidgets.IntSlider(value=1)
slider.observe(lambda change: moves.append(change.new), names={names!r})
slider"""
STUB = "def gradient():\n    {body}\n\ngradient()"


def printed(text):
    return [new_output("stream", name="stdout", text=text)]


def page(text):
    return [new_output("display_data", {"text/html": text, "text/plain": "<IPython.core.display.HTML object>"})]


IGNORED, LIVE, RAISES = ["nbval-ignore-output"], ["nbval-ignore-output", "widget"], ["raises-exception"]
ERROR = [new_output("error", ename="NotImplementedError", evalue="write it", traceback=[])]
SHOW = "from IPython.display import HTML, display\ndisplay(HTML('<details>{number}</details>'))"
CELLS = [  # right, wrong, what both store, tags; the wrong one must fail, and where there is none, neither
    ("count = 4", None, [], []),
    ("print(2 + 2)", "print(2 + 3)", printed("4\n"), []),
    ("print(count)", "count", printed("4\n"), []),
    ("print(count)", "pass", printed("4\n"), []),
    ("pass", "print(count)", [], []),
    ("print(count)", "print(4.000001)", printed("4\n"), []),
    (SHOW.format(number=4), SHOW.format(number=5), page("<details>4</details>"), []),
    ("assert count == 4", "assert count == 5, 'not equal'", [], []),
    ("print('3 s')", None, printed("2 s\n"), IGNORED),
    ("assert count == 4", "assert count == 5, 'ignored is the output, not the error'", [], IGNORED),
    (STUB.format(body="raise NotImplementedError('write it')"), STUB.format(body="return 4"), ERROR, RAISES),
    (STUB.format(body="raise NotImplementedError('write it')"), STUB.format(body="raise ValueError"), ERROR, RAISES),
    (VIEW.format(names="value"), VIEW.format(names="values"), [], LIVE),
    ("slider.value = 3\nassert moves == [3]", "slider.value = 3\nassert moves == [3], 'it did not fire'", [], []),
    ("print(count)", None, printed("4\n"), []),
]
# A view that does not fire says nothing itself: its own cell passes, and the next one tells.
SILENT = next(number for number, cell in enumerate(CELLS) if cell[3] == LIVE)


def write(path, sources):
    """A notebook with these sources over the stored outputs of the table."""
    cells = [
        new_code_cell(source, id=f"cell-{number}", execution_count=number + 1, outputs=stored, metadata={"tags": tags})
        for number, (source, (_, _, stored, tags)) in enumerate(zip(sources, CELLS, strict=True))
    ]
    nbformat.write(new_notebook(cells=cells), path)


def test_nbval_reports_exactly_the_faults(tmp_path):
    write(tmp_path / "right.ipynb", [right for right, _, _, _ in CELLS])
    write(tmp_path / "wrong.ipynb", [wrong or right for right, wrong, _, _ in CELLS])
    options = ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "--color=no", "-rA"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = re.findall(r"^(\w+) \S*?(right|wrong)\.ipynb::Cell (\d+)", done.stdout, re.M)
    expected = {("PASSED", "right", str(number)) for number in range(len(CELLS))}
    for number, (_, wrong, _, _) in enumerate(CELLS):
        expected.add(("PASSED" if wrong is None or number == SILENT else "FAILED", "wrong", str(number)))
    assert set(found) == expected, done.stdout + done.stderr
    assert len(found) == 2 * len(CELLS)
    assert done.returncode == 1
