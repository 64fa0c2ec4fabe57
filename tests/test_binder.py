"""Binder without Docker: what repo2docker would build, the same set-up in a venv, and the memory a session has.

Fast: repo2docker's own classes make the Dockerfile and the build context from what git tracks. Slow: postBuild and
start run in a venv that stands in for the image, and serve as on mybinder.org. Not tried: conda, and the image.
"""

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from contextlib import contextmanager
from pathlib import Path

import build
import nbformat
import psutil
import pytest
from browser import free_port, start_chromium
from playwright.sync_api import sync_playwright
from repo2docker.app import Repo2Docker
from repo2docker.engine import ContainerEngine
from test_exercise_notebooks import each_lesson, scores, solved
from test_notebooks import peak_megabytes
from test_project import project_files
from websocket import create_connection

from gradaccum import exercises

ROOT = Path(__file__).resolve().parents[1]
START = "lab/tree/work/00_start_here.ipynb"
MEMORY = 2 * 1024**3  # what a session on mybinder.org may use; it hears of it as MEM_LIMIT
ADDRESS = "https://example.org/gradaccum"  # a stand-in too: Binder tells a session which repository it shows
BASE_HAS = ("jupyter-offlinenotebook", "jupyter-resource-usage")  # of repo2docker's own, what learners here need
posix = pytest.mark.skipif(os.name == "nt", reason="runs scripts for bash")
linux = pytest.mark.skipif(sys.platform != "linux", reason="pins a kernel and reads its memory as Linux tells it")
pytestmark = posix


# ------------------------------------------------------------------------------------- what repo2docker would build


class Context:
    """All that Docker would get: the Dockerfile, repo2docker's own files, and the repository as `src`."""

    def __init__(self, repository, folder):
        class Engine(ContainerEngine):
            def inspect_image(self, image):
                return None

            def build(self, *, fileobj, **options):
                with tarfile.open(fileobj=fileobj) as archive:
                    archive.extractall(folder, filter="data")
                yield "taken"

        class App(Repo2Docker):
            def get_engine(self):
                return Engine(parent=self)

        names = {"user_id": 1000, "user_name": "jovyan", "output_image_spec": "gradaccum", "platform": "linux/amd64"}
        App(repo=str(repository), run=False, **names).build()
        self.folder, self.src = folder, folder / "src"
        self.dockerfile = (folder / "Dockerfile").read_text("utf-8")

    def base(self):
        """What repo2docker's own environment holds, by name, and the Python that it is made for."""
        ((lock, python),) = re.findall(r"COPY \S+ (\S+py-2d(\S+?)-2dlinux\S+lock\S*)", self.dockerfile)
        packages = (self.folder / lock).read_text("utf-8")
        return dict(re.findall(r"/([\w.-]+)-([^-/]+)-[^-/]+\.(?:conda|tar)", packages)), python.replace("-2e", ".")


def tracked_copy(folder):
    """Copy what git tracks, or would after the next commit; links stay links."""
    for path in project_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path, follow_symlinks=False)
    return folder


def problems(context):
    """Yield what would not work in the image."""
    src, steps = context.src, context.dockerfile
    for name in ("postBuild", "start"):
        if not os.access(src / "binder" / name, os.X_OK):
            yield f"binder/{name} is not executable"
    ours, environment = src / "binder" / "environment.yml", src / "environment.yml"
    if not environment.exists() or ours.read_text("utf-8") != environment.read_text("utf-8"):
        yield "binder/environment.yml is not the root's environment.yml"
    wanted = ["${MAMBA_EXE} env update", "COPY --chown=1000:1000 src/ ", "RUN ./binder/postBuild"]
    wanted += ['ENV R2D_ENTRYPOINT="${REPO_DIR}/binder/start"', 'ENTRYPOINT ["/usr/local/bin/repo2docker-entrypoint"]']
    places = [steps.find(step) for step in wanted]
    if -1 in places or places != sorted(places):  # conda comes before the copy, so that its layer stays cached
        yield f"the Dockerfile has not in this order: {wanted}"
    base, python = context.base()
    if python != "3.11":
        yield f"the image has Python {python}"
    yield from (f"{name} is no longer in repo2docker's base" for name in BASE_HAS if name not in base)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = ["pyproject.toml", project["project"]["readme"], *project["project"]["license-files"], *packages]
    missing = {*map(Path, needed), *project_files()} - {path.relative_to(src) for path in src.rglob("*")}
    yield from (f"{path} is not in the image" for path in sorted(missing))


