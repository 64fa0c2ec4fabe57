"""Binder without Docker: what repo2docker would build, the same set-up in a venv, and the memory a session has.

Fast: `jupyter-repo2docker --no-build` prints the Dockerfile. Slow: postBuild and start run in a venv that stands in
for the image, and serve as on mybinder.org. Not tried: conda, and the image.
"""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import build
import pytest
import repo2docker
from files import ROOT, clone, project_files
from server import Server, free_port, running
from websocket import create_connection

START = "lab/tree/work/00_start_here.ipynb"
MEMORY = 2 * 1024**3  # what a session on mybinder.org may use; it hears of it as MEM_LIMIT
ADDRESS = "https://example.org/gradaccum"  # a stand-in too: Binder tells a session which repository it shows
BUILDPACKS = Path(repo2docker.__file__).parent / "buildpacks"
BASE_HAS = ("jupyter-offlinenotebook", "jupyter-resource-usage")  # of repo2docker's own, what learners here need
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads memory as Linux tells it")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="runs scripts for bash")


# ------------------------------------------------------------------------------------- what repo2docker would build


def dockerfile(repository):
    """Return what repo2docker would give Docker."""
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", "--user-id=1000", "--user-name=jovyan"]
    done = subprocess.run([*command, repository], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def base_packages(python):
    """What repo2docker's own environment for a Python holds, by name."""
    lock = (BUILDPACKS / "conda" / f"environment.py-{python}-linux-64.lock").read_text("utf-8")
    return dict(re.findall(r"/([\w.-]+)-([^-/]+)-[^-/]+\.(?:conda|tar)", lock))


def problems(repository):
    """Yield what would not work in the image."""
    binder, steps = repository / "binder", dockerfile(repository)
    for name in ("postBuild", "start"):
        if not os.access(binder / name, os.X_OK):
            yield f"binder/{name} is not executable"
    if (binder / "environment.yml").read_text("utf-8") != (repository / "environment.yml").read_text("utf-8"):
        yield "binder/environment.yml is not the root's environment.yml"
    wanted = ["${MAMBA_EXE} env update", "COPY --chown=1000:1000 src/ ", "RUN ./binder/postBuild"]
    wanted += ['ENV R2D_ENTRYPOINT="${REPO_DIR}/binder/start"', 'ENTRYPOINT ["/usr/local/bin/repo2docker-entrypoint"]']
    places = [steps.find(step) for step in wanted]
    if -1 in places or places != sorted(places):  # conda comes before the copy, so that its layer stays cached
        yield f"the Dockerfile has not in this order: {wanted}"
    python = re.findall(r"COPY \S+ \S+py-2d(\S+?)-2dlinux\S+lock", steps)[0].replace("-2e", ".")
    if python != "3.11":
        yield f"the image has Python {python}"
    yield from (f"{name} is no longer in repo2docker's base" for name in BASE_HAS if name not in base_packages(python))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = [project["project"]["readme"], *project["project"]["license-files"], *packages]
    missing = [path for path in sorted({*map(Path, needed), *project_files()}) if not (repository / path).exists()]
    yield from (f"{path} is not in the image" for path in missing)
    yield from (f"{path.name} may keep files out of the image" for path in repository.rglob(".dockerignore"))


@pytest.fixture
def repository(tmp_path):
    return clone(tmp_path / "clone")


def test_repo2docker_finds_all_that_binder_needs(repository):
    assert list(problems(repository)) == []
    settings = repository / "binder" / "jupyter"
    first = json.loads((settings / "jupyter_lab_config.json").read_text("utf-8"))["LabApp"]["default_url"]
    assert first == f"/{START}"
    assert (repository / "notebooks" / first.removeprefix("/lab/tree/work/")).is_file()  # postBuild copies it
    assert '"fetchNews": "false"' in (settings / "labconfig" / "default_setting_overrides.json").read_text("utf-8")


OTHER_PYTHON = "dependencies: [python=3.12]"
SPOILT = {
    "postBuild": (lambda path: path.chmod(0o644), ["binder/postBuild is not executable"]),
    "start": (Path.unlink, ["binder/start is not exec", "the Dockerfile has not", "binder/start is not in the image"]),
    "environment.yml": (
        lambda path: path.write_text(OTHER_PYTHON),
        ["binder/environment.yml is not the root's", "the image has Python 3.12"],
    ),
    "../README.md": (Path.unlink, ["README.md is not in the image"]),
    ".dockerignore": (Path.touch, [".dockerignore may keep files out of the image"]),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_broken_is_noticed(repository, name):
    spoil, told = SPOILT[name]
    spoil(repository / "binder" / name)
    found = list(problems(repository))
    assert [problem[: len(start)] for problem, start in zip(found, told, strict=True)] == told


def test_the_entrypoint_runs_start(repository, tmp_path):
    """And start sets one thread and the settings' folder."""
    program = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['JUPYTER_CONFIG_PATH'])"
    env = os.environ | session(repository, tmp_path) | {"JUPYTER_CONFIG_PATH": "/theirs"}
    command = [*ENTRYPOINT, sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"1 {repository / 'binder' / 'jupyter'}:/theirs\n"


def test_postbuild_installs_and_refuses_cuda(repository, tmp_path):
    (tmp_path / "pip").write_text("#!/bin/sh\necho pip $*\n")
    (tmp_path / "pip").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    for cuda, told in (("13.0", "torch 9 is a CUDA build"), (None, "")):
        assert not (repository / "work").exists()
        (tmp_path / "torch.py").write_text(f"__version__ = '9'\nclass version: cuda = {cuda!r}\n")
        command, folder = [repository / "binder" / "postBuild"], repository
        built = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert built.stdout == "pip install --no-cache-dir --no-deps -e .\n"
        assert (built.returncode == 0) is (cuda is None)
        assert told in built.stderr
    copies, originals = ([*(repository / name).rglob("*.ipynb")] for name in ("work", "notebooks"))
    assert len(copies) == len(originals) > 0


# ---------------------------------------------------------------------------- a session, in a venv instead of the image


# The program that the image starts; its first line names a Python that only the image has.
ENTRYPOINT = [sys.executable, BUILDPACKS / "repo2docker-entrypoint"]


def session(repository, scripts):
    """What a session finds in its environment: from the image, from the hub, and nothing of this machine's Jupyter."""
    strange = re.compile("JUPYTER|PYTHON|IPYTHON|MPL|OMP_|VIRTUAL_ENV|TQDM|XDG_|MEM_|CPU_|BINDER_")
    env = {name: value for name, value in os.environ.items() if not strange.match(name)}
    env |= {"HOME": str(repository), "REPO_DIR": str(repository), "PATH": f"{scripts}:/usr/bin:/bin"}
    env |= {"R2D_ENTRYPOINT": str(repository / "binder" / "start"), "MEM_LIMIT": str(MEMORY), "CPU_LIMIT": "1.0"}
    env |= {"BINDER_REPO_URL": ADDRESS, "BINDER_REF_URL": f"{ADDRESS}/tree/main", "BINDER_REQUEST": "v2/gh/x/gradaccum"}
    return env | {"BINDER_LAUNCH_HOST": "https://example.org/", "BINDER_PERSISTENT_REQUEST": "v2/gh/x/gradaccum/1"}


class Session(Server):
    """JupyterLab through the image's entrypoint, with the options that a BinderHub gives it."""

    def __init__(self, image, user, port=None):
        (repository, scripts), port = image, port or free_port()
        given = [f"base_url=/user/{user}/", "token=secret", "trust_xheaders=True", "allow_origin=*"]
        options = [
            f"--{app}.{each}" for app in ("NotebookApp", "ServerApp") for each in [*given, "allow_origin_pat=.*"]
        ]
        command = [*ENTRYPOINT, "jupyter-lab", "--ip=127.0.0.1", f"--port={port}", *options]
        command += ["--allow-root", "--no-browser"]  # for this machine: an image has no root and no browser
        env = session(repository, scripts)
        super().__init__(command, repository.parent / f"{user}.log", port, f"/user/{user}/", cwd=repository, env=env)
        assert f"127.0.0.1:{port}{self.base}{START}" in self.said()

    def megabytes(self, kind):
        """The memory of all its processes: `pss` counts what they share once, `rss` in each."""
        return sum(getattr(process.memory_full_info(), kind) for process in self.family()) / 1e6

    def run(self, path, sources):
        """Run code in a kernel of its own, as an open notebook has it; return what it printed. The kernel stays."""
        body = {"path": path, "name": path, "type": "notebook", "kernel": {"name": "python3"}}
        kernel = json.load(self.ask("POST", "api/sessions", body))["kernel"]["id"]
        socket = create_connection(
            f"{self.address.replace('http', 'ws')}api/kernels/{kernel}/channels",
            header=["Authorization: token secret"],
            timeout=build.CELL_SECONDS,
        )
        printed = ""
        for number, source in enumerate(sources):
            header = {"msg_id": str(number), "msg_type": "execute_request", "version": "5.3"}
            content = {"code": source, "silent": False, "store_history": True, "allow_stdin": False}
            request = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
            socket.send(json.dumps(request))
            ended = set()
            while ended != {"execute_reply", "idle"}:
                message = socket.recv()
                message = {"parent_header": {}} if isinstance(message, bytes) else json.loads(message)  # a picture
                if message["parent_header"].get("msg_id") == str(number):
                    kind, content = message["msg_type"], message["content"]
                    assert kind != "error", f"{path}, code cell {number}: {content}"
                    printed += content["text"] if kind == "stream" else ""
                    ended |= {kind, content.get("execution_state")} & {"execute_reply", "idle"}
        socket.close()
        return printed


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A clone, and a venv with what the image has: environment.yml's packages and repo2docker's own."""
    repository, begin = clone(tmp_path_factory.mktemp("image") / "clone"), time.perf_counter()
    command = [sys._base_executable, "-c", "import make; make.set_up.set_up('lessons')"]
    subprocess.run(command, cwd=repository, check=True)
    scripts, base = repository / ".venv" / "bin", base_packages("3.11")
    pins = ["notebook==7.*", *(f"{name}=={base[name]}" for name in BASE_HAS)]
    install = [scripts / "python", "-m", "pip", "install", "-qq", "--constraint", scripts.parent / "constraints.txt"]
    subprocess.run([*install, *pins], check=True)
    installed = time.perf_counter()
    subprocess.run(["./binder/postBuild"], cwd=repository, env=session(repository, scripts), check=True)
    now = time.perf_counter()
    print(f"the venv: {installed - begin:.0f} s; postBuild: {now - installed:.0f} s")
    return repository, scripts


@pytest.mark.slow
def test_a_session_is_as_a_learner_finds_it(image):
    with running(Session(image, "gradaccum-abc")) as server:
        first = server.ask("GET", "")
        assert (first.status, first.getheader("Location")) == (302, f"{server.base}{START}?")
        assert server.ask("GET", "api/contents/work/00_start_here.ipynb").status == 200
        news = json.load(server.ask("GET", "lab/api/settings/@jupyterlab/apputils-extension:notification"))
        defaults = {name: value["default"] for name, value in news["schema"]["properties"].items()}
        assert (defaults["fetchNews"], defaults["checkForUpdates"]) == ("false", False)
        page = server.ask("GET", START).read().decode()
        config = json.loads(re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
        extensions = {extension["name"] for extension in config["federated_extensions"]}
        assert {"jupyter-offlinenotebook", "@jupyter-server/resource-usage"} <= extensions
        assert not [name for name in extensions if "nbgrader" in name]
        assert json.load(server.ask("GET", "offlinenotebook/config"))["repoid"] == ADDRESS
        code = "import os, torch, gradaccum as ours\n"
        code += "print(os.environ['OMP_NUM_THREADS'], torch.version.cuda, ours.__file__)"
        copy = image[0] / "gradaccum" / "__init__.py"
        assert server.run("work/00_start_here.ipynb", [code]) == f"1 None {copy}\n"
        memory = json.load(server.ask("GET", "api/metrics/v1"))
        assert memory["limits"]["memory"]["rss"] == MEMORY
        assert 200e6 < memory["rss"] < MEMORY


@linux
@pytest.mark.slow
def test_two_lessons_and_the_server_fit_in_1_5_gb(image):
    hungriest = ("01_naive_loop", "06_gpu_memory")
    with running(Session(image, "gradaccum-two")) as server:
        print(f"server alone: {server.megabytes('pss'):.0f} MB")
        for stem in hungriest:
            notebook = json.load(server.ask("GET", f"api/contents/work/{stem}.ipynb"))["content"]
            server.run(f"work/{stem}.ipynb", [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"])
            print(f"and {stem}: {server.megabytes('pss'):.0f} MB, {server.megabytes('rss'):.0f} as a sum of RSS")
        assert server.megabytes("pss") < 1500


@pytest.mark.browser
def test_work_outlives_the_session(chromium, image):
    (path,), work = ROOT.glob("notebooks/exercises/01_*.ipynb"), "# my own answer"
    exercise = f"lab/tree/work/exercises/{path.name}"
    problems = []
    page = chromium.new_page()
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda sent: None if "127.0.0.1" in sent.url else problems.append(sent.url))

    def cell():
        return page.locator(".jp-CodeCell:visible .cm-content").nth(1)

    def press(name):
        page.get_by_role("button", name=name, exact=True).locator("visible=true").click()

    with running(Session(image, "gradaccum-abc")) as server:
        page.goto(f"{server.address}?token=secret")  # as a launch without a path in its link
        page.get_by_role("heading", name="Start here").wait_for(timeout=60_000)
        page.get_by_text(re.compile(r"Mem:\s+[\d.]+ / 2048.00 MB")).wait_for()
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.wait_for_timeout(3000)  # what pops up comes late
        assert page.locator(".jp-Dialog, .Toastify__toast, .jp-toastContainer *").all_inner_texts() == []
        page.goto(f"{server.address}{exercise}?reset")
        cell().click()
        page.keyboard.press("Control+Home")
        page.keyboard.type(f"{work}\n")
        press("Save to browser storage")
        page.get_by_text("Notebook saved to browser storage").wait_for()
        press("Ok")
        assert problems == []
        page.wait_for_timeout(1000)
    page.locator(".jp-Dialog").get_by_role("button", name="Close").click(timeout=60_000)  # "Connection Error"
    with page.expect_download() as taken:  # the session is gone, and the tab still gives the work away
        page.locator(".jp-Toolbar .downloadVisible:visible").first.click()
    assert work in taken.value.path().read_text("utf-8")
    page.goto("about:blank")
    problems.clear()  # of a page without its server
    with running(Session(image, "gradaccum-xyz", server.port)) as server:  # another session of the same hub
        page.goto(f"{server.address}{exercise}?token=secret")
        cell().wait_for(timeout=60_000)
        assert work not in cell().inner_text()
        press("Restore from browser storage")
        page.locator(".jp-Dialog").get_by_role("button", name="OK").click()
        cell().get_by_text(work).wait_for()
    assert problems == []
    page.close()
