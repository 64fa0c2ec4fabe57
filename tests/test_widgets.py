"""The interactive parts without a browser: what they show, when, and that a view calls its function."""

import subprocess
import sys
from threading import Timer

import ipywidgets
import pytest
from jupyter_client import KernelManager
from matplotlib.figure import Figure
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, NbvalKernelspecManager

from gradaccum import interrupts, widgets


class Display:
    """Stands in for a notebook: keeps what is shown and what it is changed to."""

    def __init__(self):
        self.shown = []

    def __call__(self, shown, display_id=None):
        self.shown.append(shown)
        return self

    def update(self, shown):
        self.shown.append(shown)

    @property
    def text(self):
        return self.shown[-1].data

    @property
    def view(self):
        """The last view; what gives its parts their names in the browser is shown after it."""
        assert self.shown[-1].data == widgets._in_the_browser()
        return self.shown[-2]


@pytest.fixture
def screen(monkeypatch):
    screen = Display()
    monkeypatch.setattr(widgets, "display", screen)
    monkeypatch.setattr(widgets, "_asked", {})
    return screen


def test_an_answer_is_closed_until_a_guess(screen):
    prediction = widgets.predict("How many times?")
    prediction.reveal(4.0, "times the right one")
    assert "<details>" in screen.text
    assert "<details open" not in screen.text
    prediction.buttons[0].click()
    assert prediction.guess is None
    assert "first" in prediction.status.value
    prediction.text.value = "3 <times>"
    prediction.buttons[0].click()
    assert "<details" not in screen.text
    assert "You said <b>3 &lt;times&gt;</b>" in screen.text
    assert "<b>4</b> times the right one" in screen.text


def test_a_guess_stands_and_opens_the_answer(screen):
    prediction = widgets.predict("How?", choices=["half", "double"])
    assert [button.description for button in prediction.buttons] == ["half", "double"]
    prediction.buttons[1].click()
    assert prediction.guess == "double"
    # The one that was pressed keeps the focus: without it, no key would reach the notebook.
    assert [button.disabled for button in prediction.buttons] == [True, False]
    prediction.commit("half")
    assert prediction.guess == "double"
    prediction.reveal("twice", "as much", right="double")
    assert "You said <b>double</b>" in screen.text
    assert "Guesses so far: 1, right: 1." in screen.text
    # The cell run again, as by Shift + Enter after a click, does not take the guess away; another question is new.
    assert widgets.predict("How?", choices=["half", "double"]) is prediction
    assert widgets.predict("How?", choices=["half", "double", "thrice"]) is not prediction


def test_what_is_typed_is_taken_whole(screen):
    prediction = widgets.predict("How many?")
    assert not prediction.text.continuous_update  # key by key, the end would come after the button's click
    prediction.text.value = " 12 "  # as Enter and Tab send it
    assert (prediction.guess, prediction.text.value) == ("12", "12")
    prediction.text.value = "13"
    prediction.buttons[0].click()
    assert (prediction.guess, prediction.text.value) == ("12", "12")
    assert prediction.text.disabled


def test_a_closed_answer_names_its_question(screen):
    widgets.predict("A step holds 3 MB. How many <MB> for two?").reveal(5.0, "MB")
    assert "<summary>Answer: How many &lt;MB&gt; for two? (" in screen.text


def test_a_question_without_a_guess_is_asked_anew(screen):
    first = widgets.predict("How many?")
    assert widgets.predict("How many?") is not first
    widgets.recap()
    assert screen.text == f"<p>{widgets.NO_GUESS}</p>"


@pytest.mark.parametrize(("answer", "shown"), [(1.23456, "<b>1.23</b>"), (7, "<b>7</b>"), ("about <3", "about &lt;3")])
def test_an_answer_is_written_plainly(screen, answer, shown):
    widgets.predict("?").reveal(answer, "")
    assert shown in screen.text


@pytest.mark.parametrize(
    ("choices", "right", "sentence"),
    [
        (["half", "double"], None, "with '2': set `right` to one of 'half', 'double'"),
        (["half", "double"], "twice", "with 'twice'"),
        ({"half": 0.5}, "2 of 3", "with '2 of 3': set `right` to a number"),
        ((), float("nan"), "with nan: set `right` to a number"),
    ],
)
def test_an_answer_no_guess_can_meet_is_refused(screen, choices, right, sentence):
    prediction, before = widgets.predict("How?", choices), len(screen.shown)
    with pytest.raises(ValueError, match=sentence):
        prediction.reveal(2, "times", right=right)
    assert prediction.measured is None
    assert len(screen.shown) == before


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4", 4), ("about 4x", 4), ("x4", 4), ("52 %", 52), ("~ 3.2e-7", 3.2e-7), ("1E3", 1000), (".5", 0.5),
        ("1,000", 1000), ("1,234,567.5", 1234567.5), ("2,5", 2.5), ("0,125", 0.125), ("1,2345", 1.2345),
        ("1/3", 1 / 3), ("1 / 4 of it", 0.25), ("-2", -2), ("\u22122", -2), ("k=4", 4), ("5.", 5),
        ("half", None), ("", None), ("2 to 4", None), ("4-5", None), ("1/0", None), ("1e999", None),
        ("1.000.000", None),
    ],
)  # fmt: skip
def test_a_number_is_read_as_people_write_it(text, number):
    assert widgets._number(text) == number


