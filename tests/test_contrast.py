"""What a learner sees can be read: WCAG 2.2's contrast in figures and cards as they are drawn, and without colour."""

import inspect
import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import jupyterlab
import nbformat
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from files import LESSONS, NOTEBOOKS
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.text import Text

from gradaccum import exercises, plots, widgets
from gradaccum.exercises import cards, check, scorecard

TEXT, DRAWN = 4.5, 3.0  # WCAG 2.2, success criteria 1.4.3 and 1.4.11, level AA


def linear(colour):
    parts = np.array(to_rgb(colour))
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """The ratio of WCAG 2.2, www.w3.org/TR/WCAG22/#dfn-contrast-ratio: from 1 to 21."""
    low, high = sorted(float(linear(colour) @ (0.2126, 0.7152, 0.0722)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("one", "other", "ratio"),
    [("black", "white", 21.0), ("white", "white", 1.0), ("#767676", "#ffffff", 4.54), ("#ff0000", "#ffffff", 4.0)],
)
def test_the_formula_gives_the_known_ratios(one, other, ratio):
    assert contrast(one, other) == contrast(other, one) == pytest.approx(ratio, abs=0.005)


# --------------------------------------------------------------------------------------------------- the figures


def unreadable(figure):
    """List what in a drawn figure is too faint or too small, or has nothing but its colour to be told by."""
    figure.canvas.draw()
    return [*faults_of_texts(figure), *faults_of_shapes(figure), *faults_of_lines(figure), *alike(figure)]


def pages(figure):
    return [figure.patch, *(axis.patch for axis in figure.axes)]


def face_and_edge(area):
    return [np.atleast_2d(colour)[0] for colour in (area.get_facecolor(), area.get_edgecolor())]


def behind(figure, artist):
    """The colours that an artist lies on: of the pages and boxes that it touches, from the last that holds it whole."""
    box = artist.get_window_extent().padded(-1)
    touched = []
    for patch in [*pages(figure), *(patch for axis in figure.axes for patch in axis.patches)]:
        if face_and_edge(patch)[0][3] == 0:
            continue  # an outline: nothing lies on it
        there = patch.get_window_extent()
        if there.x0 <= box.x0 and there.y0 <= box.y0 and there.x1 >= box.x1 and there.y1 >= box.y1:
            touched = [patch]
        elif there.overlaps(box):
            touched.append(patch)
    return [colour for patch in touched for colour in face_and_edge(patch)[: 2 if patch.get_hatch() else 1]]


def faults_of_texts(figure):
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            own = text.get_bbox_patch()
            for colour in [own.get_facecolor()] if own else behind(figure, text):
                if contrast(text.get_color(), colour) < TEXT:
                    yield f"text {text.get_text()!r}: faint"
            if text.get_fontsize() < 10 or figure.get_figwidth() > 8:  # see plots.panels
                yield f"text {text.get_text()!r}: small"


def faults_of_shapes(figure):
    for shape in figure.findobj(lambda artist: isinstance(artist, Patch | PolyCollection)):
        if not shape.get_visible() or shape in pages(figure) or isinstance(shape, FancyBboxPatch):
            continue
        face, edge = face_and_edge(shape)
        shown = [colour for colour in (face, edge) if colour[3] == 1]
        if max(contrast(colour, figure.get_facecolor()) for colour in shown) < DRAWN:
            yield f"{type(shape).__name__}: faint"
        if shape.get_hatch() and contrast(face, edge) < DRAWN:
            yield f"{type(shape).__name__}: faint hatch"


def faults_of_lines(figure):
    for line in figure.findobj(Line2D):
        # An outline is as good as a ground, where the line shows on it.
        outline = [effect._gc["foreground"] for effect in line.get_path_effects() if "foreground" in effect._gc]
        outline = [colour for colour in outline if contrast(colour, line.get_color()) >= DRAWN]
        drawn = line.get_visible() and len(line.get_xdata())
        for colour in behind(figure, line) if drawn else []:
            if max(contrast(each, colour) for each in [line.get_color(), *outline]) < DRAWN:
                yield f"line {line.get_label()!r}: faint"


def alike(figure):
    """Find what a legend names and only a colour tells apart, or what lies side by side with no edge between."""
    for axis in figure.axes:
        handles, names = axis.get_legend_handles_labels()
        drawn = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]  # bars come as a tuple
        areas = [each for each in drawn if not isinstance(each, Line2D)]
        signs = [each.get_hatch() if each in areas else (each.get_marker(), each.get_linestyle()) for each in drawn]
        for (one, first), (other, second) in combinations(zip(signs, names, strict=True), 2):
            if one == other:
                yield f"{first!r} and {second!r}: alike without colour"
        for pair in combinations(areas, 2):
            faces, edges = zip(*map(face_and_edge, pair), strict=True)
            between = [edge for edge, area in zip(edges, pair, strict=True) if edge[3] and np.max(area.get_linewidth())]
            edged = any(min(contrast(edge, face) for face in faces) >= DRAWN for edge in between)
            if not edged and contrast(*faces) < DRAWN:
                yield "two areas: no edge between"


