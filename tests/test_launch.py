"""The links to Binder, Colab and Kaggle and the cell that installs: none without an address, right with one."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import build
import launch
import overview
import pytest
from files import ROOT, project_files, text_of

NAME = "some-one/a.course_2"
ADDRESS = f"https://github.com/{NAME}"
# Each of these leads a learner to the repository on the web, which is somewhere only if pyproject.toml says where.
REMOTE = (
    r"mybinder\.org/v2/gh/\w|colab\.research\.google\.com/github/\w|kernels/welcome\?src=http|badge[\w-]*\.svg|shields\.io"
    r"|github\.com/[\w.-]+/gradaccum|git\+https://\w|pip install [^\n`]*\bgradaccum\b(?! @ git\+\{)"
)
LINE = r"gradaccum [\d.]+, torch \d\S+, Python 3\.[\d.]+, device: \w+\n"
WRONG = ["", "none ", "github.com/a/b", "http://github.com/a/b", "git@github.com:a/b.git", "ssh://git@github.com/a/b"]
WRONG += ["https://gitlab.com/a/b", "https://github.com.net/a/b", "https://github.com/a", "https://github.com/a/.."]
WRONG += [f"https://github.com/a/b{end}" for end in ("/tree/main", "?tab=x", " c", "\n", '"', "'", ")", "`", "{x}")]


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(launch, "ADDRESS", ADDRESS)


@pytest.mark.parametrize("given", [ADDRESS, f"{ADDRESS}/", f"{ADDRESS}.git", f"{ADDRESS}.git/"])
def test_an_address_as_people_write_it(given):
    assert launch.parsed(given) == ADDRESS
    assert launch.parsed("none") is None


@pytest.mark.parametrize("given", WRONG)
def test_what_is_no_address_is_refused(tmp_path, monkeypatch, capsys, given):
    monkeypatch.setattr(launch, "PROJECT", tmp_path / "pyproject.toml")
    assert build.main([], build.make, given) == 1
    assert capsys.readouterr().err.startswith(f"{given!r} is not the address of a repository on GitHub")
    assert not launch.PROJECT.exists()


def test_an_address_is_one_line_of_pyproject():
    before = launch.project(text_of(Path("pyproject.toml")), None)
    after = launch.project(launch.project(before, "https://github.com/before/it"), ADDRESS)
    assert tomllib.loads(after)["project"]["urls"] == {"Repository": ADDRESS}
    assert launch.project(after, None) == before


@pytest.mark.parametrize("name", ["00_start_here", "exercises/03_exercises"])
def test_links_stand_below_the_title(address, name):
    path, copy = f"notebooks/{name}.ipynb", f"work%2F{name.replace('/', '%2F')}.ipynb"
    binder, colab, kaggle = wanted = [
        f"https://mybinder.org/v2/gh/{NAME}/HEAD?urlpath=lab%2Ftree%2F{copy}",
        f"https://colab.research.google.com/github/{NAME}/blob/main/{path}",
        f"https://kaggle.com/kernels/welcome?src={ADDRESS}/blob/main/{path}",
    ]
    notebook = build.expected(build.sources()[name])
    text, code = notebook.cells[1:3]
    assert [text.id, code.id] == list(launch.NAMES)
    assert text.source == f"Open this notebook on [Binder]({binder}), [Colab]({colab}) or [Kaggle]({kaggle})."
    assert unquote(binder).endswith(f"?urlpath=lab/tree/work/{name}.ipynb")
    assert code.metadata == {"tags": ["nbval-ignore-output"]}
    readme = overview.readme(text_of(Path("README.md")), build.lessons())
    assert f'\npip install "gradaccum @ git+{ADDRESS}"\n' in readme
    assert all(link in readme for link in wanted) == (path == launch.FIRST)
    # All that a link needs is there.
    assert (ROOT / path).exists()
    assert all(re.search(REMOTE, link) for link in [*wanted, code.source])


def test_without_an_address_nothing_leads_to_one(monkeypatch):
    monkeypatch.setattr(launch, "ADDRESS", None)
    texts = {str(path): text for path in project_files() if path.suffix != ".ipynb" and (text := text_of(path))}
    texts["README.md"] = overview.readme(texts["README.md"], build.lessons())
    for name, source in build.sources().items():
        texts[name] = "\n\n".join(cell.source for cell in build.expected(source).cells)
    found = {f"{name}: {match[0]}" for name, text in texts.items() for match in re.finditer(REMOTE, text)}
    assert found == set()
    assert len(texts) > 50


# Take the module off the path, as on a machine that has torch and not the course.
WITHOUT_IT = "import os, sys; sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p, 'gradaccum'))]\n"
PIP = """
import json, os, shutil, sys
json.dump(sys.argv[1:], open("asked.json", "w"))
if "GIVES" not in os.environ:
    raise OSError("no network")
shutil.copytree(os.environ["GIVES"], "site/gradaccum")
"""
FAILED = r"gradaccum could not be installed: .*, then run this cell again\.\n"


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONPATH": str(ROOT)}, LINE),
        ({"GIVES": str(ROOT / "gradaccum")}, rf"Installing gradaccum \.\.\.\n{LINE}"),
        ({}, rf"Installing gradaccum \.\.\.\n{FAILED}"),
    ],
    ids=["there", "installed", "no-network"],
)
def test_the_cell_installs_only_what_is_missing(tmp_path, address, environment, shown):
    """In a fresh process, in a folder of its own, with a `site` to import from and install into."""
    (tmp_path / "site" / "pip").mkdir(parents=True)
    (tmp_path / "site" / "pip" / "__init__.py").touch()
    (tmp_path / "site" / "pip" / "__main__.py").write_text(PIP)
    there = "PYTHONPATH" in environment
    code = ("" if there else WITHOUT_IT) + launch.cells(launch.FIRST)[1].source
    path = os.pathsep.join(["site", environment.get("PYTHONPATH", "")])
    env = os.environ | environment | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert re.fullmatch(shown, done.stdout), done
    assert (done.returncode, done.stderr) == (0, "")
    asked = tmp_path / "asked.json"
    assert asked.exists() != there
    assert there or json.loads(asked.read_text()) == ["install", "--quiet", "--no-deps", f"git+{ADDRESS}"]
