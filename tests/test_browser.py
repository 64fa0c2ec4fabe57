"""Every notebook in JupyterLab in Chromium: opened, run, its widgets moved by key and by mouse, and looked at.

Pictures of all of them go to .screenshots/, or to the folder that the environment variable SCREENSHOTS names.
"""

import ast
import json
import os
import re
import time
from urllib.parse import urlsplit

import build
import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import ROOT, Lab, Notebook, settle
from files import NAMES
from playwright.sync_api import expect

from gradaccum import exercises, widgets
from gradaccum.interrupts import STOPPED

pytestmark = pytest.mark.browser
PATHS = [f"notebooks/{name}.ipynb" for name in NAMES]
WARNS = {"try-4-4"}  # as handed out, it moves the schedule before the first update, and a hint speaks of the warning
SCREENSHOTS = ROOT / os.environ.get("SCREENSHOTS", ".screenshots")


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.stop()


FOLDED = """() => ["isHidden", "inputHidden"].map(
    is => nb.widgets.filter(each => each[is]).map(each => each.model.sharedModel.getId()))"""


@pytest.fixture(scope="module", params=PATHS)
def notebook(request, chromium, lab):
    """A notebook that was opened, looked at, and run from the top through the menu's command."""
    notebook = Notebook(chromium, lab.address, request.param)
    notebook.closed = [not one.evaluate("node => node.open") for one in notebook.page.locator("details").all()]
    # What is below a closed heading is out of sight, but Chromium gives its text all the same.
    in_sight = [cell for cell in notebook.code_cells() if notebook.cell(cell).is_visible()]
    notebook.given_away = [cell for cell in in_sight if "Measured:" in notebook.output(cell).inner_text()]
    cells = notebook.page.evaluate("() => context.model.toJSON().cells")
    notebook.marks = {cell["id"]: cell["metadata"] for cell in cells}
    notebook.popped_up, notebook.folded = notebook.pop_ups(), [notebook.page.evaluate(FOLDED)]
    begin = time.perf_counter()
    notebook.do("notebook:run-all-cells")
    print(f"\n{request.param}: ran in {time.perf_counter() - begin:.1f} s")
    notebook.folded.append(notebook.page.evaluate(FOLDED))
    notebook.do("notebook:expand-all-headings")  # the other tests press and look at everything
    yield notebook
    notebook.close()


@pytest.mark.parametrize("path", PATHS)
def test_it_opens_unchanged_and_closes_unasked(chromium, lab, path):
    before = (lab.root / path).read_bytes()
    notebook = Notebook(chromium, lab.address, path)
    assert not notebook.page.evaluate("() => context.model.dirty")
    expect(notebook.page.locator(".jp-mod-dirty")).to_have_count(0)  # JupyterLab's mark on the tab
    notebook.do("application:close")
    assert notebook.pop_ups() == []
    assert notebook.page.evaluate("() => context.isDisposed")
    notebook.page.evaluate("() => jupyterapp.serviceManager.sessions.shutdownAll()")
    notebook.page.close()
    assert (lab.root / path).read_bytes() == before


def calls(notebook):
    """Yield each cell's id, with each assignment and call in it."""
    for cell, content in notebook.code_cells().items():
        for node in ast.walk(ast.parse(content["source"])):
            if isinstance(node, ast.Assign | ast.Call):
                yield cell, node


def test_it_hides_answers_and_runs_without_errors(notebook):
    assert notebook.given_away == []
    assert all(notebook.closed)
    assert len(notebook.closed) >= sum(cell["source"].count(".reveal(") for cell in notebook.code_cells().values())
    for cell, content in notebook.code_cells().items():
        assert content["execution_count"], f"{cell} was not run"
        for output in content["outputs"]:
            assert output["output_type"] != "error", f"{cell}: {output['ename']}: {output['evalue']}"
            assert output.get("name") != "stderr" or cell in WARNS, f"{cell}: {output['text']}"
            left = "".join(output.get("data", {}).get("text/html", ""))
            assert not re.search(r"\d%\|", left), f"{cell} leaves a progress bar: {left}"


