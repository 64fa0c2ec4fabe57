"""The widgets of a lesson: `predict` asks for a guess, `recap` reviews the guesses, `explore` and `progress`.

They use only what ipywidgets 7.7 has. A view draws what a pure function returns, so that a test can call the function.
"""

from __future__ import annotations

import html
import inspect
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import ipywidgets
from IPython.display import HTML, DisplayHandle, display
from matplotlib.figure import Figure
from tqdm import tqdm

from gradaccum.bars import Shown
from gradaccum.interrupts import say_stopped

Item = TypeVar("Item")
NO_GUESS = "Where you commit a guess before you run the next cell, a table here says how it did."
# The margin shows the top of the next cell when a view is scrolled into sight after a guess.
# On a dark page a white figure glares. Inverted, with the hues rotated back, it keeps its contrast; to draw it in the
# page's colours, the kernel would have to know the theme.
STYLE = (
    ".gradaccum-view { scroll-margin-bottom: 6em } .gradaccum-view .widget-readout { flex-shrink: 0 }"
    " [data-jp-theme-light=false] :is(.jp-RenderedImage, .gradaccum-view) img { filter: invert(.9) hue-rotate(180deg) }"
)


class Prediction:
    """A question that waits for a guess; created by `predict`, answered by `reveal`, reviewed by `recap`."""

    def __init__(self, question: str, choices: Sequence[str] | Mapping[str, float] = ()) -> None:
        self.question = question
        self.choices = list(choices)
        self.guess: str | None = None
        self.measured: str | None = None
        self._numbers = dict(choices) if isinstance(choices, Mapping) else {}
        self._right: float | str = ""
        self._answer = ""
        self._shown: DisplayHandle | None = None
        # A button for each choice: JupyterLab takes the arrow keys and letters away from a list, but not Tab and Space.
        names, layout = self.choices or ["Commit"], ipywidgets.Layout(width="auto")
        self.buttons: list[Any] = [ipywidgets.Button(description=name, layout=layout) for name in names]
        self.text: Any = None
        if not choices:
            # Sent on Enter or on leaving: sent key by key, fast typing would arrive late and truncated.
            named = {"placeholder": "a number", "description": "Your guess"}
            self.text = ipywidgets.Text(continuous_update=False, **named)
            self.text.observe(self._typed, names="value")
        self.status: Any = ipywidgets.HTML("")
        self.status.add_class("gradaccum-says")
        for button in self.buttons:
            button.on_click(self._clicked)

    def view(self) -> Any:
        """Return the view of the question and its controls, which can be used with Tab, Enter and Space alone."""
        question = ipywidgets.HTML(f"<b>Predict:</b> {html.escape(self.question)}")
        question.add_class("gradaccum-asks")
        wrapped = ipywidgets.Layout(flex_flow="row wrap")
        answers = ipywidgets.HBox([self.text, *self.buttons] if self.text else self.buttons, layout=wrapped)
        return _view([question, answers, self.status])

    def commit(self, guess: str) -> None:
        """Accept the first guess; the answer opens at once if it is already measured."""
        if self.guess is not None:
            return
        if not guess.strip():
            self.status.value = "Give a guess first: any guess beats none."
            return
        self.guess = guess.strip()
        self.status.add_class("gradaccum-taken")
        said = f"You said <b>{html.escape(self.guess)}</b>."
        self.status.value = f"{said} It stays; now go on with Shift + Enter."
        if self._shown is not None:
            self._shown.update(HTML(self._answer_html()))
            self.status.value = f"{said} The answer is open below."

    def reveal(self, answer: object, meaning: str, right: float | str | None = None) -> None:
        """Show the answer: open if a guess was committed, otherwise closed until the reader opens it.

        Args:
            answer: the measured value; a float is shown with three digits.
            meaning: what the answer is, with its unit, in a few words that do not reveal it.
            right: the value that guesses are compared with, if it is not `answer`: a number, or one of the choices if
                they have no numbers.

        Raises:
            ValueError: guesses cannot be compared with this value: it is not one of the choices, or not a number.
        """
        value = f"{answer:.3g}" if isinstance(answer, float) else str(answer)
        given = value if right is None else right
        by_name = self.choices and not self._numbers
        judged = given if by_name else _number(str(given))
        if judged is None or (by_name and judged not in self.choices):
            wanted = f"one of {', '.join(map(repr, self.choices))}" if by_name else "a number"
            raise ValueError(f"Guesses cannot be compared with {given!r}: set `right` to {wanted}.")
        self._right, self.measured = judged, value
        self._answer = f"<b>{html.escape(value)}</b> {html.escape(meaning)}"
        self._shown = display(HTML(self._answer_html()), display_id=True)

    def verdict(self) -> tuple[bool, str]:
        """Return whether the guess was right, and in a few words how far off it was."""
        if self.measured is None:
            return False, "run the cell below the question"
        if self.choices:
            right = self._right
            if isinstance(right, float):  # the nearest by its ratio
                apart = {label: (_apart(number, right), number) for label, number in self._numbers.items()}
                right = min(apart, key=apart.__getitem__)
            return self.guess == right, "right" if self.guess == right else f"no; it is: {right}"
        guess = _number(self.guess or "")
        return (False, "not read as one number") if guess is None else _how_far(guess, float(self._right))

    def _typed(self, _: object) -> None:
        self.commit(self.text.value)
        if self.guess is not None:
            self.text.value = self.guess  # the first guess is kept

    def _clicked(self, button: Any) -> None:
        self.commit(self.text.value if self.text else button.description)
        if self.guess is not None:
            # The pressed button stays enabled: it has the focus, without which no key reaches the notebook.
            for other in [*self.buttons, *([self.text] if self.text else [])]:
                other.disabled = other.disabled or other is not button

    def _answer_html(self) -> str:
        if self.guess is None:
            question = html.escape(self.question.rsplit(". ")[-1])
            summary = f"Answer: {question} (commit a guess above, or open this)"
            return f"<details><summary>{summary}</summary><p>Measured: {self._answer}</p></details>"
        told = [each.verdict()[0] for each in _asked.values() if each.guess is not None and each.measured is not None]
        so_far = f"<p><small>Guesses so far: {len(told)}, right: {sum(told)}.</small></p>" if told else ""
        return f"<p>You said <b>{html.escape(self.guess)}</b>. Measured: {self._answer}</p>{so_far}"


