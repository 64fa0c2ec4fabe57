"""Make the notebooks of this course from their sources.

    python tools/build.py                            # all of them
    python tools/build.py 01_naive_loop              # one lesson
    python tools/build.py exercises/03_exercises     # one exercise notebook
    python tools/build.py --check                    # compare with the sources, run nothing
    python tools/build.py --with-tests 02_accumulate # run it with its `test` cells, write nothing
    python tools/build.py --address ADDRESS          # set the repository's, or `none`, and make all of them

A lesson is run in a fresh kernel and keeps what it shows. From an exercise the answers are taken out (release.py).

A source is jupytext's py:percent. Each cell opens with its name, `# %% setup` or `# %% the-promise [markdown]`, which
becomes the cell's id, so that a link, a comment and a review find the same cell after every change. Its tags say how
the page looks, and become what JupyterLab reads: a `folded` heading opens closed, a `hidden` cell without its code;
`alt="..."` is what a screen reader says of a cell's figure. A `test` cell is left out of what a learner opens.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jupytext
import launch
import nbformat
import overview
import release
from jupyter_client.manager import AsyncKernelManager
from launch import SourceError
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, NbvalKernelspecManager

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SOURCE = NOTEBOOKS / "source"
# All that JupyterLab writes when it has a kernel: where a key is missing or differs, a notebook is changed once opened.
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
        "version": "3.11.0",
    },
}
# A widget cell also carries `nbval-ignore-output`: what it shows is a live view, the cell after it tests the numbers.
TAGS = {"nbval-ignore-output", "widget", "folded", "hidden", "test"}
LOOKS = {"folded": {"jp-MarkdownHeadingCollapsed": True}, "hidden": {"jupyter": {"source_hidden": True}}}
CELL_SECONDS = 120


def lessons() -> list[Path]:
    """Find the sources of the lessons, in their order."""
    return sorted(SOURCE.glob("[0-9][0-9]_*.py"))


def sources() -> dict[str, Path]:
    """Find the sources by name: NN_name of a lesson, exercises/NN_name of its exercises."""
    found = [*lessons(), *sorted(SOURCE.glob("exercises/[0-9][0-9]_*.py"))]
    return {name_of(path): path for path in found}


def made_from(path: Path) -> Path:
    """Say where the notebook of a source lies."""
    return (NOTEBOOKS / path.relative_to(SOURCE)).with_suffix(".ipynb")


def name_of(path: Path) -> str:
    """Name a source or a notebook: 01_naive_loop, exercises/01_exercises."""
    return f"exercises/{path.stem}" if is_exercise(path) else path.stem


def is_exercise(path: Path) -> bool:
    """Tell the source of exercises from that of a lesson."""
    return path.parent.name == "exercises"


def expected(path: Path) -> NotebookNode:
    """Read what a source makes, without outputs; running it is not needed."""
    notebook = read_source(path)
    return release.released(release.marked(notebook)) if is_exercise(path) else notebook


def read_source(path: Path, tests: bool = False) -> NotebookNode:
    """Read a source into a notebook without outputs: ids from the cells' names, metadata from their tags."""
    notebook = nbformat.v4.new_notebook(metadata=METADATA)
    notebook.nbformat_minor = 5  # the first with cell ids
    allowed = f"at most the tags {', '.join(sorted(TAGS))}"
    for number, cell in enumerate(jupytext.read(path, fmt="py:percent").cells, start=1):
        here = f"{path.name}, cell {number}"
        name, tags = cell.metadata.pop("title", ""), cell.metadata.pop("tags", [])
        alt = cell.metadata.pop("alt", None)
        if not name:
            raise SourceError(f"{here} has no name: open it with `# %% some-name`.")
        if not re.fullmatch(r"[a-z0-9-]{1,64}", name):
            raise SourceError(f"{here} is named {name!r}: use 1 to 64 of a-z, 0-9 and the hyphen.")
        if name in [*launch.NAMES, *(other.id for other in notebook.cells)]:
            raise SourceError(f"{here} is named {name!r}, and so is another cell: each name stands once in a notebook.")
        layout = [key for key in cell.metadata if key.startswith("lines_to_") or key == "cell_marker"]  # jupytext's own
        if unknown := [*(set(cell.metadata) - set(layout)), *sorted(set(tags) - TAGS)]:
            raise SourceError(f"{here}, {name!r}, has {unknown[0]!r}: besides its name a cell has {allowed}.")
        if cell.cell_type == "markdown":
            cell.source = overview.filled(cell.source, path, lessons())
        if wrong := misplaced(cell, tags, alt):
            raise SourceError(f"{here}, {name!r}, {wrong}.")
        kept = [tag for tag in tags if tag not in LOOKS]
        metadata = {"tags": kept} if kept else {}
        for tag in set(tags) & set(LOOKS):
            metadata |= LOOKS[tag]
        if alt:
            metadata["alt"] = alt
        notebook.cells.append(nbformat.from_dict({**cell, "id": name, "metadata": metadata}))
    if not tests:
        notebook.cells = [cell for cell in notebook.cells if "test" not in cell.metadata.get("tags", [])]
    notebook.cells[1:1] = launch.cells(f"notebooks/{name_of(path)}.ipynb")
    nbformat.validate(notebook)
    return notebook