def test_what_is_folded_opens_closed_and_stays_so(notebook):
    below, answers, hidden = 0, [], []
    for cell in notebook.page.evaluate("() => context.model.toJSON().cells"):
        level = len(re.match(r"#*", cell["source"])[0]) if cell["cell_type"] == "markdown" else 0
        below = 0 if level and level <= below else below
        answers += [cell["id"]] if below else []
        if notebook.marks[cell["id"]].get("jp-MarkdownHeadingCollapsed"):
            below = level
        hidden += [cell["id"]] if notebook.marks[cell["id"]].get("jupyter", {}).get("source_hidden") else []
    assert notebook.folded == [[answers, hidden]] * 2, "as it was opened, and after all was run"
    assert bool(answers) == any("jp-MarkdownHeadingCollapsed" in marks for marks in notebook.marks.values())
    if notebook.path.endswith("02_accumulate.ipynb"):
        assert {"factor-run", "peak-figure"} <= set(answers)
        assert {"factor-guess", "recap-guesses"} <= set(hidden)


@pytest.mark.parametrize("stem", ["02_accumulate", "04_windows"])
def test_shift_enter_walks_through_a_lesson(chromium, lab, stem):
    """Without a guess: each code cell runs once and in order, a closed heading opens, a question takes a press more."""
    notebook = Notebook(chromium, lab.address, f"notebooks/{stem}.ipynb")
    cells = notebook.page.evaluate("() => context.model.toJSON().cells")
    assert any("jp-MarkdownHeadingCollapsed" in cell["metadata"] for cell in cells)
    notebook.do("notebook:clear-all-cell-outputs")  # and the numbers that cells have from their last run
    notebook.select(cells[0]["id"])
    ran, presses = [], 0
    while (ran or [None])[-1] != cells[-1]["id"]:
        active, counts = notebook.page.evaluate("() => nb.activeCell.model.sharedModel.getId()"), notebook.counts()
        notebook.page.keyboard.press("Shift+Enter")
        presses += 1
        if active in counts:
            notebook.wait_for_run(active, counts)
            ran.append(active)
        if active.endswith("-guess"):
            expect(notebook.output(active, ".gradaccum-view").locator("input, button").first).to_be_focused()
            notebook.page.keyboard.press("Shift+Enter")
            expect(notebook.output(active, ".gradaccum-view").locator("input, button").first).not_to_be_focused()
        assert presses <= len(cells), f"stuck at {active}"
    assert ran == [cell["id"] for cell in cells if cell["cell_type"] == "code"]
    assert presses == len(cells)
    notebook.close()


def test_every_guess_opens_its_answer(notebook):
    page, asked, revealed, looks_back, said, cells = notebook.page, {}, {}, [], {}, list(notebook.marks)
    for cell, node in calls(notebook):
        match node:
            case ast.Assign([ast.Name(name)], ast.Call(ast.Attribute(attr="predict"), [ast.Constant(question), *_])):
                asked[name] = cell, question
            case ast.Call(ast.Attribute(ast.Name(name), "reveal")):
                revealed[name] = cell
            case ast.Call(ast.Attribute(attr="recap")):
                looks_back.append(cell)
    assert set(asked) == set(revealed)
    assert [bool(asked), len(looks_back)] == [notebook.is_lesson, notebook.is_lesson]
    for number, (name, (cell, question)) in enumerate(asked.items()):
        by_keyboard, output = number != 1, notebook.output(cell, ".gradaccum-view").filter(has_text=question)
        text, buttons = output.locator("input[type=text]"), output.locator("button")
        if text.count():
            guess, button = "12", buttons
            if by_keyboard:
                notebook.tab_to(cell, text)
                page.keyboard.type(guess)
                page.keyboard.press("Tab")
            else:
                text.click()
                text.press_sequentially(guess)
        else:
            button = buttons.last
            guess = button.inner_text()
            if by_keyboard:
                notebook.tab_to(cell, button)
        if by_keyboard:
            page.keyboard.press("Space" if number else "Enter")
        else:
            button.click()
        expect(output).to_contain_text(f"You said {guess}.")
        expect(notebook.output(revealed[name])).to_contain_text(f"You said {guess}. Measured:")
        expect(output.locator("input:enabled")).to_have_count(0)
        expect(output.locator("button:enabled")).to_have_count(1)  # the one that was pressed has the focus
        if cell not in [other for other, _ in list(asked.values())[number + 1 :]]:
            assert notebook.focus() == (cells[cells.index(cell) + 1], "command")
        if number == 0:
            counts = notebook.counts()
            for _ in range(cells.index(revealed[name]) - cells.index(cell)):  # past a heading, if there is one
                page.keyboard.press("Shift+Enter")
            notebook.wait_for_run(revealed[name], counts)
            expect(notebook.output(revealed[name])).to_contain_text(f"You said {guess}. Measured:")
            assert notebook.counts()[cell] == counts[cell], "the question was asked again"
            notebook.select(cell)
            page.keyboard.press("Control+Enter")  # this asks again, and must not take the guess away
            notebook.wait_for_run(cell, counts)
            expect(output).to_contain_text(f"You said {guess}.")
        said[question] = guess
    for cell in looks_back:
        assert not notebook.output(cell, "table").count()
        notebook.select(cell)
        page.keyboard.press("Control+Enter")
        rows = notebook.output(cell, "tr")
        expect(rows).to_have_count(1 + len(said))
        table = [row.locator("td").all_inner_texts() for row in rows.all()[1:]]
        assert {question: guess for question, guess, *_ in table} == said
        assert all(all(row) and len(row) == 4 for row in table)


