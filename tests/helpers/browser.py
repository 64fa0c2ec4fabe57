"""JupyterLab in Chromium as a learner has it: start both, open a notebook, run it, read it, take its picture.

`python tests/helpers/browser.py notebooks/03_normalize.ipynb FOLDER` runs a notebook and leaves two pictures in FOLDER.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = map(str, (ROOT, ROOT / "tools"))
import set_up  # noqa: E402
import work  # noqa: E402
from server import Server, free_port  # noqa: E402

import make  # noqa: E402

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]  # no sandbox: root has none
IS_OPEN = """path => {
    const context = window.jupyterapp?.shell.currentWidget?.context;
    return context?.isReady && context.path === path;
}"""
# What the page is asked again and again; `nb` is the notebook, and every cell's node bears its id.
HELPERS = """
window.nb = window.jupyterapp.shell.currentWidget.content;
window.context = window.jupyterapp.shell.currentWidget.context;
window.cell = id => nb.widgets.find(each => each.model.sharedModel.getId() === id);
window.mark = () => nb.widgets.forEach(each => each.node.dataset.cell = each.model.sharedModel.getId());
window.begin = (command, options) => {  // it may take long: not awaited here, `ended` tells
    window.ended = null;
    jupyterapp.commands.execute(command, options).then(() => window.ended = "done", error => window.ended = `${error}`);
};
window.ask = async code => {
    const future = context.sessionContext.session.kernel.requestExecute({code, store_history: false});
    let text = "";
    future.onIOPub = message => text += message.content.text ?? message.content.traceback?.join("\\n") ?? "";
    await future.done;
    return text;
};
"""


def start_chromium(playwright):
    """Start the Chromium of this machine, or return None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", playwright.chromium.executable_path)
    found = next(filter(None, map(shutil.which, names)), None)
    return playwright.chromium.launch(executable_path=found, args=OPTIONS) if found else None


def settle(page):
    """Let a page do what it has put off: timers without a delay, pictures and fonts, then two frames."""
    page.evaluate("""async () => {
        await new Promise(done => setTimeout(done, 0));
        await Promise.all([document.fonts.ready, ...[...document.images].map(image => image.decode().catch(() => 0))]);
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
    }""")