def test_repo2docker_finds_all_that_binder_needs(tmp_path):
    context = Context(tracked_copy(tmp_path / "clone"), tmp_path / "context")
    assert list(problems(context)) == []
    settings = context.src / "binder" / "jupyter"
    first = json.loads((settings / "jupyter_lab_config.json").read_text("utf-8"))["LabApp"]["default_url"]
    assert first == f"/{START}"
    assert (context.src / "notebooks" / first.removeprefix("/lab/tree/work/")).is_file()  # postBuild copies it
    assert '"fetchNews": "false"' in (settings / "labconfig" / "default_setting_overrides.json").read_text("utf-8")


def break_post_build(binder):
    (binder / "postBuild").chmod(0o644)
    return ["binder/postBuild is not executable"]


def break_start(binder):
    (binder / "start").unlink()
    return ["binder/start is not executable", "the Dockerfile has not", "binder/start is not in the image"]


def break_environment(binder):
    (binder / "environment.yml").write_text("dependencies: [python=3.12]")
    return ["binder/environment.yml is not the root's", "the image has Python 3.12"]


def break_readme(binder):
    (binder.parent / "README.md").unlink()
    return ["README.md is not in the image"]


def break_package(binder):
    (binder / ".dockerignore").write_text("gradaccum/data.py")
    return ["gradaccum/data.py is not in the image"]


@pytest.mark.parametrize("spoil", [break_post_build, break_start, break_environment, break_readme, break_package])
def test_what_is_broken_is_noticed(tmp_path, spoil):
    repository = tracked_copy(tmp_path / "clone")
    told = spoil(repository / "binder")
    found = list(problems(Context(repository, tmp_path / "context")))
    assert [problem[: len(start)] for problem, start in zip(found, told, strict=True)] == told


