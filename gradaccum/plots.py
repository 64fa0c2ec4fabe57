"""The figures of the lessons: data in, figure out, nothing computed.

The colours are Okabe and Ito's, which hold for colour-blind eyes; each series has a marker or a hatch of its own too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "--", "\\\\", "oo")


def panels(titles: Sequence[str], height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """Make a white figure with one panel for each title, side by side, at most 9 inches wide.

    The figure is taken from pyplot's list, so that a notebook shows it once: as the value of its cell.

    Example:
        >>> figure, (left, right) = panels(["noise", "bytes"])
        >>> left.get_title(), right.get_title()
        ('noise', 'bytes')
    """
    figure, axes = pyplot.subplots(
        1, len(titles), figsize=(min(9.0, 5.2 * len(titles)), height), dpi=110, squeeze=False, layout="constrained"
    )
    pyplot.close(figure)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def lines(
    axis: Axes, x: Sequence[float], series: Mapping[str, Sequence[float]], *, log: str = "", **labels: str
) -> None:
    """Draw each series over x with its own colour and marker.

    Args:
        axis: where.
        x: the places on the horizontal axis.
        series: name -> values, as many as x; a name that starts with "expected" is drawn as a thin dashed line.
        log: "x", "y" or "xy" for logarithmic axes; a logarithmic x shows the values themselves.
        labels: `xlabel` and `ylabel`, with their units.

    Example:
        >>> figure, (axis,) = panels(["noise"])
        >>> lines(axis, [1, 2, 4], {"measured": [4, 2, 1], "expected": [4, 2, 1]}, log="x", xlabel="batch size")
        >>> [line.get_label() for line in axis.lines], axis.get_xlabel()
        (['measured', 'expected'], 'batch size')
    """
    for index, (name, values) in enumerate(series.items()):
        if name.startswith("expected"):
            axis.plot(x, values, color="#555555", linestyle="--", linewidth=1, label=name)
        else:
            axis.plot(x, values, color=COLOURS[index], marker=MARKERS[index], markersize=5, label=name)
    if "x" in log:
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [f"{value:g}" for value in x])
    if "y" in log:
        positive = [value for values in series.values() for value in values if value > 0]
        axis.set_yscale("log", base=2 if max(positive) < 100 * min(positive) else 10)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    axis.set(**labels)
    if len(series) > 1:
        axis.legend(frameon=False, fontsize=9)


def bars(axis: Axes, names: Sequence[str], values: Sequence[float], *, text: str = "{:.3g}", **labels: str) -> None:
    """Draw one bar for each name with its value written at its end; `text` is the format of that value.

    Example:
        >>> figure, (axis,) = panels(["error"])
        >>> bars(axis, ["by k", "by count"], [20.3, 0.0], text="{:.0f} %", xlabel="error, percent")
        >>> [label.get_text() for label in axis.texts]
        ['20 %', '0 %']
    """
    drawn = axis.barh(names, values, color=[COLOURS[index % len(COLOURS)] for index in range(len(names))])
    axis.bar_label(drawn, [text.format(value) for value in values], padding=3, fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.set(**labels)


def stacked_roles(
    axis: Axes, peaks: Mapping[str, Mapping[str, int]], *, unit: str = "MB", limit_bytes: int = 0
) -> None:
    """Draw each peak as a bar stacked by role, in millions or billions of bytes, with its total at the end.

    Args:
        axis: where.
        peaks: name -> role -> bytes, such as `measure_memory`'s `at_peak`.
        unit: "MB" or "GB".
        limit_bytes: where to draw a line, such as a GPU's memory; 0 draws none.

    Example:
        >>> figure, (axis,) = panels(["peak"])
        >>> stacked_roles(axis, {"k = 1": {"parameters": 1_000_000, "activations": 3_000_000}}, limit_bytes=2_000_000)
        >>> [text.get_text() for text in axis.texts]
        [' 4.00 MB', ' limit 2 MB']
    """
    names, scale = list(peaks), {"MB": 1e6, "GB": 1e9}[unit]
    left, behind = [0.0] * len(names), {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for index, role in enumerate(dict.fromkeys(role for roles in peaks.values() for role in roles)):
        width = [peaks[name].get(role, 0) / scale for name in names]
        if any(width):
            axis.barh(names, width, left=left, label=role, height=0.6, **_role_style(index))
            left = [start + more for start, more in zip(left, width, strict=True)]
    for place, total in enumerate(left):
        axis.text(total, place, f" {total:.2f} {unit}", va="center", fontsize=9, bbox=behind)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.2 * max(*left, limit_bytes / scale))
    axis.set_xlabel(f"bytes held at the peak, {unit}")
    if limit_bytes:
        axis.axvline(limit_bytes / scale, color="black", linestyle="--", zorder=1.5)
        axis.text(limit_bytes / scale, 0.5, f" limit {limit_bytes / scale:g} {unit}", va="center", fontsize=9)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=4)


def stacked_timelines(timelines: Mapping[str, Mapping[str, Sequence[int]]]) -> Figure:
    """Draw what is held from moment to moment, stacked by role: a panel for each name, with one scale of bytes.

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
                axis.fill_between(range(len(top)), below, top, step="post", label=role, lw=0, **_role_style(index))
                below = top
        axis.plot(below, color="black", linewidth=0.8, drawstyle="steps-post")
        axis.set(xlabel="events: a tensor made, or free again", xlim=(0, len(below) - 1))
    axes[0].set_ylabel("bytes held, MB")
    highest = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, highest)
    handles = {text: drawn for axis in axes for drawn, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    return figure


def _role_style(index: int) -> dict[str, Any]:
    return {"facecolor": COLOURS[index % 7], "hatch": HATCHES[index % 7], "edgecolor": "white"}


def window_strip(axis: Axes, loops: Mapping[str, Iterable[Sequence[int]]]) -> None:
    """Draw how each loop groups its micro-batches: one square each, an arrow where the weights are updated.

    Args:
        axis: where.
        loops: name -> groups of micro-batch numbers. A group that starts with a negative number was never stepped:
            its squares are hollow and have no arrow.

    Example:
        >>> figure, (axis,) = panels(["windows"])
        >>> window_strip(axis, {"k = 2": [[1, 2], [-3]]})
        >>> [text.get_text() for text in axis.texts if text.get_text()]
        ['1', '2', '3']
    """
    names = list(loops)
    for row, groups in enumerate(loops.values()):
        for index, group in enumerate(groups):
            stepped, colour = group[0] >= 0, COLOURS[index % 6]
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
    """Draw a padded batch: each row's targets as a filled bar, the ignored rest hollow, the count at the end.

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
        axis.text(width + 0.5, row, f"{value}", va="center", fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="position in the padded row", ylabel="row", yticks=rows)
    axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
