"""make.py, and the files that set the tutorial up: the pure parts quickly, whole set-ups where marked slow."""

import http.client
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LESSON = "work/00_start_here.ipynb"
STARTER = sys._base_executable  # the Python below this one's .venv, as a user has it: no public name tells it
HIDDEN = shutil.ignore_patterns(".*", "__pycache__", "work")  # what a fresh clone has not, .venv above all
posix = pytest.mark.skipif(os.name == "nt", reason="a script for bash, or a signal that Windows has not")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make.py as a module, loaded from a copy of its own, so that nothing it does reaches the real .venv."""
    (tmp_path / "tools").mkdir()
    for name in ("make.py", "pyproject.toml", "tools/constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    spec = importlib.util.spec_from_file_location("make_under_test", tmp_path / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert tmp_path.resolve() == module.ROOT
    monkeypatch.chdir(tmp_path)  # make.py goes there too; this brings the tests back
    return module


def fake_package(site, name, version, *requires):
    """Lay a package into a folder that has metadata like a real one and cannot be imported."""
    entry = site / f"{name}-{version}.dist-info"
    for folder in (site / name, entry):
        folder.mkdir(parents=True)
    (site / name / "__init__.py").write_text("raise SystemExit('imported')\n")
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (entry / "METADATA").write_text("\n".join(lines) + "\n")


def shown(*command, **options):
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)


def test_is_enough(make):
    enough = ["2.11.0", "2.11", "2.13.0+cpu", "2.12.0+abcdef", "2.12.0a0+git1", "3.0.1"]
    too_old = ["2.11.0a0+git1", "2.11.0rc1", "2.9.1", "1.13.1"]
    assert [version for version in enough + too_old if make.is_enough(version, "2.11")] == enough


def test_a_torch_of_the_starting_python_is_taken_if_it_is_new_and_not_our_own(make, tmp_path):
    for site, version in ((tmp_path / "new", "2.12.0"), (tmp_path / "old", "2.10.0"), (make.SITE, "2.12.0")):
        fake_package(site, "torch", version)
    assert make.starting_torch([str(tmp_path), str(tmp_path / "new")]) == ("2.12.0", str(tmp_path / "new"))
    for place in (tmp_path / "old", make.SITE, tmp_path):
        assert make.starting_torch([str(place)]) is None


def pretend(make, monkeypatch, works, nvidia_smi, platform):
    """Let an attempt succeed if it contains the words `works`; return the list that will tell what was tried."""
    tried = []
    monkeypatch.setattr(make, "attempt", lambda words, silent=False: tried.append(words) or works in " ".join(words))
    monkeypatch.setattr(make.subprocess, "getoutput", lambda command: nvidia_smi)
    monkeypatch.setattr(make.sys, "platform", platform)
    return tried


def test_where_torch_comes_from(make, monkeypatch):
    for works, cuda, nvidia_smi, platform, attempts, last in (
        ("--no-index", False, "not found", "linux", 1, "pip install -qq --no-index --no-deps"),
        ("uv", False, "not found", "linux", 3, "--torch-backend auto"),
        ("-qq torch", True, "not found", "linux", 3, "pip install -qq"),
        ("-qq torch", False, "GPU 0: NVIDIA H200", "linux", 3, "pip install -qq"),
        ("-qq torch", False, "not found", "darwin", 3, "pip install -qq"),
    ):
        tried = pretend(make, monkeypatch, works, nvidia_smi, platform)
        make.install_torch(cuda)
        assert len(tried) == attempts
        assert " ".join(tried[-1]).endswith(f"{last} torch=={make.pinned_torch()}")


def test_a_cuda_build_is_refused_without_a_gpu(make, monkeypatch):
    tried = pretend(make, monkeypatch, "-qq torch", "No devices were found", "linux")
    with pytest.raises(SystemExit, match=r"No CPU build of torch .* --cuda"):
        make.install_torch(cuda=False)
    fake_package(make.SITE, "torch", f"{make.pinned_torch()}+cu130", "nvidia-nccl-cu13==2.30")
    with pytest.raises(SystemExit, match="is a CUDA build"):
        make.install_torch(cuda=False)
    make.install_torch(cuda=True)
    assert len(tried) == 2  # of the first: once the right version is there, nothing is installed


def test_the_stamp_changes_with_everything_that_decides_what_is_installed(make, monkeypatch):
    seen = [make.fingerprint(*of) for of in (("lessons", None), ("dev", None), ("lessons", ("2.12.0", "/x")))]
    for name in ("pyproject.toml", "tools/constraints.txt", "make.py"):
        (make.ROOT / name).write_text("changed")
        seen.append(make.fingerprint("lessons", None))
    monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    seen.append(make.fingerprint("lessons", None))
    assert len(set(seen)) == 7


@pytest.fixture
def steps(make, monkeypatch):
    """Note the last word of every program a set-up would start; the starting Python holds a torch."""
    noted = []

    def run(command, **options):
        noted.append(Path(command[-1]).name)
        assert make.MARK.exists()
        assert not make.STAMP.exists()
        if noted[-1] == ".venv":
            assert list(make.VENV.iterdir()) == [make.MARK]
            for folder in (make.SITE, make.PYTHON.parent):
                folder.mkdir(parents=True)
            make.PYTHON.touch()
        assert not (make.SITE / "gradaccum_torch.pth").exists()  # pip must not see the starting Python's packages
        return subprocess.CompletedProcess(command, returncode=int(noted[-1] == ".[dev,peers]"))

    monkeypatch.setattr(make.subprocess, "run", run)
    monkeypatch.setattr(make, "starting_torch", lambda path: ("2.12.0", "/a folder/é"))
    return noted


def test_a_set_up_does_only_what_is_needed(make, steps, monkeypatch):
    for extra in ("lessons", "lessons", "dev", "lessons"):  # the second finds all done, and dev serves lessons too
        make.set_up(extra)
    assert steps == [".venv", ".[lessons]", ".[dev]"]
    with pytest.raises(SystemExit, match="Installing failed"):
        make.set_up("dev,peers")
    make.set_up("lessons")
    assert steps[4:] == [".venv", ".[lessons]"]  # no stamp was left, and a half-made .venv is not trusted
    monkeypatch.setattr(make, "starting_torch", lambda path: ("2.12.1", "/b"))
    make.set_up("lessons")
    assert steps[6:] == [".venv", ".[lessons]"]  # another torch means another .venv


def everything(folder):
    """What a folder holds, by name: the bytes of files, where links lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