class Lab(Server):
    """JupyterLab as `make lab` starts it, but from a copy of the notebooks and without the user's settings."""

    def __init__(self, folder):
        self.root, port = folder / "root", free_port()
        work.copy_notebooks(ROOT / "notebooks", self.root / "notebooks")
        command = [sys.executable, *make.LAB, f"--ServerApp.root_dir={self.root}", f"--ServerApp.port={port}"]
        command += ["--ServerApp.port_retries=0", "--no-browser", "--LabApp.expose_app_in_browser=True"]
        env = set_up.child_environment() | {"JUPYTER_TOKEN": "secret", "OMP_NUM_THREADS": "1"}
        env |= {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
        env |= {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        env.pop("TQDM_DISABLE", None)  # the tests have none of the bars that a learner sees; here they are wanted
        super().__init__(command, folder / "lab.log", port, env=env)


class Notebook:
    """A notebook as JupyterLab shows it, and what went wrong on its page or left this machine."""

    def __init__(self, browser, address, path):
        self.is_lesson = "/exercises/" not in path
        self.page, self.path, self.errors, self.requests = browser.new_page(), path, [], []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(error.stack or str(error)))
        for kind in ("request", "websocket"):
            self.page.on(kind, lambda asked: self.requests.append(asked.url))
        self.page.set_default_timeout(10_000)
        self.resize(1000, 900)
        self.page.goto(f"{address}lab/tree/{path}?token=secret&reset")  # without the tabs of the page before
        self.page.wait_for_function(IS_OPEN, arg=path, timeout=60_000)
        self.page.evaluate(f"() => {{{HELPERS}}}")
        # A kernel that is called idle is not ready: what is run at once would be lost.
        self.page.evaluate("""async () => {
            await context.sessionContext.ready;
            await context.sessionContext.session.kernel.info;
            await jupyterapp.restored;
            jupyterapp.shell.collapseLeft();
            mark();
        }""")
        # JupyterLab draws no cell that is far from the screen; here all are to be seen.
        self.page.add_style_tag(content=".jp-Cell { content-visibility: visible !important; contain: none !important }")
        # It draws cells one by one while it is idle; in the mode "full" never all of them.
        drawn = "() => nb.notebookConfig.windowingMode === 'full' || nb.widgets.every(each => !each.isPlaceholder())"
        self.page.wait_for_function(drawn, timeout=60_000)
        settle(self.page)

    def code_cells(self):
        """The code cells as the notebook's file would have them, by id."""
        cells = self.page.evaluate("() => context.model.toJSON().cells")
        return {cell["id"]: cell for cell in cells if cell["cell_type"] == "code"}

    def counts(self):
        """The number that each code cell has from its last run."""
        return {cell: content["execution_count"] for cell, content in self.code_cells().items()}

    def wait_for_run(self, cell, counts):
        """Wait until a cell has another number than it had."""
        changed = "([id, count]) => cell(id).model.executionCount && cell(id).model.executionCount !== count"
        self.page.wait_for_function(changed, arg=[cell, counts[cell]], timeout=60_000)

    def focus(self):
        """The cell that has the focus, if JupyterLab agrees that it is the active one, and the notebook's mode."""
        return tuple(
            self.page.evaluate("""() => [
                document.activeElement === nb.activeCell.node && nb.activeCell.model.sharedModel.getId(), nb.mode,
            ]""")
        )

    def do(self, command, **options):
        """Carry out a command of JupyterLab's menus, to its end."""
        self.page.evaluate("([command, options]) => begin(command, options)", [command, options])
        self.page.wait_for_function("() => window.ended", timeout=120_000)
        assert self.page.evaluate("() => window.ended") == "done"

    def ask(self, code):
        """What the notebook's kernel prints; nothing of it enters the notebook."""
        return self.page.evaluate("code => ask(code)", code)

    def select(self, cell, mode="command"):
        """Make a cell the active one, as a click beside it would."""
        self.page.evaluate(
            """([id, mode]) => {
                nb.activeCellIndex = nb.widgets.indexOf(cell(id));
                nb.deselectAll();
                nb.mode = mode;
                (mode === "edit" ? nb.activeCell.editor : nb.activeCell.node).focus();
            }""",
            [cell, mode],
        )

    def cell(self, cell):
        """A cell's node."""
        return self.page.locator(f".jp-Cell[data-cell='{cell}']")

    def output(self, cell, inside=""):
        """What a cell shows below its code."""
        return self.page.locator(f"[data-cell='{cell}'] .jp-Cell-outputArea {inside}".strip())

    def pop_ups(self):
        """The texts of the dialogs and notifications that are on the screen."""
        return self.page.locator(".jp-Dialog, .Toastify__toast").all_inner_texts()

    def tab_to(self, cell, target):
        """Reach something in a cell's output from the cell, with the Tab key alone."""
        self.select(cell)
        for _ in range(30):
            self.page.keyboard.press("Tab")
            if target.evaluate("node => node === document.activeElement"):
                return
        raise AssertionError(f"{cell}: the Tab key does not come to {target}")

    def resize(self, width, height):
        self.page.set_viewport_size({"width": width, "height": height})

    def picture(self, file, width=1000, theme="JupyterLab Light"):
        """Save a picture of the whole notebook."""
        self.do("apputils:change-theme", theme=theme)
        self.page.wait_for_selector(f"body[data-jp-theme-name='{theme}']", state="attached")
        self.resize(width, 900)
        settle(self.page)
        height = self.page.evaluate("""() => {
            const [first, last] = [nb.widgets[0], nb.widgets.at(-1)].map(each => each.node.getBoundingClientRect());
            return Math.ceil(last.bottom - first.top);
        }""")
        self.resize(width, min(height + 200, 16_000))  # Chromium draws no more: the rest is a second picture
        file.parent.mkdir(parents=True, exist_ok=True)
        for part, top in (("", 0), ("_end", height - 15_000))[: 1 + (height + 200 > 16_000)]:
            self.page.evaluate("top => document.querySelector('.jp-WindowedPanel-outer').scrollTop = top", top)
            settle(self.page)
            self.page.screenshot(path=file.with_stem(file.stem + part))

    def close(self):
        self.page.evaluate("() => context.sessionContext.shutdown()")
        self.page.close()


if __name__ == "__main__":
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        try:
            notebook = Notebook(start_chromium(playwright), lab.address, sys.argv[1])
            notebook.do("notebook:run-all-cells")
            for theme in ("Light", "Dark"):
                notebook.picture(Path(sys.argv[2]) / f"{theme}.png", theme=f"JupyterLab {theme}")
        finally:
            lab.stop()
