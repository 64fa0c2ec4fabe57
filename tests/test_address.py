"""The repository's address: nowhere before it is set, in every link once it is, gone to the byte when taken away."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import build
import launch
import nbformat
import pytest
from test_project import project_files, text_of

ROOT = Path(__file__).resolve().parents[1]
NAME = "some-one/a.course_2"
ADDRESS = f"https://github.com/{NAME}"
HIDDEN = shutil.ignore_patterns(".*", "__pycache__", "work")
# Each of these leads a learner to the repository on the web, which is somewhere only if pyproject.toml says where.
REMOTE = (
    r"mybinder\.org/v2/gh/\w|colab\.research\.google\.com/github/\w|kernels/welcome\?src=http|badge[\w-]*\.svg|shields\.io"
    r"|github\.com/[\w.-]+/gradaccum|git\+https://\w|pip install [^\n`]*\bgradaccum\b(?! @ git\+\{)"
)
LINE = r"gradaccum [\d.]+, torch \d\S+, Python 3\.[\d.]+, device: \w+\n"


def outputs(notebook):
    """What each code cell shows, by name, as text."""
    return {
        cell.id: [output.get("text") or output.get("data", {}).get("text/plain") for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def installing(monkeypatch):
    """The code of the generated cell."""
    monkeypatch.setattr(launch, "ADDRESS", ADDRESS)
    return launch.cells(launch.FIRST)[1].source


# --------------------------------------------------------------------------------------------------- the addresses


@pytest.mark.parametrize("given", [ADDRESS, f"{ADDRESS}/", f"{ADDRESS}.git", f"{ADDRESS}.git/"])
def test_an_address_is_taken_as_people_write_it(given):
    assert launch.parsed(given) == ADDRESS


def test_the_address_that_stands_here_is_one_that_would_be_taken():
    assert launch.parsed(launch.ADDRESS or "none") == launch.ADDRESS


def test_without_an_address_nothing_leads_to_one(monkeypatch):
    monkeypatch.setattr(launch, "ADDRESS", None)
    texts = {str(path): text for path in project_files() if (text := text_of(path))}
    texts |= {"README.md": launch.readme(texts["README.md"]), "pyproject.toml": launch.project(texts["pyproject.toml"])}
    for name in texts:
        if name.endswith(".ipynb"):
            notebook = nbformat.reads(texts[name], as_version=4)
            kept = [cell.source for cell in notebook.cells if cell.id not in launch.NAMES]
            texts[name] = "\n\n".join(kept)
    found = {f"{name}: {match[0]}" for name, text in texts.items() for match in re.finditer(REMOTE, text)}
    assert found == set()
    assert "[project.urls]" not in texts["pyproject.toml"]
    assert len(texts) > 50


def test_a_link_that_leads_to_one_would_be_noticed(monkeypatch):
    monkeypatch.setattr(launch, "ADDRESS", ADDRESS)
    for text in [
        *launch.links(launch.FIRST).values(),
        installing(monkeypatch),
        " ".join(["pip", "install", "gradaccum"]),
    ]:
        assert re.search(REMOTE, text), text
    pip = launch.WITH.format(address=ADDRESS, links="").splitlines()
    assert sum(bool(re.search(REMOTE, line)) for line in pip) == 1


# ------------------------------------------------------------------------------------- setting it, and taking it away


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A copy of what an address is written into, without one, and the builder at work there."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=HIDDEN)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(build, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "notebooks" / "source")
    monkeypatch.setattr(launch, "PROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(launch, "README", tmp_path / "README.md")
    monkeypatch.setattr(launch, "ADDRESS", launch.ADDRESS)
    assert build.set_address("none") == 0
    return tmp_path


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_address_is_written_everywhere_and_taken_away_without_a_trace(course, capsys):
    before, paths = contents(course), list(build.sources().values())
    assert len(paths) == 13
    old = {path: nbformat.read(build.made_from(path), as_version=4) for path in paths}
    assert build.set_address("https://github.com/before/it.git") == 0
    assert build.set_address(ADDRESS) == 0
    assert f"The address is now {ADDRESS}: 15 files say so.\n" in capsys.readouterr().out
    texts = {name: text.decode() for name, text in contents(course).items() if name.suffix != ".png"}
    assert not [name for name, text in texts.items() if "before/it" in text]
    assert tomllib.loads(texts[Path("pyproject.toml")])["project"]["urls"] == {"Repository": ADDRESS}

    def wanted(path):
        assert (ROOT / path).exists()
        copy = path.replace("notebooks/", "work/").replace("/", "%2F")
        return [
            f"https://mybinder.org/v2/gh/{NAME}/HEAD?urlpath=lab%2Ftree%2F{copy}",
            f"https://colab.research.google.com/github/{NAME}/blob/main/{path}",
            f"https://kaggle.com/kernels/welcome?src={ADDRESS}/blob/main/{path}",
        ]

    for path in paths:
        assert build.differences(path) == []
        notebook = nbformat.read(build.made_from(path), as_version=4)
        text, code = notebook.cells[1:3]
        assert [text.id, code.id] == ["launch", "install"]
        place = f"notebooks/{build.name_of(path)}.ipynb"
        assert re.findall(r"\[(\w+)\]\((\S+)\)", text.source) == [
            *zip(["Binder", "Colab", "Kaggle"], wanted(place), strict=True)
        ]
        assert unquote(wanted(place)[0]).endswith(f"?urlpath=lab/tree/work/{build.name_of(path)}.ipynb")
        assert len(text.source.splitlines()) == 1
        assert f'"git+{ADDRESS}"' in code.source
        assert dict(code.metadata) == {"tags": ["nbval-ignore-output"]}
        counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
        assert counts == ([None] * len(counts) if build.is_exercise(path) else list(range(1, len(counts) + 1)))
        shown = outputs(notebook).pop("install")
        assert shown == [] if build.is_exercise(path) else re.fullmatch(LINE, *shown)
        # All else is as it was: no lesson was run for this.
        assert [cell for cell in notebook.cells if cell.id not in launch.NAMES and cell.cell_type == "markdown"] == [
            cell for cell in old[path].cells if cell.cell_type == "markdown"
        ]
        assert outputs(notebook) == {**outputs(old[path]), "install": outputs(notebook)["install"]}
    page = texts[Path("README.md")]
    assert [link for _, link in re.findall(r"\[(Binder|Colab|Kaggle)\]\((\S+)\)", page)] == wanted(launch.FIRST)
    assert f'\npip install "gradaccum @ git+{ADDRESS}"\n' in page
    assert build.set_address("none") == 0
    assert contents(course) == before


WRONG = ["", "none ", "github.com/a/b", "http://github.com/a/b", "git@github.com:a/b.git", "ssh://git@github.com/a/b"]
WRONG += ["https://gitlab.com/a/b", "https://github.com.net/a/b", "https://github.com/a", "https://github.com/a/.."]
WRONG += [
    f"https://github.com/a/b{end}" for end in ("/tree/main", "?tab=readme", " c", "\n", '"', "'", ")", "`", "{x}")
]


def test_what_is_no_address_is_refused_in_one_sentence_and_changes_nothing(course, capsys):
    assert build.set_address(ADDRESS) == 0
    before = contents(course)
    for given in WRONG:
        capsys.readouterr()
        assert build.set_address(given) == 1
        told = capsys.readouterr().err
        assert told.startswith(f"Nothing was changed. {given!r} is not the address of a repository on GitHub"), told
        assert told.count("\n") == 1
    assert contents(course) == before


def test_a_failure_leaves_nothing_half_done(course, monkeypatch, capsys):
    before, write, written = contents(course), build.write, []

    def full(data, path):
        written.append(path)
        if len(written) == 7:
            raise OSError("No space left on device")
        write(data, path)

    monkeypatch.setattr(build, "write", full)
    monkeypatch.setattr(build, "greeting", lambda: [])
    assert build.set_address(ADDRESS) == 1
    assert "Nothing was changed. No space left on device" in capsys.readouterr().err
    assert len(written) == 7 + 6  # those that were written were put back
    assert contents(course) == before

    readme, project, lesson = course / "README.md", course / "pyproject.toml", course / launch.FIRST
    for path, old, new, told in (
        (readme, launch.END, "", "README.md has lost two of its lines"),
        (project, "[project.optional-dependencies]\n", "[project.optional-dependencies] # x\n", "in an unknown way"),
        (lesson, "# Start here", "# Begin here", "cell 'promise' has another source: make the notebooks first"),
    ):
        right = path.read_text("utf-8")
        assert old in right
        path.write_text(right.replace(old, new), "utf-8")
        changed = contents(course)
        assert build.set_address(ADDRESS) == 1
        assert told in capsys.readouterr().err
        assert contents(course) == changed
        path.write_text(right, "utf-8")


def test_other_addresses_of_the_project_stay(monkeypatch):
    before = text_of(Path("pyproject.toml"))
    monkeypatch.setattr(launch, "ADDRESS", None)
    before = launch.project(before)
    table = '[project.urls]\nDocumentation = "https://example.org/"\n\n[project.optional-dependencies]\n'
    mine = before.replace("[project.optional-dependencies]\n", table)
    monkeypatch.setattr(launch, "ADDRESS", ADDRESS)
    urls = tomllib.loads(launch.project(mine))["project"]["urls"]
    assert urls == {"Repository": ADDRESS, "Documentation": "https://example.org/"}
    monkeypatch.setattr(launch, "ADDRESS", None)
    assert launch.project(launch.project(mine)) == mine


# ----------------------------------------------------------------------------------------------- the cell that installs

# Take the module off the path, as on a machine that has torch and not the course.
WITHOUT_IT = (
    "import os, sys; sys.path[:] = [at for at in sys.path if not os.path.isdir(os.path.join(at, 'gradaccum'))]\n"
)
PIP = """
import json, os, shutil, sys
json.dump(sys.argv[1:], open("asked.json", "w"))
if "GIVES" not in os.environ:
    raise OSError("no network")