QUESTIONS = {
    "setup": "from gradaccum import widgets",
    "box": "box = widgets.predict('How many?')",
    "box-run": "box.reveal(4.0, 'of them')",
    "commit": "commit = widgets.predict('How many more?')",
    "commit-run": "commit.reveal(4.0, 'more')",
    "click": "click = widgets.predict('Which one?', choices=['this', 'that'])",
    "click-run": "click.reveal('this', 'it is')",
    "space": "space = widgets.predict('Which other one?', choices=['this', 'that'])",
    "space-run": "space.reveal('this', 'it is')",
    "two": "one, other = widgets.predict('One?'), widgets.predict('Two?', choices=['this', 'that'])",
    "prose": "*Look at it.*",
    "two-run": "one.reveal(4.0, 'one'); other.reveal('this', 'two')",
    **{f"far-{number}": "A line.\n\n" * 20 for number in range(9)},
}


def open_questions(chromium, lab):
    """Open a notebook of questions; none is asked yet."""
    kinds = {name: "markdown" if name.startswith(("prose", "far")) else "code" for name in QUESTIONS}
    cells = [getattr(nbformat.v4, f"new_{kinds[name]}_cell")(text, id=name) for name, text in QUESTIONS.items()]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=build.METADATA), lab.root / "questions.ipynb")
    return Notebook(chromium, lab.address, "questions.ipynb")


@pytest.fixture(scope="module")
def questions(chromium, lab):
    notebook = open_questions(chromium, lab)
    yield notebook
    assert notebook.errors == []
    notebook.close()


def ask(notebook, cell):
    """Ask a cell's questions for the first time; return their views, boxes and buttons."""
    notebook.ask(f"{QUESTIONS['setup']}; widgets._asked.clear()")
    notebook.do("notebook:clear-all-cell-outputs")
    notebook.select(cell)
    notebook.page.keyboard.press("Control+Enter")
    views = notebook.output(cell, ".gradaccum-view[data-named]")
    expect(views).to_have_count(1 + (cell == "two"), timeout=30_000)  # a page's first view brings its code along
    return views, views.locator("input"), views.locator("button")


@pytest.mark.parametrize("way", ["box", "commit", "click", "space"])
def test_after_a_guess_one_key_runs_the_next_cell(questions, way):
    notebook, keyboard, following = questions, questions.page.keyboard, f"{way}-run"
    view, box, buttons = ask(notebook, way)
    guess = "12" if way in ("box", "commit") else "that"
    if guess == "12":
        box.click()
        keyboard.type(guess)
    if way == "box":
        keyboard.press("Enter")
    elif way == "space":
        notebook.tab_to(way, buttons.last)
        keyboard.press("Space")
    else:
        buttons.last.click()
    expect(notebook.cell(following)).to_be_focused()
    assert notebook.focus() == (following, "command")
    counts = notebook.counts()
    keyboard.press("Shift+Enter")
    notebook.wait_for_run(following, counts)
    expect(notebook.output(following)).to_have_text(re.compile(f"^You said {guess}. Measured: (4|this) "))
    expect(view).to_contain_text(f"You said {guess}. ")
    after = notebook.counts()
    assert {cell for cell in counts if counts[cell] != after[cell]} == {following}, "the question was asked again"


