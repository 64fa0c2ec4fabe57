"""The interactive parts without a browser: what they show, when, and that a view calls its function."""

import ipywidgets
import pytest
from matplotlib.figure import Figure

from gradaccum import widgets


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


@pytest.fixture
def screen(monkeypatch):
    screen = Display()
    monkeypatch.setattr(widgets, "display", screen)
    return screen


def test_an_answer_is_closed_until_a_guess_is_committed(screen):
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


def test_a_committed_guess_stands_and_opens_the_answer(screen):
    prediction = widgets.predict("How?", choices=["half", "double"])
    assert [button.description for button in prediction.buttons] == ["half", "double"]
    prediction.buttons[1].click()
    assert prediction.guess == "double"
    assert all(button.disabled for button in prediction.buttons)
    prediction.reveal("2.0", "times")
    assert "You said <b>double</b>" in screen.text


@pytest.mark.parametrize(("answer", "shown"), [(1.23456, "<b>1.23</b>"), (7, "<b>7</b>"), ("about <3", "about &lt;3")])
def test_an_answer_is_written_plainly(screen, answer, shown):
    widgets.predict("?").reveal(answer, "")
    assert shown in screen.text


def find(box, kind):
    return [child for child in box.children if isinstance(child, kind)]


def test_explore_starts_at_the_defaults_redraws_and_goes_back(screen):
    calls = []

    def view(steps=4, name="SGD"):
        calls.append((steps, name))
        return Figure(), f"{steps} steps of {name}"

    widgets.explore(view, steps=[1, 2, 4], name=["Adam", "SGD"])
    box = screen.shown[-1]
    slider, choice = find(box, ipywidgets.SelectionSlider)
    (sentence,), (picture,), (back,) = (find(box, getattr(ipywidgets, name)) for name in ("HTML", "Image", "Button"))
    assert calls == [(4, "SGD")]
    assert bytes(picture.value).startswith(b"\x89PNG")
    picture.value = b""
    slider.value = 1
    choice.value = "Adam"
    assert calls[1:] == [(1, "SGD"), (1, "Adam")]
    assert "1 steps of Adam" in sentence.value
    assert bytes(picture.value).startswith(b"\x89PNG")
    back.click()
    assert calls[-1] == (4, "SGD")


@pytest.mark.parametrize("stop_early", [False, True])
def test_progress_yields_everything_and_leaves_nothing_behind(screen, stop_early):
    seen = []
    with pytest.raises(KeyboardInterrupt) if stop_early else pytest.MonkeyPatch.context():
        for item in widgets.progress(range(5), "counting"):
            seen.append(item)
            if stop_early and item == 2:
                raise KeyboardInterrupt
    assert seen == ([0, 1, 2] if stop_early else [0, 1, 2, 3, 4])
    assert any("counting" in shown.data for shown in screen.shown)
    assert screen.text == ""