def test_the_entrypoint_runs_start_and_start_sets_one_thread(tmp_path):
    context = Context(tracked_copy(tmp_path / "clone"), tmp_path / "context")
    program = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['JUPYTER_CONFIG_PATH'])"
    command = [*entrypoint(context), sys.executable, "-c", program]
    env = os.environ | session(context, tmp_path) | {"JUPYTER_CONFIG_PATH": "/theirs"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"1 {context.src / 'binder' / 'jupyter'}:/theirs\n"


def test_postbuild_installs_refuses_cuda_and_copies(tmp_path):
    clone = tracked_copy(tmp_path / "clone")
    (tmp_path / "pip").write_text("#!/bin/sh\necho pip $*\n")
    (tmp_path / "pip").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    for cuda, told in (("13.0", "torch 9 is a CUDA build"), (None, "")):
        assert not (clone / "work").exists()
        (tmp_path / "torch.py").write_text(f"__version__ = '9'\nclass version: cuda = {cuda!r}\n")
        built = subprocess.run([clone / "binder" / "postBuild"], cwd=clone, env=env, capture_output=True, text=True)
        assert built.stdout == "pip install --no-cache-dir --no-deps -e .\n"
        assert (built.returncode == 0) is (cuda is None)
        assert told in built.stderr
    notebooks = [folder.rglob("*.ipynb") for folder in (clone / "work", clone / "notebooks")]
    assert len({*notebooks[0]}) == len({*notebooks[1]}) > 0


# ---------------------------------------------------------------------------- a session, in a venv instead of the image


def entrypoint(context):
    """The program that the image starts; its first line names a Python that only the image has."""
    return [sys.executable, context.folder / "repo2docker-entrypoint"]


def session(context, scripts):
    """What a session finds in its environment: from the image, from the hub, and nothing of this machine's Jupyter."""
    strange = re.compile("JUPYTER|PYTHON|IPYTHON|MPL|OMP_|VIRTUAL_ENV|TQDM|XDG_|MEM_|CPU_|BINDER_")
    env = {name: value for name, value in os.environ.items() if not strange.match(name)}
    env |= {"HOME": str(context.src), "REPO_DIR": str(context.src), "PATH": f"{scripts}:/usr/bin:/bin"}
    env |= {"R2D_ENTRYPOINT": str(context.src / "binder" / "start"), "MEM_LIMIT": str(MEMORY), "CPU_LIMIT": "1.0"}
    env |= {"BINDER_REPO_URL": ADDRESS, "BINDER_REF_URL": f"{ADDRESS}/tree/main", "BINDER_REQUEST": "v2/gh/x/gradaccum"}
    return env | {"BINDER_LAUNCH_HOST": "https://example.org/", "BINDER_PERSISTENT_REQUEST": "v2/gh/x/gradaccum/1"}


class Server:
    """A running session: its processes, its address, and a way to ask it."""

    def __init__(self, process, port, user):
        self.process, self.port, self.base = process, port, f"/user/{user}/"
        self.address, self.headers = f"http://127.0.0.1:{port}{self.base}", {"Authorization": "token secret"}

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, self.base + path, json.dumps(body) if body else None, self.headers)
        return connection.getresponse()

    def megabytes(self, kind):
        """The memory of all its processes: `pss` counts what they share once, `rss` in each."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(getattr(process.memory_full_info(), kind) for process in family) / 1e6

    def run(self, path, sources):
        """Run code in a kernel of its own, as an open notebook has it; return what it printed. The kernel stays."""
        body = {"path": path, "name": path, "type": "notebook", "kernel": {"name": "python3"}}
        kernel = json.load(self.ask("POST", "api/sessions", body))["kernel"]["id"]
        socket = create_connection(
            f"{self.address.replace('http', 'ws')}api/kernels/{kernel}/channels",
            header=[f"{name}: {value}" for name, value in self.headers.items()],
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
    """The build context, and a venv with what the image has: environment.yml's packages and repo2docker's own."""
    folder, begin = tmp_path_factory.mktemp("image"), time.perf_counter()
    context = Context(tracked_copy(folder / "clone"), folder / "context")
    command = [sys._base_executable, "-c", "import make; make.set_up('lessons')"]
    subprocess.run(command, cwd=folder / "clone", check=True)
    scripts, (base, _) = folder / "clone" / ".venv" / "bin", context.base()
    pins = ["notebook==7.*", *(f"{name}=={base[name]}" for name in BASE_HAS)]
    install = [scripts / "python", "-m", "pip", "install", "-qq", "--constraint", scripts.parent / "constraints.txt"]
    subprocess.run([*install, *pins], check=True)
    installed = time.perf_counter()
    subprocess.run(["./binder/postBuild"], cwd=context.src, env=session(context, scripts), check=True)
    now = time.perf_counter()
    print(f"the venv: {installed - begin:.0f} s; postBuild: {now - installed:.0f} s")
    return context, scripts


@contextmanager
def launched(image, user, port=None):
    """Start JupyterLab through the image's entrypoint with the options that a BinderHub gives it."""
    context, scripts = image
    port = port or free_port()
    given = [f"base_url=/user/{user}/", "token=secret", "trust_xheaders=True", "allow_origin=*", "allow_origin_pat=.*"]
    options = [f"--{app}.{option}" for app in ("NotebookApp", "ServerApp") for option in given]
    command = [*entrypoint(context), "jupyter-lab", "--ip=127.0.0.1", f"--port={port}", *options]
    command += ["--allow-root", "--no-browser"]  # for this machine: an image has no root and no browser
    log = context.folder / f"{user}.log"
    with log.open("wb") as out:
        process = psutil.Popen(command, cwd=context.src, env=session(context, scripts), stdout=out, stderr=out)
    server, begin = Server(process, port, user), time.perf_counter()
    try:
        while f"127.0.0.1:{port}{server.base}{START}" not in log.read_text("utf-8"):
            assert process.poll() is None, log.read_text("utf-8")
            assert time.perf_counter() - begin < 120, log.read_text("utf-8")
            time.sleep(0.2)
        yield server
        assert "Traceback" not in log.read_text("utf-8")  # before the end: a kernel may complain of being stopped
    finally:
        family = process.children(recursive=True)
        process.terminate()
        _, left = psutil.wait_procs([process, *family], timeout=60)
        for one in left:
            one.kill()
    assert left == []


