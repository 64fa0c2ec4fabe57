#!/usr/bin/env python3
"""Every command of this repository: `python make.py lab` opens the lessons, `python make.py` lists the rest.

Only the standard library is used, so that any Python that is new enough can start it, on Windows too.
The first command makes `.venv` beside this file; later ones find it ready and install nothing.
"""

# ruff: noqa: E402 - the version is looked at before anything is imported that an older Python lacks
import sys

OLDEST = (3, 11)
if sys.version_info < OLDEST:
    sys.exit(f"Python {sys.version.split()[0]} is too old: start make.py with Python 3.11 or newer.")

import argparse
import hashlib
import importlib.machinery
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sysconfig
import tomllib
from contextlib import suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PATHS = {"base": str(VENV), "platbase": str(VENV)}
SITE = Path(sysconfig.get_path("purelib", "venv", PATHS))
PYTHON = Path(sysconfig.get_path("scripts", "venv", PATHS)) / ("python.exe" if os.name == "nt" else "python")
MARK = VENV / "made_by_make.txt"  # there before anything else: what is in a folder without it is not ours to delete
STAMP = VENV / "stamp.txt"  # written last, removed first: a set-up that was interrupted has none
NOTEBOOKS, WORK = ROOT / "notebooks", ROOT / "work"
RECORD = WORK / ".copied.json"  # the digest that each copy's original had
EXTRAS = ["lessons", "dev", "dev,peers"]  # what pyproject.toml calls them; each holds the ones before it
COMMANDS = {
    "lab": "open the lessons in JupyterLab",
    "test": "run the tests, in minutes (what follows goes to pytest: test -k windows)",
    "test-all": "run every test but the browser's, the slow ones too",
    "test-browser": "open every notebook in JupyterLab in Chromium, run it, move its widgets",
    "test-peers": "run the tests beside accelerate, Lightning and transformers (installs those)",
    "notebooks": "make the notebooks from notebooks/source, all or the ones named",
    "address": "write the repository's address into pyproject.toml (or: none), then make the notebooks",
    "lint": "check style, types and spelling",
    "benchmarks": "measure gradaccum beside other libraries (installs those)",
    "environment": "write environment.yml, for conda and for Binder, from pyproject.toml",
    "constraints": "write constraints.txt anew (torch keeps its version: constraints torch==2.13.0 sets it)",
    "work": "copy the notebooks that work/ lacks, for a Python of your own (lab does it too)",
    "clean": "delete .venv, and nothing in work/; the next command makes it again",
}


def is_enough(version: str, minimum: str) -> bool:
    """Tell whether torch `version` satisfies `>=minimum`, as pip would: 2.11.0a0 comes before 2.11."""
    number, least = (tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (version, minimum))
    return number > least or (number == least and not re.search("a|b|rc|dev", version.split("+")[0]))


def torch_on(path: list[str]) -> importlib.metadata.Distribution | None:
    """Return what is installed on `path` as torch."""
    return next(iter(importlib.metadata.distributions(name="torch", path=path)), None)


def starting_torch(path: list[str]) -> tuple[str, str] | None:
    """Return the version and the folder of a torch on `path` that serves, without importing it; else None."""
    minimum = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))[0]
    spec, found = importlib.machinery.PathFinder.find_spec("torch", path), torch_on(path)
    if spec is None or spec.origin is None or Path(spec.origin).resolve().is_relative_to(VENV):
        return None
    return (found.version, str(Path(spec.origin).parents[1])) if found and is_enough(found.version, minimum) else None


def pinned_torch() -> str:
    """Return the version of torch that constraints.txt names."""
    found = re.search(r"(?m)^torch==([\w.]+)", (ROOT / "tools" / "constraints.txt").read_text("utf-8"))
    if found is None:
        sys.exit("constraints.txt names no torch: run `python make.py constraints torch==2.13.0`.")
    return found[1]


