"""make.py and tools/set_up.py: the pure parts quickly, one whole set-up where marked slow."""

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
import tomllib
from contextlib import contextmanager
from pathlib import Path

import environment
import psutil
import pytest
from files import ROOT, START, clone, contents
from server import Server, free_port, running

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINNED = re.findall(r"(?m)^torch==([\w.]+)", (ROOT / "tools" / "constraints.txt").read_text("utf-8"))[0]
LESSON = f"work/{START}.ipynb"
STARTER = sys._base_executable  # the Python below this one's .venv, as a user has it: no public name tells it
posix = pytest.mark.skipif(os.name == "nt", reason="a script for bash, or a signal that Windows has not")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make.py as a module, loaded from a copy of its own, so that nothing it does reaches the real .venv."""
    (tmp_path / "tools").mkdir()
    for name in ("make.py", "pyproject.toml", "tools/set_up.py", "tools/constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(sys, "path", [*sys.path])  # make.py puts its own tools/ first
    monkeypatch.delitem(sys.modules, "set_up", raising=False)
    spec = importlib.util.spec_from_file_location("make_under_test", tmp_path / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert tmp_path.resolve() == module.set_up.ROOT
    monkeypatch.chdir(tmp_path)  # make.py goes there too; this brings the tests back
    return module


@pytest.fixture
def ours(make):
    """The copy's tools/set_up.py."""
    return make.set_up


def fake_package(site, name, version, *requires):
    """Lay a package into a folder that has metadata like a real one and cannot be imported."""
    entry = site / f"{name}-{version}.dist-info"
    for folder in (site / name, entry):
        folder.mkdir(parents=True)
    (site / name / "__init__.py").write_text("raise SystemExit('imported')\n")
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {each}" for each in requires]
    (entry / "METADATA").write_text("\n".join(lines) + "\n")


def shown(*command, **options):
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)


def test_is_enough(ours):
    enough = ["2.11.0", "2.11", "2.13.0+cpu", "2.12.0+abcdef", "2.12.0a0+git1", "3.0.1"]
    too_old = ["2.11.0a0+git1", "2.11.0rc1", "2.9.1", "1.13.1"]
    assert [version for version in enough + too_old if ours.is_enough(version, "2.11")] == enough


def test_a_new_torch_not_our_own_is_kept(ours, tmp_path):
    for site, version in ((tmp_path / "new", "2.12.0"), (tmp_path / "old", "2.10.0"), (ours.SITE, "2.12.0")):
        fake_package(site, "torch", version)
    assert ours.starting_torch([str(tmp_path), str(tmp_path / "new")]) == ("2.12.0", str(tmp_path / "new"))
    for place in (tmp_path / "old", ours.SITE, tmp_path):
        assert ours.starting_torch([str(place)]) is None


def pretend(ours, monkeypatch, works, nvidia_smi, platform):
    """Let an attempt succeed if it contains the words `works`; return the list that will tell what was tried."""
    tried = []
    monkeypatch.setattr(ours, "attempt", lambda words, silent=False: tried.append(words) or works in " ".join(words))
    monkeypatch.setattr(ours.subprocess, "getoutput", lambda command: nvidia_smi)
    monkeypatch.setattr(ours.sys, "platform", platform)
    return tried


def test_where_torch_comes_from(ours, monkeypatch):
    for works, cuda, nvidia_smi, platform, attempts, last in (
        ("--no-index", False, "not found", "linux", 1, "pip install -qq --no-index --no-deps"),
        ("uv", False, "not found", "linux", 3, "--torch-backend auto"),
        ("-qq torch", True, "not found", "linux", 3, "pip install -qq"),
        ("-qq torch", False, "GPU 0: NVIDIA H200", "linux", 3, "pip install -qq"),
        ("-qq torch", False, "not found", "darwin", 3, "pip install -qq"),
    ):
        tried = pretend(ours, monkeypatch, works, nvidia_smi, platform)
        ours.install_torch(cuda)
        assert len(tried) == attempts
        assert " ".join(tried[-1]).endswith(f"{last} torch=={PINNED}")