@pytest.mark.slow
def test_a_session_is_as_a_learner_should_find_it(image):
    with launched(image, "gradaccum-abc") as server:
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
        copy = image[0].src / "gradaccum" / "__init__.py"
        assert server.run("work/00_start_here.ipynb", [code]) == f"1 None {copy}\n"
        memory = json.load(server.ask("GET", "api/metrics/v1"))
        assert memory["limits"]["memory"]["rss"] == MEMORY
        assert 200e6 < memory["rss"] < MEMORY


@linux
@pytest.mark.slow
def test_two_open_lessons_and_the_server_stay_under_1_5_gb(image):
    hungriest = ("01_naive_loop", "06_gpu_memory")
    with launched(image, "gradaccum-two") as server:
        print(f"server alone: {server.megabytes('pss'):.0f} MB")
        for stem in hungriest:
            notebook = json.load(server.ask("GET", f"api/contents/work/{stem}.ipynb"))["content"]
            server.run(f"work/{stem}.ipynb", [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"])
            print(f"and {stem}: {server.megabytes('pss'):.0f} MB, {server.megabytes('rss'):.0f} as a sum of RSS")
        assert server.megabytes("pss") < 1500


@pytest.mark.browser
def test_a_launch_opens_the_first_page_and_work_outlives_the_session(image):
    (path,), work = ROOT.glob("notebooks/exercises/01_*.ipynb"), "# my own answer"
    exercise = f"lab/tree/work/exercises/{path.name}"
    problems = []
    with sync_playwright() as playwright:
        browser = start_chromium(playwright)
        if browser is None:
            pytest.skip("No Chromium was found.")  # in CI, where it must be, test_browser.py fails for it
        page = browser.new_page()
        page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda sent: None if "127.0.0.1" in sent.url else problems.append(sent.url))

        def cell():
            return page.locator(".jp-CodeCell:visible .cm-content").nth(1)

        def press(name):
            page.get_by_role("button", name=name, exact=True).locator("visible=true").click()

        with launched(image, "gradaccum-abc") as server:
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
        with launched(image, "gradaccum-xyz", server.port) as server:  # another session of the same hub
            page.goto(f"{server.address}{exercise}?token=secret")
            cell().wait_for(timeout=60_000)
            assert work not in cell().inner_text()
            press("Restore from browser storage")
            page.locator(".jp-Dialog").get_by_role("button", name="OK").click()
            cell().get_by_text(work).wait_for()
        assert problems == []
        browser.close()


# ------------------------------------------------------------------------------------ the exercises on such a session


@linux
@pytest.mark.slow
@each_lesson
def test_solved_exercises_run_on_one_core_in_900_mb(lesson):
    notebook, begin = solved(lesson), time.perf_counter()
    with build.kernel(notebook) as client:
        process = client.km.provisioner.pid
        os.sched_setaffinity(process, sorted(os.sched_getaffinity(0))[:1])
        build.run_cells(client, notebook.cells)
        peak = peak_megabytes(process)
    print(f"exercises {lesson} on one core: {time.perf_counter() - begin:.1f} s, {peak:.0f} MB")
    assert scores(notebook) == {question.id: question.points for question in exercises.questions_of(lesson)}
    assert peak <= 900


@pytest.mark.slow
@each_lesson
def test_after_a_killed_kernel_every_question_goes_on_from_the_set_up(lesson):
    notebook = solved(lesson)
    forget = nbformat.v4.new_code_cell("%reset -f", id="forget")  # all names, as a killed kernel does, in no time
    notebook.cells.append(forget)
    with build.kernel(notebook) as client:
        for question in exercises.questions_of(lesson):
            own = question.id.replace(".", "-")
            names = ["forget", "setup", *(f"{role}-{own}" for role in ("losses", "answer", "try", "check"))]
            chosen = [cell for cell in notebook.cells if cell.id in names]
            build.run_cells(client, [forget, *chosen[:-1]])
    assert scores(notebook) == {question.id: question.points for question in exercises.questions_of(lesson)}
