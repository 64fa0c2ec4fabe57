"""What a learner waits for: the import, and each lesson's run time and memory in a fresh kernel."""

import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from contenders import table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PAIRS = 10
REACH_IMPORT, REACH_TWO, REACH_ONE, REACH_MB = 50, 15, 30, 900  # ms, s, s, MB
IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
PEAK = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def import_ms(module: str) -> float:
    """Give the milliseconds that importing a module takes in a fresh process."""
    run = subprocess.run(
        [sys.executable, "-c", IMPORT.format(module)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return float(run.stdout) * 1000


def imports(pairs: int) -> list[str]:
    import_ms("gradaccum")  # so that the files are in the system's cache
    torch_ms, ours_ms = [], []
    for pair in tqdm(range(pairs), desc="import", leave=False):
        for module in ("torch", "gradaccum") if pair % 2 else ("gradaccum", "torch"):
            (torch_ms if module == "torch" else ours_ms).append(import_ms(module))
    more = [ours - torch for ours, torch in zip(ours_ms, torch_ms, strict=True)]
    after = [import_ms("torch; t = time.perf_counter(); import gradaccum") for _ in range(pairs)]
    rows = [
        [what, f"{median(ms):.1f}", f"{min(ms):.1f} to {max(ms):.1f}"]
        for what, ms in (
            ("`import torch`", torch_ms),
            ("`import gradaccum`", ours_ms),
            ("the difference, pair by pair", more),
            ("`import gradaccum` after `import torch` in one process", after),
        )
    ]
    word = "reached" if median(more) <= REACH_IMPORT else "MISSED"
    return [
        *table(["import", "ms (median)", "lowest to highest"], rows),
        f"{pairs} pairs of fresh processes. Reach: a difference of at most {REACH_IMPORT} ms: {word}.",
        "",
    ]


def run_notebook(path: Path, cores: int) -> tuple[float, float]:
    """Run a notebook in a fresh kernel on so many cores: seconds, the kernel's start included, and its VmHWM in MB."""
    import nbformat
    from nbclient import NotebookClient

    notebook: Any = nbformat.read(path, as_version=4)
    proc = Path("/proc/self/status").exists()
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        if allowed is not None:
            os.sched_setaffinity(0, sorted(allowed)[:cores])  # the kernel inherits it
        start = time.perf_counter()
        with client.setup_kernel():
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
            seconds = time.perf_counter() - start
            megabytes = math.nan  # where there is no /proc
            if proc:
                notebook.cells.append(nbformat.v4.new_code_cell(PEAK))
                client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1)
                megabytes = int(notebook.cells[-1].outputs[0].text.split()[1]) * 1024 / 1e6
    finally:
        if allowed is not None:
            os.sched_setaffinity(0, allowed)
    return seconds, megabytes


def notebooks() -> list[str]:
    if any(importlib.util.find_spec(name) is None for name in ("nbclient", "ipykernel")):
        return ["Notebooks: not measured, nbclient or ipykernel is not installed."]
    rows, missed = [], []
    for path in tqdm(sorted(NOTEBOOKS.glob("*.ipynb")), desc="notebooks", leave=False):
        two, peak = run_notebook(path, 2)
        one = run_notebook(path, 1)[0] if hasattr(os, "sched_setaffinity") else math.nan
        rows.append([path.stem, f"{two:.1f}", f"{one:.1f}", f"{peak:.0f}"])
        if two > REACH_TWO or one > REACH_ONE or peak > REACH_MB:
            missed.append(path.stem)
    return [
        *table(["notebook", "seconds, two cores", "seconds, pinned to one", "kernel's peak, MB (VmHWM)"], rows),
        f"Reach: at most {REACH_TWO} s on two cores, {REACH_ONE} s on one, {REACH_MB} MB: "
        f"{'MISSED by ' + ', '.join(missed) if missed else f'reached by all {len(rows)}'}.",
    ]


def run(quick: bool) -> str:
    found = ["Notebooks: not run by --quick."] if quick else notebooks()
    return "\n".join(imports(1 if quick else PAIRS) + found)
