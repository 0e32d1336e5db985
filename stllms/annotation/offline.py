"""The trained annotator: a small sentence classifier, run with numpy alone.

For a sentence with features ``x`` (hashed words, word pairs, cue words and shape of the
sentence and its neighbours, place in the chain) and ``a`` (how often cues occur around it)::

    s = 0.7 log softmax(x W + a V + b)                          a linear model
      + 0.3 log softmax([relu(x E + c), relu(a F + d)] O + e)   and a network
    p = forward-backward(exp(0.8 s), (T / prior) ** 0.2)        and the neighbours' labels
    label = argmax_b log p_b - correction * log prior_b

``T`` are the transitions between labels of neighbouring sentences in the training data. The
weights (``training/offline.py``) hold no text; ``offline_card.md`` says what they are worth.
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
from scipy.special import log_softmax

from stllms.annotation import placing, sentences
from stllms.hashes import file_hash
from stllms.labels import PAPER, LabelSet
from stllms.records import Annotation, Response

WEIGHTS = Path(__file__).with_name("offline.npz")

_OWN, _NEIGHBOURS = 0.8, 0.2  # how much a sentence and the transitions count
_NETWORK = 0.3  # how much of a sentence's score comes from the network
EIGHT_BITS = ("words", "hidden_words")  # arrays that are stored so, with a scale a column


@dataclass(frozen=True)
class Classifier:
    """What ``training/offline.py`` learned; ``arrays`` are, by name,

    ``words [2 ** BITS, N]``, ``around [AROUND, N]``, ``bias [N]`` of the linear model,
    ``hidden_words [2 ** b, H]``, ``hidden_words_bias``, ``hidden_around [AROUND, G]``,
    ``hidden_around_bias``, ``out [H + G, N]``, ``out_bias`` of the network,
    ``log_prior [N]`` and ``log_transitions [N, N]`` (row: the label before).
    """

    labels: tuple[str, ...]
    arrays: dict[str, np.ndarray]
    correction: float
    metadata: dict[str, Any]

    def scores(self, rows: Features) -> np.ndarray:
        """Scores ``[n, N]`` of sentences, each on its own."""
        w = self.arrays
        linear = rows.hashed(w["words"]) + rows.around @ w["around"] + w["bias"]
        words = rows.hashed(w["hidden_words"]) + w["hidden_words_bias"]
        around = rows.around @ w["hidden_around"] + w["hidden_around_bias"]
        hidden = np.maximum(np.hstack([words, around]), 0)
        linear, network = (
            log_softmax(raw, axis=1) for raw in (linear, hidden @ w["out"] + w["out_bias"])
        )
        return (1 - _NETWORK) * linear + _NETWORK * network

    def probabilities(self, rows: Features) -> np.ndarray:
        """``[n, N]`` for the sentences of one chain, each row adding up to 1."""
        return self.smooth(self.scores(rows))

    def smooth(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities ``[n, N]`` from the scores of one chain: forward-backward."""
        w = self.arrays
        own = np.exp(_OWN * (scores - scores.max(axis=1, keepdims=True)))
        step = np.exp(_NEIGHBOURS * (w["log_transitions"] - w["log_prior"]))
        before, after = np.array(own), np.ones_like(own)
        for i in range(1, len(own)):
            before[i] = before[i - 1] @ step * own[i]
            before[i] /= before[i].sum()
        for i in range(len(own) - 2, -1, -1):
            after[i] = step @ (own[i + 1] * after[i + 1])
            after[i] /= after[i].sum()
        found = before * after
        return found / found.sum(axis=1, keepdims=True)

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """The index of the label of each row, the prior partly taken out."""
        with np.errstate(divide="ignore"):
            logs = np.log(probabilities) - self.correction * self.arrays["log_prior"]
        return logs.argmax(axis=1)

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Read what ``training/offline.py`` wrote; ``ValueError`` for anything else."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no weights at {path}: training/offline.py makes them")
        with np.load(path, allow_pickle=False) as file:
            stored = dict(file)
        found = tuple(len(stored.get(name, ())) for name in ("words", "around"))
        if found != (1 << BITS, AROUND):
            raise ValueError(f"{path} has {found} rows, expected {(1 << BITS, AROUND)}")
        metadata = json.loads(str(stored.pop("metadata")))
        for name in EIGHT_BITS:
            stored[name] = stored[name].astype(np.float32) * stored.pop(name + "_scale")
        labels, correction = tuple(metadata.pop("labels")), metadata.pop("correction")
        return cls(labels, stored, correction, metadata)