ROLES = ["parameters", "gradients", "state", "inputs", "activations", "backward temporaries", "optimizer temporaries"]


def draw(function):
    """Draw with one of the figures' functions, with data that uses each of its colours."""
    if function is plots.stacked_timelines:
        return function({name: {role: [0, 10**6, 2 * 10**6] for role in ROLES} for name in ("k = 1", "k = 4")})
    if function is plots.weights:
        update = SimpleNamespace(micro_batches=[0, 1], weights=[0.3, 1], right=[0.5, 0.5], kind="does not fit")
        return function([update] * 4, title="a title")
    figure, (axis,) = plots.panels(["a title"])
    values = range(1, 5)
    arguments = {
        plots.lines: (
            values,
            {name: [n * value for value in values] for n, name in enumerate([*ROLES, "expected"], 1)},
        ),
        plots.bars: (ROLES, [0.0, 1, 2, 3, 4, 5, 6]),
        plots.stacked_roles: ({name: dict.fromkeys(ROLES, 10**6) for name in ("k = 1", "k = 4")},),
        plots.window_strip: ({"k = 2": [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [-11]]},),
        plots.padded_rows: ([3, 5, 1], 5),
    }
    function(axis, *arguments[function], **({"limit_bytes": 2_500_000} if function is plots.stacked_roles else {}))
    return figure