@pytest.mark.parametrize("way", ["box", "click"])
def test_a_question_that_was_run_takes_the_keys(questions, way):
    """What is typed after Shift+Enter is a guess, not a command of JupyterLab; the same keys go on without one."""
    notebook, keyboard = questions, questions.page.keyboard
    for guess in ("", "12" if way == "box" else "this"):
        notebook.ask(f"{QUESTIONS['setup']}; widgets._asked.clear()")
        notebook.do("notebook:clear-all-cell-outputs")
        notebook.select(way)
        keyboard.press("Shift+Enter")
        view = notebook.output(way, ".gradaccum-view[data-named]")
        expect(view.locator("input, button").first).to_be_focused(timeout=30_000)
        if guess:
            keyboard.type("12" if way == "box" else "")
            keyboard.press("Enter")
            expect(view).to_contain_text(f"You said {guess}.")
        else:
            keyboard.press("Shift+Enter")
        expect(notebook.cell(f"{way}-run")).to_be_focused()
        assert notebook.focus() == (f"{way}-run", "command")
        assert ("You said" in view.inner_text()) is bool(guess)


def test_arrows_go_from_choice_to_choice(questions):
    page = questions.page
    view, *_ = ask(questions, "click")
    choices = view.locator("button")
    choices.first.focus()
    for key, place in (("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", choices.count() - 1), ("ArrowRight", 0)):
        page.keyboard.press(key)
        expect(choices.nth(place)).to_be_focused()


def test_the_focus_stays_without_a_guess(questions):
    page = questions.page
    for empty in ("", "  "):
        view, box, commit = ask(questions, "box")
        box.click()
        page.keyboard.type(empty)
        page.keyboard.press("Enter")
        expect(view).to_contain_text("Give a guess first")
        settle(page)
        expect(box).to_be_focused()
    view, box, commit = ask(questions, "box")
    commit.click()
    expect(view).to_contain_text("Give a guess first")
    settle(page)
    expect(commit).to_be_focused()
    page.evaluate("() => context.sessionContext.session.kernel.restart()")
    expect(questions.output("box", ".jupyter-widgets-disconnected")).not_to_have_count(0)  # nobody hears the view now
    box.click()
    page.keyboard.type("12")
    page.keyboard.press("Enter")
    settle(page)
    expect(box).to_be_focused()
    assert all("Cannot send" in error for error in questions.errors)
    questions.errors.clear()  # ipywidgets says so of the last guess


def test_who_leaves_the_box_goes_where_they_want(questions):
    page = questions.page
    view, box, commit = ask(questions, "box")
    box.click()
    page.keyboard.type("12")
    page.keyboard.press("Tab")
    expect(view).to_contain_text("You said 12.")
    settle(page)
    expect(commit).to_be_focused()
    page.keyboard.press("Space")  # the guess is taken already, and now they are done
    expect(questions.cell("box-run")).to_be_focused()
    view, box, commit = ask(questions, "commit")
    box.click()
    page.keyboard.type("12")
    questions.cell("setup").locator(".jp-InputPrompt").first.click()
    expect(view).to_contain_text("You said 12.")
    settle(page)
    assert questions.focus() == ("setup", "command")


def test_the_sentence_comes_after_the_focus(questions):
    """A screen reader says what changes in a live region, and breaks off where the focus moves."""
    page = questions.page
    view, box, _ = ask(questions, "box")
    said = view.locator(".gradaccum-says [aria-live=polite]")
    said.evaluate("""node => {
        window.order = [];
        document.addEventListener("focusin", event => order.push(event.target.closest(".jp-Cell")?.dataset.cell));
        new MutationObserver(() => order.push(node.textContent.trim())).observe(node, {subtree: true, childList: true});
    }""")
    box.click()
    page.keyboard.type("12")
    page.keyboard.press("Enter")
    expect(said).to_have_text("You said 12. It stays; now go on with Shift + Enter.")
    assert page.evaluate("() => order") == ["box", "box-run", "You said 12. It stays; now go on with Shift + Enter."]
    expect(said).to_be_in_viewport()


