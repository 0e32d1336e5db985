"""The trained annotator: a linear sentence classifier, run with numpy alone.

For a sentence with features ``x`` (hashed words and word pairs of the sentence, hashed words
of the two sentences on either side, cue words, shape, place in the chain; how often cues
occur around the sentence and in the whole chain)

    ``p = softmax(x W + b)``                                   the probabilities
    ``label = argmax_b log p_b - correction * log prior_b``    the label

Probabilities are calibrated for the judge whose annotations it was trained on, and their mean
estimates a label's share best. Labels get part of the prior taken out, because the plain
``argmax`` calls nearly everything ``deduction``. ``offline_card.md`` has the numbers, what
this annotator is good for and what not; :mod:`stllms.annotate.train` makes both files.

The weights hold no text: only hashes of words reach them.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from stllms import sentences, spans
from stllms.annotate import lexical
from stllms.records import Annotation, Response

WEIGHTS = Path(__file__).with_name("offline.npz")

#: Features live in ``2 ** BITS`` rows of the weights.
BITS = 17
_CONTEXT = (-2, -1, 1, 2)
_CONTEXT_WEIGHT = 0.5
_LONGEST = 60  # words of a sentence that are looked at

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_TOKEN = re.compile(r"[^\W\d_]+(?:'[a-z]+)?|0|[^\w\s]")


# --- features ----------------------------------------------------------------------------


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

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """``x W`` for every row, ``[n, N]``."""
        product = weights[self.index] * self.value[:, None]
        sums = np.vstack([np.zeros(product.shape[1]), np.cumsum(product, axis=0, dtype=float)])
        hashed = sums[self.start[1:]] - sums[self.start[:-1]]
        return hashed + self.around @ weights[1 << BITS :]


def features(text: str, places: Sequence[tuple[int, int]]) -> Features:
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
    return Features(
        np.concatenate([np.zeros(0, dtype=np.int64), *index]),
        np.concatenate([np.zeros(0, dtype=np.float32), *value]),
        np.array(start),
        _surroundings(said),
    )


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


# --- the annotator -----------------------------------------------------------------------


@dataclass(frozen=True)
class Classifier:
    """``weights [2 ** BITS + AROUND, N]``, ``bias [N]``, and how much prior to take out."""

    labels: tuple[str, ...]
    weights: np.ndarray
    bias: np.ndarray
    log_prior: np.ndarray
    correction: float
    metadata: dict[str, Any]

    def probabilities(self, rows: Features) -> np.ndarray:
        """``[n, N]``, each row adding up to 1."""
        scores = rows.scores(self.weights) + self.bias
        scores -= scores.max(axis=1, keepdims=True)
        weights = np.exp(scores)
        return weights / weights.sum(axis=1, keepdims=True)

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """The index of the label of each row, the prior partly taken out."""
        with np.errstate(divide="ignore"):
            return (np.log(probabilities) - self.correction * self.log_prior).argmax(axis=1)

    def save(self, path: str | Path) -> None:
        """Write the hashed weights in 8 bits each, the others in 32; read by :meth:`load`."""
        hashed, around = np.split(self.weights, [1 << BITS])
        scale = np.maximum(np.abs(hashed).max(axis=0), 1e-12) / 127
        np.savez_compressed(
            path,
            weights=np.round(hashed / scale).astype(np.int8),
            scale=scale.astype(np.float32),
            around=around.astype(np.float32),
            bias=self.bias.astype(np.float32),
            log_prior=self.log_prior.astype(np.float32),
            correction=np.float32(self.correction),
            metadata=np.array(json.dumps({"labels": self.labels, **self.metadata})),
        )

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Read what :meth:`save` wrote."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no weights at {path}: train them with python -m stllms.annotate.train "
                "--data FILE... --out FILE"
            )
        with np.load(path, allow_pickle=False) as stored:
            metadata = json.loads(str(stored["metadata"]))
            found = (len(stored["weights"]), len(stored["around"]))
            if found != (1 << BITS, AROUND):
                raise ValueError(
                    f"{path} has {found} rows, expected {(1 << BITS, AROUND)}: "
                    "it was trained with other features; train it again"
                )
            hashed = stored["weights"].astype(np.float32) * stored["scale"]
            return cls(
                labels=tuple(metadata.pop("labels")),
                weights=np.vstack([hashed, stored["around"]]),
                bias=stored["bias"].astype(np.float64),
                log_prior=stored["log_prior"].astype(np.float64),
                correction=float(stored["correction"]),
                metadata=metadata,
            )


class Offline:
    """The trained annotator; ``weights`` names another file than the shipped one.

    Every annotation's ledger holds ``probability``, the mean probability of each segment's
    label, and ``expected``, the share of the characters each label has in expectation, which
    estimates fractions better than counting labels does.
    """

    name = "offline"

    def __init__(self, weights: str | Path | None = None) -> None:
        self.classifier = Classifier.load(WEIGHTS if weights is None else weights)

    def probabilities(self, text: str) -> tuple[list[tuple[int, int]], np.ndarray]:
        """The sentences of ``text`` as characters, and ``[n, N]`` label probabilities."""
        places = sentences.split(text)
        return places, self.classifier.probabilities(features(text, places))

    def annotate(self, responses: Sequence[Response]) -> list[Annotation]:
        """One annotation a response, in order."""
        return [self._one(response) for response in responses]

    def _one(self, response: Response) -> Annotation:
        text, names = response.thinking, self.classifier.labels
        places, found = self.probabilities(text)
        chosen = self.classifier.decide(found)
        placed = lexical.merged(text, places, [names[i] for i in chosen])
        starts = np.array([start for start, _ in places])
        sizes = np.array([len("".join(text[start:end].split())) for start, end in places])
        certain, weight = found[np.arange(len(found)), chosen], sizes / max(1, sizes.sum())
        mine = [(starts >= s.start) & (starts < s.end) for s in placed]
        return spans.annotation(
            spans.place(placed, text),
            response.task_id,
            self.name,
            probability=[round(float(certain[m].mean()), 3) for m in mine],
            expected=dict(zip(names, map(float, np.round(weight @ found, 4)), strict=True)),
        )