def borrow_torch(version: str) -> None:
    """Tell pip that torch is there: naming no requirements, it fetches none; without a RECORD, it removes nothing."""
    entry = SITE / f"torch-{version}.dist-info"
    entry.mkdir(exist_ok=True)
    (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n", "utf-8")
    (entry / "INSTALLER").write_text("make.py\n", "utf-8")


def install_torch(cuda: bool) -> None:
    """Install torch alone and first, so that no later step can pick the CUDA build for a machine without a GPU."""
    version = pinned_torch()
    cuda = cuda or "GPU 0" in subprocess.getoutput("nvidia-smi -L")
    cpu_only = sys.platform == "linux" and not cuda  # elsewhere no build brings CUDA along
    found = torch_on([str(SITE)])
    if found is None or found.version.split("+")[0] != version:
        print(f"Installing torch {version} ...", flush=True)
        wanted = f"torch=={version}"
        # 1. A wheel that lies on this machine, where pip is set up to find one; fails within a second elsewhere.
        local = ["pip", "install", "-qq", "--no-index", "--no-deps", wanted]
        # 2. uv knows torch's own indexes: the CPU build, or the one for the driver that is there.
        uv = ["uv", "pip", "install", "--python", str(PYTHON), "--torch-backend", "auto", wanted]
        if not (attempt(local, silent=True) or (attempt(["pip", "install", "-qq", "uv"], silent=True) and attempt(uv))):
            # 3. The default index: the CPU build on macOS and Windows, several GB of CUDA libraries on Linux.
            if cpu_only:
                sys.exit(f"No CPU build of torch {version} was found, as told above: check the network, or add --cuda.")
            install([wanted])
        found = torch_on([str(SITE)])
    if cpu_only and found and any(name.startswith(("nvidia-", "cuda-")) for name in found.requires or []):
        sys.exit(f"There is no GPU, but torch {found.version} is a CUDA build: offer pip a CPU build, or add --cuda.")


def fingerprint(extra: str, torch: tuple[str, str] | None) -> str:
    """Return two digests: what .venv is built on, and that with everything that decides what is installed."""
    base = f"{sys.version_info[:3]} {sys.base_prefix} {VENV} {torch}".encode()
    inputs = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "tools/constraints.txt", "make.py")]
    everything = b"\0".join([base, extra.encode(), *inputs])
    return f"{hashlib.sha256(base).hexdigest()} {hashlib.sha256(everything).hexdigest()}"


def set_up(extra: str, cuda: bool = False) -> None:
    """Make .venv ready for `extra`; install nothing if its stamp says that it is."""
    refuse_foreign()
    torch = starting_torch(sys.path)
    stamp = STAMP.read_text("utf-8") if STAMP.exists() and PYTHON.exists() else ""
    if stamp in [fingerprint(each, torch) for each in EXTRAS[EXTRAS.index(extra) :]]:
        return
    claim_venv()
    print(f"Setting up {VENV} for {extra}; this takes a minute or two, once.", flush=True)
    STAMP.unlink(missing_ok=True)
    # While pip works, it must not see what else lies beside the borrowed torch: it would take that for installed.
    borrowed = SITE / "gradaccum_torch.pth"
    borrowed.unlink(missing_ok=True)
    if stamp.split(" ")[0] != fingerprint(extra, torch).split(" ")[0]:
        make_venv()
    constraints = (ROOT / "tools" / "constraints.txt").read_text("utf-8")
    if torch:
        print(f"Using torch {torch[0]} in {torch[1]}, which the Python you started has.", flush=True)
        borrow_torch(torch[0])
        constraints = re.sub(r"(?m)^torch==.*$", f"torch=={torch[0]}", constraints)
    else:
        install_torch(cuda)
    (VENV / "constraints.txt").write_text(constraints, "utf-8")
    print("Installing the rest ...", flush=True)
    install(["--constraint", str(VENV / "constraints.txt"), "--editable", f".[{extra}]"])
    if torch:  # A line of code in ASCII, since the encoding of a .pth file depends on the machine.
        borrowed.write_text(f"import sys; sys.path.append({torch[1]!a})\n", "ascii")
    STAMP.write_text(fingerprint(extra, torch), "utf-8")