def test_the_focus_stays_for_a_second_question(questions):
    keyboard = questions.page.keyboard
    views, box, buttons = ask(questions, "two")
    box.click()
    keyboard.type("12")
    keyboard.press("Enter")
    expect(views.first).to_contain_text("You said 12.")
    settle(questions.page)
    expect(box).to_be_focused()
    buttons.last.click()
    expect(questions.cell("prose")).to_be_focused()
    for cell in ("prose", "two-run"):  # the first press shows the text and goes on
        assert questions.focus() == (cell, "command")
        keyboard.press("Shift+Enter")
    expect(questions.output("two-run")).to_contain_text("You said 12. Measured: 4 one")


def test_a_next_cell_is_found_before_it_is_drawn(chromium, tmp_path):
    settings = tmp_path / "CONFIG/lab/user-settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "full"}')  # what is off the screen is not drawn, a cell or two excepted
    lab = Lab(tmp_path)
    try:
        notebook = open_questions(chromium, lab)
        views, box, buttons = ask(notebook, "two")
        buttons.last.click()
        box.click()
        notebook.page.keyboard.type("12")
        notebook.page.mouse.wheel(0, 5000)
        expect(notebook.cell("prose")).to_have_count(0)
        notebook.page.keyboard.press("Enter")
        expect(notebook.cell("prose")).to_be_focused()
        assert notebook.focus() == ("prose", "command")
        expect(views.first).to_be_in_viewport()
        assert notebook.errors == []
        notebook.close()
    finally:
        lab.stop()


def test_outside_of_jupyterlab_the_focus_stays(chromium):
    page, errors, clicks = chromium.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(error))
    page.expose_function("clicked", lambda: clicks.append(None))
    button = "<button onclick='clicked()'>Commit</button>"
    view = f"<div class=gradaccum-view><div class=gradaccum-asks>How many?</div><input>{button}</div>"
    page.set_content(f"<div tabindex=0>{view}</div><div tabindex=0></div>{widgets._in_the_browser()}")
    box, commit = page.locator("input"), page.locator("button")
    box.press("Enter")
    settle(page)
    assert len(clicks) == 1  # the button has it said that a guess is missing
    box.fill("12")
    for target in (box, commit):
        target.press("Enter")
        settle(page)
        expect(target).to_be_focused()
    assert [len(clicks), *errors] == [2]
    page.close()


class View:
    """The live view of a cell: what it shows, and what its pure function says."""

    def __init__(self, notebook, cell, call):
        self.notebook, self.cell, self.output = notebook, cell, notebook.output(cell)
        self.sliders, self.picture = self.output.get_by_role("slider"), self.output.locator("img")
        # The same call, but of a function that prints what the first argument gives for what the controls show.
        self.call = ast.Call(ast.Name("said"), [call.args[0], ast.Name("shown")], call.keywords)
        notebook.ask(SAID)
        self.drawn = []  # seconds that the kernel took to draw the same picture

    def shown(self):
        """What each control reads, the sentence, and the picture's digest."""
        controls = self.output.locator(".widget-readout, .widget-toggle-button.mod-active").all_inner_texts()
        sentence = self.output.locator("p").inner_text()
        return [controls, sentence, self.picture.evaluate(DIGEST)]

    def place(self, slider, share):
        """Where on the screen a slider's handle lies at a share of its way."""
        track = slider.locator("xpath=ancestor::*[contains(@class, 'noUi-base')]")
        track.scroll_into_view_if_needed()
        box = track.bounding_box()
        return box["x"] + min(max(1, box["width"] * share), box["width"] - 1), box["y"] + box["height"] / 2

    def agrees(self):
        """Wait until the view shows what its function says; return that."""
        for _ in range(20):
            shown, begin = self.shown(), time.perf_counter()
            said = json.loads(self.notebook.ask(f"shown = {shown[0]}\n{ast.unparse(self.call)}"))
            self.drawn.append(time.perf_counter() - begin)
            if shown[1:] == said:
                return shown
            self.notebook.page.wait_for_timeout(100)
        raise AssertionError(f"{self.cell} shows {shown} and not {said}")


SAID = """
def said(view, shown, **controls):
    import hashlib, json
    from gradaccum.widgets import _label, _png
    chosen = [{_label(value): value for value in values}[text] for values, text in zip(controls.values(), shown)]
    figure, sentence = view(**dict(zip(controls, chosen)))
    print(json.dumps([sentence, hashlib.sha256(_png(figure)).hexdigest()]))
"""
DIGEST = """async image => {
    const bytes = await (await fetch(image.src)).arrayBuffer();
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    return Array.from(digest, byte => byte.toString(16).padStart(2, "0")).join("");
}"""


