"""The result of a check: a number for nbgrader, a card for people."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gradaccum.exercises.judge import Outcome, Result
from gradaccum.exercises.progress import Kept
from gradaccum.exercises.question import Question
from gradaccum.exercises.weighing import Weights

# For the badges, white has a contrast of 4.5:1 or more on each; for the border, each has 3:1 or more on the pages of
# light and dark themes (#fff, #111, #212121). All other text has the theme's colour.
GREEN, RED, GREY = "#1a7f37", "#c8322b", "#69717a"
HEIGHT = 40.0  # of the bars


class Score(float):
    """The points of one check. As text it is only the number, which nbgrader reads as partial credit.

    Attributes:
        outcome: the results, property by property.
        report: the card as plain text.
        so_far: a sentence for the learner about their progress in the lesson.
        stale: a sentence, if the check tested an older version of the answer.
    """

    outcome: Outcome
    so_far = ""
    stale = ""

    def __new__(cls, outcome: Outcome) -> Score:
        """Return a score with the points of the outcome."""
        score = super().__new__(cls, outcome.points)
        score.outcome = outcome
        return score

    def _repr_html_(self) -> str:
        return _card(self.outcome, self.so_far, self.stale)

    @property
    def report(self) -> str:
        """The card as plain text."""
        outcome = self.outcome
        lines = [_headline(outcome), *filter(None, (self.stale, outcome.note))]
        for result in outcome.results:
            lines += [f"  {_verdict(result)[0]:10} {result.name} ({_worth(result)})"]
            lines += [f"             {line}" for line in _details(result)]
        lines += [f"This looks like: {outcome.mistake}"] if outcome.mistake else []
        lines += [f"What the weights show: {outcome.said}"] if outcome.said else []
        lines += [self.so_far] if self.so_far else []
        return "\n".join(lines)


def _headline(outcome: Outcome) -> str:
    question = outcome.question
    return f"Exercise {question.id}, {question.title}: {outcome.points} of {question.points} points"


def _worth(result: Result) -> str:
    if result.points == 0:
        return "no points, but it worked in the given code"
    if result.points < 0:
        return f"{-result.points} point off"
    return f"{result.points} point{'' if result.points == 1 else 's'}"


def _verdict(result: Result) -> tuple[str, str]:
    if result.passed is None:
        return "NOT YET", GREY
    return ("PASS", GREEN) if result.passed else ("FAIL", RED)


def _details(result: Result) -> list[str]:
    return [*_relation(result), *_tried(result), *_vectors(result)]


def _relation(result: Result) -> list[str]:
    """Return sentences on how the result relates to the expected one, and on the weights in it."""
    relation = result.difference.relation if result.difference else ""
    if relation.startswith("exactly"):
        relation += " as it should be"
    lines = [f"{relation[0].upper()}{relation[1:]}."] if relation else []
    return [*lines, str(result.weights)] if result.weights else lines


def _tried(result: Result) -> list[str]:
    lines = [f"Tried: {result.tried}."] if result.passed is False and result.tried else []
    return [*lines, result.problem] if result.problem else lines


def _vectors(result: Result) -> list[str]:
    difference = result.difference
    return [f"Expected: {difference.expected}", f"Got: {difference.got}"] if difference else []


def _bars(weights: Weights) -> str:
    """Return an SVG of the weights as bars, the right ones as outlines; the card's text has the numbers."""
    highest, lowest = (pick(0.0, *weights.got, *weights.right) for pick in (max, min))
    unit, wide = HEIGHT / (highest - lowest), 24 * len(weights.got) + 8
    zero, bars = 2 + unit * highest, []
    for place, (got, right) in enumerate(zip(weights.got, weights.right, strict=True)):
        for weight, look in (
            (got, f'fill="{GREY}"'),
            (right, 'fill="none" stroke="currentColor" stroke-dasharray="3 2"'),
        ):
            top, high = zero - unit * max(weight, 0.0), unit * abs(weight)
            bars.append(f'<rect x="{24 * place + 8}" y="{top:.1f}" width="16" height="{high:.1f}" {look}/>')
    line = f'<line x1="2" x2="{wide}" y1="{zero:.1f}" y2="{zero:.1f}" stroke="currentColor"/>'
    name = "The weights as bars, the right ones as dashed outlines."
    size = f'width="{wide + 2}" height="{HEIGHT + 4:g}"'
    svg = f"<svg role='img' aria-label='{name}' {size} style='vertical-align:middle'>{''.join(bars)}{line}</svg>"
    return f"<div style='margin:4px 0'>{svg} <small>bars: got; dashed: should have</small></div>"


def _badge(text: str, colour: str) -> str:
    style = f"background:{colour};color:#fff;border-radius:3px;padding:1px 6px;font-weight:bold;font-size:90%"
    return f'<span style="{style}">{text}</span>'


def _escaped(text: str) -> str:
    """Escape a text for HTML, with text between backticks as code."""
    parts = html.escape(text).split("`")
    if len(parts) % 2 == 0:  # an unpaired backtick, perhaps from the learner's own line
        return "`".join(parts)
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"<div style='margin:2px 0'>{_escaped(line)}</div>" for line in lines)