def refuse_foreign() -> None:
    """Refuse a .venv that is not ours to change. An empty folder is: a set-up was stopped before its first file."""
    found = Path(os.path.realpath(VENV))
    if found != VENV:  # true of a link that leads nowhere too, and of Windows' junctions
        kind = f"a link to {found}"
    elif VENV.exists() and not VENV.is_dir():
        kind = "not a folder"
    elif VENV.exists() and any(VENV.iterdir()) and not (MARK.exists() or STAMP.exists()):
        kind = "a folder without make.py's mark"
    else:
        return
    sys.exit(f"{VENV} is {kind}, so it is left alone: move it away or delete it, then run the same command again.")


def claim_venv() -> None:
    """Mark .venv as ours, made if it is missing, before it is changed; refuse while JupyterLab runs from it."""
    refuse_foreign()
    if running := running_labs():
        stop = f"JupyterLab runs from {VENV}: stop it first (process {', '.join(running)})"
        sys.exit(f"{stop}, then run the same command again.")
    VENV.mkdir(exist_ok=True)
    MARK.touch()


def empty_venv() -> None:
    """Delete what is in .venv; the mark stays, so that the next command can go on where this one is stopped."""
    STAMP.unlink(missing_ok=True)
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != MARK:
            path.unlink()


def make_venv() -> None:
    """Make .venv anew with the Python that runs this."""
    if Path(sys.prefix).resolve() == VENV:
        sys.exit(".venv is out of date and cannot remake itself: run `deactivate`, then the same once more.")
    empty_venv()  # not by venv's own --clear, which would delete the mark too
    if subprocess.run([sys.executable, "-m", "venv", str(VENV)], env=child_environment()).returncode:
        sys.exit("Making .venv failed, as told above; on Debian and Ubuntu, install python3-venv first.")


def install(arguments: list[str]) -> None:
    """Let .venv's pip install something, or say that it failed."""
    if not attempt(["pip", "install", "-qq", *arguments]):
        sys.exit("Installing failed, as told above; check the network, then run the same command again.")


def attempt(module: list[str], silent: bool = False) -> bool:
    """Run a module of .venv and tell whether it succeeded."""
    command = [str(PYTHON), "-m", *module]
    return subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=silent).returncode == 0


def child_environment() -> dict[str, str]:
    """Return the environment for .venv's programs: nothing of the user's that would lead them out of it."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_CONSTRAINT", "UV_CONSTRAINT")
    env = {name: value for name, value in os.environ.items() if name not in unwanted}
    env |= {"PYTHONUTF8": "1", "PIP_USER": "0", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env |= {"VIRTUAL_ENV": str(VENV), "JUPYTER_PREFER_ENV_PATH": "1"}
    ours = {"PATH": str(PYTHON.parent), "JUPYTER_CONFIG_PATH": str(ROOT / "binder" / "jupyter")}
    env |= {name: os.pathsep.join(filter(None, [first, env.get(name)])) for name, first in ours.items()}
    if not os.access(Path.home(), os.W_OK):
        for name in ("XDG_CACHE_HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
            env.setdefault(name, str(VENV / "home" / name.lower()))
    return env


def become(arguments: list[str], **variables: str) -> int:
    """Run .venv's Python in place of this one, so that Ctrl-C and signals reach it and nothing else."""
    env = variables | child_environment()
    if os.name != "nt":
        os.execve(PYTHON, [str(PYTHON), *arguments], env)
    child = subprocess.Popen([PYTHON, *arguments], env=env)  # Windows cannot replace a process: wait instead
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            pass  # The console has sent it to the child too, which stops in its own way.


def leave_id() -> None:
    """Leave this process's id in .venv, locked for as long as the process lives, whatever it becomes."""
    with suppress(OSError):  # a .venv that cannot be written, or a file system without locks: then nobody is told
        file = os.open(VENV / f"lab.{os.getpid()}", os.O_CREAT | os.O_WRONLY, 0o644)
        os.set_inheritable(file, True)
        if sys.platform != "win32":  # there nobody can delete an open file, which is lock enough
            fcntl.flock(file, fcntl.LOCK_EX)