FUNCTIONS = [
    function
    for name, function in inspect.getmembers(plots, inspect.isfunction)
    if function.__module__ == plots.__name__ and not name.startswith("_") and name != "panels"
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_figure_can_be_read_without_colour(function):
    figure = draw(function)
    assert figure.findobj(Text)
    assert unreadable(figure) == []


def test_faint_lines_grey_text_and_twins_show():
    figure, (axis,) = plots.panels(["a title"])
    plots.lines(axis, [1, 2], {"seen": [1, 2], "twin": [2, 1]})
    axis.lines[1].set(marker="o", linestyle="-")
    axis.plot([1, 2], [1, 1], color="#E69F00", label="orange", linestyle=":")
    axis.text(1, 1.5, "grey", color="#999999")
    axis.text(1, 1.6, "tiny", fontsize=6)
    assert unreadable(figure) == [
        "text 'grey': faint",
        "text 'tiny': small",
        "line 'orange': faint",
        "'seen' and 'twin': alike without colour",
    ]


def test_faint_boxes_and_hatches_are_noticed():
    figure, (axis,) = plots.panels(["a title"])
    axis.barh(["a"], [3], color="#2450CC", label="one", hatch="//", edgecolor="#A83204")
    axis.barh(["a"], [3], left=3, color="#A83204", label="two")
    axis.barh(["b"], [3], color="#E69F00")
    axis.text(1, 0, "on it")
    found = unreadable(figure)
    assert found == [
        "text 'on it': faint",
        "text 'on it': faint",  # on the hatch too
        "Rectangle: faint hatch",
        "Rectangle: faint",
        "two areas: no edge between",
    ]


def test_the_colours_hold_for_colour_blind_eyes():
    # The least distance in CIELAB; of Okabe and Ito's seven, two of which are too light for a white page, it is 16.
    # What an eye without one kind of cone sees: G. M. Machado and others, 2009, severity 1.
    eyes = {
        "all cones": np.eye(3),
        "no long": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "no medium": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "no short": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for eye, seen in eyes.items():
        colours = np.clip([np.array(seen) @ linear(colour) for colour in plots.COLOURS], 0, 1)
        x, y, z = np.transpose([to_xyz @ colour / to_xyz.sum(axis=1) for colour in colours])
        x, y, z = (np.where(v > 0.008856, np.cbrt(v), 7.787 * v + 16 / 116) for v in (x, y, z))
        places = np.transpose([116 * y - 16, 500 * (x - y), 200 * (y - z)])
        apart = min(np.linalg.norm(one - other) for one, other in combinations(places, 2))
        assert apart >= 20, f"{eye}: {apart:.1f}"


def test_figures_on_a_dark_page_keep_contrast():
    share = float(re.search(r"invert\((\.\d+)\) hue-rotate\(180deg\)", widgets.STYLE)[1])
    # What a browser makes of a colour: www.w3.org/TR/filter-effects-1/#invertEquivalent and #hueRotateEquivalent.
    turned = np.array([[-0.574, 1.43, 0.144], [0.426, 0.43, 0.144], [0.426, 1.43, -0.856]])
    white, *others = (
        np.clip(turned @ (np.array(to_rgb(colour)) * (1 - 2 * share) + share), 0, 1)
        for colour in ("white", *plots.COLOURS)
    )
    assert contrast(white, "#111111") < 1.2, "no brighter than the page"
    for colour, seen in zip(plots.COLOURS, others, strict=True):
        assert contrast(seen, white) >= (TEXT if colour in (*plots.DARK, "#000000") else DRAWN), colour


@pytest.mark.parametrize("stem", LESSONS)
def test_a_lesson_draws_with_our_colours(stem):
    named = r"""#[0-9A-Fa-f]{6}\b|colou?rs?["']?\s*[=:]\s*["']"""
    assert re.findall(named, (NOTEBOOKS / "source" / f"{stem}.py").read_text(encoding="utf-8")) == []


def without_words(notebook):
    """List the cells whose picture has no words: none printed with it, and no text right below."""
    found = []
    for cell, below in zip(notebook.cells, [*notebook.cells[1:], {"cell_type": "none"}], strict=True):
        outputs = cell.get("outputs", [])
        printed = "".join(each.text for each in outputs if each.output_type == "stream")
        said = len(re.findall("[a-z]{2,}", printed)) >= 3 or (
            below["cell_type"] == "markdown" and not below["source"].startswith("#")
        )
        if any("image/png" in each.get("data", {}) for each in outputs) and not said:
            found.append(cell.id)
    return found


@pytest.mark.parametrize("stem", LESSONS)
def test_a_picture_has_its_words(stem):
    assert without_words(nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4)) == []


def test_a_picture_without_words_is_noticed():
    def drawn(name, *printed):
        picture = nbformat.v4.new_output("display_data", {"image/png": ""})
        words = [nbformat.v4.new_output("stream", text=text) for text in printed]
        return nbformat.v4.new_code_cell("figure", id=name, outputs=[*words, picture])

    heading, text = map(nbformat.v4.new_markdown_cell, ("## Next", "It falls."))
    told = [drawn("told", "The noise falls 8 times."), drawn("above-a-text"), text]
    notebook = nbformat.v4.new_notebook(cells=[*told, drawn("above-a-heading", "2.1"), heading, drawn("last")])
    assert without_words(notebook) == ["above-a-heading", "last"]


# ----------------------------------------------------------------------------------------------------- the cards

BADGE = re.compile(r"<span style=\"background:(#\w+);color:#fff[^>]*>([A-Z ]+)</span>")


def grounds():
    """What the installed JupyterLab's themes, all of them, lay behind an output."""
    found = {"#212121"}  # where another editor's dark page is lighter
    for path in (Path(jupyterlab.__file__).parent / "themes" / "@jupyterlab").glob("*/index.css"):
        found.update(re.findall(r"--jp-layout-color0:([^;]+);", path.read_text(encoding="utf-8")))
    assert found >= {"white", "#111"}
    return found


@pytest.fixture
def shown(monkeypatch):
    """A card of each outcome, and the scorecard at the start and at the end: name -> page."""
    monkeypatch.setattr(exercises, "_scores", {})
    monkeypatch.setattr(exercises.progress, "_session", {})

    def stub(reduction, sizes):
        raise NotImplementedError

    def partly(reduction, sizes):
        print("what I print")
        return len(sizes)

    def right(reduction, sizes):
        return len(sizes) if reduction == "mean" else sum(sizes)

    answers = [stub, lambda reduction, sizes: sizes["a"], partly, right]
    views = [scorecard(3), *(check("3.2", answer) for answer in answers), scorecard(3)]
    views.append(check("5.1", lambda counts: [1 / len(counts)] * len(counts)))
    names = ["nothing", "not written", "broken", "partly right", "right", "some", "bars"]
    return {name: view._repr_html_() for name, view in zip(names, views, strict=True)}


@pytest.mark.parametrize("colour", [cards.GREEN, cards.RED, cards.GREY])
def test_a_card_s_colour_shows_on_every_theme(colour):
    assert contrast(colour, "#fff") >= TEXT
    assert all(contrast(colour, ground) >= DRAWN for ground in grounds())


def test_a_card_has_no_other_colour(shown):
    ours = {cards.GREEN, cards.RED, cards.GREY}
    for name, page in shown.items():
        assert {ground for ground, _ in BADGE.findall(page)} <= ours, name
        assert len(re.findall("background|(?<![-\\w])color", page)) == 2 * len(BADGE.findall(page)), "only badges"
        assert set(re.findall(r"#[0-9a-f]{3,6}\b", page)) <= ours | {"#fff"}, name
        # What has no fill is drawn in the theme's own colour.
        for shape in re.findall(r"<(?:rect|line)[^>]*>", page):
            assert f'fill="{cards.GREY}"' in shape or 'stroke="currentColor"' in shape, name
    assert ours <= set(re.findall(r"#\w+", "".join(shown.values())))


def test_a_card_says_without_colour_what_it_says(shown):
    badges = {name: {words for _, words in BADGE.findall(page)} for name, page in shown.items()}
    assert badges["not written"] == {"NOT YET"}
    assert badges["partly right"] == {"PASS", "FAIL"}
    assert badges["right"] == {"PASS"}
    assert badges["broken"] == {"FAIL"}


def test_a_card_has_names_for_a_screen_reader(shown):
    for name in ("nothing", "some"):
        page = shown.pop(name)
        assert page.startswith("<div role='group' aria-label='Scorecard'>")
        assert set(re.findall("<th ([^ >]*)", page)) == {"scope='row'", "scope='col'"}
        assert all("aria-label" in bar for bar in re.findall("<progress[^>]*>", page))  # axe does not look at these
    assert shown.pop("bars").startswith("<div role='status' aria-label='Exercise 5.1: result'")
    for page in shown.values():
        assert page.startswith("<div role='status' aria-label='Exercise 3.2: result'")


FAINT = "<p><i style='background:#e69f00;color:#fff'>on it</i></p><svg role='img'></svg>"


@pytest.mark.browser
@pytest.mark.parametrize(("ground", "text"), [("white", "rgba(0,0,0,.87)"), ("#111", "white"), ("#212121", "white")])
def test_axe_finds_nothing_in_a_card(chromium, shown, ground, text):
    page = chromium.new_page()

    def found(body):
        head = f"<html lang=en><title>Cards</title><body style='background:{ground};color:{text}'>"
        page.set_content(f"{head}<main><h1>Cards</h1>{body}</main>")
        return Axe().run(page)

    report = found("".join(shown.values()))
    assert report.violations_count == 0, report.generate_report()
    noticed = {each["id"] for each in found(FAINT).response["violations"]}
    assert noticed == {"color-contrast", "svg-img-alt"}
    page.close()