def _card(outcome: Outcome, so_far: str = "", stale: str = "") -> str:
    text = _escaped
    full = outcome.points == outcome.question.points
    rows = []
    for result in outcome.results:
        details = _lines(_relation(result))
        details += _bars(result.weights) if result.weights else ""
        details += _lines(_tried(result))
        vectors = _vectors(result)
        if result.weights or (_relation(result) and any("..." in each for each in vectors)):
            details += f"<details><summary>The numbers</summary>{_lines(vectors)}</details>"
        else:
            details += _lines(vectors)
        worth = f"<i style='white-space:nowrap'>({_worth(result)})</i>"
        body = f"{text(result.name[:1].upper() + result.name[1:])} {worth}{details}"
        rows.append(f"<li style='list-style:none;margin:6px 0'>{_badge(*_verdict(result))} {body}</li>")
    parts = [f"<b>{text(_headline(outcome))}</b>"]
    parts += [f"<p>{text(each)}</p>" for each in (stale, outcome.note) if each]
    parts.append(f"<ul style='padding-left:0;margin:6px 0'>{''.join(rows)}</ul>")
    if outcome.mistake:
        parts.append(f"<p><b>This looks like:</b> {text(outcome.mistake)}</p>")
    if outcome.said:
        parts.append(f"<p><b>What the weights show:</b> {text(outcome.said)}</p>")
    if outcome.printed.strip():
        shown = f"<pre style='white-space:pre-wrap'>{html.escape(outcome.printed)}</pre>"
        parts.append(f"<details><summary>What your code printed</summary>{shown}</details>")
    parts += [f"<small>{text(so_far)}</small>"] if so_far else []
    failed = any(result.passed is False for result in outcome.results)
    colour = GREEN if full else GREY if outcome.note and not failed else RED
    style = f"border:1px solid {colour};border-left:6px solid {colour};padding:8px 12px;max-width:52em"
    name = f"Exercise {text(outcome.question.id)}: result"
    return f"<div role='status' aria-label='{name}' style='{style}'>{''.join(parts)}</div>"


class Row(NamedTuple):
    """An exercise on a scorecard: its last check since the notebook was started, and its saved record."""

    question: Question
    score: Score | None
    kept: Kept | None

    @property
    def best(self) -> int:
        """The best known points."""
        known = self.kept.best if self.kept else 0
        return min(max(known, int(self.score or 0)), self.question.points)

    @property
    def now(self) -> str:
        """The points of the last check."""
        return "not checked" if self.score is None else f"{self.score:g} of {self.question.points}"

    @property
    def before(self) -> str:
        """The saved points, if they are better or the only ones."""
        kept = self.kept
        if kept is None or (self.score is not None and self.score >= self.best):
            return ""
        best = f"{self.best} of {self.question.points} on {kept.on:.10}"
        if self.score is not None:
            return f"best: {best}"
        last = f", {kept.last} at the last check" if kept.last < kept.best else ""
        return f"kept from an earlier session: {best}{last}"


class Scorecard:
    """The exercises of a lesson, with their points since the notebook was started and the saved points."""

    def __init__(
        self,
        questions: Sequence[Question],
        scores: Mapping[str, Score],
        known: Mapping[str, Kept] | None = None,
        counted: str = "",
    ) -> None:
        self.rows = [Row(each, scores.get(each.id), (known or {}).get(each.id)) for each in questions]
        self.points = sum(row.best for row in self.rows)
        self.possible = sum(each.points for each in questions)
        self.solved = sum(row.best == row.question.points for row in self.rows)
        self.counted = counted

    @property
    def so_far(self) -> str:
        """A sentence about the progress in the lesson, for a check's card."""
        count = f"{self.solved} of {len(self.rows)} exercises of this lesson"
        return f"So far, best checks counted: {count}, {self.points} of {self.possible} points."

    def next_step(self) -> str:
        """Return the next thing to do, in one sentence."""
        for row in self.rows:
            named = f"Next: {row.question.id}, {row.question.title}"
            if row.score is None and row.best < row.question.points:
                return f"{named}: run its check."
            if row.score is not None and row.best < row.question.points:
                missing = next((r.name for r in row.score.outcome.results if not r.passed), "")
                return f"{named}. Not there yet: {missing}."
        return "All exercises are solved. Go on with the next lesson."

    def _lines(self) -> list[str]:
        share = f"exercises.card({self.rows[0].question.id.partition('.')[0]})"
        card = [f'`{share}` draws a card to share, `{share}.savefig("card.png")` saves it.'] if self.points else []
        return [self.next_step(), *([self.counted] if self.counted else []), *card]

    def __repr__(self) -> str:
        rows = [
            f"  {row.now:>11}  {row.question.id} {row.question.title}" + (f"; {row.before}" if row.before else "")
            for row in self.rows
        ]
        return "\n".join([f"{self.points} of {self.possible} points", *rows, *self._lines()])

    def _repr_html_(self) -> str:
        text, cell = html.escape, "style='text-align:left;font-weight:normal;padding:2px 12px 2px 0'"
        has_kept = any(row.before for row in self.rows)
        rows = []
        for row in self.rows:
            cells = [row.now, row.before] if has_kept else [row.now]
            data = "".join(f"<td {cell}>{text(each)}</td>" for each in cells)
            rows.append(f"<tr><th scope='row' {cell}>{row.question.id} {text(row.question.title)}</th>{data}</tr>")
        names = ("Exercise", "Since the start", "Kept") if has_kept else ("Exercise", "Points")
        columns = "".join(f"<th scope='col' {cell}><b>{name}</b></th>" for name in names)
        bar = f"<progress max='{self.possible}' value='{self.points}' aria-label='points'></progress>"
        head = f"<b>{self.points} of {self.possible} points</b> {bar}"
        table = f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        first, *others = (_escaped(line) for line in self._lines())
        small = "".join(f"<p style='margin:2px 0'><small>{line}</small></p>" for line in others)
        return f"<div role='group' aria-label='Scorecard'>{head}{table}<p>{first}</p>{small}</div>"