FOREIGN = {
    "a link to .*theirs": lambda venv, theirs: venv.symlink_to(theirs, target_is_directory=True),
    "a link to .*theirs.mine.txt": lambda venv, theirs: venv.symlink_to(theirs / "mine.txt"),
    "a link to .*nowhere": lambda venv, theirs: venv.symlink_to(theirs / "nowhere"),
    "not a folder": lambda venv, theirs: venv.write_text("mine"),
    "a folder without make.py's mark": lambda venv, theirs: theirs.rename(venv),
}


@posix
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_venv_that_is_not_ours_is_refused(make, steps, kind):
    theirs = make.ROOT / "theirs"
    if kind == "a link to .*theirs":
        make.set_up("dev")  # a link is refused wherever it leads, and if there is nothing to do too
        make.VENV.rename(theirs)
    theirs.mkdir(exist_ok=True)
    (theirs / "mine.txt").write_text("years of work")
    FOREIGN[kind](make.VENV, theirs)
    before = everything(make.ROOT)
    steps.clear()
    for command in ("lab", "test", "notebooks", "constraints", "clean"):
        with pytest.raises(SystemExit, match=rf"^\S+\.venv is {kind}\b.*: move it away or delete it, then run .*\.$"):
            make.main([command])
    assert everything(make.ROOT) == before
    assert steps == []


def older_venv(make):
    """A finished .venv without a mark, as make.py once left it, with a link in it that leads out."""
    make.PYTHON.parent.mkdir(parents=True)
    make.PYTHON.touch()
    (make.VENV / "link").symlink_to(make.ROOT, target_is_directory=True)
    make.STAMP.write_text("of another Python")