shutil.copytree(os.environ["GIVES"], "site/gradaccum")
"""


def ran(code, folder, python=sys.executable, **environment):
    """Run a cell's code in a fresh process, in a folder of its own, with a `site` to import from and install into."""
    paths = os.pathsep.join(["site", environment.pop("PYTHONPATH", "")])
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env = own | {"PYTHONPATH": paths} | environment
    return subprocess.run([python, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("there", "works", "shown"),
    [
        (True, True, LINE),
        (False, True, rf"Installing gradaccum \.\.\.\n{LINE}"),
        (
            False,
            False,
            r"Installing gradaccum \.\.\.\ngradaccum could not be installed: .*, then run this cell again\.\n",
        ),
    ],
    ids=["there", "installed", "no-network"],
)
def test_the_cell_installs_the_module_only_where_it_is_missing(tmp_path, monkeypatch, there, works, shown):
    (tmp_path / "site" / "pip").mkdir(parents=True)
    (tmp_path / "site" / "pip" / "__init__.py").touch()
    (tmp_path / "site" / "pip" / "__main__.py").write_text(PIP)
    code = installing(monkeypatch)
    done = ran(
        code if there else WITHOUT_IT + code,
        tmp_path,
        **({"PYTHONPATH": str(ROOT)} if there else {}),
        **({"GIVES": str(ROOT / "gradaccum")} if works else {}),
    )
    assert re.fullmatch(shown, done.stdout), done
    assert (done.returncode, done.stderr) == (0, "")
    asked = tmp_path / "asked.json"
    assert asked.exists() != there
    if not there:
        assert json.loads(asked.read_text()) == ["install", "--quiet", "--no-deps", f"git+{ADDRESS}"]


@pytest.mark.slow
def test_pip_installs_the_module_and_nothing_else_from_the_address(tmp_path, monkeypatch):
    platform, repository = tmp_path / "platform", tmp_path / "repository"
    subprocess.run([sys.executable, "-m", "venv", platform], check=True)
    (site,) = platform.glob("[Ll]ib/**/site-packages")
    packages = [
        path for path in sys.path if "-packages" in path
    ]  # the platform has torch; the module is not among them
    (site / "packages.pth").write_text("\n".join(packages), "utf-8")
    before = set(site.iterdir())
    for path in project_files():
        if path.parts[0] in ("gradaccum", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
            (repository / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, repository / path)
    me = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "."], [*me, "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", str(repository), *command], check=True)
    # git fetches the address from that folder instead.
    stand_in = {"GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf", "GIT_CONFIG_VALUE_0": ADDRESS}
    code = installing(monkeypatch) + "\nprint(gradaccum.__file__)"
    done = ran(code, tmp_path, next(platform.glob("[bS]*/python*")), **stand_in, GIT_CONFIG_COUNT="1")
    assert re.fullmatch(rf"Installing gradaccum \.\.\.\n{LINE}.*\n", done.stdout), done
    assert Path(done.stdout.splitlines()[-1]).samefile(site / "gradaccum" / "__init__.py")
    assert {path.name.partition("-")[0] for path in set(site.iterdir()) - before} == {"gradaccum"}


@pytest.mark.slow
def test_with_an_address_all_is_as_the_sources_say_and_lessons_run(tmp_path):
    folder = shutil.copytree(ROOT, tmp_path / "course", symlinks=True, ignore=HIDDEN)
    env = os.environ | {"PYTHONPATH": str(folder)}

    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    builder, exercise = "notebooks/source/build.py", folder / "notebooks" / "exercises" / "01_exercises.ipynb"
    run(builder, f"--address={ADDRESS}")
    run(builder, "--check")
    written = exercise.read_bytes()
    run(builder, "00_start_here", "exercises/01_exercises")  # made from their sources, they have the cells too
    run(builder, "--check")
    assert exercise.read_bytes() == written
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", launch.FIRST, "notebooks/02_accumulate.ipynb")
