"""What follows from the sources: README's table of the lessons, and the line that opens an exercise notebook."""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import launch
from launch import SourceError

NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def texts(path: Path) -> list[str]:
    """Return the Markdown cells of a source."""
    cells = jupytext.read(path, fmt="py:percent").cells
    return [cell.source for cell in cells if cell.cell_type == "markdown"]


def minutes(text: str, path: Path) -> int:
    """Return the minutes that a text promises."""
    found = re.search(r"\b(\d+) minutes", text)
    if found is None:
        raise SourceError(f"{path.name}: {text[:40]!r} does not say how many minutes it takes.")
    return int(found[1])


def totals(path: Path) -> tuple[int, int, int]:
    """Count the exercises in a source, their points and their minutes, as their headings say."""
    headings = [text for text in texts(path) if text.startswith("## Exercise ")]
    points = [re.search(r"\| (\d+) points?\n", text) for text in headings]
    if None in points:
        raise SourceError(f"{path.name}: an exercise does not say its points.")
    return (len(headings), sum(int(each[1]) for each in points), sum(minutes(text, path) for text in headings))


def in_words(path: Path) -> str:
    """Say the totals as an exercise notebook opens with them."""
    count, points, spent = totals(path)
    return f"{NUMBERS[count].capitalize()} exercises, {points} points, about {spent} minutes"


def table(lessons: list[Path], folder: str = "") -> str:
    """Write a row for each lesson, from its title, its promise and its exercises; links begin with `folder`."""
    lines = ["| lesson | what it is about | minutes | exercises |", "|---|---|---|---|"]
    sums = [0, 0, 0, 0]
    for path in lessons:
        promise, number = texts(path)[0], path.stem[:2]
        title, _, about = promise.splitlines()[0].removeprefix("# ").partition(": ")
        title = title if title[0].isdigit() else f"{int(number)}. {title}"
        spent, cell, found = minutes(promise, path), "", (0, 0, 0)
        graded = path.parent / "exercises" / f"{number}_exercises.py"
        if graded.exists():
            found = totals(graded)
            cell = f"[{found[0]} ({found[1]} points, {found[2]} minutes)]({folder}exercises/{graded.stem}.ipynb)"
        lines.append(f"| [{title}]({folder}{path.stem}.ipynb) | {about} | {spent} | {cell} |")
        sums = [one + other for one, other in zip(sums, (spent, *found), strict=True)]
    lines.append(f"| in all | | {sums[0]} | {sums[1]} ({sums[2]} points, {sums[3]} minutes) |")
    return "\n".join(lines)


def filled(text: str, path: Path, lessons: list[Path]) -> str:
    """Put into a Markdown cell what follows from the sources: {{lessons}}, or in exercises {{totals}}."""
    if "{{totals}}" in text:
        text = text.replace("{{totals}}", in_words(path))
    if "{{lessons}}" in text:
        text = text.replace("{{lessons}}", table([each for each in lessons if each != path]))
    return text


def within(text: str, name: str, command: str, block: str) -> str:
    """Put a block between the two lines that README.md keeps for it."""
    start, end = f"<!-- {name}: `{command}` writes this -->\n", f"<!-- /{name} -->\n"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SourceError(f"README.md has lost two of its lines: {start.strip()} and {end.strip()}.")
    return before + start + block + end + after


def readme(text: str, lessons: list[Path]) -> str:
    """Write the links and the table into README's text."""
    text = within(text, "launch", "make address", launch.block())
    return within(text, "lessons", "make notebooks", table(lessons, "notebooks/") + "\n")
