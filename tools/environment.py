"""Make environment.yml, for conda and for Binder, from pyproject.toml and constraints.txt.

    python tools/environment.py                              # environment.yml alone
    python tools/environment.py constraints                  # constraints.txt anew first; torch keeps its version
    python tools/environment.py constraints torch==2.13.0    # and this torch

Only the standard library is used: constraints.txt decides what is installed, so nothing can be before it.
"""

import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "tools" / "constraints.txt"


def oldest_python() -> str:
    """Return the oldest Python that serves, as 3.11."""
    (found,) = re.findall(r'(?m)^requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    return str(found)


def environment() -> str:
    """Return environment.yml: pyproject.toml's dependencies under conda's names, at the versions tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    tested = dict(re.findall(r"(?m)^([\w-]+)==(\d+\.\d+)", CONSTRAINTS.read_text("utf-8")))
    lines = ["# Made by `python make.py environment` from pyproject.toml: change that, not this."]
    lines += ["name: gradaccum", "channels: [conda-forge]", "dependencies:"]
    lines += [f"  - python={oldest_python()}  # to Binder, >= would mean its own, older default", "  - pip"]
    # conda-forge has torch later than others have it: its range, and the CPU build where there is no GPU.
    lines += [f"  - {text.replace('torch', 'pytorch', 1)}" for text in project["dependencies"]]
    names = [re.findall(r"^[\w-]+", text)[0] for text in project["optional-dependencies"]["lessons"]]
    return "\n".join([*lines, *(f"  - {name}={tested[name]}.*" for name in names), ""])


def constraints(pins: list[str]) -> str:
    """Return constraints.txt: the newest versions that fit together, on every system and Python."""
    torch = re.findall(r"(?m)^torch==[\w.]+", CONSTRAINTS.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        python = Path(sysconfig.get_path("scripts", "venv", {"base": folder, "platbase": folder})) / "python"
        pinned = Path(folder) / "pins.txt"
        pinned.write_text("\n".join(pins or torch), "utf-8")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", "uv"], check=True)
        command = [str(python), "-m", "uv", "pip", "compile", "pyproject.toml", "--all-extras", "--universal"]
        command += ["--python-version", oldest_python(), "--constraint", str(pinned), "--no-header", "--no-annotate"]
        found = subprocess.run([*command, "--quiet"], cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if found.returncode:
        sys.exit("No set of versions fits, as shown above: name another torch.")
    # torch itself names its CUDA libraries exactly, and another build of it names others: they have no place here.
    lines = [line for line in found.stdout.splitlines() if not line.startswith(("nvidia-", "cuda-", "triton="))]
    return "\n".join(["# Made by `python make.py constraints`.", *lines, ""])


if __name__ == "__main__":
    if sys.argv[1:2] == ["constraints"]:
        CONSTRAINTS.write_text(constraints(sys.argv[2:]), "utf-8", newline="\n")
    # Binder reads its own folder alone, and a link there would be a text file in a clone on Windows.
    for place in (ROOT, ROOT / "binder"):
        (place / "environment.yml").write_text(environment(), "utf-8", newline="\n")
