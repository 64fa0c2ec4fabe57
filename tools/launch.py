"""The links to Binder, Colab and Kaggle, and the cell that installs the module there, from the repository's address.

`make address URL=https://github.com/OWNER/NAME` writes the address into pyproject.toml, its only place, and makes the
notebooks; `URL=none` removes it. Without an address, no text names a page that might not exist.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from urllib.parse import quote

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
TABLE = "[project.urls]\n"
BRANCH = "main"  # Colab and Kaggle want its name; Binder takes HEAD
FIRST = "notebooks/00_start_here.ipynb"
NAMES = ("launch", "install")  # the generated cells; no source may use these names

WITHOUT = """\
To open it without installing anything, once this repository is public on GitHub, paste its address at \
[mybinder.org](https://mybinder.org).
`make address URL=https://github.com/OWNER/NAME` writes links to Binder, Colab and Kaggle here and into every \
notebook; `URL=none` removes them.
"""
WITH = """\
To open it without installing anything, use {links}. Each notebook has these links below its title.
On Colab and Kaggle the notebook's first cell installs the module; on Kaggle, first switch the internet on in the \
notebook's settings.

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


class SourceError(ValueError):
    """What cannot be made into a notebook, a table or a link; the message is for the author."""


def parsed(given: str) -> str | None:
    """Return an address as it is kept, or None for `none`."""
    owner, name = r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,38}", r"(?!\.{0,2}(?:\.git)?/?$)[A-Za-z0-9._-]{1,100}?"
    found = re.fullmatch(rf"(https://github\.com/{owner}/{name})(?:\.git)?/?", given)
    if found is None and given != "none":
        raise SourceError(
            f"{given!r} is not the address of a repository on GitHub, the only place that Colab and Kaggle open "
            "notebooks from: give https://github.com/OWNER/NAME, or `none` to take the present one away."
        )
    return found and found[1]


ADDRESS = parsed(tomllib.loads(PROJECT.read_text("utf-8"))["project"]["urls"].get("Repository", "none"))


def project(text: str, address: str | None) -> str:
    """Return the text of pyproject.toml with this address in the place of the one before."""
    line = f'Repository = "{address}"\n' if address else ""
    return re.sub(r"(?m)^Repository = .*\n", "", text).replace(TABLE, TABLE + line)


def links(path: str) -> dict[str, str]:
    """Return where a notebook, by its path in the repository, opens on each platform."""
    repository = ADDRESS.removeprefix("https://github.com/")
    copy = path.replace("notebooks/", "work/", 1)  # Binder makes the copies too
    return {
        "Binder": f"https://mybinder.org/v2/gh/{repository}/HEAD?urlpath={quote(f'lab/tree/{copy}', safe='')}",
        "Colab": f"https://colab.research.google.com/github/{repository}/blob/{BRANCH}/{path}",
        "Kaggle": f"https://kaggle.com/kernels/welcome?src={ADDRESS}/blob/{BRANCH}/{path}",
    }


def links_in_words(path: str) -> str:
    """Return a notebook's links as part of a sentence."""
    first, second, third = (f"[{place}]({link})" for place, link in links(path).items())
    return f"{first}, {second} or {third}"


def cells(path: str) -> list[NotebookNode]:
    """Return the cells that follow the title of the notebook at `path`: none without an address."""
    if ADDRESS is None:
        return []
    code, tags = INSTALL.replace("ADDRESS", ADDRESS).strip(), {"tags": ["nbval-ignore-output"]}
    text = f"Open this notebook on {links_in_words(path)}."
    return [new_markdown_cell(text, id=NAMES[0]), new_code_cell(code, id=NAMES[1], metadata=tags)]


def block() -> str:
    """Return what README says of opening the notebooks without an installation."""
    return WITH.format(address=ADDRESS, links=links_in_words(FIRST)) if ADDRESS else WITHOUT
