"""The lessons' data: text that is the same on every machine and in every year, its batches, and random tokens."""

import hashlib
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from gradaccum import data
from gradaccum.data import IGNORED, NAME_RANGES, Characters, count_targets, random_tokens, shuffled, text_lines

NAMES = data.character_names()
ALPHABET = Characters(NAMES)


def test_the_names_are_the_same_in_every_year():
    digest = hashlib.sha256("\n".join(NAMES).encode()).hexdigest()
    assert digest == "6cb69f9d3d74713ed0db96980808fdbe75e0a2362398f988518ba0693429414e"
    assert len(NAMES) == len(set(NAMES)) == 4765
    assert (min(map(len, NAMES)), max(map(len, NAMES))) == (2, 78)


def test_every_range_is_full_and_they_ascend():
    assert all(first <= last for first, last in NAME_RANGES)
    assert all(last < first for (_, last), (first, _) in pairwise(NAME_RANGES))
    points = [point for first, last in NAME_RANGES for point in range(first, last + 1)]
    assert [unicodedata.name(chr(point), "none") for point in points] == NAMES


def test_the_names_are_text_and_not_a_formula():
    starts = Counter(tuple(name.split()[:2]) for name in NAMES)
    stems = Counter(name.rpartition(" ")[0] for name in NAMES if " " in name)  # without the last word
    words = Counter(word for name in NAMES for word in name.split())
    assert max(starts.values()) < 0.05 * len(NAMES)
    assert max(stems.values()) < 0.02 * len(NAMES)
    assert len(stems) > 2600
    assert len(words) > 2900
    lengths = sorted(map(len, NAMES))
    assert lengths[len(NAMES) * 9 // 10] == 4 * lengths[len(NAMES) // 10] == 36  # very unequal


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=6).filter(any))
def test_batches_hold_the_lines_and_nothing_else(lines):
    characters = Characters(iter(lines))
    assert len(characters) == len(set("".join(lines))) + 1
    inputs, targets = characters.batch(lines)
    assert inputs.shape == targets.shape == (len(lines), max(map(len, lines)) + 1)
    assert inputs.dtype == targets.dtype == torch.int64
    assert int(count_targets((inputs, targets))) == sum(len(line) + 1 for line in lines)
    for line, given_row, wanted_row in zip(lines, inputs.tolist(), targets.tolist(), strict=True):
        tokens, padding = characters.encode(line), len(given_row) - len(line) - 1
        assert characters.decode(tokens) == line == characters.decode(torch.tensor([*tokens, 0, 1]))
        assert all(1 <= token < len(characters) for token in tokens)
        assert given_row == [0, *tokens] + [0] * padding
        assert wanted_row == [*tokens, 0] + [IGNORED] * padding


def test_ignored_is_what_torch_leaves_out():
    assert IGNORED == -100
    logits = torch.randn(2, 5)
    assert cross_entropy(logits, torch.tensor([3, IGNORED])) == cross_entropy(logits[:1], torch.tensor([3]))


def test_count_targets_leaves_the_reading_to_accumulate():
    count = count_targets(ALPHABET.batch(["OX", "A"]))
    assert isinstance(count, torch.Tensor)
    assert (count.shape, count.dtype, count.item()) == ((), torch.int64, 5)
    assert count_targets(ALPHABET.batch([""])).item() == 1  # the end of the line


def test_characters_do_not_depend_on_the_order_of_the_lines():
    assert len(ALPHABET) == 39
    assert Characters(NAMES[::-1]).encode(NAMES[7]) == ALPHABET.encode(NAMES[7])


def test_characters_refuse():
    for lines in ([], [""], ["", ""]):
        with pytest.raises(ValueError, match="no character"):
            Characters(lines)
    for refused in (lambda: ALPHABET.encode("OX?"), lambda: ALPHABET.batch(["OX", "OX?"])):
        with pytest.raises(ValueError, match=r"'OX\?' has '\?'.* 38 characters"):
            refused()
    with pytest.raises(ValueError, match="at least one line"):
        ALPHABET.batch([])


def test_a_text_file_of_your_own(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes("\ufeffEin Fuß\r\n\r\n  ein Fluß \t\n\n".encode())  # as Windows may write it
    assert text_lines(path) == text_lines(str(path)) == ["Ein Fuß", "ein Fluß"]
    with pytest.raises(FileNotFoundError):
        text_lines(tmp_path / "none.txt")
    for content, problem in ((b"", "holds no text"), (b" \n\t\n", "holds no text"), (b"Fu\xdf", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"own\.txt.*{problem}"):
            text_lines(path)


def test_the_global_random_state_is_left_alone_and_a_seed_decides():
    before = torch.get_rng_state()
    first = list(random_tokens(batches=3, seed=5))
    order = shuffled(NAMES, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert all(
        torch.equal(a, b)
        for one, two in zip(first, random_tokens(3, seed=5), strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert shuffled(NAMES, seed=5) == order
    assert sorted(order) == sorted(NAMES)
    assert order != shuffled(NAMES, seed=6) != NAMES
    assert not torch.equal(first[0][0], next(random_tokens(seed=6))[0])


def test_random_tokens_are_the_first_lessons():
    pairs = list(random_tokens())
    assert len(pairs) == 20
    assert all(side.shape == (8, 20) and side.dtype == torch.int64 for pair in pairs for side in pair)
    tokens = torch.stack([side for pair in pairs for side in pair])
    assert (int(tokens.min()), int(tokens.max())) == (0, 999)
    assert len({tuple(side.flatten().tolist()) for side in tokens}) == 40  # no batch twice, no target its input
    assert next(random_tokens(1, 2, 3, vocabulary=1))[1].tolist() == [[0, 0, 0], [0, 0, 0]]