def test_a_cuda_build_is_refused_without_a_gpu(ours, monkeypatch):
    tried = pretend(ours, monkeypatch, "-qq torch", "No devices were found", "linux")
    with pytest.raises(SystemExit, match=r"No CPU build of torch==.* --cuda"):
        ours.install_torch(cuda=False)
    fake_package(ours.SITE, "torch", f"{PINNED}+cu130", "nvidia-nccl-cu13==2.30")
    with pytest.raises(SystemExit, match="is a CUDA build"):
        ours.install_torch(cuda=False)
    ours.install_torch(cuda=True)
    assert len(tried) == 2  # of the first: once the right version is there, nothing is installed


def test_the_stamp_covers_all_that_decides(ours, monkeypatch):
    seen = [ours.fingerprint(*of) for of in (("lessons", None), ("dev", None), ("lessons", ("2.12.0", "/x")))]
    for name in ("pyproject.toml", "tools/constraints.txt", "tools/set_up.py"):
        (ours.ROOT / name).write_text("changed")
        seen.append(ours.fingerprint("lessons", None))
    monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    seen.append(ours.fingerprint("lessons", None))
    assert len(set(seen)) == 7


@pytest.fixture
def steps(ours, monkeypatch):
    """Note the last word of every program a set-up would start; the starting Python holds a torch."""
    noted = []

    def run(command, **options):
        noted.append(Path(command[-1]).name)
        assert ours.STAMP.read_text() == ""
        if noted[-1] == ".venv":
            assert list(ours.VENV.iterdir()) == [ours.STAMP]
            for folder in (ours.SITE, ours.PYTHON.parent):
                folder.mkdir(parents=True)
            ours.PYTHON.touch()
        assert not (ours.SITE / "gradaccum_torch.pth").exists()  # pip must not see the starting Python's packages
        return subprocess.CompletedProcess(command, returncode=int(noted[-1] == ".[dev,peers]"))

    monkeypatch.setattr(ours.subprocess, "run", run)
    monkeypatch.setattr(ours, "starting_torch", lambda path: ("2.12.0", "/a folder/é"))
    return noted


def test_a_set_up_does_only_what_is_needed(ours, steps, monkeypatch):
    for extra in ("lessons", "lessons", "dev", "lessons"):  # the second finds all done, and dev serves lessons too
        ours.set_up(extra)
    assert steps == [".venv", ".[lessons]", ".[dev]"]
    with pytest.raises(SystemExit, match="Installing failed"):
        ours.set_up("dev,peers")
    ours.set_up("lessons")
    assert steps[4:] == [".venv", ".[lessons]"]  # no stamp was left, and a half-made .venv is not trusted
    monkeypatch.setattr(ours, "starting_torch", lambda path: ("2.12.1", "/b"))
    ours.set_up("lessons")
    assert steps[6:] == [".venv", ".[lessons]"]  # another torch means another .venv


FOREIGN = {
    "a link to .*theirs": lambda venv, theirs: venv.symlink_to(theirs, target_is_directory=True),
    "a link to .*theirs.mine.txt": lambda venv, theirs: venv.symlink_to(theirs / "mine.txt"),
    "a link to .*nowhere": lambda venv, theirs: venv.symlink_to(theirs / "nowhere"),
    "not a folder": lambda venv, theirs: venv.write_text("mine"),
    "a folder without make.py's stamp": lambda venv, theirs: theirs.rename(venv),
}


@posix
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_venv_that_is_not_ours_is_refused(make, ours, steps, kind):
    theirs = make.ROOT / "theirs"
    if kind == "a link to .*theirs":
        ours.set_up("dev")  # a link is refused wherever it leads, and if there is nothing to do too
        ours.VENV.rename(theirs)
    theirs.mkdir(exist_ok=True)
    (theirs / "mine.txt").write_text("years of work")
    FOREIGN[kind](ours.VENV, theirs)
    before = contents(make.ROOT)
    steps.clear()
    for command in ("lab", "test", "notebooks", "clean"):
        with pytest.raises(SystemExit, match=rf"^\S+\.venv is {kind}\b.*: move it away or delete it, then run .*\.$"):
            make.main([command])
    assert contents(make.ROOT) == before
    assert steps == []


