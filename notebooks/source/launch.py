"""The repository's public address: where it stands, and what is written from it.

    python make.py address https://github.com/owner/name    # into README and every notebook
    python make.py address none                             # out of them again

It stands in pyproject.toml, as [project.urls], and nowhere else. Without one, nothing here names a place on the web
that might not exist. This file holds texts; build.py reads and writes the files.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from urllib.parse import quote

import overview
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).resolve().parents[2]
PROJECT, README = ROOT / "pyproject.toml", ROOT / "README.md"
BRANCH = "main"  # Colab and Kaggle want its name; Binder takes HEAD
FIRST = "notebooks/00_start_here.ipynb"
NAMES = ("launch", "install")  # the cells that are generated; no source may use these
START, END = "<!-- launch: `make address` writes this -->\n", "<!-- /launch -->\n"

WITHOUT = """\
To open it without installing anything, once this repository is public on GitHub: paste its address at [mybinder.org](https://mybinder.org).
`make address URL=https://github.com/OWNER/NAME` writes links to Binder, Colab and Kaggle here and into every notebook; with `URL=none` it takes them away.
"""
WITH = """\
To open it without installing anything: on {links}. Each notebook has these links below its title.
On Colab and Kaggle its first cell installs the module; on Kaggle, switch the internet on in the notebook's settings first.

For the module alone, in a Python that has torch:

```
pip install "gradaccum @ git+{address}"
```
"""
# With --no-deps: the platform's own torch, matplotlib and ipywidgets stay as they are.
INSTALL = """\
# Where gradaccum is missing, as on Colab and Kaggle, install it, and nothing else.
import importlib.util
import subprocess
import sys

import torch

if importlib.util.find_spec("gradaccum") is None:
    print("Installing gradaccum ...")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    pip += ["git+ADDRESS"]
    subprocess.run(pip, capture_output=True)
    importlib.invalidate_caches()
if importlib.util.find_spec("gradaccum") is None:
    print(
        "gradaccum could not be installed: let this notebook use the internet "
        "(on Kaggle, a switch in its settings), then run this cell again."
    )
else:
    import gradaccum

    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    versions = f"gradaccum {gradaccum.__version__}, torch {torch.__version__}"
    print(f"{versions}, Python {sys.version.split()[0]}, device: {device}")
"""


class AddressError(ValueError):
    """No address, or no place to write it; the message is for the author."""


def stands_in(text: str) -> str | None:
    """Read the address from the text of pyproject.toml."""
    return tomllib.loads(text)["project"].get("urls", {}).get("Repository")


ADDRESS = stands_in(PROJECT.read_text("utf-8"))


def parsed(given: str) -> str | None:
    """Take an address as people write it, or `none`; AddressError says what else would do."""
    if given == "none":
        return None
    owner, name = (
        r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,38}",
        r"(?!\.{0,2}(?:\.git)?/?$)[A-Za-z0-9._-]{1,100}?",
    )
    found = re.fullmatch(rf"(https://github\.com/{owner}/{name})(?:\.git)?/?", given)
    if found is None:
        raise AddressError(
            f"{given!r} is not the address of a repository on GitHub, the only place that Colab and Kaggle open "
            "notebooks from: give https://github.com/OWNER/NAME, or `none` to take the present one away."
        )
    return found[1]


def links(path: str) -> dict[str, str]:
    """Say where a notebook, by its path in the repository, opens on each platform."""
    repository = ADDRESS.removeprefix("https://github.com/")
    copy = path.replace("notebooks/", "work/", 1)  # Binder makes the copies too
    in_lab = quote(f"lab/tree/{copy}", safe="")
    return {
        "Binder": f"https://mybinder.org/v2/gh/{repository}/HEAD?urlpath={in_lab}",
        "Colab": f"https://colab.research.google.com/github/{repository}/blob/{BRANCH}/{path}",
        "Kaggle": f"https://kaggle.com/kernels/welcome?src={ADDRESS}/blob/{BRANCH}/{path}",
    }


def links_in_words(path: str) -> str:
    """Write a notebook's links as part of a sentence."""
    first, second, third = (f"[{place}]({link})" for place, link in links(path).items())
    return f"{first}, {second} or {third}"


def cells(path: str) -> list[NotebookNode]:
    """Make the cells that follow the title of the notebook at `path`: none without an address."""
    if ADDRESS is None:
        return []
    text = f"Open this notebook on {links_in_words(path)}."
    code = INSTALL.replace("ADDRESS", ADDRESS).strip()
    tags = {"tags": ["nbval-ignore-output"]}
    return [
        new_markdown_cell(text, id=NAMES[0]),
        new_code_cell(code, id=NAMES[1], metadata=tags),
    ]


def readme(text: str) -> str:
    """Write the block that README.md keeps for this."""
    block = (
        WITHOUT
        if ADDRESS is None
        else WITH.format(address=ADDRESS, links=links_in_words(FIRST))
    )
    return overview.within(text, START, END, block)


def project(text: str) -> str:
    """Write the address into the text of pyproject.toml, in the place of the one that was there."""
    text = re.sub(r"(?m)^Repository = .*\n", "", text)
    text = text.replace("[project.urls]\n\n", "")
    if ADDRESS is not None:
        line, table = f'Repository = "{ADDRESS}"\n', "[project.urls]\n"
        if table in text:
            text = text.replace(table, table + line)
        else:
            text = text.replace(
                "[project.optional-dependencies]\n",
                f"{table}{line}\n[project.optional-dependencies]\n",
            )
    if stands_in(text) != ADDRESS:
        raise AddressError(
            "pyproject.toml is laid out in an unknown way: set Repository in [project.urls] by hand."
        )
    return text