@pytest.mark.parametrize(
    ("guess", "right", "verdict"),
    [
        ("4x", 4.0, "right"), ("1/3", "0.3333", "right"), ("0", 0, "right"), ("30 %", "28 %", "right, within 10 %"),
        ("1.1", 1, "right, within 10 %"), ("1.5", 1, "50 % too high"), ("6", 8, "25 % too low"),
        ("10", 4, "2.5 times too high"), ("2", 4, "2 times too low"), ("1,000", 1, "1,000 times too high"),
        ("-1", 2, "too low"), ("1", 0, "too high"), ("lots", 4, "not read as one number"),
    ],
)  # fmt: skip
def test_a_typed_guess_is_judged_by_its_distance(screen, guess, right, verdict):
    prediction = widgets.predict("How many?")
    prediction.commit(guess)
    prediction.reveal(right, "")
    assert prediction.verdict() == (verdict.startswith("right"), verdict)


STEPS = {"exactly 0": 0.0, "below 0.00001": 1e-7, "about 0.001": 1e-3, "about 0.1": 0.1}


@pytest.mark.parametrize(
    ("measured", "best"), [(0, 0), (1e-16, 1), (9e-6, 1), (2e-5, 2), (9e-3, 2), (2e-2, 3), (50.0, 3), ("about 0.2", 3)]
)
def test_the_right_choice_is_nearest_by_ratio(screen, measured, best):
    for number, label in enumerate(STEPS):
        prediction = widgets.Prediction("How far?", STEPS)
        prediction.buttons[number].click()
        prediction.reveal("this far", "", right=measured)
        right = list(STEPS)[best]
        assert prediction.verdict() == ((True, "right") if label == right else (False, f"no; it is: {right}"))


def test_recap_says_how_the_guesses_did(screen):
    for question, choices, guess, answer in [
        ("How <many>?", (), "8", 4.0),
        ("Which?", ["this", "that"], "this", "this"),
        ("How far?", (), None, 777),
        ("What next?", (), "<1>", None),
    ]:
        prediction = widgets.predict(question, choices)
        if guess:
            prediction.commit(guess)
        if answer:
            prediction.reveal(answer, "")
    for _ in range(2):
        widgets.recap()
        rows = [row.split("</td>")[:-1] for row in screen.text.split("<tr>")[2:]]
        assert [[cell.rpartition(">")[2] for cell in row] for row in rows] == [
            ["How &lt;many&gt;?", "8", "4", "2 times too high"],
            ["Which?", "this", "this", "right"],
            ["What next?", "&lt;1&gt;", "not yet", "run the cell below the question"],
        ]
        assert "<p>You guessed 3 of 4, and 1 was right.</p>" in screen.text
        assert "777" not in screen.text


def find(box, kind):
    return [child for child in box.children if isinstance(child, kind)]


@pytest.fixture
def explored(screen):
    """A view, its parts, and the calls of its function."""
    calls = []

    def view(steps=4, name="SGD"):
        calls.append((steps, name))
        if steps == 2:
            raise ValueError("steps is 2 <two>.\nMore of it.")
        return Figure(), f"{steps} steps of {name}"

    widgets.explore(view, steps=[1, 2, 4], name=["Adam", "SGD"])
    kinds = ("SelectionSlider", "ToggleButtons", "HTML", "Image", "Button")
    (slider,), (choice,), *rest = (find(screen.view, getattr(ipywidgets, kind)) for kind in kinds)
    return screen.view, calls, (slider, choice), *rest


def test_explore_redraws_and_goes_back(explored):
    _, calls, (slider, choice), (sentence,), (picture,), (back,) = explored
    assert calls == [(4, "SGD")]
    assert bytes(picture.value).startswith(b"\x89PNG")
    picture.value = b""
    slider.value = 1
    choice.value = "Adam"
    assert calls[1:] == [(1, "SGD"), (1, "Adam")]
    assert "1 steps of Adam" in sentence.value
    assert bytes(picture.value).startswith(b"\x89PNG")
    back.click()
    assert (slider.value, choice.value) == (4, "SGD")
    assert "4 steps of SGD" in sentence.value
    assert len(calls) == 3, "what was drawn before is shown again, and going back draws no step of the way"