def running_labs() -> list[str]:
    """Return the process ids that hold their lock: unlike a bare id, it ends with its process and is not used again."""
    running = []
    for path in VENV.glob("lab.*"):
        try:
            with path.open("a") as file:
                if sys.platform != "win32":
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except (BlockingIOError, PermissionError):
            running.append(path.suffix[1:])
        except OSError:
            pass
    return running


def copy_notebooks() -> None:
    """Copy the notebooks that work/ lacks. What is there stays: who has a copy of an older edition is told."""
    try:
        record = dict(json.loads(RECORD.read_bytes()))
    except (OSError, ValueError, TypeError):
        record = {}  # none yet, or a broken one: then the copies count as today's
    before, older = dict(record), []
    for path in sorted([*NOTEBOOKS.glob("[0-9]*.ipynb"), *NOTEBOOKS.glob("exercises/[0-9]*.ipynb")]):
        name, data = path.relative_to(NOTEBOOKS).as_posix(), path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if not os.path.lexists(WORK / name):
            # JupyterLab would write its kernel's version, and call the notebook changed. All else stays to the byte.
            version = rb'("pygments_lexer": "ipython3",\s+"version": ")[^"]*'
            write_new(WORK / name, re.sub(version, rb"\g<1>" + sys.version.split()[0].encode(), data))
            record[name] = digest
        elif record.setdefault(name, digest) != digest:
            older.append(name)
    if record != before:
        RECORD.write_text(json.dumps(record, indent=1), "utf-8")
    if older:
        advice = "yours in work/ stay; to get one, rename yours, then run the same command again"
        print(f"There are newer editions of {', '.join(older)}: {advice}.", flush=True)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # somebody was quicker: theirs stays
        file = path.open("xb")
        try:
            with file:
                file.write(data)
        except BaseException:
            path.unlink()
            raise


def lab_options(root: Path) -> list[str]:
    """Return how JupyterLab is started: with `root` as its root, reachable from this machine alone."""
    options = ["--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={root}", "--ServerApp.answer_yes=True"]
    return [*options, "--allow-root"]  # in a container; which page opens first stands in binder/jupyter, for Binder too


def lab(port: int | None, browser: bool, cuda: bool) -> int:
    """Open JupyterLab on the first lesson; Ctrl-C stops it at once."""
    options = lab_options(ROOT)
    if port is not None:  # who names a port means that one; else JupyterLab takes the next free one from 8888 on
        if not 1 <= port <= 65535:
            sys.exit(f"Port {port} does not exist: choose one from 1024 to 65535.")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                sys.exit(f"Port {port} is in use: choose another, like `python make.py lab --port {port % 65535 + 1}`.")
        options += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    has_screen = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not (browser and has_screen):
        options += ["--no-browser"]
    set_up("lessons", cuda)
    copy_notebooks()
    print(f"JupyterLab runs from {VENV}. Open the address it prints below; Ctrl-C stops it.", flush=True)
    leave_id()
    return become(["-m", "jupyterlab", *options])