class Offline:
    """The trained annotator; ``weights`` names another file than the shipped one, or a folder
    with an :data:`WEIGHTS` of its own. Then its ``name`` is ``offline:WEIGHTS``.

    Weights know the labels that they were trained on, the shipped ones the paper's;
    ``ValueError`` that says what to do for a set of other ``labels``.

    Every annotation's ledger holds ``probability``, the mean probability of each segment's
    label, and ``expected``, the share of the characters each label has in expectation, which
    estimates fractions better than counting labels does.
    """

    shared = True

    def __init__(self, weights: str | Path | None = None, *, labels: LabelSet = PAPER) -> None:
        path = WEIGHTS if weights is None else Path(weights).expanduser()
        path = path / WEIGHTS.name if path.is_dir() else path
        self.name = "offline" if weights is None else f"offline:{weights}"
        self.labels, self.classifier = labels, Classifier.load(path)
        self.fingerprint = file_hash(path)[:16]
        if set(self.classifier.labels) != set(labels.names):
            which = "the shipped weights" if weights is None else str(path)
            raise ValueError(
                f"offline: {which} know {', '.join(self.classifier.labels)}, not the labels "
                f"{labels.name!r} ({', '.join(labels.names)}): train your own with python "
                "training/offline.py --labels FILE --data CHAINS.jsonl --out FOLDER, and take "
                "offline:FOLDER"
            )

    def annotate(self, responses: Sequence[Response]) -> list[Annotation]:
        """One annotation per response, in order."""
        return [self._one(response) for response in responses]

    def _one(self, response: Response) -> Annotation:
        text, names = response.thinking, self.classifier.labels
        places = sentences.split(text)
        found = self.classifier.probabilities(of_chain(text, places))
        chosen = self.classifier.decide(found)
        placed = sentences.segments(text, places, [names[i] for i in chosen])
        starts = np.array([start for start, _ in places])
        sizes = np.array([len("".join(text[start:end].split())) for start, end in places])
        certain, weight = found[np.arange(len(found)), chosen], sizes / max(1, sizes.sum())
        mine = [(starts >= s.start) & (starts < s.end) for s in placed]
        return placing.annotation(
            placing.place(placed, text),
            response.task_id,
            self.name,
            probability=[round(float(certain[m].mean()), 3) for m in mine],
            expected=dict(zip(names, map(float, np.round(weight @ found, 4)), strict=True)),
        )


# --- what the classifier sees of a sentence ----------------------------------------------

#: Features live in ``2 ** BITS`` rows of the weights.
BITS = 17
_CONTEXT_WEIGHT = 0.5  # of the words of the two sentences before and after
_LONGEST = 60  # words of a sentence that are looked at
_NORM = 9.0  # length of every row of hashed features: long sentences are no surer

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_TOKEN = re.compile(r"[^\W\d_]+(?:'[a-z]+)?|0|[^\w\s]")
_FIRST_PERSON = re.compile(r"(?:^|\s)I[ ']")
_SHAPES = {
    "bullet": re.compile(r"^[-*#•]"),
    "numbered": re.compile(r"^\**\d+\."),
    "quote": re.compile(r'["“]'),
    "latex": re.compile(r"\\"),
}

_WINDOWS = ((-5, -1), (1, 5), (-12, -1), (-2, 2))
_CHAIN_WEIGHT = 3.0  # as if its columns were penalised nine times less
_MARKS = len(sentences.CUES) + 7
AROUND = _MARKS * (len(_WINDOWS) + 1) + 6


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
    """The features of every sentence of a chain; ``places`` from :func:`sentences.split`.

    No text is kept: a word becomes one of ``2 ** BITS`` rows by its CRC-32, and the same word
    in a neighbouring sentence becomes another row.
    """
    said = [text[start:end] for start, end in places]
    words, pairs, signs = (
        [_hashes(names(sentence)) for sentence in said] for names in (_words, _pairs, _signs)
    )
    index, value, sizes = [], [], []
    for i, sentence in enumerate(said):
        gap = text[places[i - 1][1] : places[i][0]].count("\n") if i else 3
        here = _hashes(_position(i, len(said), gap, sentence))
        rows = [(hashes, 0, 1.0) for hashes in (words[i], pairs[i], signs[i], here)]
        for role, near in enumerate((i - 2, i - 1, i + 1, i + 2), start=1):
            if 0 <= near < len(said):
                rows += [(words[near], role, _CONTEXT_WEIGHT), (signs[near], role, 1.0)]
            else:
                rows.append((_hashes({"none"}), role, 1.0))
        index.append(np.concatenate([_rows_of(hashes, role) for hashes, role, _ in rows]))
        weights = [np.full(len(hashes), weight) for hashes, _, weight in rows]
        raw = np.concatenate(weights).astype(np.float32)
        value.append(raw * np.float32(_NORM / np.sqrt((raw.astype(float) ** 2).sum())))
        sizes.append(len(raw))
    start = np.cumsum([0, *sizes])
    if not said:
        index, value = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
    return Features(np.concatenate(index), np.concatenate(value), start, _surroundings(said))


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
    return [float(cue in cues) for cue in sentences.CUES] + [float(value) for value in shape]


@lru_cache(maxsize=4096)
def _cues(sentence: str) -> frozenset[str]:
    return frozenset(cue for cue, sound in sentences.CUES.items() if sound.search(sentence))


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
    return signs | {name for name, pattern in _SHAPES.items() if pattern.search(sentence)}


def _position(i: int, n: int, gap: int, sentence: str) -> set[str]:
    place = f"first {min(i, 8)}"
    names = {place, f"tenth {10 * i // n}", f"last {min(n - 1 - i, 4)}", f"gap {min(gap, 3)}"}
    return names | {f"{place} {cue}" for cue in _cues(sentence)}
