"""The card to share: a picture of 1200 by 630 pixels with the points in the exercises."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from textwrap import fill
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gradaccum.exercises.cards import Row, Scorecard
from gradaccum.plots import COLOURS

BLUE = COLOURS[0]
PAPER, INK, QUIET = "#FAF9F6", "#1B1B1B", "#55585C"  # its own background, for light and dark pages


def drawn(lesson: int | None, reached: Scorecard, about: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the card: for each exercise a bar for the points, and an outline for the possible points.

    Args:
        lesson: the number of the lesson, or None for all exercises.
        reached: the exercises with their points.
        about: for each exercise its lesson's title, its difficulty from 1 to 5 and its first sentence.
    """
    rows = reached.rows
    lessons = [row.question.id.partition(".")[0] for row in rows]
    series = f"lessons {lessons[0]} to {lessons[-1]}" if lesson is None else f"exercises of lesson {lesson}"
    name = "All exercises" if lesson is None else about[rows[0].question.id]["lesson"]
    points = f"{reached.points} of {reached.possible} points"
    whole = "all" if reached.solved == len(rows) else f"{reached.solved} of"
    count = f"{whole} {len(rows)} exercises solved"
    day = max((row.kept.on for row in rows if row.kept and row.best), default=date.today().isoformat())[:10]

    figure = pyplot.figure(figsize=(12, 6.3), dpi=100, facecolor=PAPER)
    pyplot.close(figure)  # so that a notebook shows it once, as the value of its cell
    figure.add_artist(Rectangle((0, 0), 1, 1, fill=False, edgecolor=BLUE, linewidth=8, transform=figure.transFigure))
    _write(figure, 0.89, "gradaccum", 22, BLUE, bold=True)
    _write(figure, 0.89, day, 16, QUIET, x=0.95, ha="right")
    _write(figure, 0.805, series, 16, QUIET)
    _write(figure, 0.695, fill(name, 22, break_on_hyphens=False), 32, INK, bold=True)
    _write(figure, 0.545, points, 32, BLUE, bold=True)
    _write(figure, 0.46, count, 19, INK)
    _bars(figure.add_axes((0.58, 0.455, 0.37, 0.36)), rows)
    told = ""
    if solved := [row.question for row in rows if row.best == row.question.points]:
        hardest = max(solved, key=lambda each: (about[each.id]["difficulty"], each.points))
        why = about[hardest.id]["why"].replace("`", "")
        head = f"the hardest one solved, difficulty {about[hardest.id]['difficulty']} of 5"
        _write(figure, 0.335, head, 16, QUIET)
        _write(figure, 0.275, hardest.title, 20, INK, bold=True)
        width = len(why) // -(-len(why) // 84) + 8  # lines of about the same length
        _write(figure, 0.235, fill(why, width), 17, INK, va="top")
        told = f" {head.capitalize()}: {hardest.title}. {why}"
    _write(figure, 0.07, "gradient accumulation in PyTorch, exercises that grade themselves", 14, QUIET)
    figure.set_label(f"gradaccum, {series}, {name}: {points}, {count}, {day}.{told}")
    return figure


def _write(figure: Figure, y: float, text: str, size: float, colour: str, bold: bool = False, **at: Any) -> None:
    looks: dict[str, Any] = {"x": 0.05, "ha": "left", "va": "center", "linespacing": 1.25, "parse_math": False} | at
    figure.text(y=y, s=text, fontsize=size, color=colour, fontweight="bold" if bold else "normal", **looks)


def _bars(axis: Axes, rows: list[Row]) -> None:
    """Draw each exercise as the lessons draw a weight: the points as a bar, the possible points as an outline."""
    places: dict[str, list[float]] = {}
    thin = 1.3 if len(rows) < 10 else 0.8
    for number, row in enumerate(rows):
        own = places.setdefault(row.question.id.partition(".")[0], [])
        own.append(number + 0.6 * (len(places) - 1))
        axis.bar(own[-1], row.best, 0.56, color=BLUE)
        axis.bar(own[-1], row.question.points, 0.84, fill=False, edgecolor=INK, linestyle="--", linewidth=thin)
    if len(places) == 1:
        axis.set_xticks(range(len(rows)), [row.question.id for row in rows])
    else:
        axis.set_xticks([sum(each) / len(each) for each in places.values()], list(places))
    axis.tick_params(length=0, labelsize=15, labelcolor=INK)
    axis.set_yticks([])
    axis.set_facecolor("none")
    axis.spines[["top", "left", "right"]].set_visible(False)
