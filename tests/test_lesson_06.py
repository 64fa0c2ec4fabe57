"""Lesson 6's short ways to a number, against predictions of every layer and micro-batch, which it has no time for."""

import ast
import itertools
import re

import build
import nbformat
import pytest
import torch

from gradaccum import widgets

CELLS = {cell.id: cell.source for cell in build.read_source(build.sources()["06_gpu_memory"]).cells}


def names_after(*sources):
    """Run these after the lesson's set-up, and return the names that they leave behind."""
    names, threads = {}, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:  # what shows something needs a notebook
        patch.setattr(widgets, "progress", lambda items, _: items)
        patch.setattr(widgets, "explore", lambda *view, **controls: None)
        for source in (CELLS["setup"], *sources):
            exec(source, names)
    torch.set_num_threads(threads)
    return names


def total(roles):
    return sum(roles.values())


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["GPT-2 small", "GPT-2 medium", "GPT-2 large", "GPT-2 XL", "7 billion"])
def test_the_line_is_exact_at_every_depth(shape):
    lesson = names_after(CELLS["shapes-run"])
    # Every setting for the smallest; the others, which take seconds each, as the lesson's table has them.
    settings = itertools.product((True, False), (False, True)) if shape == "GPT-2 small" else [(True, False)]
    sizes = ((1, 1), (1, 2), (5, 2)) if shape == "GPT-2 small" else ((1, 1), (5, 2))
    for (adamw, autocast), (micro_batch, k) in itertools.product(settings, sizes):
        optimizer = torch.optim.AdamW if adamw else torch.optim.SGD
        whole = lesson["peak_of"](autocast, shape, [micro_batch] * k, optimizer)
        found = lesson["moments"](shape, micro_batch, micro_batch * k, adamw, autocast)
        assert total(whole) == max(map(total, found.values())), (adamw, autocast, micro_batch, k)


def test_the_last_sentence_is_what_was_measured():
    path = build.made_from(build.sources()["06_gpu_memory"])
    made = {cell.id: cell for cell in nbformat.read(path, as_version=4).cells}
    (row,) = re.findall(r"\| GPT-2 large \|.*", made["shapes-run"].outputs[-1].data["text/markdown"])
    alone, eight = re.findall(r"([\d.]+) GB at", made["explore-run"].outputs[0].text)
    least, *verdicts = row.split(" | ")[2:5]
    assert verdicts == ["no: optimizer state", "no: collected gradients"]
    assert 0 <= float(least) - float(eight) < 0.011, "the table's window has 512 rows of tokens, not 8: 8 MB more"
    said = (
        f"takes {alone} GB and fits in 16; eight in eight micro-batches take {eight}: the collected gradients tip it."
    )
    assert said in made["explore-why"].source


def test_the_roads_of_the_question_are_switches():
    (asked,) = (node for node in ast.walk(ast.parse(CELLS["roads-guess"])) if isinstance(node, ast.List))
    settings = names_after(CELLS["roads-run"].partition("\nroads = ")[0])["settings"]
    assert {value for road in ast.literal_eval(asked) for value in settings[road].values()} == {True}


@pytest.mark.slow
def test_two_micro_batches_stand_for_all():
    short = CELLS["roads-run"].partition("\nroads = ")[0]
    assert short.count("window[:2]") == 1
    of_two, of_all = (names_after(source)["predicted"] for source in (short, short.replace("window[:2]", "window")))
    for k, checkpointed in ((4, False), (16, False), (4, True)):
        assert of_two(k, checkpointed=checkpointed) == of_all(k, checkpointed=checkpointed)