def other_venv(make):
    """A finished .venv of another Python, with a link in it that leads out."""
    ours = make.set_up
    ours.PYTHON.parent.mkdir(parents=True)
    ours.PYTHON.touch()
    (ours.VENV / "link").symlink_to(make.ROOT, target_is_directory=True)
    ours.STAMP.write_text("of another Python")


def is_stopped(make, moment, act):
    """Press Ctrl-C before the `moment`th line of ours that `act` runs; return whether it came that far."""
    lines, tracing = itertools.count(1), sys.gettrace()

    def trace(frame, event, argument):
        if event == "line" and next(lines) == moment:
            raise KeyboardInterrupt
        return trace

    def is_ours(code):  # and no comprehension, which is of many lines that change nothing
        return code.co_filename in (make.__file__, make.set_up.__file__) and code.co_name[0] != "<"

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
    make.set_up.set_up("lessons")


@posix
@pytest.mark.parametrize(
    ("begin", "act"), [(clean, set_up), (other_venv, set_up), (other_venv, clean), (set_up, clean)]
)
def test_what_is_stopped_anywhere_is_mended(make, ours, steps, monkeypatch, begin, act):
    delete, listed = shutil.rmtree, Path.iterdir

    def rmtree(path):
        assert ours.STAMP.read_text() == ""  # what is half deleted does not look finished
        delete(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listed(path)))  # the stamp comes last, not by chance
    for moment in itertools.count(1):
        clean(make)
        begin(make)
        if not is_stopped(make, moment, lambda: act(make)):
            break
        set_up(make)
        assert ours.STAMP.read_text("utf-8") == ours.fingerprint("lessons", ours.starting_torch([]))
        assert ours.PYTHON.exists()
    assert ours.VENV.exists() == (act is set_up)
    assert moment > 40
    assert (make.ROOT / "pyproject.toml").exists()  # the link in .venv was not followed


@contextmanager
def stand_in_lab(make):
    """Run the command `lab` with a program for JupyterLab that starts one more, as a kernel; yield the process."""
    (make.ROOT / "tools" / "work.py").touch()
    (make.ROOT / "jupyterlab.py").write_text(
        "import subprocess, sys, time\n"
        "if len(sys.argv) > 1: print('up', subprocess.Popen([sys.executable, __file__]).pid, flush=True)\n"
        "time.sleep(300)"
    )
    code = (
        "import make, sys; make.set_up.starting_torch = lambda path: None; sys.exit(make.main(['lab', '--no-browser']))"
    )
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
def test_a_running_lab_is_to_be_stopped_first(make, ours, monkeypatch):
    def run(command, **options):
        raise AssertionError(f"{command}: into the Python that runs the tests, for this .venv is but a link to it")

    monkeypatch.setattr(ours.subprocess, "run", run)
    monkeypatch.setattr(ours, "starting_torch", lambda path: None)
    ours.claim_venv()
    ours.PYTHON.parent.mkdir(parents=True)
    ours.PYTHON.symlink_to(STARTER)
    ours.STAMP.write_text(ours.fingerprint("lessons", None), "utf-8")
    (ours.VENV / f"lab.{os.getpid()}").touch()  # of a lab that was killed, and whose id runs again
    with stand_in_lab(make) as one, stand_in_lab(make) as two:
        before = contents(ours.VENV)
        ours.set_up("lessons")  # there is nothing to do
        for ids in ({one.pid, two.pid}, {two.pid}):  # before and after one is killed
            for command in ("test", "clean"):
                with pytest.raises(SystemExit, match=r"stop it first \(process [\d, ]+\), then run") as told:
                    make.main([command])
                assert set(map(int, re.findall(r"\d+(?=[,)])", str(told.value)))) == ids
            one.send_signal(signal.SIGKILL)
            one.wait(10)
        assert before.keys() - contents(ours.VENV).keys() == {f"lab.{pid}" for pid in (os.getpid(), one.pid)}
        two.terminate()
        two.wait(10)
        assert make.main(["clean"]) == 0
    assert not ours.VENV.exists()


def test_a_kept_torch_is_on_the_path(ours, steps):
    ours.set_up("lessons")
    line = (ours.SITE / "gradaccum_torch.pth").read_text("ascii")
    assert line == "import sys; sys.path.append('/a folder/\\xe9')\n"
    assert "\ntorch==2.12.0\n" in (ours.VENV / "constraints.txt").read_text("utf-8")
    assert ours.torch_on([str(ours.SITE)]).requires is None  # else pip would fetch them