def test_explore_shows_an_error_and_goes_on(explored):
    _, _, (slider, _), (sentence,), (picture,), (back,) = explored
    slider.value = 2
    assert sentence.value == "<p>This cannot be shown. ValueError: steps is 2 &lt;two&gt;.</p>"
    assert bytes(picture.value) == b""
    assert picture.layout.display == "none"
    back.click()
    assert "4 steps" in sentence.value
    assert bytes(picture.value).startswith(b"\x89PNG")
    assert picture.layout.display is None


def test_explore_refuses_what_cannot_start(screen):
    with pytest.raises(ZeroDivisionError):
        widgets.explore(lambda steps=0: 1 / steps, steps=[0, 1])
    for view in (lambda steps: None, lambda steps=3: None, lambda other=1: None):
        with pytest.raises(ValueError, match=r"The default of steps is .*: set it to one of \[1, 2\]"):
            widgets.explore(view, steps=[1, 2])
    assert screen.shown == []


def test_a_wide_figure_is_drawn_for_800_pixels():
    width = int.from_bytes(widgets._png(Figure(figsize=(9, 2), dpi=100))[16:20])  # where a PNG has it
    assert width == 800


def test_the_browser_finds_what_it_names(explored, screen):
    view, _, _, (sentence,), *_ = explored
    assert "gradaccum-view" in view._dom_classes
    assert "gradaccum-says" in sentence._dom_classes
    prediction = widgets.predict("How?")
    asked, _, said = screen.view.children
    assert "gradaccum-view" in screen.view._dom_classes
    assert "gradaccum-asks" in asked._dom_classes
    assert said is prediction.status
    assert "gradaccum-says" in said._dom_classes
    assert "gradaccum-taken" not in said._dom_classes
    prediction.commit("4")
    assert "gradaccum-taken" in said._dom_classes
    for name in ("view", "says", "asks", "taken"):
        assert f".gradaccum-{name}" in widgets._in_the_browser()


@pytest.mark.parametrize("stop_early", [False, True])
def test_progress_yields_all_and_leaves_nothing(screen, stop_early):
    seen = []
    with pytest.raises(KeyboardInterrupt) if stop_early else pytest.MonkeyPatch.context():
        for item in widgets.progress(range(5), "counting"):
            seen.append(item)
            if stop_early and item == 2:
                raise KeyboardInterrupt
    assert seen == ([0, 1, 2] if stop_early else [0, 1, 2, 3, 4])
    assert any("counting" in shown.data for shown in screen.shown)
    assert screen.text == ""


def test_a_stopped_cell_fails_with_one_sentence():
    manager = KernelManager(kernel_name=CURRENT_ENV_KERNEL_NAME, kernel_spec_manager=NbvalKernelspecManager())
    manager.start_kernel(extra_arguments=["--IPKernelApp.log_level=ERROR"])
    client = manager.client()
    client.start_channels()

    def run(code, stop=False):
        shown = []

        def show(message):
            shown.append(message)
            if stop and message["msg_type"] == "stream":  # it is running
                Timer(0.2, manager.interrupt_kernel).start()

        reply = client.execute_interactive(code, output_hook=show, timeout=60)["content"]
        return reply, [one["content"]["traceback"] for one in shown if one["msg_type"] == "error"]

    try:
        client.wait_for_ready(timeout=60)
        first = "import time; from gradaccum.interrupts import say_stopped; say_stopped(); say_stopped()"
        reply, tracebacks = run(f"{first}; print('now', flush=True); time.sleep(30)", stop=True)
        assert reply["status"] == "error", "Run All stops here"
        assert reply["ename"] == "KeyboardInterrupt"
        assert tracebacks == [[interrupts.STOPPED]]
        reply, (traceback,) = run("1 / 0")
        assert len(traceback) > 1, "other errors are shown as ever"
        assert run("4")[0]["status"] == "ok"
        own = "get_ipython().set_custom_exc((KeyError,), lambda *_, **__: None); say_stopped()"
        run(f"{own}; assert get_ipython().custom_exceptions == (KeyError,)")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


FIRST_CALLS = """import signal, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
handlers = lambda: (shell.custom_exceptions, shell.CustomTB, sys.excepthook, signal.getsignal(signal.SIGINT))
before = handlers()
import gradaccum.interrupts
assert not {"matplotlib", "ipywidgets"} & set(sys.modules)
from gradaccum import data, exercises, memory, models, plots, widgets
from matplotlib.figure import Figure
assert handlers() == before
calls = [
    lambda: exercises.check("3.2", len),
    lambda: exercises.attempt(len, ""),
    lambda: widgets.predict("How many?"),
    lambda: widgets.explore(lambda steps=1: (Figure(), ""), steps=[1, 2]),
    lambda: list(widgets.progress([], "counting")),
]
for call in calls:
    shell.set_custom_exc((), None)
    call()
    assert shell.custom_exceptions == (KeyboardInterrupt,)
    shell.set_custom_exc((KeyError,), lambda *_, **__: None)
    theirs = handlers()
    call()
    assert handlers() == theirs
"""


def test_the_first_check_or_view_sets_the_handler():
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