def environment_text() -> str:
    """Return environment.yml: pyproject.toml's dependencies under conda's names, at the versions tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    tested = dict(re.findall(r"(?m)^([\w-]+)==(\d+\.\d+)", (ROOT / "tools" / "constraints.txt").read_text("utf-8")))
    lines = ["# Made by `python make.py environment` from pyproject.toml: change that, not this."]
    lines += ["name: gradaccum", "channels: [conda-forge]", "dependencies:"]
    lines += [f"  - python={'.'.join(map(str, OLDEST))}  # to Binder, >= would mean its own, older default", "  - pip"]
    # conda-forge has torch later than others have it: its range, and the CPU build where there is no GPU.
    lines += [f"  - {text.replace('torch', 'pytorch', 1)}" for text in project["dependencies"]]
    names = [re.findall(r"^[\w-]+", text)[0] for text in project["optional-dependencies"]["lessons"]]
    return "\n".join([*lines, *(f"  - {name}={tested[name]}.*" for name in names), ""])


def constraints(pins: list[str]) -> None:
    """Write constraints.txt: the newest versions that fit together, on every system and Python."""
    claim_venv()
    if not PYTHON.exists():
        make_venv()
    install(["uv"])
    (VENV / "pins.txt").write_text("\n".join(pins or [f"torch=={pinned_torch()}"]), "utf-8")
    command = [str(PYTHON), "-m", "uv", "pip", "compile", "pyproject.toml", "--all-extras", "--universal", "--quiet"]
    command += ["--python-version", ".".join(map(str, OLDEST)), "--constraint", str(VENV / "pins.txt")]
    command += ["--no-header", "--no-annotate"]
    result = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if result.returncode:
        sys.exit("No set of versions fits, as told above: name another torch.")
    # torch itself names its CUDA libraries exactly, and another build of it names others: they have no place here.
    lines = [line for line in result.stdout.splitlines() if not line.startswith(("nvidia-", "cuda-", "triton="))]
    text = "\n".join(["# Made by `python make.py constraints`.", *lines, ""])
    (ROOT / "tools" / "constraints.txt").write_text(text, "utf-8", newline="\n")
    print(f"Wrote constraints.txt: {len(lines)} lines. Now run `python make.py environment`.")


def main(arguments: list[str]) -> int:
    """Carry out what the command line says and return the exit code; problems end it with one sentence."""
    listing = "\n".join(["commands:", *(f"  {name:<12} {text}" for name, text in COMMANDS.items())])
    parser = argparse.ArgumentParser(usage="python make.py COMMAND [options]", description=listing, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, metavar="N", help="lab: the port; without it, the first free from 8888 on")
    parser.add_argument("--no-browser", action="store_true", help="lab: open no browser, only print the address")
    parser.add_argument("--cuda", action="store_true", help="set-up: take torch's CUDA build (GBs) without a GPU")
    options, rest = parser.parse_known_args(arguments)
    command = options.command
    if command is None:
        parser.print_help()
        return 0
    if rest and command in ("lab", "lint", "environment", "work", "clean"):
        parser.error(f"`{command}` does not know {' '.join(rest)}")
    if command == "address" and len(rest) != 1:
        parser.error("`address` takes one address, https://github.com/OWNER/NAME, or `none`")
    os.chdir(ROOT)
    if command == "lab":
        return lab(options.port, not options.no_browser, options.cuda)
    if command in ("test", "test-all", "test-browser", "test-peers", "notebooks", "address", "lint", "benchmarks"):
        set_up("dev,peers" if command in ("benchmarks", "test-peers") else "dev", options.cuda)
    if command in ("test", "test-all", "test-browser", "test-peers"):
        # The slow tests measure time: alone. The order of the files is conftest's: the longest first.
        quick = [
            "-m",
            "not slow and not browser and not peers",
            "-n",
            "2",
            "--dist",
            "loadfile",
            "--no-loadscope-reorder",
        ]
        chosen = {"test": quick, "test-all": ["-m", "not browser and not peers"]}
        pytest = ["-m", "pytest", *chosen.get(command, ["-m", command.removeprefix("test-")]), "--durations=20", *rest]
        return become(pytest, OMP_NUM_THREADS="1")  # two workers share the cores, unless the user says otherwise
    if command == "address":
        return become(["tools/build.py", f"--address={rest[0]}"])
    scripts = {"notebooks": "tools/build.py", "benchmarks": "benchmarks/run.py"}
    if command in scripts:
        return become([scripts[command], *rest])
    if command == "lint":
        checks = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["codespell_lib"]]
        return int(False in [attempt(check) for check in checks])  # every check runs, also after one that failed
    if command == "environment":
        # Binder reads its own folder alone, and a link there would be a text file in a clone on Windows.
        for folder in (ROOT, ROOT / "binder"):
            (folder / "environment.yml").write_text(environment_text(), "utf-8", newline="\n")
    elif command == "constraints":
        constraints(rest)
    elif command == "work":
        copy_notebooks()
    else:  # clean
        claim_venv()
        empty_venv()
        shutil.rmtree(VENV)  # the mark is the last to go
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nStopped.")
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written, a file that another program has open
        sys.exit(f"Stopped: {error}.")