def test_children_stay_in_the_venv(ours, tmp_path, monkeypatch):
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "/theirs")
    monkeypatch.delenv("IPYTHONDIR", raising=False)
    monkeypatch.setattr(ours.Path, "home", lambda: tmp_path / "missing")
    env = ours.child_environment()
    assert "/elsewhere" not in env.values()
    assert env["PIP_USER"] == "0"
    assert env["PATH"].startswith(str(ours.PYTHON.parent) + os.pathsep)
    assert env["JUPYTER_CONFIG_PATH"] == os.pathsep.join([str(ours.ROOT / "binder" / "jupyter"), "/theirs"])
    assert Path(env["IPYTHONDIR"]).is_relative_to(ours.VENV)  # a home that cannot be written is not needed


def test_an_older_python_is_refused():
    older = "import sys; sys.version_info, sys.version = (3, 10, 4), '3.10.4 (main)'; import make"
    told = shown(sys.executable, "-B", "-c", older, cwd=ROOT).stderr
    assert told == "Python 3.10.4 is too old: start make.py with Python 3.11 or newer.\n"


def test_lab_refuses_before_it_installs(make, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for number, told in ((port, "is in use: choose another"), (70000, "does not exist")):
            with pytest.raises(SystemExit, match=f"^Port {number} {told}"):
                make.main(["lab", "--port", str(number)])
    with pytest.raises(SystemExit, match="2"):
        make.main(["lab", "--prot", "9999"])
    assert "`lab` does not know --prot 9999" in capsys.readouterr().err
    assert not make.set_up.VENV.exists()


def test_each_command_sets_up_what_it_needs(make, ours, monkeypatch, capsys):
    noted = []
    (make.ROOT / "tools" / "work.py").touch()
    monkeypatch.setattr(ours, "set_up", lambda extra, cuda: noted.append((extra, cuda)))
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
    assert noted[18:] == [("dev", False), "tools/build.py --address none"]
    for wrong in ([], ["two", "words"]):  # refused before anything is installed
        with pytest.raises(SystemExit, match="2"):
            make.main(["address", *wrong])
    assert len(noted) == 20
    assert make.main([]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in make.COMMANDS)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_the_makefile_names_every_command(make):
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for command in make.COMMANDS:
        arguments = ["--no-print-directory", "-n", command, "PORT=9999", "URL=none", "PYTHON=python3.12", "ARGS=-x"]
        own = {"lab": "--port 9999 ", "address": '"$URL" '}.get(command, "")  # as it is: the shell must not read it
        assert shown("make", *arguments, cwd=ROOT, env=env).stdout == f"python3.12 make.py {command} {own}-x\n"
    command = ["make", "--no-print-directory", "address", "PYTHON=printf %s/", 'URL=it\'s "$$(echo odd)"']
    assert shown(*command, cwd=ROOT, env=env).stdout == 'make.py/address/it\'s "$(echo odd)"/'


def test_the_environment_fits_pyproject(make):
    text = environment.environment()
    for name in ("environment.yml", "binder/environment.yml"):
        assert (ROOT / name).read_bytes() == text.encode(), "run `make environment`"
        assert not (ROOT / name).is_symlink()
    wanted = [re.match(r"[\w-]+", text)[0] for text in PROJECT["optional-dependencies"]["lessons"]]
    assert re.findall(r"(?m)^  - ([\w-]+)", text) == ["python", "pip", "pytorch", *wanted]
    assert PROJECT["requires-python"] == ">=" + ".".join(map(str, make.OLDEST))
    constraints = (ROOT / "tools" / "constraints.txt").read_text("utf-8")
    for requirement in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"]):
        name = re.match(r"[\w-]+", requirement)[0]
        assert len(re.findall(rf"(?m)^{name}==\d", constraints)) == 1 or name == "gradaccum"
    assert not re.search(r"/|@|--|nvidia-|cuda-", constraints)


@pytest.mark.parametrize("token", [None, "secret"])
def test_lab_prints_its_address_alone(make, monkeypatch, token):
    calls = []
    monkeypatch.setattr(make, "become", calls.append)
    monkeypatch.setattr(make, "run_bare", lambda *_: 0)
    monkeypatch.setattr(make.set_up, "set_up", lambda *_: None)
    monkeypatch.setattr(make.set_up, "lock_id", lambda: None)
    monkeypatch.delenv("JUPYTER_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("JUPYTER_TOKEN", token)
    make.lab(None, browser=False, cuda=False)
    # JupyterLab tells an address without a token of its own in the lines that this leaves out.
    assert ("--Application.log_level=ERROR" in calls[0]) == (token is None)


@contextmanager
def lab(python, folder, log, seconds, end):
    """Run `make.py lab`, which must answer within `seconds`; stop it by the signal `end`."""
    port = free_port()
    command = [python, folder / "make.py", "lab", "--port", str(port), "--no-browser"]
    # Whoever runs the tests in the background ignores SIGINT, and so would this.
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "cwd": log.parent}
    env = os.environ | {"JUPYTER_TOKEN": "secret"}
    with running(Server(command, log, port, seconds=seconds, env=env, **options), end) as server:
        assert f"http://127.0.0.1:{port}/lab/tree/{LESSON}" in server.said()
        yield server
    assert server.process.wait(0) == 0


@posix
@pytest.mark.slow
def test_one_set_up_for_lab_tests_and_kept_torch(tmp_path):
    """Cold, from a Python with a torch; then again, at once; then the tests' packages on top."""
    folder = clone(tmp_path / "a clone, é")
    starter = folder / ".venv-of-mine"  # a name that begins like .venv, which pip could take for its own
    subprocess.run([STARTER, "-m", "venv", starter], check=True)
    theirs, python = next(starter.glob("lib/python*/site-packages")), starter / "bin" / "python"
    fake_package(theirs, "torch", "2.12.0", "nvidia-nccl-cu13==2.30", "no-such-package-anywhere==1")
    fake_package(theirs, "tqdm", "4.5.0")  # older than the constraints: must be neither used nor removed
    before = sorted(theirs.rglob("[!_]*"))
    with lab(python, folder, tmp_path / "cold.log", 900, signal.SIGINT) as cold:
        assert cold.ask("GET", "").getheader("Location").startswith(f"/lab/tree/{LESSON}")
        for path in (LESSON, "gradaccum"):  # the root is the repository
            assert cold.ask("GET", f"api/contents/{path}?content=0").status == 200
        news = json.load(cold.ask("GET", "lab/api/settings/@jupyterlab/apputils-extension:notification"))
        assert news["schema"]["properties"]["fetchNews"]["default"] == "false"
        assert cold.ask("POST", "api/kernels").status == 201
        sockets = [each for process in cold.family() for each in process.net_connections("inet")]
        assert {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    site = next(folder.glob(".venv/lib/python*/site-packages"))
    assert not [entry.name for entry in site.iterdir() if entry.name.startswith(("nvidia", "cuda_", "triton"))]
    made = site.stat().st_mtime_ns
    with lab(python, folder, tmp_path / "warm.log", 900, signal.SIGTERM) as warm:
        assert "Setting up" not in warm.said()
        print(f"from the command to an answer: {cold.seconds:.1f} s, then {warm.seconds:.1f} s")
        assert warm.seconds < cold.seconds / 2
    assert site.stat().st_mtime_ns == made
    tests = shown(python, folder / "make.py", "test", "--collect-only", "-q", "tests/test_setup.py", cwd=tmp_path)
    assert "test_is_enough" in tests.stdout, tests.stderr
    own = folder / ".venv" / "bin" / "python"
    ask = "import importlib.util as i; print(*(i.find_spec(name).origin for name in ('torch', 'tqdm')), sep='|')"
    torch, tqdm = shown(own, "-c", ask, check=True, cwd=tmp_path).stdout.strip().split("|")
    assert torch == str(theirs / "torch" / "__init__.py")
    assert tqdm.startswith(str(folder / ".venv") + os.sep)
    assert "satisfied: torch" in shown(own, "-m", "pip", "install", "--no-index", "torch==2.12.0").stdout
    assert shown(own, "-m", "pip", "uninstall", "-y", "torch").returncode != 0
    assert sorted(theirs.rglob("[!_]*")) == before