def is_stopped(make, moment, act):
    """Press Ctrl-C before the `moment`th line of make.py that `act` runs; tell whether it came that far."""
    lines, tracing = itertools.count(1), sys.gettrace()

    def trace(frame, event, argument):
        if event == "line" and next(lines) == moment:
            raise KeyboardInterrupt
        return trace

    def is_ours(code):  # and no comprehension, which is of many lines that change nothing
        return code.co_filename == make.__file__ and code.co_name[0] != "<"

    sys.settrace(lambda frame, *_: trace if is_ours(frame.f_code) else None)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracing)
    return False


def clean(make):
    make.main(["clean"])


def set_up(make):
    make.set_up("lessons")


@posix
@pytest.mark.parametrize(
    ("begin", "act"), [(clean, set_up), (older_venv, set_up), (older_venv, clean), (set_up, clean)]
)
def test_what_is_stopped_anywhere_is_mended(make, steps, monkeypatch, begin, act):
    delete, listed = shutil.rmtree, Path.iterdir

    def rmtree(path):
        assert not make.STAMP.exists()  # what is half deleted does not look finished
        delete(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listed(path)))  # the stamp comes last, not by chance
    for moment in itertools.count(1):
        clean(make)
        begin(make)
        if not is_stopped(make, moment, lambda: act(make)):
            break
        set_up(make)
        assert make.STAMP.read_text("utf-8") == make.fingerprint("lessons", make.starting_torch([]))
        assert make.PYTHON.exists()
    assert make.VENV.exists() == (act is set_up)
    assert moment > 40
    assert (make.ROOT / "pyproject.toml").exists()  # the link in .venv was not followed


@contextmanager
def stand_in_lab(make):
    """Run the command `lab` with a program for JupyterLab that starts one more, as a kernel; yield the process."""
    (make.ROOT / "jupyterlab.py").write_text(
        "import subprocess, sys, time\n"
        "if len(sys.argv) > 1: print('up', subprocess.Popen([sys.executable, __file__]).pid, flush=True)\n"
        "time.sleep(300)"
    )
    code = "import make, sys; make.starting_torch = lambda path: None; sys.exit(make.main(['lab', '--no-browser']))"
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with subprocess.Popen([STARTER, "-B", "-c", code], cwd=make.ROOT, text=True, **pipes) as process:
        kernel = None
        try:
            while not (said := process.stdout.readline()).startswith("up "):
                assert said, "it ended"
            kernel = psutil.Process(int(said.split()[1]))
            yield process
        finally:
            process.kill()
            if kernel:
                assert kernel.is_running()  # it outlives a server that is killed, and must not count
                kernel.kill()


@posix
def test_a_running_lab_is_to_be_stopped_first(make, monkeypatch):
    def run(command, **options):
        raise AssertionError(f"{command}: into the Python that runs the tests, for this .venv is but a link to it")

    monkeypatch.setattr(make.subprocess, "run", run)
    monkeypatch.setattr(make, "starting_torch", lambda path: None)
    make.claim_venv()
    make.PYTHON.parent.mkdir(parents=True)
    make.PYTHON.symlink_to(STARTER)
    make.STAMP.write_text(make.fingerprint("lessons", None), "utf-8")
    (make.VENV / f"lab.{os.getpid()}").touch()  # of a lab that was killed, and whose id runs again
    with stand_in_lab(make) as one, stand_in_lab(make) as two:
        before = everything(make.VENV)
        make.set_up("lessons")  # there is nothing to do
        for ids in ({one.pid, two.pid}, {two.pid}):  # before and after one is killed
            for command in ("test", "constraints", "clean"):
                with pytest.raises(SystemExit, match=r"stop it first \(process [\d, ]+\), then run") as told:
                    make.main([command])
                assert set(map(int, re.findall(r"\d+(?=[,)])", str(told.value)))) == ids
            one.send_signal(signal.SIGKILL)
            one.wait(10)
        assert before.keys() - everything(make.VENV).keys() == {f"lab.{pid}" for pid in (os.getpid(), one.pid)}
        two.terminate()
        two.wait(10)
        assert make.main(["clean"]) == 0
    assert not make.VENV.exists()


