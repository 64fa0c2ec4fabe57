"""How a learner sees the result of a check: a number for nbgrader, a card for people."""

from __future__ import annotations

import html
from collections.abc import Sequence

from gradaccum.exercises.judge import Outcome, Result
from gradaccum.exercises.question import Question
from gradaccum.exercises.weighing import Weights

# White on each is 4.5:1 or more, for the badges; each is 3:1 or more on the page of a light and of a dark theme (#fff,
# #111, #212121), for the border. All other text takes the theme's own colour.
GREEN, RED, GREY = "#1a7f37", "#c8322b", "#69717a"
HEIGHT = 40.0  # of the bars


class Score(float):
    """The points of one check. Its text is the bare number, which nbgrader reads as partial credit.

    Attributes:
        outcome: what was tried, property by property.
        report: the card as plain text.
    """

    outcome: Outcome

    def __new__(cls, outcome: Outcome) -> Score:
        """Make the number of the outcome's points."""
        score = super().__new__(cls, outcome.points)
        score.outcome = outcome
        return score

    def _repr_html_(self) -> str:
        return _card(self.outcome)

    @property
    def report(self) -> str:
        """Write the card as plain text."""
        outcome = self.outcome
        lines = [_headline(outcome), *([outcome.note] if outcome.note else [])]
        for result in outcome.results:
            lines += [f"  {_verdict(result)[0]:10} {result.name} ({_worth(result)})"]
            lines += [f"             {line}" for line in _details(result)]
        lines += [f"This looks like: {outcome.mistake}"] if outcome.mistake else []
        lines += [f"What the gradient shows: {outcome.said}"] if outcome.said else []
        return "\n".join(lines)


def _headline(outcome: Outcome) -> str:
    question = outcome.question
    return f"Exercise {question.id}, {question.title}: {outcome.points} of {question.points} points"


def _worth(result: Result) -> str:
    if result.points == 0:
        return "no points, but it held in the given code"
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
    """Say in a sentence each how what came out relates to what was expected, and which weights are in it."""
    relation = result.difference.relation if result.difference else ""
    if relation.startswith("exactly"):
        relation += " as it should be"
    lines = [f"{relation[0].upper()}{relation[1:]}."] if relation else []
    return [*lines, str(result.weights)] if result.weights else lines


def _tried(result: Result) -> list[str]:
    lines = [f"Tried: {result.tried}."] if result.passed is False else []
    return [*lines, result.problem] if result.problem else lines


def _vectors(result: Result) -> list[str]:
    difference = result.difference
    return [f"Expected: {difference.expected}", f"Got: {difference.got}"] if difference else []


def _bars(weights: Weights) -> str:
    """Draw the weights as bars, the right ones as outlines; the numbers are in the sentence beside it."""
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
    """Escape a text for HTML, and show what stands between backticks as code."""
    parts = html.escape(text).split("`")
    if len(parts) % 2 == 0:  # one is left over, perhaps from the learner's own line
        return "`".join(parts)
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"<div style='margin:2px 0'>{_escaped(line)}</div>" for line in lines)


def _card(outcome: Outcome) -> str:
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
    if outcome.note:
        parts.append(f"<p>{text(outcome.note)}</p>")
    parts.append(f"<ul style='padding-left:0;margin:6px 0'>{''.join(rows)}</ul>")
    if outcome.mistake:
        parts.append(f"<p><b>This looks like:</b> {text(outcome.mistake)}</p>")
    if outcome.said:
        parts.append(f"<p><b>What the gradient shows:</b> {text(outcome.said)}</p>")
    if outcome.printed.strip():
        shown = f"<pre style='white-space:pre-wrap'>{html.escape(outcome.printed)}</pre>"
        parts.append(f"<details><summary>What your code printed</summary>{shown}</details>")
    colour = GREEN if full else GREY if outcome.note else RED
    style = f"border:1px solid {colour};border-left:6px solid {colour};padding:8px 12px;max-width:52em"
    name = f"Exercise {text(outcome.question.id)}: result"
    return f"<div role='status' aria-label='{name}' style='{style}'>{''.join(parts)}</div>"


class Scorecard:
    """All the exercises of a lesson, with what was earned since the notebook was started; made by `scorecard`."""

    def __init__(self, questions: Sequence[Question], scores: dict[str, Score]) -> None:
        self.rows = [(each, scores.get(each.id)) for each in questions]
        self.points = int(sum(scores.get(each.id, 0) for each in questions))
        self.possible = sum(each.points for each in questions)

    def next_step(self) -> str:
        """Say what to do next, in one sentence."""
        for question, score in self.rows:
            if score is None:
                return f"Next: {question.id}, {question.title}: run its check."
            if score < question.points:
                missing = next((r.name for r in score.outcome.results if not r.passed), "")
                return f"Next: {question.id}, {question.title}. Not there yet: {missing}."
        return "All of it. Go on with the next lesson."

    def __repr__(self) -> str:
        rows = [f"  {_reached(question, score):>8}  {question.id} {question.title}" for question, score in self.rows]
        return "\n".join([f"{self.points} of {self.possible} points", *rows, self.next_step()])

    def _repr_html_(self) -> str:
        text, cell = html.escape, "style='text-align:left;font-weight:normal;padding:2px 12px 2px 0'"
        rows = [
            f"<tr><th scope='row' {cell}>{question.id} {text(question.title)}</th>"
            f"<td {cell}>{_reached(question, score)}</td></tr>"
            for question, score in self.rows
        ]
        columns = "".join(f"<th scope='col' {cell}><b>{name}</b></th>" for name in ("Exercise", "Points"))
        bar = f"<progress max='{self.possible}' value='{self.points}' aria-label='points'></progress>"
        head = f"<b>{self.points} of {self.possible} points</b> {bar}"
        table = f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        return f"<div role='group' aria-label='Scorecard'>{head}{table}<p>{text(self.next_step())}</p></div>"


def _reached(question: Question, score: Score | None) -> str:
    return "not checked" if score is None else f"{score:g} of {question.points}"