def misplaced(cell: NotebookNode, tags: list[str], alt: str | None) -> str:
    """Say what is wrong with where a tag is used; "" if nothing is."""
    is_heading = cell.cell_type == "markdown" and cell.source.startswith("#")
    if "folded" in tags and not is_heading:
        return "is folded but is no heading, and only a heading can be closed"
    if cell.cell_type != "code" and (alt or {"hidden", "test"} & set(tags)):
        return "is Markdown, and only code is hidden, tests, or has a figure's alt"
    if "test" in tags and not re.search(r"\bassert\b", cell.source):
        return "is a test without an assert"
    return ""


@contextmanager
def kernel(notebook: NotebookNode, **environment: str) -> Iterator[NotebookClient]:
    """Start a kernel of this Python, whatever the machine's `python3` kernel is, in the notebooks' folder."""
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_name=CURRENT_ENV_KERNEL_NAME, kernel_spec_manager=NbvalKernelspecManager()),
        timeout=CELL_SECONDS,
        coalesce_streams=True,  # how a stream was cut into messages is chance
        record_timing=False,
        shutdown_kernel="immediate",
        extra_arguments=["--HistoryManager.hist_file=:memory:", "--IPKernelApp.log_level=ERROR"],
    )
    inherited = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # figures are inline
    inherited["TQDM_DISABLE"] = "1"  # a bar, on a slow machine, is no output to keep
    inherited["GRADACCUM_PROGRESS"] = "off"  # nor are these an author's own exercises
    with client.setup_kernel(cleanup_kc=True, cwd=str(NOTEBOOKS), env=inherited | environment):
        yield client


def run_cells(client: NotebookClient, cells: Iterable[NotebookNode]) -> None:
    """Run code cells one after another; SourceError names the one that fails."""
    for cell in cells:
        try:
            client.execute_cell(cell, client.nb.cells.index(cell))
        except CellExecutionError as error:
            problem = f"{error.ename}: {error.evalue}\n\n{error.traceback}"
        except CellTimeoutError:
            problem = f"took longer than {CELL_SECONDS} seconds"
        except DeadKernelError:
            problem = "the kernel died, perhaps for want of memory"
        else:
            continue
        raise SourceError(f"cell {cell.id!r} failed: {problem}")