INFO = {"name": "python", "mimetype": "text/x-python", "file_extension": ".py", "nbconvert_exporter": "python"}
INFO |= {"codemirror_mode": {"name": "ipython", "version": 3}, "pygments_lexer": "ipython3", "version": "3.0.0"}


def lay_out(notebook):
    return (nbformat.writes(notebook) + "\n").encode()


@pytest.fixture
def originals(make):
    """Two small notebooks in notebooks/, by name, beside what is not to be copied."""
    info = '"pygments_lexer": "ipython3",\n   "version": "3.0.0"'  # in a cell it is text, as an output it is data
    data = nbformat.v4.new_output("display_data", {"application/json": {"version": "3.0.0", "language_info": {}}})
    cells = [nbformat.v4.new_code_cell(f"'é' # {info}", outputs=[data], id="one")]
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": INFO, "title": "é"}
    notebooks = {}
    for name in ("00_page.ipynb", "exercises/01_page.ipynb"):
        notebooks[name] = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
        (make.NOTEBOOKS / name).parent.mkdir(parents=True)
        (make.NOTEBOOKS / name).write_bytes(lay_out(notebooks[name]))
    for name in (".ipynb_checkpoints/00_page-checkpoint.ipynb", "source/00_page.py", "exercises/INSTRUCTOR.md"):
        (make.NOTEBOOKS / name).parent.mkdir(exist_ok=True)
        (make.NOTEBOOKS / name).touch()
    return notebooks


def copies(make):
    return {name: data for name, data in everything(make.WORK).items() if name.endswith(".ipynb")}


def test_a_copy_names_the_python_that_runs_it(make, originals):
    assert make.main(["work"]) == 0
    for notebook in originals.values():
        notebook.metadata.language_info.version = sys.version.split()[0]
    assert copies(make) == {name: lay_out(notebook) for name, notebook in originals.items()}


def test_a_copy_is_never_written_over(make, originals, monkeypatch, capsys):
    monkeypatch.setattr(make, "set_up", lambda extra, cuda: None)
    monkeypatch.setattr(make, "become", lambda arguments: 0)
    assert make.main(["lab"]) == 0
    made = copies(make)
    mine, gone = make.WORK / "00_page.ipynb", make.WORK / "exercises" / "01_page.ipynb"
    mine.write_text("my answer")
    (make.WORK / "my own.ipynb").write_text("mine too")
    gone.unlink()
    kept = {"00_page.ipynb": b"my answer", "my own.ipynb": b"mine too"}
    written = mine.stat().st_mtime_ns
    assert make.main(["clean"]) == 0
    assert copies(make) == kept
    for command in ("work", "lab"):
        assert make.main([command]) == 0
        assert copies(make) == kept | {"exercises/01_page.ipynb": made["exercises/01_page.ipynb"]}
    with monkeypatch.context() as patch:
        patch.setattr(make.os.path, "lexists", lambda path: False)  # as if it came between the look and the writing
        assert make.main(["work"]) == 0
    assert mine.read_text() == "my answer"
    assert mine.stat().st_mtime_ns == written
    assert "newer" not in capsys.readouterr().out


def test_a_newer_edition_is_told_in_a_line(make, originals, capsys):
    def told():
        assert make.main(["work"]) == 0
        return capsys.readouterr().out

    lesson, exercise = (make.NOTEBOOKS / name for name in originals)
    assert told() == ""
    made = copies(make)
    newer = exercise.read_bytes().replace(b'"one"', b'"two"')
    exercise.write_bytes(newer)
    for _ in range(2):  # until it is heeded
        line = told()
        assert line.startswith("There are newer editions of exercises/01_page.ipynb: yours in work/ stay; ")
        assert line.count("\n") == 1
        assert copies(make) == made
    (make.WORK / "exercises" / "01_page.ipynb").rename(make.WORK / "exercises" / "mine.ipynb")
    assert told() == told() == ""
    assert b'"two"' in copies(make)["exercises/01_page.ipynb"]
    for number, broken in enumerate((b"", b"\xff", b"[1]", b"5", b'{"00_page')):
        make.RECORD.write_bytes(broken)
        assert told() == ""
        lesson.write_bytes(lesson.read_bytes() + b" " * number + b"\n")
        assert told().startswith("There are newer editions of 00_page.ipynb: ")


