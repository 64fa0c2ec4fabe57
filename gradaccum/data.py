"""The data of the lessons: random tokens, real text of very unequal lengths, and audits of libraries; no download.

The text is the names of Unicode characters. Unicode guarantees that a name never changes (its Name Stability policy),
so every version of Python has the same 4,765 lines.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The target of padding, which `torch.nn.functional.cross_entropy` ignores by default."""

# First and last code point. All code points inside have had names since Unicode 14 or before, so no range can grow.
# Left out are names that are formulas rather than text (Braille patterns, mathematical alphabets, domino tiles ...).
NAME_RANGES = (
    (0x0020, 0x007E),  # ASCII
    (0x00A0, 0x017F),  # Latin letters with their marks
    (0x0250, 0x02FF),  # phonetic letters
    (0x03A3, 0x03FF),  # Greek and Coptic
    (0x0400, 0x045F),  # Cyrillic
    (0x05D0, 0x05EA),  # Hebrew
    (0x0610, 0x065F),  # Arabic
    (0x0900, 0x097F),  # Devanagari
    (0x0E01, 0x0E3A),  # Thai
    (0x0F00, 0x0F47),  # Tibetan
    (0x10D0, 0x10FF),  # Georgian
    (0x13A0, 0x13F5),  # Cherokee
    (0x16A0, 0x16F8),  # Runic
    (0x2010, 0x2027),  # punctuation
    (0x2030, 0x205E),
    (0x20A0, 0x20C0),  # currencies
    (0x2100, 0x214F),  # letter-like symbols
    (0x2190, 0x23FF),  # arrows, mathematical operators, technical symbols
    (0x25A0, 0x27EF),  # shapes, miscellaneous symbols, dingbats
    (0x2A00, 0x2AFF),  # more mathematical operators
    (0x2E00, 0x2E5D),  # rare punctuation
    (0x3041, 0x3096),  # Hiragana
    (0x10107, 0x10133),  # Aegean numbers
    (0x101D0, 0x101FD),  # the signs of the Phaistos disc
    (0x10330, 0x1034A),  # Gothic
    (0x1D100, 0x1D126),  # musical symbols
    (0x1D129, 0x1D1E8),
    (0x1F300, 0x1F64F),  # pictographs and emoticons
    (0x1F680, 0x1F6D7),  # transport and maps
    (0x1F700, 0x1F773),  # alchemical symbols
    (0x1F900, 0x1F9FF),  # more pictographs
)


def character_names(length: int | None = None) -> list[str]:
    """Return the names of 4,765 Unicode characters, 2 to 78 characters long, in the order of their code points.

    Args:
        length: return only names of exactly this many characters: 256 names for 18.

    Example:
        >>> names = character_names()
        >>> len(names), min(names, key=len), names[65], len(character_names(length=18))
        (4765, 'OX', 'LATIN SMALL LETTER A', 256)
    """
    names = [unicodedata.name(chr(point)) for first, last in NAME_RANGES for point in range(first, last + 1)]
    return [name for name in names if length in (None, len(name))]