_asked: dict[str, Prediction] = {}


def predict(question: str, choices: Sequence[str] | Mapping[str, float] = ()) -> Prediction:
    """Ask the learner for a guess, by mouse or keyboard, before the value is shown; a committed guess is kept.

    Args:
        question: one sentence; plain text.
        choices: the choices, or a mapping from each choice to its number; without choices, the learner types a number.

    Returns:
        The `Prediction`; call its `reveal` in the cell that measures the value.
    """
    say_stopped()
    prediction = _asked.get(question)
    # Shift + Enter at a button with the focus runs this cell again: the guess is kept.
    if prediction is None or prediction.guess is None or prediction.choices != list(choices):
        prediction = _asked[question] = Prediction(question, choices)
    _show(prediction.view())
    return prediction


def recap() -> None:
    """Show how the guesses in this notebook compare with the results, in a sentence and a table.

    Example:
        >>> recap()
        <IPython.core.display.HTML object>
    """
    guessed = [prediction for prediction in _asked.values() if prediction.guess is not None]
    verdicts = [prediction.verdict() for prediction in guessed]
    right = sum(is_right for is_right, _ in verdicts)
    counted = f"{right or 'none'} {'was' if right < 2 else 'were'} right"
    text = f"<p>You guessed {len(guessed)} of {len(_asked)}, and {counted}.</p>" if guessed else f"<p>{NO_GUESS}</p>"
    if guessed:
        rows = [("question", "you said", "measured", "how it did")]
        for prediction, (_, verdict) in zip(guessed, verdicts, strict=True):
            rows.append((prediction.question, prediction.guess or "", prediction.measured or "not yet", verdict))
        text += f"<table>{''.join(map(_row, rows, ['th scope=col'] + ['td'] * len(guessed)))}</table>"
    display(HTML(text))


def _row(cells: Sequence[str], kind: str) -> str:
    style = f"style='text-align:left;vertical-align:top{';white-space:nowrap' if kind != 'td' else ''}'"
    return f"<tr>{''.join(f'<{kind} {style}>{html.escape(cell)}</{kind[:2]}>' for cell in cells)}</tr>"


def _number(text: str) -> float | None:
    """Return the number in a text, None unless there is exactly one: "about 4x", "52 %", "1,000", "2,5", "1/3"."""
    text = re.sub(r"(?<![\d.,])([1-9]\d{0,2})((?:,\d{3})+)(?![\d,])", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"(?<=\d),(?=\d)", ".", text.replace("\u2212", "-"))
    found = re.findall(r"(?:(?<![\w.)])-)?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", text)
    values = [float(each) for each in found]
    if len(values) == 2 and values[1] and re.search(r"\d\s*/\s*\d", text):
        values = [values[0] / values[1]]
    return values[0] if len(values) == 1 and math.isfinite(values[0]) else None


def _apart(one: float, other: float) -> float:
    """Return the absolute log ratio of two numbers; infinite if the signs differ or only one is 0."""
    if one == other:
        return 0.0
    return abs(math.log(one / other)) if one * other > 0 else math.inf