@posix
def test_a_copy_is_made_whole_or_not_at_all(make, originals):
    import resource

    limit = len(lay_out(originals["00_page.ipynb"])) - 10
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    for size, told in ((full, r"Stopped: .*File too large.*\.\n"), ({}, "")):
        done = shown(STARTER, "-B", "make.py", "work", cwd=make.ROOT, **size)
        assert re.fullmatch(told, done.stderr), done
        assert done.stdout == ""
        assert set(copies(make)) == (set() if told else set(originals))
    shutil.rmtree(make.WORK)
    make.WORK.write_text("a file of mine")
    assert re.fullmatch(r"Stopped: .*work'\.\n", shown(STARTER, "-B", "make.py", "work", cwd=make.ROOT).stderr)
    assert make.WORK.read_text() == "a file of mine"


def test_every_notebook_s_copy_is_right_and_links_on(make, monkeypatch):
    import test_project  # which asks git; the other tests run in a folder without it too

    for path in test_project.project_files():
        (make.ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, make.ROOT / path)
    names = [path.relative_to("notebooks") for path in test_project.pages() if path.suffix == ".ipynb"]
    monkeypatch.setattr(test_project, "ROOT", make.ROOT)
    assert make.main(["work"]) == 0
    assert copies(make).keys() == set(map(str, names))
    for name in names:
        wanted = nbformat.read(make.NOTEBOOKS / name, as_version=4)
        wanted.metadata.language_info.version = sys.version.split()[0]
        assert copies(make)[str(name)] == lay_out(wanted)
        page = Path("work") / name
        assert list(test_project.broken_links(page, test_project.markdown_of(page))) == []


def test_a_borrowed_torch_is_on_the_path_and_pip_is_told_to_keep_it(make, steps):
    make.set_up("lessons")
    line = (make.SITE / "gradaccum_torch.pth").read_text("ascii")
    assert line == "import sys; sys.path.append('/a folder/\\xe9')\n"
    assert "\ntorch==2.12.0\n" in (make.VENV / "constraints.txt").read_text("utf-8")
    assert make.torch_on([str(make.SITE)]).requires is None  # else pip would fetch them


def test_children_get_nothing_that_leads_out_of_the_venv(make, tmp_path, monkeypatch):
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "/theirs")
    monkeypatch.delenv("IPYTHONDIR", raising=False)
    monkeypatch.setattr(make.Path, "home", lambda: tmp_path / "missing")
    env = make.child_environment()
    assert "/elsewhere" not in env.values()
    assert env["PIP_USER"] == "0"
    assert env["PATH"].startswith(str(make.PYTHON.parent) + os.pathsep)
    assert env["JUPYTER_CONFIG_PATH"] == os.pathsep.join([str(make.ROOT / "binder" / "jupyter"), "/theirs"])
    assert Path(env["IPYTHONDIR"]).is_relative_to(make.VENV)  # a home that cannot be written is not needed


def test_an_older_python_is_refused_in_one_sentence():
    older = "import sys; sys.version_info, sys.version = (3, 10, 4), '3.10.4 (main)'; import make"
    told = shown(sys.executable, "-B", "-c", older, cwd=ROOT).stderr
    assert told == "Python 3.10.4 is too old: start make.py with Python 3.11 or newer.\n"


