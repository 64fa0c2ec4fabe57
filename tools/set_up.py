"""Make `.venv`, which every command of make.py runs from; a set-up that is finished is found, not repeated.

A torch that the starting Python has (a system's, a conda environment's, an activated venv's) is used and not replaced.
Only the standard library is used.
"""

import hashlib
import importlib.machinery
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PATHS = {"base": str(VENV), "platbase": str(VENV)}
SITE = Path(sysconfig.get_path("purelib", "venv", PATHS))
PYTHON = Path(sysconfig.get_path("scripts", "venv", PATHS)) / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "stamp.txt"  # marks .venv as ours; empty until a set-up is finished
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
EXTRAS = ["lessons", "dev", "dev,peers"]  # what pyproject.toml calls them; each holds the ones before it
AGAIN = "then run the same command again"


def torch_on(path: list[str]) -> importlib.metadata.Distribution | None:
    """Return what is installed on `path` as torch."""
    return next(iter(importlib.metadata.distributions(name="torch", path=path)), None)


def is_enough(version: str, minimum: str) -> bool:
    """Return whether torch `version` satisfies `>=minimum`, as pip would: 2.11.0a0 comes before 2.11."""
    number, least = (tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (version, minimum))
    return number > least or (number == least and not re.search("a|b|rc|dev", version.split("+")[0]))


def starting_torch(path: list[str]) -> tuple[str, str] | None:
    """Return the version and the folder of a torch on `path` that is new enough, without importing it; else None."""
    minimum = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))[0]
    spec, found = importlib.machinery.PathFinder.find_spec("torch", path), torch_on(path)
    if spec is None or spec.origin is None or Path(spec.origin).resolve().is_relative_to(VENV):
        return None
    return (found.version, str(Path(spec.origin).parents[1])) if found and is_enough(found.version, minimum) else None


def install_torch(cuda: bool) -> None:
    """Install torch alone and first, so that no later step can pick the CUDA build for a machine without a GPU."""
    wanted = re.findall(r"(?m)^torch==[\w.]+", CONSTRAINTS.read_text("utf-8"))[0]
    cuda = cuda or "GPU 0" in subprocess.getoutput("nvidia-smi -L")
    cpu_only = sys.platform == "linux" and not cuda  # elsewhere no build brings CUDA along
    found = torch_on([str(SITE)])
    if found is None or f"torch=={found.version.split('+')[0]}" != wanted:
        print(f"Installing {wanted} ...", flush=True)
        # 1. A wheel on this machine, where pip is set up to find one; fails within a second elsewhere.
        local = ["pip", "install", "-qq", "--no-index", "--no-deps", wanted]
        # 2. uv knows torch's own indexes: the CPU build, or the one for the driver that is there.
        uv = ["uv", "pip", "install", "--python", str(PYTHON), "--torch-backend", "auto", wanted]
        if not (attempt(local, silent=True) or (attempt(["pip", "install", "-qq", "uv"], silent=True) and attempt(uv))):
            # 3. The default index: the CPU build on macOS and Windows, several GB of CUDA libraries on Linux.
            if cpu_only:
                sys.exit(f"No CPU build of {wanted} was found, see above: check the network, or add --cuda.")
            install([wanted])
        found = torch_on([str(SITE)])
    if cpu_only and found and any(name.startswith(("nvidia-", "cuda-")) for name in found.requires or []):
        sys.exit(f"There is no GPU, but torch {found.version} is a CUDA build: offer pip a CPU build, or add --cuda.")


def fingerprint(extra: str, torch: tuple[str, str] | None) -> str:
    """Return two digests: what .venv is built on, and that with everything that decides what is installed."""
    base = f"{sys.version_info[:3]} {sys.base_prefix} {VENV} {torch}".encode()
    inputs = [path.read_bytes() for path in (ROOT / "pyproject.toml", CONSTRAINTS, ROOT / "tools" / "set_up.py")]
    everything = b"\0".join([base, extra.encode(), *inputs])
    return f"{hashlib.sha256(base).hexdigest()} {hashlib.sha256(everything).hexdigest()}"