def _how_far(guess: float, right: float) -> tuple[bool, str]:
    apart, direction = _apart(guess, right), "high" if guess > right else "low"
    if apart <= math.log(1.01):
        return True, "right"
    if abs(guess - right) <= 0.1 * abs(right) * (1 + 1e-9):
        return True, "right, within 10 %"
    if math.isinf(apart):
        return False, f"too {direction}"
    if apart < math.log(2) - 1e-9:
        return False, f"{100 * abs(guess / right - 1):.0f} % too {direction}"
    return False, f"{float(f'{math.exp(apart):.2g}'):,g} times too {direction}"


def explore(view: Callable[..., tuple[Figure, str]], **controls: Sequence[Any]) -> None:
    """Show a figure and a sentence, redrawn whenever a control changes.

    Args:
        view: a pure function of the controls' values that returns the figure and one sentence that describes it.
            The default of each parameter is the start value of its control.
        controls: the possible values, in order, by the names of `view`'s parameters. Numbers become a slider, which
            the arrow keys move; words and booleans become buttons.

    Raises:
        ValueError: the default of a parameter is not among the values of its control.
    """
    say_stopped()
    start = {name: parameter.default for name, parameter in inspect.signature(view).parameters.items()}
    for name, values in controls.items():
        if start.get(name) not in values:
            raise ValueError(f"The default of {name} is {start.get(name)!r}: set it to one of {list(values)}.")
    boxes = {name: _control(name, values, start[name]) for name, values in controls.items()}
    back = ipywidgets.Button(description="Back to the start", tooltip="Set every control to where it began")
    sentence = ipywidgets.HTML()
    sentence.add_class("gradaccum-says")
    layout = ipywidgets.Layout(max_width="100%", margin="0", align_self="flex-start")
    picture = ipywidgets.Image(format="png", layout=layout)

    @lru_cache(maxsize=64)  # by index, since values may be unhashable
    def drawn(*_: int) -> tuple[str, bytes]:
        figure, text = view(**{name: box.value for name, box in boxes.items()})
        return text, _png(figure)

    def draw(_: object = None) -> None:
        try:
            text, image = drawn(*(box.index for box in boxes.values()))
        except Exception as error:  # outside of a cell, where an error is not shown
            reason = str(error).partition("\n")[0]
            text, image = f"This cannot be shown. {type(error).__name__}: {reason}", b""
        sentence.value, picture.value = f"<p>{html.escape(text)}</p>", image
        picture.layout.display = None if image else "none"

    def reset(_: object) -> None:
        for name, box in boxes.items():
            box.unobserve(draw, names="value")
            box.value = start[name]
            box.observe(draw, names="value")
        draw()

    drawn(*(box.index for box in boxes.values()))  # an error in the first figure is raised in the cell
    draw()
    for box in boxes.values():
        box.observe(draw, names="value")
    back.on_click(reset)
    _show(_view([*boxes.values(), back, sentence, picture]))


def progress(items: Iterable[Item], description: str) -> Iterator[Item]:
    """Yield the items and show a progress bar with the remaining time, which leaves no output in the notebook.

    Args:
        items: an iterable; the remaining time is shown if it has a length.
        description: a few words beside the bar.
    """
    say_stopped()
    shown = display(HTML(""), display_id=True)
    try:
        bar = {"mininterval": 0.2, "ascii": " -", "ncols": 70, "disable": False}  # leaves no output
        yield from tqdm(items, desc=description, file=Shown(shown), **bar)
    finally:
        shown.update(HTML(""))


def _control(name: str, values: Sequence[Any], start: Any) -> Any:
    shown = {"description": name.replace("micro_batch", "micro-batch").replace("_", " ")}
    options, style = [(_label(one), one) for one in values], {"description_width": "150px"}
    if any(isinstance(one, str | bool) for one in values):
        return ipywidgets.ToggleButtons(options=options, value=start, style=style | {"button_width": "auto"}, **shown)
    wide = ipywidgets.Layout(width="auto", max_width="520px")
    return ipywidgets.SelectionSlider(options=options, value=start, style=style, layout=wide, **shown)


def _label(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _view(parts: Sequence[Any]) -> Any:
    view = ipywidgets.VBox(parts)
    view.add_class("gradaccum-view")
    return view


def _show(view: Any) -> None:
    display(view)
    display(HTML(_in_the_browser()))


@cache
def _in_the_browser() -> str:
    """Return the style of a view, and the script that names its parts and moves the focus."""
    script = Path(__file__).with_name("widgets.js").read_text("utf-8")
    return f"<style>{STYLE}</style><script>{script}</script>"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.set_figwidth(min(figure.get_figwidth(), 8.0))  # a narrow window shrinks a wide figure and its text
    figure.savefig(buffer, format="png")  # the layout fits, so one drawing is enough
    return buffer.getvalue()