def test_lab_refuses_what_cannot_be_before_it_installs(make, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for number, told in ((port, "is in use: choose another"), (70000, "does not exist")):
            with pytest.raises(SystemExit, match=f"^Port {number} {told}"):
                make.main(["lab", "--port", str(number)])
    with pytest.raises(SystemExit, match="2"):
        make.main(["lab", "--prot", "9999"])
    assert "`lab` does not know --prot 9999" in capsys.readouterr().err
    assert not make.VENV.exists()


def test_each_command_sets_up_what_it_needs_and_hands_over_the_rest(make, monkeypatch, capsys):
    noted = []
    monkeypatch.setattr(make, "set_up", lambda extra, cuda: noted.append((extra, cuda)))
    monkeypatch.setattr(make, "become", lambda arguments, **variables: noted.append(" ".join(arguments)) or 7)
    for command in ("test", "test-all", "test-browser", "test-peers", "notebooks", "benchmarks"):
        assert make.main([command, "-k", "x", "--cuda"]) == 7
    dev, peers = ("dev", True), ("dev,peers", True)
    assert noted[0::2] == [dev, dev, dev, peers, dev, peers]
    quick = "not slow and not browser and not peers -n 2 --dist loadfile --no-loadscope-reorder"
    marks = (quick, "not browser and not peers", "browser", "peers")
    assert noted[1:9:2] == [f"-m pytest -m {which} --durations=20 -k x" for which in marks]
    assert noted[9::2] == ["tools/build.py -k x", "benchmarks/run.py -k x"]
    monkeypatch.setattr(make.sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    for screen, wish in (("", []), (":0", ["--no-browser"]), (":0", [])):
        monkeypatch.setenv("DISPLAY", screen)
        assert make.main(["lab", *wish]) == 7
    assert noted[12::2] == [("lessons", False)] * 3
    assert ["--no-browser" in program for program in noted[13::2]] == [True, True, False]
    assert make.main(["address", "none"]) == 7
    assert noted[18:] == [("dev", False), "tools/build.py --address=none"]
    for wrong in ([], ["two", "words"]):  # refused before anything is installed
        with pytest.raises(SystemExit, match="2"):
            make.main(["address", *wrong])
    assert len(noted) == 20
    assert make.main([]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in make.COMMANDS)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_the_makefile_names_every_command_in_one_line(make):
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for command in make.COMMANDS:
        arguments = ["--no-print-directory", "-n", command, "PORT=9999", "URL=none", "PYTHON=python3.12", "ARGS=-x"]
        own = {"lab": "--port 9999 ", "address": '"$URL" '}.get(command, "")  # as it is: the shell must not read it
        assert shown("make", *arguments, cwd=ROOT, env=env).stdout == f"python3.12 make.py {command} {own}-x\n"
    command = ["make", "--no-print-directory", "address", "PYTHON=printf %s/", 'URL=it\'s "$$(echo odd)"']
    assert shown(*command, cwd=ROOT, env=env).stdout == 'make.py/address/it\'s "$(echo odd)"/'


def test_the_made_files_say_what_pyproject_says_and_name_no_place(make):
    (make.ROOT / "binder").mkdir()
    assert make.main(["environment"]) == 0
    for name in ("environment.yml", "binder/environment.yml"):
        assert (ROOT / name).read_bytes() == (make.ROOT / name).read_bytes() == make.environment_text().encode()
        assert not (ROOT / name).is_symlink()
    wanted = [re.match(r"[\w-]+", text)[0] for text in PROJECT["optional-dependencies"]["lessons"]]
    assert re.findall(r"(?m)^  - ([\w-]+)", make.environment_text()) == ["python", "pip", "pytorch", *wanted]
    assert PROJECT["requires-python"] == ">=" + ".".join(map(str, make.OLDEST))
    constraints = (ROOT / "tools" / "constraints.txt").read_text("utf-8")
    for requirement in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"]):
        name = re.match(r"[\w-]+", requirement)[0]
        assert len(re.findall(rf"(?m)^{name}==\d", constraints)) == 1 or name == "gradaccum"
    assert not re.search(r"/|@|--|nvidia-|cuda-", constraints)


@contextmanager
def lab(folder, log, seconds, end):
    """Run `make.py lab`, which must answer within `seconds`; yield a way to ask it; stop it by the signal `end`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [STARTER, folder / "make.py", "lab", "--port", str(port), "--no-browser"]
    env = os.environ | {"JUPYTER_TOKEN": "secret"}
    begin = time.perf_counter()
    with log.open("wb") as out:
        process = psutil.Popen(
            command,
            cwd=log.parent,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            # Whoever runs the tests in the background ignores SIGINT, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def ask(method, path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path, headers={"Authorization": "token secret"})
        return connection.getresponse()

    try:
        while f"http://127.0.0.1:{port}/lab/tree/{LESSON}" not in log.read_text("utf-8"):
            assert process.poll() is None, log.read_text("utf-8")
            assert time.perf_counter() - begin < seconds, log.read_text("utf-8")
            time.sleep(0.2)
        while True:  # it prints its address a moment before it listens
            with suppress(ConnectionRefusedError):
                assert ask("GET", "/api").status == 200
                break
            assert time.perf_counter() - begin < seconds
            time.sleep(0.1)
        print(f"from the command to an answer: {time.perf_counter() - begin:.1f} s")
        yield process, ask
    finally:
        family = process.children(recursive=True)
        process.send_signal(end)
    assert process.wait(60) == 0
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert "Traceback" not in log.read_text("utf-8")


@posix
@pytest.mark.slow
def test_a_fresh_clone_starts_then_starts_again_in_seconds_then_takes_the_tests(tmp_path):
    folder = shutil.copytree(ROOT, tmp_path / "a clone, é", symlinks=True, ignore=HIDDEN)
    with lab(folder, tmp_path / "cold.log", 900, signal.SIGINT) as (process, ask):
        assert ask("GET", "/").getheader("Location").startswith(f"/lab/tree/{LESSON}")
        for path in (LESSON, "gradaccum"):  # the root is the repository
            assert ask("GET", f"/api/contents/{path}?content=0").status == 200
        news = json.load(ask("GET", "/lab/api/settings/@jupyterlab/apputils-extension:notification"))
        assert news["schema"]["properties"]["fetchNews"]["default"] == "false"
        assert ask("POST", "/api/kernels").status == 201
        family = [process, *process.children(recursive=True)]
        listening = [c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert set(listening) == {"127.0.0.1"}
    site = next(folder.glob(".venv/lib/python*/site-packages"))
    assert not [entry.name for entry in site.iterdir() if entry.name.startswith(("nvidia", "cuda_", "triton"))]
    before = site.stat().st_mtime_ns
    with lab(folder, tmp_path / "warm.log", 20, signal.SIGTERM):
        pass
    assert site.stat().st_mtime_ns == before
    assert "Installing" not in (tmp_path / "warm.log").read_text("utf-8")
    tests = shown(STARTER, folder / "make.py", "test", "--collect-only", "-q", "tests/test_setup.py", cwd=tmp_path)
    assert "test_is_enough" in tests.stdout, tests.stderr


@posix
@pytest.mark.slow
def test_a_torch_that_the_starting_python_has_is_used_and_not_replaced(tmp_path):
    folder = shutil.copytree(ROOT, tmp_path / "clone", symlinks=True, ignore=HIDDEN)
    starter = folder / ".venv-of-mine"  # a name that begins like .venv, which pip could take for its own
    subprocess.run([STARTER, "-m", "venv", starter], check=True)
    theirs = next(starter.glob("lib/python*/site-packages"))
    fake_package(theirs, "torch", "2.12.0", "nvidia-nccl-cu13==2.30", "no-such-package-anywhere==1")
    fake_package(theirs, "tqdm", "4.5.0")  # older than the constraints: must be neither used nor removed
    before = sorted(theirs.rglob("[!_]*"))
    command = [starter / "bin" / "python", "-c", "import make; make.set_up('lessons')"]
    subprocess.run(command, check=True, cwd=folder)
    python = folder / ".venv" / "bin" / "python"
    ask = "import importlib.util as i; print(i.find_spec('torch').origin, i.find_spec('tqdm').origin)"
    torch, tqdm = shown(python, "-c", ask, check=True, cwd=tmp_path).stdout.split()
    assert torch == str(theirs / "torch" / "__init__.py")
    assert tqdm.startswith(str(folder / ".venv") + os.sep)
    assert "satisfied: torch" in shown(python, "-m", "pip", "install", "--no-index", "torch==2.12.0").stdout
    assert shown(python, "-m", "pip", "uninstall", "-y", "torch").returncode != 0
    assert sorted(theirs.rglob("[!_]*")) == before
    assert shown(*command, check=True, cwd=folder).stdout == ""  # the second set-up finds all done
