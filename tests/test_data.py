"""The lessons' data: text that is the same on every machine and in every year, its batches, and random tokens."""

import hashlib
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


def test_names_are_fixed_and_ranges_ascend():
    digest = hashlib.sha256("\n".join(NAMES).encode()).hexdigest()
    assert digest == "6cb69f9d3d74713ed0db96980808fdbe75e0a2362398f988518ba0693429414e"
    assert len(NAMES) == len(set(NAMES)) == 4765
    assert all(last < first for (_, last), (first, _) in pairwise(NAME_RANGES))


def test_the_names_are_text_and_not_a_formula():
    stems = Counter(name.rpartition(" ")[0] for name in NAMES if " " in name)  # without the last word
    assert max(stems.values()) < 0.02 * len(NAMES)
    assert len({word for name in NAMES for word in name.split()}) > 2900
    lengths = sorted(map(len, NAMES))
    assert (lengths[0], lengths[len(NAMES) // 10], lengths[len(NAMES) * 9 // 10], lengths[-1]) == (2, 9, 36, 78)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=6).filter(any))
def test_batches_hold_the_lines_and_nothing_else(lines):
    characters = Characters(iter(lines))
    assert len(characters) == len(set("".join(lines))) + 1
    inputs, targets = characters.batch(lines)
    assert inputs.shape == targets.shape == (len(lines), max(map(len, lines)) + 1)
    assert inputs.dtype == targets.dtype == torch.int64
    count = count_targets((inputs, targets))  # a tensor: reading it is left to `accumulate`
    assert torch.equal(count, torch.tensor(sum(len(line) + 1 for line in lines)))
    for line, given_row, wanted_row in zip(lines, inputs.tolist(), targets.tolist(), strict=True):
        tokens, padding = characters.encode(line), len(given_row) - len(line) - 1
        assert characters.decode(tokens) == line == characters.decode(torch.tensor([*tokens, 0, 1]))
        assert all(1 <= token < len(characters) for token in tokens)
        assert given_row == [0, *tokens] + [0] * padding
        assert wanted_row == [*tokens, 0] + [IGNORED] * padding


def test_ignored_is_what_torch_leaves_out():
    logits = torch.randn(2, 5)
    assert cross_entropy(logits, torch.tensor([3, IGNORED])) == cross_entropy(logits[:1], torch.tensor([3]))


def test_characters_depend_on_no_order():
    assert Characters(NAMES[::-1]).encode(NAMES[7]) == ALPHABET.encode(NAMES[7])
    for lines in ([], [""]):
        with pytest.raises(ValueError, match="no characters"):
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
    for content, problem in ((b"", "has no text"), (b" \n\t\n", "has no text"), (b"Fu\xdf", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"own\.txt.*{problem}"):
            text_lines(path)


def test_a_seed_alone_decides():
    before = torch.get_rng_state()
    order, tokens = shuffled(NAMES, seed=5), torch.stack([torch.stack(pair) for pair in random_tokens(seed=5)])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert shuffled(NAMES, seed=5) == order != shuffled(NAMES, seed=6) != NAMES
    assert sorted(order) == sorted(NAMES)
    assert torch.equal(torch.stack(next(random_tokens(seed=5))), tokens[0])
    assert not torch.equal(torch.stack(next(random_tokens(seed=6))), tokens[0])
    assert (tokens.shape, tokens.dtype, int(tokens.min()), int(tokens.max())) == ((20, 2, 8, 20), torch.int64, 0, 999)
    assert len(tokens.flatten(0, 1).unique(dim=0)) == 40  # no batch twice, no target its input
    assert [side.tolist() for side in next(random_tokens(1, 2, 3, vocabulary=1))] == [[[0, 0, 0], [0, 0, 0]]] * 2