def test_every_view_shows_what_its_function_says(notebook):
    waits = []
    for cell, node in calls(notebook):
        match node:
            case ast.Call(ast.Attribute(attr="explore")):
                view = View(notebook, cell, node)
            case _:
                continue
        page, start = notebook.page, view.agrees()
        names = [keyword.arg.replace("micro_batch", "micro-batch").replace("_", " ") for keyword in node.keywords]
        choices = view.output.locator(".widget-toggle-buttons[role=group]")
        labels = [each.get_attribute("aria-label") for each in [*choices.all(), *view.sliders.all()]]
        assert sorted(labels) == sorted(names)
        for choice in choices.all():
            pressed = choice.locator("[aria-pressed=true]")
            first, other = pressed.inner_text(), choice.locator("[aria-pressed=false]").first
            name, before = other.inner_text(), view.agrees()
            notebook.tab_to(cell, other)
            page.keyboard.press("Space")
            expect(pressed).to_have_text(name)
            assert view.agrees() != before
            choice.get_by_role("button", name=first, exact=True).click()
            expect(pressed).to_have_text(first)
            assert view.agrees() == before
        for slider in view.sliders.all():
            first, last, at = (float(slider.get_attribute(f"aria-value{name}")) for name in ("min", "max", "now"))
            keys = ["ArrowRight", "ArrowLeft"] if at < last else ["ArrowLeft", "ArrowRight"]
            notebook.tab_to(cell, slider)
            for key in keys:
                before, source = view.agrees(), view.picture.get_attribute("src")
                begin = time.perf_counter()
                page.keyboard.press(key)
                page.wait_for_function(
                    "([image, before]) => image.src !== before", arg=[view.picture.element_handle(), source]
                )
                waits.append(time.perf_counter() - begin)
                assert view.agrees() != before
            end, before = last if at < last else first, view.agrees()
            where = {value: view.place(slider, (value - first) / (last - first)) for value in (at, end)}
            page.mouse.click(*where[end])
            expect(slider).to_have_attribute("aria-valuenow", f"{end:.1f}")
            assert view.agrees() != before
            slider.hover()  # this waits until the handle has arrived
            page.mouse.down()
            page.mouse.move(*where[at], steps=5)
            page.mouse.up()
            # A fast drag may end beside the place: ipywidgets moves the handle when the kernel answers, late.
            expect(slider).not_to_have_attribute("aria-valuenow", f"{end:.1f}")
            view.agrees()
        back = view.output.get_by_role("button", name="Back to the start")
        for by_keyboard in (True, False):
            for slider in view.sliders.all():
                slider.press("ArrowRight")
                slider.press("ArrowRight")
            for choice in choices.all():
                choice.locator("[aria-pressed=false]").last.click()
            assert view.agrees() != start
            if by_keyboard:
                notebook.tab_to(cell, back)
                page.keyboard.press("Enter")
            else:
                back.click()
            expect(view.output.locator("p")).to_have_text(start[1])
            expect(view.picture).to_have_attribute("alt", start[1])
            assert view.agrees() == start
        seen = f"least {min(waits):.2f} s of {len(waits)}, least to draw {min(view.drawn):.2f} s of {len(view.drawn)}"
        print(f"{notebook.path}, {cell}: from the key to the new picture {seen}")
        assert min(waits) < min(view.drawn), seen


# JupyterLab drops a picture's alt text; the rest is of pages, and an output is a part of one.
NOT_OURS = {name: {"enabled": False} for name in ("image-alt", "region")}
OURS = ".jp-OutputArea-output .gradaccum-view, .jp-RenderedHTML [role], .jp-RenderedHTML details"


def test_it_looks_well_in_both_themes_and_narrow(notebook):
    stem = notebook.path.removeprefix("notebooks/").removesuffix(".ipynb").replace("/", "_")
    for name in ("dark", "light"):
        notebook.picture(SCREENSHOTS / f"{stem}_{name}.png", theme=f"JupyterLab {name.title()}")
        assert notebook.page.locator(OURS).count()
        found = Axe().run(notebook.page, {"include": [OURS]}, {"rules": NOT_OURS})
        assert found.violations_count == 0, found.generate_report()
    notebook.picture(SCREENSHOTS / f"{stem}_800.png", width=800)
    outputs = notebook.page.locator(".jp-OutputArea, .jp-OutputArea-output, .jp-OutputArea .widget-box")
    wide = outputs.evaluate_all("""nodes => nodes.filter(node => node.scrollWidth > node.clientWidth + 1)
        .map(node => `${node.closest("[data-cell]").dataset.cell}: ${node.scrollWidth} > ${node.clientWidth}`)""")
    assert wide == []


