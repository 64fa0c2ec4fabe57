#!/usr/bin/env python3
"""Every command of this repository: `python make.py lab` opens the lessons, `python make.py` lists the rest.

Only the standard library is used, so that any Python that is new enough can start it, on Windows too.
The first command makes `.venv` beside this file (tools/set_up.py); later ones find it ready and install nothing.
"""

# ruff: noqa: E402 - the version is checked before anything is imported that an older Python lacks
import sys

OLDEST = (3, 11)
if sys.version_info < OLDEST:
    sys.exit(f"Python {sys.version.split()[0]} is too old: start make.py with Python 3.11 or newer.")

import argparse
import os
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import set_up

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
    "constraints": "write constraints.txt and environment.yml anew (constraints torch==2.13.0 sets the torch)",
    "work": "copy the notebooks that work/ lacks, for a Python of your own (lab does it too)",
    "clean": "delete .venv, and nothing in work/; the next command makes it again",
}
# The slow tests measure time: alone. The order of the files is conftest's: the longest first.
QUICK = ["not slow and not browser and not peers", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
TESTS = {"test": QUICK, "test-all": ["not browser and not peers"], "test-browser": ["browser"], "test-peers": ["peers"]}
SCRIPTS = {"notebooks": ["tools/build.py"], "address": ["tools/build.py", "--address"]}
SCRIPTS |= {"benchmarks": ["benchmarks/run.py"]}
BARE = {"work": ["tools/work.py"], "environment": ["tools/environment.py"]}  # these need nothing installed
BARE |= {"constraints": ["tools/environment.py", "constraints"]}
CHECKS = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["codespell_lib"]]
# Reachable from this machine alone; as root in a container. binder/jupyter says which page opens first.
LAB = ["-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", "--ServerApp.answer_yes=True", "--allow-root"]


def become(arguments: list[str], **variables: str) -> int:
    """Run .venv's Python in place of this one, so that Ctrl-C and signals reach it and nothing else."""
    env, command = variables | set_up.child_environment(), [str(set_up.PYTHON), *arguments]
    if os.name != "nt":
        os.execve(command[0], command, env)
    child = subprocess.Popen(command, env=env)  # Windows cannot replace a process: wait instead
    while True:
        with suppress(KeyboardInterrupt):  # the console has sent it to the child too, which stops in its own way
            return child.wait()


def run_bare(command: str, arguments: list[str]) -> int:
    """Run a script with the Python that runs this; return its exit code."""
    return subprocess.run([sys.executable, *BARE[command], *arguments], cwd=ROOT).returncode


def lab(port: int | None, browser: bool, cuda: bool) -> int:
    """Open JupyterLab on the first lesson; Ctrl-C stops it at once."""
    options = [*LAB, f"--ServerApp.root_dir={ROOT}"]
    if port is not None:  # that one and no other; without it JupyterLab takes the next free one from 8888 on
        if not 1 <= port <= 65535:
            sys.exit(f"Port {port} does not exist: choose one from 1024 to 65535.")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                sys.exit(f"Port {port} is in use: choose another, like `python make.py lab --port {port % 65535 + 1}`.")
        options += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    has_screen = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not (browser and has_screen):
        options += ["--no-browser"]
    if "JUPYTER_TOKEN" not in os.environ:  # with one, JupyterLab says its address in these lines and nowhere else
        options += ["--Application.log_level=ERROR"]
    set_up.set_up("lessons", cuda)
    if failed := run_bare("work", []):
        return failed
    print(f"JupyterLab runs from {set_up.VENV}. Open the address it prints below; Ctrl-C stops it.", flush=True)
    set_up.lock_id()
    return become(options)


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
    if command in BARE:
        return run_bare(command, rest)
    if command == "clean":
        set_up.claim_venv()
        set_up.empty_venv()
        shutil.rmtree(set_up.VENV)  # the stamp is the last to go
        return 0
    set_up.set_up("dev,peers" if command in ("benchmarks", "test-peers") else "dev", options.cuda)
    if command == "lint":
        return int(False in [set_up.attempt(check) for check in CHECKS])  # every check runs, also after a failure
    if command in TESTS:  # two workers share the cores, unless the user says otherwise
        return become(["-m", "pytest", "-m", *TESTS[command], "--durations=20", *rest], OMP_NUM_THREADS="1")
    return become([*SCRIPTS[command], *rest])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nStopped.")
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written, a file that another program has open
        sys.exit(f"Stopped: {error}.")
