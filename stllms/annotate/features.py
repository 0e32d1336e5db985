"""What the offline annotator sees of a sentence: hashed words, cues, shape, place, neighbours.

No text is kept: a word becomes one of ``2 ** BITS`` rows by its CRC-32, and the same word in a
neighbouring sentence becomes another row.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from stllms.annotate import lexical

#: Features live in ``2 ** BITS`` rows of the weights.
BITS = 17
_CONTEXT = (-2, -1, 1, 2)
_CONTEXT_WEIGHT = 0.5
_LONGEST = 60  # words of a sentence that are looked at
_NORM = 9.0  # length of every row of hashed features: long sentences are no surer

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_TOKEN = re.compile(r"[^\W\d_]+(?:'[a-z]+)?|0|[^\w\s]")


@dataclass(frozen=True)
class Features:
    """The rows of a design matrix ``[n, 2 ** BITS + K]``.

    Hashed features are sparse, row ``i`` holding ``index`` and ``value`` at
    ``[start[i], start[i+1])``; ``around [n, K]`` are the last ``K`` columns.
    """

    index: np.ndarray
    value: np.ndarray
    start: np.ndarray
    around: np.ndarray

    def hashed(self, weights: np.ndarray) -> np.ndarray:
        """Weighted sums of rows of ``weights [2 ** b, H]``, ``b <= BITS``: ``[n, H]``.

        With ``b < BITS`` the hashes share rows.
        """
        shift = BITS - (len(weights).bit_length() - 1)
        product = weights[self.index >> shift] * self.value[:, None]
        sums = np.vstack([np.zeros(product.shape[1]), np.cumsum(product, axis=0, dtype=float)])
        return sums[self.start[1:]] - sums[self.start[:-1]]


def of_chain(text: str, places: Sequence[tuple[int, int]]) -> Features:
    """The features of every sentence of a chain; ``places`` from :func:`sentences.split`."""
    said = [text[start:end] for start, end in places]
    words = [_hashes(_words(sentence)) for sentence in said]
    pairs = [_hashes(_pairs(sentence)) for sentence in said]
    signs = [_hashes(_signs(sentence)) for sentence in said]
    none = np.array([zlib.crc32(b"none")], dtype=np.uint32)

    index, value, start = [], [], [0]
    for i in range(len(said)):
        gap = text[places[i - 1][1] : places[i][0]].count("\n") if i else 3
        here = _hashes(_position(i, len(said), gap, said[i]))
        rows = [(words[i], 0, 1.0), (pairs[i], 0, 1.0), (signs[i], 0, 1.0), (here, 0, 1.0)]
        for role, distance in enumerate(_CONTEXT, start=1):
            if 0 <= i + distance < len(said):
                rows.append((words[i + distance], role, _CONTEXT_WEIGHT))
                rows.append((signs[i + distance], role, 1.0))
            else:
                rows.append((none, role, 1.0))
        for hashes, role, weight in rows:
            index.append(_rows_of(hashes, role))
            value.append(np.full(len(hashes), weight, dtype=np.float32))
        start.append(start[-1] + sum(len(hashes) for hashes, _, _ in rows))
    values = np.concatenate([np.zeros(0, dtype=np.float32), *value])
    edges = np.array(start)
    sums = np.concatenate([[0.0], np.cumsum(values.astype(float) ** 2)])
    norms = np.sqrt(sums[edges[1:]] - sums[edges[:-1]])
    values *= np.repeat(_NORM / norms, np.diff(edges)).astype(np.float32)
    indices = np.concatenate([np.zeros(0, dtype=np.int64), *index])
    return Features(indices, values, edges, _surroundings(said))


def _surroundings(said: list[str]) -> np.ndarray:
    """``[n, AROUND]``: means of every mark over five windows of sentences, and the place."""
    n = len(said)
    marks = np.array([_marks(sentence) for sentence in said]).reshape(n, _MARKS)
    sums = np.vstack([np.zeros(_MARKS), np.cumsum(marks, axis=0)])
    i = np.arange(n)
    blocks = []
    for left, right in _WINDOWS:
        first, last = np.clip(i + left, 0, n), np.clip(i + right + 1, 0, n)
        blocks.append((sums[last] - sums[first]) / np.maximum(1, last - first)[:, None])
    blocks.append(np.broadcast_to(_CHAIN_WEIGHT * sums[-1] / max(1, n), (n, _MARKS)))
    logs = np.log1p([i, n - 1 - i, np.full(n, n)]) / 4
    blocks.append(np.stack([i / max(1, n), (i / max(1, n)) ** 2, i < 3, *logs], axis=1))
    return np.hstack(blocks).astype(np.float32)


_WINDOWS = ((-5, -1), (1, 5), (-12, -1), (-2, 2))
_CHAIN_WEIGHT = 3.0  # as if its columns were penalised nine times less
_MARKS = len(lexical.CUES) + 7
AROUND = _MARKS * (len(_WINDOWS) + 1) + 6


def _marks(sentence: str) -> list[float]:
    """Cues and shape as numbers between 0 and about 1, to be averaged over sentences."""
    cues, size = _cues(sentence), len(sentence)
    shape = (
        sum(c.isdigit() for c in sentence) / size,
        min(8, sum(c in "=+*/^×÷≈<>\\" for c in sentence)) / 8,
        min(2.0, np.log2(size) / 4 - 1),
        sentence.endswith("?"),
        _FIRST_PERSON.search(sentence) is not None,
        '"' in sentence,
        sentence[0] in "-*#",
    )
    return [float(cue in cues) for cue in lexical.CUES] + [float(value) for value in shape]


_FIRST_PERSON = re.compile(r"(?:^|\s)I[ ']")


@lru_cache(maxsize=4096)
def _cues(sentence: str) -> frozenset[str]:
    return frozenset(cue for cue, sound in lexical.CUES.items() if sound.search(sentence))


def _hashes(names: set[str]) -> np.ndarray:
    raw = (name.encode("utf-8", "surrogatepass") for name in sorted(names))
    return np.array([zlib.crc32(name) for name in raw], dtype=np.uint32)


def _rows_of(hashes: np.ndarray, role: int) -> np.ndarray:
    """Rows of the weights: the same word in another role (sentence) has another row."""
    mixed = (hashes ^ np.uint32(0x9E3779B1 * role & 0xFFFFFFFF)) * np.uint32(0x85EBCA6B)
    return (mixed >> np.uint32(32 - BITS)).astype(np.int64)


@lru_cache(maxsize=4096)
def _tokens(sentence: str) -> tuple[str, ...]:
    plain = _NUMBER.sub("0", sentence[:2000].lower().replace("’", "'"))
    return tuple(_TOKEN.findall(plain)[:_LONGEST])


def _words(sentence: str) -> set[str]:
    """Single words, and the one to five words that open the sentence."""
    words = _tokens(sentence)
    openings = {"F " + " ".join(words[:k]) for k in range(1, min(5, len(words)) + 1)}
    return {"1 " + word for word in words} | openings


def _pairs(sentence: str) -> set[str]:
    words = ("<", *_tokens(sentence), ">")
    return {f"2 {a} {b}" for a, b in pairwise(words)}


def _signs(sentence: str) -> set[str]:
    """Cue words and shape: length, digits, mathematics, how it ends, list, quote."""
    size = len(sentence)
    signs = {f"cue {cue}" for cue in _cues(sentence)}
    signs.add(f"length {min(7, size.bit_length())}")
    signs.add(f"digits {min(5, 10 * sum(c.isdigit() for c in sentence) // size)}")
    signs.add(f"maths {min(4, sum(c in '=+*/^×÷≈<>' for c in sentence))}")
    signs.add("end " + (sentence[-1] if not sentence[-1].isalnum() else "word"))
    for name, pattern in _SHAPES.items():
        if pattern.search(sentence):
            signs.add(name)
    return signs


_SHAPES = {
    "bullet": re.compile(r"^[-*#•]"),
    "numbered": re.compile(r"^\**\d+\."),
    "quote": re.compile(r'["“]'),
    "latex": re.compile(r"\\"),
}


def _position(i: int, n: int, gap: int, sentence: str) -> set[str]:
    place = f"first {min(i, 8)}"
    names = {place, f"tenth {10 * i // n}", f"last {min(n - 1 - i, 4)}", f"gap {min(gap, 3)}"}
    return names | {f"{place} {cue}" for cue in _cues(sentence)}