def test_nothing_pops_up_or_leaves_the_machine(notebook):
    assert notebook.popped_up == notebook.pop_ups() == []
    assert notebook.errors == []
    hosts = {urlsplit(url).hostname for url in notebook.requests if not url.startswith(("blob:", "data:"))}
    assert hosts == {"127.0.0.1"}


WRONG = """def accumulate_window(model, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()"""


def test_an_exercise_is_done_as_a_learner_does_it(chromium, lab):
    notebook = Notebook(chromium, lab.address, "notebooks/exercises/03_exercises.ipynb")
    keyboard, stored = notebook.page.keyboard, json.loads(exercises.ANSWERS.read_text("utf-8"))["3.1"]

    def write(cell, text):
        """Replace a cell's code, key by key: without what the editor has indented by itself."""
        notebook.select(cell, "edit")
        keyboard.press("Control+A")
        for number, line in enumerate(text.split("\n")):
            if number:
                keyboard.press("Enter")
                keyboard.press("Shift+Home")
            keyboard.press("Delete")
            keyboard.type(line)
        assert notebook.code_cells()[cell]["source"] == text

    def run(*cells):
        """Run cells that follow each other."""
        for _ in cells:
            keyboard.press("Shift+Enter")

    notebook.select("setup")
    run("setup")
    write("answer-3-1", WRONG)
    run("answer-3-1", "try-3-1", "check-3-1")
    card = notebook.output("check-3-1")
    expect(card).to_contain_text("This looks like: Each micro-batch contributed its whole mean", timeout=30_000)
    expect(card).to_contain_text("0 of 4 points")
    write("answer-3-1", stored["solution"])
    run("answer-3-1", "try-3-1", "check-3-1")
    expect(card).to_contain_text("4 of 4 points")
    expect(card).not_to_contain_text("This looks like")
    notebook.select("scorecard-run")
    run("scorecard-run")
    expect(notebook.output("scorecard-run")).to_contain_text("4 of 11 points")
    expect(notebook.output("scorecard-run")).to_contain_text("Next: 3.2")
    write("answer-3-1", 'exercises.reset("3.1")')
    run("answer-3-1")
    notebook.page.wait_for_function("text => cell('answer-3-1').model.sharedModel.source === text", arg=stored["start"])
    notebook.select("scorecard-run")
    keyboard.press("b")  # a new cell below
    keyboard.press("Enter")
    keyboard.type('exercises.solution("3.1")')
    run("the new cell")
    expect(notebook.page.get_by_text("parameter.grad /= k")).to_be_visible()
    assert notebook.errors == []
    notebook.close()


def test_a_stopped_cell_says_so_in_a_line(chromium, tmp_path):
    lab = Lab(tmp_path)
    try:
        notebook = Notebook(chromium, lab.address, "notebooks/00_start_here.ipynb")
        keyboard, page = notebook.page.keyboard, notebook.page
        notebook.select("setup")
        keyboard.press("Control+Enter")
        notebook.select("how-guess")  # the first view arranges it
        keyboard.press("Control+Enter")
        keyboard.press("b")  # a new cell below
        keyboard.press("Enter")
        keyboard.type("import time; print('asleep'); time.sleep(60)")
        keyboard.press("Control+Enter")
        sleeper = page.evaluate("() => { mark(); return nb.activeCell.node.dataset.cell; }")
        expect(notebook.output(sleeper)).to_contain_text("asleep", timeout=30_000)
        notebook.do("notebook:interrupt-kernel")
        expect(notebook.output(sleeper)).to_contain_text("Stopped")
        lines = notebook.output(sleeper, ".jp-OutputArea-output").all_inner_texts()
        assert "\n".join(lines).split() == ["asleep", *STOPPED.split()]
    finally:
        family, left = lab.stop()
    assert len(family) >= 1, "no kernel was running"
    assert left == []
