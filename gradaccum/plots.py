"""The figures of the lessons: functions from data to a figure, which compute nothing.

The colours can be told apart by colour-blind readers. Their contrast with white is 4.5:1 or more, so that white numbers
on them are readable, and 3:1 for the two light ones. Each series also has its own marker and line, hatch, or label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

COLOURS = ("#2450CC", "#A83204", "#22573F", "#722B66", "#C07F1A", "#4094DE", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "--", "\\\\", "oo")
DARK = COLOURS[:4]  # dark enough for a white number


def panels(titles: Sequence[str], height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """Return a white figure, at most 8 inches wide, and its axes: one panel per title, side by side.

    The figure is removed from pyplot's list, so that a notebook shows it only once, as the value of its cell. All text
    has 10 points or more: a window of 800 pixels shows a figure of 8 inches at 0.7 of its size, which leaves 8 points.

    Example:
        >>> figure, (left, right) = panels(["noise", "bytes"])
        >>> left.get_title(), right.get_title()
        ('noise', 'bytes')
    """
    figure, axes = pyplot.subplots(
        1, len(titles), figsize=(min(8.0, 5.2 * len(titles)), height), dpi=110, squeeze=False, layout="constrained"
    )
    pyplot.close(figure)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def lines(
    axis: Axes, x: Sequence[float], series: Mapping[str, Sequence[float]], *, log: str = "", **labels: str
) -> None:
    """Draw each series over x with its own colour, marker and line style.

    Args:
        axis: the axes to draw on.
        x: the positions on the horizontal axis.
        series: name -> values, as many as x; a name that starts with "expected" is a black dotted line, on top.
        log: "x", "y" or "xy" for logarithmic axes; a logarithmic x axis is labelled with the values.
        labels: `xlabel` and `ylabel`, with their units.

    Example:
        >>> figure, (axis,) = panels(["noise"])
        >>> lines(axis, [1, 2, 4], {"measured": [4, 2, 1], "expected": [4, 2, 1]}, log="x", xlabel="batch size")
        >>> [line.get_label() for line in axis.lines], axis.get_xlabel()
        (['measured', 'expected'], 'batch size')
    """
    for index, (name, values) in enumerate(series.items()):
        if name.startswith("expected"):
            axis.plot(x, values, color="black", linestyle=":", label=name, zorder=3)
        else:
            style: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": LINES[index % 4]}
            axis.plot(x, values, markersize=5, label=name, **style)
    if "x" in log:
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [f"{value:g}" for value in x])
    else:
        axis.locator_params(axis="x", integer=all(float(value).is_integer() for value in x))
    if "y" in log:
        positive = [value for values in series.values() for value in values if value > 0]
        axis.set_yscale("log", base=2 if max(positive) < 100 * min(positive) else 10)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    axis.set(**labels)
    if len(series) > 1:
        axis.legend(frameon=False, handlelength=3)


def bars(axis: Axes, names: Sequence[str], values: Sequence[float], *, text: str = "{:.3g}", **labels: str) -> None:
    """Draw one bar per name, with its value at the end; `text` is the format of the value.

    Example:
        >>> figure, (axis,) = panels(["error"])
        >>> bars(axis, ["by k", "by count"], [20.3, 0.0], text="{:.0f} %", xlabel="error, percent")
        >>> [label.get_text() for label in axis.texts]
        ['20 %', '0 %']
    """
    drawn = axis.barh(names, values, color=COLOURS[0])
    axis.bar_label(drawn, [text.format(value) for value in values], padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.set(**labels)


def weights(seen: Any, names: Sequence[str] = (), *, title: str = "") -> Figure:
    """Draw the weight that each micro-batch got as a bar, and the right weight as an outline.

    Args:
        seen: an `Audit` after its block, or a list of its updates, with `micro_batches`, `weights`, `right` and `kind`.
        names: names for the updates, instead of their numbers and kinds.
        title: the title of the figure.

    Returns:
        A figure; its label (`figure.get_label()`) is a sentence that describes it, for an alt text.

    Example:
        >>> from types import SimpleNamespace
        >>> update = SimpleNamespace(micro_batches=[0, 1], weights=[1.0, 1.0], right=[0.5, 0.5], kind="not divided")
        >>> weights([update]).get_label()
        'The weight that each of 2 micro-batches got, beside the right one; update 0, not divided: 1, 1 for 0.5, 0.5.'
    """
    updates = list(getattr(seen, "updates", seen))
    heads = list(names) or [f"update {number}, {update.kind}" for number, update in enumerate(updates)]
    figure, (axis,) = panels([title], height=2.8)
    many, place, ticks = sum(len(update.weights) for update in updates), 0.0, []
    width = min(8.0, 3.5 + 0.5 * many)
    figure.set_size_inches(width, 2.8)
    highest = max([weight for update in updates for weight in (*update.weights, *update.right)], default=1.0)
    for number, update in enumerate(updates):
        places = [place + index for index in range(len(update.weights))]
        colour, hatch = COLOURS[number % len(DARK)], HATCHES[number % len(DARK)]
        axis.bar(places, update.weights, 0.8, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        around = withStroke(linewidth=3.2, foreground="white")  # so that it shows on a dark bar
        outline: dict[str, Any] = {"fill": False, "edgecolor": "black", "linestyle": "--", "path_effects": [around]}
        axis.bar(places, update.right, 0.8, linewidth=1.6 if many <= 16 else 0.9, **outline)
        if many <= 16:
            for x, weight, share in zip(places, update.weights, update.right, strict=True):
                top = max(weight, share) if abs(weight - share) < 0.1 * highest else max(weight, 0.0)  # not on a line
                shown = weight if abs(weight) > 1e-3 * highest else 0.0  # not what solving leaves in the last digits
                label = f"{shown:.2g}".replace("0.", ".", 1) if 0 < abs(shown) < 1 else f"{shown:.2g}"  # narrow bars
                axis.annotate(label, (x, top), (0, 3), textcoords="offset points", ha="center")
        if len(updates) <= 4 and places:
            head = "\n".join(wrap(heads[number], max(10, int(9 * width) * len(places) // many), break_long_words=False))
            axis.text((places[0] + places[-1]) / 2, 1.14 * highest, head, ha="center", va="bottom", color=colour)
        ticks += list(zip(places, update.micro_batches, strict=True))
        place += len(places) + 0.6
    every = max(1, -(-len(ticks) // 20))
    axis.set_xticks([x for x, _ in ticks[::every]], [str(name) for _, name in ticks[::every]])
    axis.xaxis.set_ticks_position("none")
    lowest = min(0.0, axis.get_ylim()[0])
    axis.set(xlabel="micro-batch", ylabel="weight (dashed: the right one)", ylim=(lowest, 1.5 * highest))
    pairs = [f"{_numbers(update.weights)} for {_numbers(update.right)}" for update in updates]
    said = "; ".join(f"{head}: {pair}" for head, pair in zip(heads, pairs, strict=True))
    figure.set_label(f"The weight that each of {many} micro-batches got, beside the right one; {said}.")
    return figure


def _numbers(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.3g}" for value in values[:8])
    return shown if len(values) <= 8 else f"{shown} and {len(values) - 8} more"


def stacked_roles(
    axis: Axes, peaks: Mapping[str, Mapping[str, int]], *, unit: str = "MB", limit_bytes: int = 0
) -> None:
    """Draw each peak as a bar stacked by role, in MB or GB (powers of 10), with its total at the end.

    Args:
        axis: the axes to draw on.
        peaks: name -> role -> bytes, such as `measure_memory`'s `at_peak`.
        unit: "MB" or "GB".
        limit_bytes: draw a line at this limit, such as a GPU's memory; 0 draws none.

    Example:
        >>> figure, (axis,) = panels(["peak"])
        >>> stacked_roles(axis, {"k = 1": {"parameters": 1_000_000, "activations": 3_000_000}}, limit_bytes=2_000_000)
        >>> [text.get_text() for text in axis.texts]
        [' 4.00 MB', ' limit 2 MB']
    """
    names, scale = list(peaks), {"MB": 1e6, "GB": 1e9}[unit]
    left = [0.0] * len(names)
    for index, role in enumerate(dict.fromkeys(role for roles in peaks.values() for role in roles)):
        width = [peaks[name].get(role, 0) / scale for name in names]
        if any(width):
            axis.barh(names, width, left=left, label=role, height=0.6, **_role_style(index))
            left = [start + more for start, more in zip(left, width, strict=True)]
    limit = limit_bytes / scale
    for place, total in enumerate(left):
        at = limit if 0.75 * limit < total < limit else total  # no text on the line
        axis.text(at, place, f" {total:.2f} {unit}", va="center")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.2 * max(*left, limit))
    axis.set_xlabel(f"bytes held at the peak, {unit}")
    if limit_bytes:
        edge = [withStroke(linewidth=4, foreground="white")]
        axis.axvline(limit, color="black", linestyle="--", zorder=1.5, path_effects=edge)
        axis.text(limit, 0.5, f" limit {limit:g} {unit}", va="center")
    _legend_below(axis.figure)


def stacked_timelines(timelines: Mapping[str, Mapping[str, Sequence[int]]]) -> Figure:
    """Draw the memory in use over time, stacked by role: a panel for each name, all with the same scale.

    Args:
        timelines: name -> role -> bytes after each event, such as `measure_memory`'s `timeline`.

    Example:
        >>> figure = stacked_timelines({"k = 1": {"parameters": [4, 4, 4], "activations": [0, 8, 0]}})
        >>> [axis.get_title() for axis in figure.axes]
        ['k = 1']
    """
    figure, axes = panels(list(timelines))
    for axis, timeline in zip(axes, timelines.values(), strict=True):
        below = [0.0] * len(next(iter(timeline.values())))
        for index, (role, held) in enumerate(timeline.items()):
            if any(held):
                top = [start + more / 1e6 for start, more in zip(below, held, strict=True)]
                axis.fill_between(range(len(top)), below, top, step="post", label=role, lw=0.8, **_role_style(index))
                below = top
        axis.plot(below, color="black", linewidth=0.8, drawstyle="steps-post")
        axis.set(xlabel="events: a tensor made, or free again", xlim=(0, len(below) - 1))
    axes[0].set_ylabel("bytes held, MB")
    highest = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, highest)
    _legend_below(figure)
    return figure


def _legend_below(figure: Any) -> None:
    """Draw one legend below all panels, with boxes large enough to show a hatch."""
    drawn = [axis.get_legend_handles_labels() for axis in figure.axes]
    handles = {name: patch for found in drawn for patch, name in zip(*found, strict=True)}
    style = {"loc": "outside lower center", "frameon": False, "handlelength": 3, "handleheight": 1.4}
    figure.legend(handles.values(), handles, ncols=int(figure.get_figwidth() / 1.9), **style)


def _role_style(index: int) -> dict[str, Any]:
    return {"facecolor": COLOURS[index % 7], "hatch": HATCHES[index % 7], "edgecolor": "white"}


def window_strip(axis: Axes, loops: Mapping[str, Iterable[Sequence[int]]]) -> None:
    """Draw how each loop groups its micro-batches: one square per micro-batch, and an arrow at each update.

    Args:
        axis: the axes to draw on.
        loops: name -> groups of micro-batch numbers. A group that starts with a negative number has no update: its
            squares are hollow, without an arrow.

    Example:
        >>> figure, (axis,) = panels(["windows"])
        >>> window_strip(axis, {"k = 2": [[1, 2], [-3]]})
        >>> [text.get_text() for text in axis.texts if text.get_text()]
        ['1', '2', '3']
    """
    names = list(loops)
    for row, groups in enumerate(loops.values()):
        for index, group in enumerate(groups):
            stepped, colour = group[0] >= 0, DARK[index % len(DARK)]
            fill, ink = (colour, "white") if stepped else ("white", "black")
            for place in map(abs, group):
                axis.add_patch(Rectangle((place - 0.42, row - 0.3), 0.84, 0.6, facecolor=fill, edgecolor=colour))
                axis.text(place, row, str(place), ha="center", va="center", color=ink)
            if stepped:
                axis.annotate(
                    "", (group[-1] + 0.42, row + 0.5), (group[-1] + 0.42, row + 0.28), arrowprops={"arrowstyle": "->"}
                )
    last = max(abs(number) for groups in loops.values() for group in groups for number in group)
    axis.set(xlim=(0.3, last + 0.9), ylim=(len(names) - 0.4, -0.6), xticks=[])
    axis.set_yticks(range(len(names)), names)
    axis.spines[["bottom", "left"]].set_visible(False)
    axis.tick_params(left=False)


def padded_rows(axis: Axes, counts: Sequence[int], width: int) -> None:
    """Draw a padded batch: each row's targets as a filled bar, its padding hollow, the count at the end.

    Example:
        >>> figure, (axis,) = panels(["batch"])
        >>> padded_rows(axis, [3, 5], width=5)
        >>> [text.get_text() for text in axis.texts]
        ['3', '5']
    """
    rows = list(range(1, len(counts) + 1))
    axis.barh(rows, counts, color=COLOURS[0], height=0.7, label="targets")
    axis.barh(
        rows,
        [width - value for value in counts],
        left=counts,
        color="white",
        edgecolor="#555555",
        hatch="//",
        height=0.7,
        label="padding, ignored",
    )
    for row, value in zip(rows, counts, strict=True):
        axis.text(width + 0.5, row, f"{value}", va="center")
    axis.invert_yaxis()
    axis.set(xlabel="position in the padded row", ylabel="row", yticks=rows)
    _legend_below(axis.figure)
