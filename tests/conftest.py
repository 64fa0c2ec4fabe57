"""What all tests share: how hypothesis and matplotlib behave, the order of the files, and that no run leaves a file."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# What makes things, and what tests share.
sys.path[:0] = map(str, (ROOT / "tools", TESTS, TESTS / "exercises", TESTS / "exercises/answers", TESTS / "helpers"))
WAS_THERE = pytest.StashKey[dict[str, tuple[int, int]]]()

# A slow machine is no failure. In CI the same examples run each time, so that red means a change and not luck.
settings.register_profile("gradaccum", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("gradaccum")

# The lessons' kernels inherit it: where a busy machine slows a prediction down, nbval must not find a bar.
os.environ["TQDM_DISABLE"] = "1"

# Theirs too: what is kept for a learner, in work/ or in Jupyter's data folder, is no place for tests.
os.environ["GRADACCUM_PROGRESS"] = "off"

# The tests draw without a screen. Not through MPLBACKEND: the notebooks' kernels would inherit it and show no figure.
os.environ.pop("MPLBACKEND", None)
with suppress(ImportError):
    import matplotlib

    matplotlib.use("agg")


@pytest.fixture(scope="module")
def chromium():
    """Chromium; where there is none the test is skipped, and in CI it fails."""
    from browser import start_chromium
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = start_chromium(playwright)
        if browser is None:
            message = "No Chromium was found: install Debian's `chromium`, or run `playwright install chromium`."
            (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
        yield browser
        browser.close()


def learner_files():
    """What lies where a learner works, with time and size; not the sources, and not Jupyter's own checkpoints."""
    paths = [path for name in ("notebooks", "work") for path in (ROOT / name).rglob("*") if path.is_file()]
    names = {path.relative_to(ROOT): path.stat() for path in paths}
    ours = {name: stat for name, stat in names.items() if not {"source", ".ipynb_checkpoints"} & set(name.parts)}
    return {str(name): (stat.st_mtime_ns, stat.st_size) for name, stat in ours.items()}


def is_worker(config):
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config, items):
    """With several workers, start the long files first; alone, the short ones, whose failures come soonest."""
    if is_worker(config):
        items.sort(key=lambda item: item.path.suffix != ".ipynb")


def pytest_sessionstart(session):
    if not is_worker(session.config):
        session.config.stash[WAS_THERE] = learner_files()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Running the lessons writes nothing into their folders: whatever is new or changed fails the run."""
    before = session.config.stash.get(WAS_THERE, None)
    after = learner_files()
    if before is not None and before != after:
        changed = sorted(name for name in before | after if before.get(name) != after.get(name))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.stash[WAS_THERE] = dict.fromkeys(changed, (0, 0))
    elif before is not None:
        session.config.stash[WAS_THERE] = {}
    return (yield)


def pytest_terminal_summary(terminalreporter, config):
    if changed := config.stash.get(WAS_THERE, {}):
        terminalreporter.section("notebooks/ or work/ changed while the tests ran", red=True)
        terminalreporter.line(", ".join(changed) + ": a test or a lesson wrote it, or somebody worked there meanwhile.")
