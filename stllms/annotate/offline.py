"""The trained annotator: a small sentence classifier, run with numpy alone.

For a sentence with features ``x`` (hashed words and word pairs of the sentence, hashed words
of the two sentences on either side, cue words, shape, place in the chain) and ``a`` (how
often cues occur around it and in the whole chain)

    ``s = 0.7 log softmax(x W + a V + b)``                     a linear model
    ``  + 0.3 log softmax([relu(x E + c), relu(a F + d)] O + e)``    and a network
    ``p = forward-backward(exp(0.8 s), (T / prior) ** 0.2)``   and the neighbours' labels
    ``label = argmax_b log p_b - correction * log prior_b``

where ``T`` are the transitions between labels of neighbouring sentences in the training data,
softened because ``x`` has already looked at the neighbours. Probabilities are calibrated for
the judge whose annotations it was trained on, and their mean estimates a label's share best.
Labels get part of the prior taken out, because the plain ``argmax`` calls nearly everything
``deduction``. ``offline_card.md`` has the numbers, what this annotator is good for and what
not; :mod:`stllms.annotate.train` makes both files.

The weights hold no text: only hashes of words reach them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stllms import sentences, spans
from stllms.annotate import lexical
from stllms.annotate.features import AROUND, BITS, Features, of_chain
from stllms.provenance import file_hash
from stllms.records import Annotation, Response

WEIGHTS = Path(__file__).with_name("offline.npz")

_OWN, _NEIGHBOURS = 0.8, 0.2  # how much a sentence and the transitions count
_NETWORK = 0.3  # how much of a sentence's score comes from the network


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities over the last axis."""
    scores = scores - scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


@dataclass(frozen=True)
class Classifier:
    """What :mod:`stllms.annotate.train` learned; ``arrays`` are, by name,

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
        network = hidden @ w["out"] + w["out_bias"]
        return (1 - _NETWORK) * log_softmax(linear) + _NETWORK * log_softmax(network)

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

    def save(self, path: str | Path) -> None:
        """Write the hashed weights in 8 bits each, the others in 32; read by :meth:`load`."""
        stored = {}
        for name, array in self.arrays.items():
            if name in _EIGHT_BITS:
                scale = np.maximum(np.abs(array).max(axis=0), 1e-12) / 127
                stored[name] = np.round(array / scale).astype(np.int8)
                stored[name + "_scale"] = scale.astype(np.float32)
            else:
                stored[name] = array.astype(np.float32)
        metadata = {"labels": self.labels, "correction": self.correction, **self.metadata}
        np.savez_compressed(path, metadata=np.array(json.dumps(metadata)), **stored)

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Read what :meth:`save` wrote."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no weights at {path}: train them with python -m stllms.annotate.train "
                "--data FILE... --out FILE"
            )
        with np.load(path, allow_pickle=False) as file:
            stored = dict(file)
        found = tuple(len(stored.get(name, ())) for name in ("words", "around"))
        if found != (1 << BITS, AROUND):
            raise ValueError(
                f"{path} has {found} rows, expected {(1 << BITS, AROUND)}: "
                "it was trained with other features; train it again"
            )
        metadata = json.loads(str(stored.pop("metadata")))
        for name in _EIGHT_BITS:
            stored[name] = stored[name].astype(np.float32) * stored.pop(name + "_scale")
        labels, correction = tuple(metadata.pop("labels")), metadata.pop("correction")
        return cls(labels, stored, correction, metadata)


_EIGHT_BITS = ("words", "hidden_words")


class Offline:
    """The trained annotator; ``weights`` names another file than the shipped one.

    Every annotation's ledger holds ``probability``, the mean probability of each segment's
    label, and ``expected``, the share of the characters each label has in expectation, which
    estimates fractions better than counting labels does.
    """

    name = "offline"

    def __init__(self, weights: str | Path | None = None) -> None:
        path = WEIGHTS if weights is None else Path(weights)
        self.classifier = Classifier.load(path)
        self.fingerprint = file_hash(path)[:16]

    def probabilities(self, text: str) -> tuple[list[tuple[int, int]], np.ndarray]:
        """The sentences of ``text`` as characters, and ``[n, N]`` label probabilities."""
        places = sentences.split(text)
        return places, self.classifier.probabilities(of_chain(text, places))

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