def set_up(extra: str, cuda: bool = False) -> None:
    """Make .venv ready for `extra`; install nothing if its stamp says that it is."""
    refuse_foreign()
    torch = starting_torch(sys.path)
    stamp = STAMP.read_text("utf-8") if PYTHON.exists() else ""
    if stamp in [fingerprint(each, torch) for each in EXTRAS[EXTRAS.index(extra) :]]:
        return
    claim_venv()
    print(f"Setting up {VENV} for {extra}; this takes a minute or two, once.", flush=True)
    # While pip works, it must not see what else is beside the kept torch: it would take that for installed.
    kept = SITE / "gradaccum_torch.pth"
    kept.unlink(missing_ok=True)
    if stamp.split(" ")[0] != fingerprint(extra, torch).split(" ")[0]:
        make_venv()
    constraints = CONSTRAINTS.read_text("utf-8")
    if torch:
        print(f"Using torch {torch[0]} in {torch[1]}, which the Python you started has.", flush=True)
        constraints = re.sub(r"(?m)^torch==.*$", f"torch=={torch[0]}", constraints)
        # pip sees a torch without requirements, so it fetches none; without a RECORD it removes nothing either.
        entry = SITE / f"torch-{torch[0]}.dist-info"
        entry.mkdir(exist_ok=True)
        (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch[0]}\n", "utf-8")
        (entry / "INSTALLER").write_text("make.py\n", "utf-8")
    else:
        install_torch(cuda)
    (VENV / "constraints.txt").write_text(constraints, "utf-8")
    print("Installing the rest ...", flush=True)
    install(["--constraint", str(VENV / "constraints.txt"), "--editable", f".[{extra}]"])
    if torch:  # A line of code in ASCII, since the encoding of a .pth file depends on the machine.
        kept.write_text(f"import sys; sys.path.append({torch[1]!a})\n", "ascii")
    STAMP.write_text(fingerprint(extra, torch), "utf-8")


def refuse_foreign() -> None:
    """Refuse a .venv that is not ours to change. An empty folder is: a set-up was stopped before its first file."""
    found = Path(os.path.realpath(VENV))
    if found != VENV:  # true of a link that leads nowhere too, and of Windows' junctions
        kind = f"a link to {found}"
    elif VENV.exists() and not VENV.is_dir():
        kind = "not a folder"
    elif VENV.exists() and any(VENV.iterdir()) and not STAMP.exists():
        kind = "a folder without make.py's stamp"
    else:
        return
    sys.exit(f"{VENV} is {kind}, so it is left alone: move it away or delete it, {AGAIN}.")


def claim_venv() -> None:
    """Mark .venv as ours and unfinished, made if it is missing; refuse while JupyterLab runs from it."""
    refuse_foreign()
    if running := [path.suffix[1:] for path in VENV.glob("lab.*") if is_locked(path)]:
        sys.exit(f"JupyterLab runs from {VENV}: stop it first (process {', '.join(running)}), {AGAIN}.")
    VENV.mkdir(exist_ok=True)
    STAMP.write_text("", "utf-8")


def empty_venv() -> None:
    """Delete what is in .venv; the stamp stays, so that the next command can go on where this one is stopped."""
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != STAMP:
            path.unlink()


def make_venv() -> None:
    """Make .venv anew with the Python that runs this."""
    if Path(sys.prefix).resolve() == VENV:
        sys.exit(f".venv is out of date and cannot remake itself: run `deactivate`, {AGAIN}.")
    empty_venv()  # not by venv's own --clear, which would delete the stamp too
    if subprocess.run([sys.executable, "-m", "venv", str(VENV)], env=child_environment()).returncode:
        sys.exit("Making .venv failed, see above; on Debian and Ubuntu, install python3-venv first.")


def install(arguments: list[str]) -> None:
    """Let .venv's pip install something, or say that it failed."""
    if not attempt(["pip", "install", "-qq", *arguments]):
        sys.exit(f"Installing failed, see above; check the network, {AGAIN}.")


def attempt(module: list[str], silent: bool = False) -> bool:
    """Run a module of .venv and return whether it succeeded."""
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


def lock_id() -> None:
    """Leave this process's id in .venv, locked for as long as the process lives, whatever it becomes."""
    with suppress(OSError):  # a .venv that cannot be written, or a file system without locks: then nobody is told
        file = os.open(VENV / f"lab.{os.getpid()}", os.O_CREAT | os.O_WRONLY, 0o644)
        os.set_inheritable(file, True)
        if sys.platform != "win32":  # there nobody can delete an open file, which is lock enough
            fcntl.flock(file, fcntl.LOCK_EX)


def is_locked(path: Path) -> bool:
    """Return whether the process runs that locked its id: a lock ends with its process, an id is used again."""
    try:
        with path.open("a") as file:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        pass
    return False
