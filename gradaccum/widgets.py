"""The interactive parts of a lesson: `predict` before you run, `explore` with the mouse or the keys, `progress`.

They keep to what ipywidgets 7.7 has. A view draws what a pure function returns, so that a test can call the function.
"""

from __future__ import annotations

import html
import inspect
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import ipywidgets
from IPython.display import HTML, DisplayHandle, display
from matplotlib.figure import Figure
from tqdm import tqdm

Item = TypeVar("Item")


class Prediction:
    """A question that waits for a guess; made by `predict`, answered by `reveal`."""

    def __init__(self, question: str, choices: Sequence[str] = ()) -> None:
        self.question = question
        self.guess: str | None = None
        self._answer = ""
        self._shown: DisplayHandle | None = None
        # A button for each choice: JupyterLab keeps the arrow keys and letters from a list, not Tab and Space.
        labels, layout = choices or ["Commit"], ipywidgets.Layout(width="auto")
        self.buttons: list[Any] = [ipywidgets.Button(description=label, layout=layout) for label in labels]
        self.text: Any = None if choices else ipywidgets.Text(placeholder="a number", description="Your guess")
        self.status: Any = ipywidgets.HTML("")
        for button in self.buttons:
            button.on_click(lambda clicked: self.commit(self.text.value if self.text else clicked.description))

    def view(self) -> Any:
        """Lay out the question and what to answer it with: Tab, Enter and Space are enough to use it."""
        question = ipywidgets.HTML(f"<b>Predict:</b> {html.escape(self.question)}")
        answers = ipywidgets.HBox([self.text, *self.buttons] if self.text else self.buttons)
        return ipywidgets.VBox([question, answers, self.status])

    def commit(self, guess: str) -> None:
        """Take the guess, once; the answer opens at once where it is already measured."""
        if not guess.strip():
            self.status.value = "Give a guess first: any guess beats none."
            return
        self.guess = guess.strip()
        for widget in [*self.buttons, *([self.text] if self.text else [])]:
            widget.disabled = True
        said = f"You said <b>{html.escape(self.guess)}</b>."
        self.status.value = f"{said} Now run the next cell."
        if self._shown is not None:
            self._shown.update(HTML(self._answer_html()))
            self.status.value = f"{said} The answer is open below."

    def reveal(self, answer: object, meaning: str) -> None:
        """Show the answer: open if a guess was committed, else closed until the reader opens it.

        Args:
            answer: what was measured; a float is shown with three digits.
            meaning: what the answer is, with its unit, in a few words that do not give it away.
        """
        value = f"{answer:.3g}" if isinstance(answer, float) else str(answer)
        self._answer = f"<b>{html.escape(value)}</b> {html.escape(meaning)}"
        self._shown = display(HTML(self._answer_html()), display_id=True)

    def _answer_html(self) -> str:
        if self.guess is None:
            summary = "Answer: commit a guess above, or open this"
            return f"<details><summary>{summary}</summary><p>Measured: {self._answer}</p></details>"
        return f"<p>You said <b>{html.escape(self.guess)}</b>. Measured: {self._answer}</p>"


def predict(question: str, choices: Sequence[str] = ()) -> Prediction:
    """Ask the learner for a guess, by keyboard alone if they like, before the value shows.

    Args:
        question: one sentence; plain text.
        choices: what to choose from; without them a number is typed.

    Returns:
        The prediction; call its `reveal` in the cell that measures the value.
    """
    prediction = Prediction(question, choices)
    display(prediction.view())
    return prediction


def explore(view: Callable[..., tuple[Figure, str]], **controls: Sequence[Any]) -> None:
    """Show a figure and its sentence, drawn anew whenever a control moves.

    Args:
        view: a pure function of the controls' values; gives the figure and one sentence that says what it shows.
            The default of each of its parameters is where that control starts.
        controls: the values to choose from, in order, under the names of `view`'s parameters. Each becomes a
            slider, which the arrow keys move.
    """
    start = {name: parameter.default for name, parameter in inspect.signature(view).parameters.items()}
    boxes = {name: _control(name, values, start[name]) for name, values in controls.items()}
    back = ipywidgets.Button(description="Back to the start", tooltip="Set every control to where it began")
    sentence = ipywidgets.HTML()
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", align_self="flex-start"))

    def draw(_: object = None) -> None:
        figure, text = view(**{name: box.value for name, box in boxes.items()})
        sentence.value = f"<p>{html.escape(text)}</p>"
        picture.value = _png(figure)

    def reset(_: object) -> None:
        for name, box in boxes.items():
            box.value = start[name]

    for box in boxes.values():
        box.observe(draw, names="value")
    back.on_click(reset)
    draw()
    display(ipywidgets.VBox([*boxes.values(), back, sentence, picture]))


def progress(items: Iterable[Item], description: str) -> Iterator[Item]:
    """Show a bar with the time left while going through `items`; it leaves nothing behind in the notebook.

    Args:
        items: what to go through; its length, where it has one, gives the time left.
        description: a few words beside the bar.
    """
    shown = display(HTML(""), display_id=True)
    try:
        bar = {"mininterval": 0.2, "ascii": " -", "ncols": 70, "disable": False}  # it leaves no output behind
        yield from tqdm(items, desc=description, file=_Shown(shown), **bar)
    finally:
        shown.update(HTML(""))


class _Shown(io.StringIO):
    """A file that shows the last line written to it in a display of the notebook."""

    def __init__(self, shown: DisplayHandle) -> None:
        super().__init__()
        self._handle = shown

    def write(self, text: str) -> int:
        if text.strip():
            self._handle.update(HTML(f"<pre>{html.escape(text.strip())}</pre>"))
        return len(text)


def _control(name: str, values: Sequence[Any], start: Any) -> Any:
    return ipywidgets.SelectionSlider(
        options=[(str(value), value) for value in values],
        value=start,
        description=name.replace("_", " "),
        style={"description_width": "150px"},
        layout=ipywidgets.Layout(width="520px"),
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()