def build(path: Path, tests: bool = False) -> NotebookNode:
    """Read a source, run it in a fresh kernel, and keep the outputs of all cells but the widgets."""
    notebook = read_source(path, tests)
    with kernel(notebook) as client:
        try:
            run_cells(client, notebook.cells)
        except SourceError as error:
            raise SourceError(f"{path.name}, {error}") from None
    for cell in notebook.cells:
        if "widget" in cell.metadata.get("tags", []):
            cell.outputs = []
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def differences(path: Path) -> list[str]:
    """Say where a committed notebook does not match its source, outputs apart. Nothing is run."""
    made, wanted = made_from(path), expected(path)
    if not made.exists():
        return [f"{made.name} is missing"]
    text = made.read_text(encoding="utf-8")
    try:
        found = nbformat.reads(text, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        return [f"{made.name} is no notebook: {str(error).splitlines()[0]}"]
    names, committed = ([cell.id for cell in wanted.cells], [cell.get("id", "no id") for cell in found.cells])
    problems = [f"cell {name!r} is missing" for name in names if name not in committed]
    problems += [f"cell {name!r} is not in the source" for name in committed if name not in names]
    if not problems and names != committed:
        problems.append("the cells stand in another order, or one stands twice")
    ours = {cell.id: cell for cell in wanted.cells}
    for cell in found.cells:
        for key in ("cell_type", "source", "metadata", "attachments"):
            if cell.get("id") in ours and cell.get(key) != ours[cell.id].get(key):
                problems.append(f"cell {cell.id!r} has another {key}")
    for key in ("metadata", "nbformat", "nbformat_minor"):
        if found[key] != wanted[key]:
            problems.append(f"the notebook has another {key}")
    if text != nbformat.writes(found) + "\n":
        problems.append("the file is laid out by another program")
    return [f"{made.name}: {problem}" for problem in problems]


def laid_out(notebook: NotebookNode) -> bytes:
    """Return the notebook as a file, in nbformat's own layout."""
    nbformat.validate(notebook)
    return (nbformat.writes(notebook) + "\n").encode()


def write(data: bytes, path: Path) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def make(path: Path) -> list[str]:
    """Make one notebook and say so."""
    started = time.perf_counter()
    notebook = expected(path) if is_exercise(path) else build(path)
    data = laid_out(notebook)
    write(data, made_from(path))
    seconds = time.perf_counter() - started
    print(f"{name_of(path)}: {len(notebook.cells)} cells, {seconds:.1f} s, {len(data):,} bytes", flush=True)
    return []


def test(path: Path) -> list[str]:
    """Run one lesson with its `test` cells and say so; nothing is written."""
    if is_exercise(path):
        return []  # its checks are its tests
    notebook = build(path, tests=True)
    tests = sum("test" in cell.metadata.get("tags", []) for cell in notebook.cells)
    print(f"{name_of(path)}: runs, and its {tests} test cells hold")
    return []


def check(path: Path) -> list[str]:
    """Compare one notebook with its source and say so."""
    problems = differences(path)
    print("\n".join(problems) or f"{name_of(path)}: as its source says")
    return problems


def kept() -> dict[Path, str]:
    """Return what the module keeps of the exercises: the worked solutions, and what a card to share says."""
    paths = [path for path in sources().values() if is_exercise(path)]
    both = [(release.marked(read_source(path)), expected(path)) for path in paths]
    return {release.ANSWERS: release.answers(both), release.ABOUT: release.about(both)}


def readme() -> dict[Path, str]:
    """Return README with its links and its table of the lessons."""
    path = NOTEBOOKS.parent / "README.md"
    return {path: overview.readme(path.read_text("utf-8"), lessons())} if path.exists() else {}


def keep(files: dict[Path, str], act: Callable[[Path], list[str]]) -> list[str]:
    """Write these files, or compare them."""
    stale = [path for path, text in files.items() if not path.exists() or path.read_text("utf-8") != text]
    if act is make:
        for path in stale:
            write(files[path].encode(), path)
        return []
    problems = [f"{path.name}: does not hold what the sources say" for path in stale]
    print(*problems, sep="\n", end="\n" if problems else "")
    return problems


def set_address(given: str) -> None:
    """Write the repository's address into pyproject.toml, or take it away."""
    launch.ADDRESS = launch.parsed(given)
    text = launch.PROJECT.read_text("utf-8")
    write(launch.project(text, launch.ADDRESS).encode(), launch.PROJECT)


def main(names: list[str], act: Callable[[Path], list[str]] = make, address: str | None = None) -> int:
    """Make or check the named notebooks, or all of them; return the exit status."""
    known = sources()
    chosen = [name_of(Path(name)) for name in names] or list(known)
    try:
        if address is not None:
            set_address(address)
        if unknown := [name for name in chosen if name not in known]:
            raise SourceError(f"there is no source {unknown[0]!r}; there are: {', '.join(known) or 'none'}.")
        problems = [problem for name in chosen for problem in act(known[name])]
        if any(is_exercise(known[name]) for name in chosen):
            problems += keep(kept(), act)
        if not names:
            problems += keep(readme(), act)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 1
    made = {made_from(path) for path in known.values()}
    found = [*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("exercises/*.ipynb")]
    for orphan in [] if names else sorted(set(found) - made):
        problems.append(f"{orphan.relative_to(NOTEBOOKS)}: has no source")
        print(problems[-1])
    return 1 if problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the notebooks from their sources.")
    parser.add_argument("names", nargs="*", help="such as 01_naive_loop; all of them if none is named")
    parser.add_argument("--check", action="store_true", help="compare sources, ids and metadata; run nothing")
    parser.add_argument("--with-tests", action="store_true", help="run a lesson with its `test` cells; write nothing")
    parser.add_argument("--address", help="set the repository's address, https://github.com/OWNER/NAME or none")
    arguments = parser.parse_args()
    act = check if arguments.check else test if arguments.with_tests else make
    sys.exit(main(arguments.names, act, arguments.address))