def text_lines(path: str | Path) -> list[str]:
    r"""Return the lines of your own text file, one sample per line, for use in place of `character_names()`.

    Args:
        path: a UTF-8 text file. Empty lines, and white space around a line, are dropped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has no text, or is not UTF-8.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "poem.txt"
        >>> _ = path.write_text("Whose woods these are\n\n  I think I know\n", encoding="utf-8")
        >>> text_lines(path)
        ['Whose woods these are', 'I think I know']
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"The file {str(path)!r} is not UTF-8 text: save it as UTF-8 and try again.") from error
    kept = [line.strip() for line in lines if line.strip()]
    if not kept:
        raise ValueError(f"The file {str(path)!r} has no text: put one sample on each line.")
    return kept


class Characters:
    """A character vocabulary with token ids 1, 2, ...; id 0 is both the start and the end of a line.

    Args:
        lines: the text whose characters form the vocabulary, in any order.

    Raises:
        ValueError: `lines` has no character.

    Example:
        >>> characters = Characters(["OX", "FOX"])
        >>> len(characters), characters.encode("FOX"), characters.decode([1, 2, 3])
        (4, [1, 2, 3], 'FOX')
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._symbols = sorted(set().union(*lines))
        if not self._symbols:
            raise ValueError("The lines have no characters: give at least one line of text.")
        self._ids = {symbol: index for index, symbol in enumerate(self._symbols, start=1)}

    def __len__(self) -> int:
        """Return the number of token ids, 0 included: the vocabulary size of a model."""
        return len(self._symbols) + 1

    def encode(self, line: str) -> list[int]:
        """Return a line's token ids; raise ValueError for a character that is not in the vocabulary."""
        unknown = sorted(set(line) - self._ids.keys())
        if unknown:
            raise ValueError(
                f"The line {line!r} has {unknown[0]!r}, which is not among the {len(self) - 1} characters."
            )
        return [self._ids[symbol] for symbol in line]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids, up to the first 0."""
        text = []
        for token in tokens:
            if token == 0:
                break
            text.append(self._symbols[token - 1])
        return "".join(text)

    def batch(self, lines: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return lines as one padded batch, to predict each next character and the end of the line.

        Returns:
            inputs and targets, int64 of shape (lines, longest + 1). A line of n characters has n + 1 targets;
            the rest of its row is 0 in the inputs and `IGNORED` (-100) in the targets.

        Raises:
            ValueError: there are no lines, or one has an unknown character.

        Example:
            >>> Characters(["OX", "FOX"]).batch(["OX", "FOX"])[1]
            tensor([[   2,    3,    0, -100],
                    [   1,    2,    3,    0]])
        """
        if not lines:
            raise ValueError("A batch needs at least one line, but none was given.")
        width = max(len(line) for line in lines) + 1
        inputs = torch.zeros(len(lines), width, dtype=torch.int64)
        targets = torch.full((len(lines), width), IGNORED, dtype=torch.int64)
        for row, line in enumerate(lines):
            tokens = torch.tensor([*self.encode(line), 0])
            inputs[row, 1 : len(tokens)] = tokens[:-1]
            targets[row, : len(tokens)] = tokens
        return inputs, targets


def count_targets(micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the number of targets in an (inputs, targets) pair that are not ignored, a tensor of shape ().

    Example:
        >>> count_targets(Characters(["OX", "FOX"]).batch(["OX", "FOX"]))
        tensor(7)
    """
    return (micro_batch[1] != IGNORED).sum()


def shuffled(lines: Sequence[str], seed: int) -> list[str]:
    """Return the lines in an order that depends only on `seed`; the global random state is not used.

    Example:
        >>> shuffled(["A", "B", "C", "D"], seed=0)
        ['A', 'B', 'D', 'C']
    """
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed))
    return [lines[index] for index in order.tolist()]


def library_record() -> dict[str, Any]:
    """Return the weights that other libraries gave to micro-batches, as measured by `benchmarks/run.py edges`.

    Returns:
        "provenance": date, versions, machine and command; "rows": one dict per way to use a library, whose "updates"
        have micro-batches, weights, right weights, error and kind.

    Example:
        >>> library_record()["provenance"]["command"]
        'python benchmarks/run.py edges'
    """
    found: dict[str, Any] = json.loads(Path(__file__).with_name("edges.json").read_text("utf-8"))
    return found


def random_tokens(
    batches: int = 20, batch_size: int = 8, length: int = 20, vocabulary: int = 1000, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first lesson's mini-batches: random inputs and random targets, with nothing to learn.

    Args:
        batches: the number of pairs.
        batch_size: samples in a pair.
        length: tokens in a sample.
        vocabulary: tokens are 0 to `vocabulary` - 1.
        seed: determines all tokens; the global random state is not used.

    Yields:
        inputs and targets, int64 of shape (batch_size, length).

    Example:
        >>> inputs, targets = next(random_tokens())
        >>> inputs.shape, inputs.dtype
        (torch.Size([8, 20]), torch.int64)
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        pair = torch.randint(vocabulary, (2, batch_size, length), generator=generator)
        yield pair[0], pair[1]
