"""Train the offline annotator on annotated chains, measure it, write its card.

``python training/offline.py`` trains what ships, on the corpus and on chains of the grammar.
``python training/offline.py --data FILE... [--labels FILE] [--out FILE or FOLDER]`` trains on
annotated chains of your own. A FILE is

* a released comparison file, a JSON list with ``thinking_process`` and ``annotated_response``;
* an ``annotations.jsonl`` of ours, with its ``responses.jsonl`` beside it;
* or any JSONL of labelled chains: ``{"question": ..., "segments": [{"label", "text"}, ...]}``.

One file should hold the chains of one model. ``--labels`` is a person's own set of labels, in
YAML; the weights, for ``--judge offline:FOLDER``, know these labels only.

The truth of a sentence is the label of most of its characters. Nothing is measured on what it
was trained on: a chain is labelled by a classifier that has not seen its **question**, nor,
with ``--unseen models``, any chain of its **model** (file). ``--measure FILE...`` adds how the
finished classifier does on chains that take no part in the training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix, hstack, vstack
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support

from stllms.annotation import annotators, markup, offline, placing, sentences
from stllms.annotation.agreement import kappa, label_indices, one_against_all
from stllms.labels import PAPER, LabelSet
from stllms.records import (
    Annotation,
    PlacedSegment,
    annotation_from_row,
    from_rows,
    loads,
    response_from_row,
)
from stllms.runs.files import BadFile, read_json
from stllms.runs.store import Rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from training import chains as grammar
from training import corpus, families

#: Inverse strength of the penalty on the squared weights.
PENALTY = 0.5
#: Chains of the grammar in the shipped annotator, of questions that the fixtures trained on.
GRAMMAR = 300
#: Features of fewer training sentences are left out: no loss, and three times as fast.
LEAST = 3
#: The network: rows ``2 ** HIDDEN_BITS`` of hashed words, hidden units, passes over the data.
HIDDEN_BITS, HIDDEN, EPOCHS = 15, 32, 4
FOLDS = 5
RESAMPLES = 1000
CORRECTIONS = np.round(np.arange(0.0, 1.01, 0.1), 1)


@dataclass(frozen=True)
class Chain:
    """A thinking text whose sentences ``places`` have the labels ``truth`` (-1: none)."""

    source: str
    question: str
    text: str
    places: list[tuple[int, int]]
    truth: np.ndarray


@dataclass(frozen=True)
class Data:
    """One row per sentence: its features ``matrix [n, 2 ** BITS + AROUND]``, its true label (-1
    for none), the numbers of its source, question and chain, and how much it counts ``[n]``.
    Rows of a chain are in order; a chain has one source and one question. Labels are numbers of
    ``names``."""

    matrix: Any
    truth: np.ndarray
    source: np.ndarray
    question: np.ndarray
    chain: np.ndarray
    weight: np.ndarray
    names: tuple[str, ...] = PAPER.names

    def __getitem__(self, rows: np.ndarray) -> Data:
        *columns, names = vars(self).values()
        return Data(*(values[rows] for values in columns), names)


def read_chains(path: str | Path, labels: LabelSet = PAPER) -> list[Chain]:
    """The annotated chains of one file. Raises ``ValueError`` by name on any other file."""
    path = Path(path)
    source = path.stem
    if path.suffix != ".jsonl":
        pairs = _released(path, labels)
    elif path.name == "annotations.jsonl":
        pairs, source = _own(path), path.parent.name
    else:
        pairs = _written(path, labels)
    return [
        Chain(source, one.task_id, text, places, sentence_labels(one, text, places, labels))
        for text, one in pairs
        for places in [sentences.split(text)]
    ]


def sentence_labels(
    annotation: Annotation,
    text: str,
    places: Sequence[tuple[int, int]],
    labels: LabelSet = PAPER,
) -> np.ndarray:
    """The label of most characters of every sentence, -1 where less than half have one."""
    marks, solid = label_indices(annotation, len(text), labels), placing.solid(text)
    found = np.full(len(places), -1)
    for i, (start, end) in enumerate(places):
        mine = marks[start:end][solid[start:end]]
        if 2 * (mine >= 0).sum() >= len(mine):
            found[i] = np.bincount(mine[mine >= 0]).argmax()
    return found


def grammar_chains(count: int) -> list[Chain]:
    """Chains of the grammar on questions of its training part, with their true labels; their
    source is ``grammar``."""
    rng, found = Random("offline"), []
    while len(found) < count:
        puzzle = families.draw(rng)
        if grammar.part_of(puzzle.question) == "train":
            drawn = grammar.chain(rng, puzzle)
            text, one = _joined(drawn.sentences, puzzle.question)
            places = sentences.split(text)
            truth = sentence_labels(one, text, places)
            found.append(Chain("grammar", puzzle.question, text, places, truth))
    return found


def _own(path: Path) -> list[tuple[str, Annotation]]:
    beside = path.with_name("responses.jsonl")
    made = from_rows(Rows(beside, ("task_id",)).load(), response_from_row, beside)
    texts = {one.task_id: one.thinking for one in made}
    records = from_rows(Rows(path, annotators.KEY).load(), annotation_from_row, path)
    unknown = [record.task_id for record in records if record.task_id not in texts]
    if unknown:
        raise ValueError(f"{path}: task {unknown[0]!r} is not in {beside}")
    return [(texts[one.task_id], one) for one in records if one.failed is None]


def _written(path: Path, labels: LabelSet) -> list[tuple[str, Annotation]]:
    """Chains as somebody labelled them; their segments, joined by a space, are the text."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}: line {number}"
        try:
            row = loads(line)
            parts = [(str(one["label"]), str(one["text"]).strip()) for one in row["segments"]]
            question = str(row.get("question") or row["task_id"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadFile(
                f"{where}: expected a chain with question (or task_id) and segments, each with "
                "label and text"
            ) from None
        for label, part in parts:
            if label not in labels.names:
                known = ", ".join(labels.names)
                raise BadFile(f"{where}: label {label!r} of {part!r:.60} is not among {known}")
        pairs.append(_joined(parts, question))
    return pairs


def _joined(parts: Sequence[tuple[str, str]], question: str) -> tuple[str, Annotation]:
    """(label, text) pairs as one text, joined by blanks, and its annotation."""
    placed, text = [], ""
    for label, part in parts:
        start = len(text) + bool(text)
        text = f"{text} {part}" if text else part
        placed.append(PlacedSegment(label, part, start, len(text)))
    return text, placing.annotation(placing.place(placed, text), question, "own")


def _released(path: Path, labels: LabelSet) -> list[tuple[str, Annotation]]:
    pairs = []
    try:
        for i, row in enumerate(read_json(path)):
            text = row["thinking_process"]
            placed = placing.align(markup.parse(row["annotated_response"], labels), text)
            pairs.append((text, placing.annotation(placed, str(i), "released")))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a list of chains with thinking_process and "
            "annotated_response, or an annotations.jsonl"
        ) from error
    return pairs


# --- fitting -----------------------------------------------------------------------------


def design(chains: Sequence[Chain]) -> csr_matrix:
    """The features of every sentence, as a sparse matrix ``[n, 2 ** BITS + AROUND]``."""
    blocks = []
    for chain in chains:
        rows = offline.of_chain(chain.text, chain.places)
        shape = (len(chain.places), 1 << offline.BITS)
        hashed = csr_matrix((rows.value, rows.index, rows.start), shape=shape)
        blocks.append(hstack([hashed, csr_matrix(rows.around)], format="csr"))
    matrix = vstack(blocks, format="csr")
    matrix.sum_duplicates()
    return matrix


def as_features(matrix: csr_matrix) -> offline.Features:
    """Rows of :func:`design` in the form that the annotator runs on."""
    hashed = matrix[:, : 1 << offline.BITS]
    around = matrix[:, 1 << offline.BITS :].toarray()
    return offline.Features(hashed.indices, hashed.data, hashed.indptr, around)


def fit(data: Data, metadata: dict[str, Any] | None = None) -> offline.Classifier:
    """Both models on the labelled rows, and the label transitions; no correction chosen yet."""
    truth, known = data.truth, data.truth >= 0
    counts = np.bincount(truth[known], minlength=len(data.names))
    if not counts.all():
        missing = [name for name, count in zip(data.names, counts, strict=True) if not count]
        raise ValueError(f"no sentence of {', '.join(missing)} to train on: give more chains")
    pairs = (data.chain[1:] == data.chain[:-1]) & known[1:] & known[:-1]
    steps = 1 + confusion(truth[:-1][pairs], truth[1:][pairs], len(data.names))
    arrays = {
        "log_prior": np.log(counts / counts.sum()),
        "log_transitions": np.log(steps / steps.sum(axis=1, keepdims=True)),
    }
    rows = data[known]
    arrays |= fit_linear(rows.matrix, rows.truth, rows.weight)
    arrays |= fit_network(as_features(rows.matrix), rows.truth, rows.weight)
    return offline.Classifier(data.names, arrays, 0.0, metadata or {})


def fit_linear(rows, truth: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Multinomial logistic regression."""
    used = np.flatnonzero(np.bincount(rows.indices, minlength=rows.shape[1]) >= LEAST)
    model = LogisticRegression(C=PENALTY, max_iter=300, tol=1e-3)
    model.fit(rows[:, used], truth, weight)
    coefficients, bias = model.coef_, model.intercept_
    if len(coefficients) == 1:  # of two labels scikit-learn keeps the log odds of the second
        coefficients = np.vstack([-coefficients, coefficients]) / 2
        bias = np.concatenate([-bias, bias]) / 2
    weights = np.zeros((rows.shape[1], len(coefficients)), dtype=np.float32)
    weights[used] = coefficients.T
    words, around = np.split(weights, [1 << offline.BITS])
    return {"words": words, "around": around, "bias": bias}


def fit_network(
    rows: offline.Features, truth: np.ndarray, weight: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """One hidden layer over hashed words and surroundings, with dropout on both."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    shift, scale = rows.around.mean(axis=0), rows.around.std(axis=0) + 1e-3
    around = torch.from_numpy(((rows.around - shift) / scale).astype(np.float32))
    index = torch.from_numpy(rows.index.astype(np.int64) >> (offline.BITS - HIDDEN_BITS))
    value = torch.from_numpy(rows.value / 3)
    target, weights = torch.from_numpy(truth), torch.from_numpy(weight.astype(np.float32))
    words = torch.nn.EmbeddingBag(1 << HIDDEN_BITS, HIDDEN, mode="sum", sparse=True)
    torch.nn.init.normal_(words.weight, std=0.1)
    bias = torch.nn.Parameter(torch.zeros(HIDDEN))
    near = torch.nn.Linear(around.shape[1], HIDDEN // 2)
    out = torch.nn.Linear(HIDDEN + HIDDEN // 2, int(truth.max()) + 1)
    dense = torch.optim.AdamW([bias, *near.parameters(), *out.parameters()], lr=3e-3)
    optimisers = [torch.optim.SparseAdam(words.parameters(), lr=3e-3), dense]
    for _ in range(EPOCHS):
        for batch in np.array_split(rng.permutation(len(truth)), max(1, len(truth) // 64)):
            places = np.concatenate([np.arange(*rows.start[i : i + 2]) for i in batch])
            starts = np.cumsum([0, *np.diff(rows.start)[batch][:-1]])
            kept = value[places] * (torch.rand(len(places)) > 0.3) / 0.7
            bag = words(index[places], torch.from_numpy(starts), per_sample_weights=kept)
            hidden = torch.relu(torch.cat([bag + bias, near(around[batch])], dim=1))
            scores = out(torch.dropout(hidden, 0.4, True))
            loss = torch.nn.functional.cross_entropy(scores, target[batch], reduction="none")
            for optimiser in optimisers:
                optimiser.zero_grad()
            (loss * weights[batch]).mean().backward()
            for optimiser in optimisers:
                optimiser.step()
    near_weights = near.weight.detach().numpy().T / scale[:, None]
    return {
        "hidden_words": words.weight.detach().numpy() / 3,
        "hidden_words_bias": bias.detach().numpy(),
        "hidden_around": near_weights,
        "hidden_around_bias": near.bias.detach().numpy() - shift @ near_weights,
        "out": out.weight.detach().numpy().T,
        "out_bias": out.bias.detach().numpy(),
    }


def row_weights(chains: Sequence[Chain]) -> np.ndarray:
    """How much each sentence counts in training: less where a chain goes in circles.

    A sentence that occurs ``k`` times counts ``1 / sqrt(k)``, one of a chain of ``n > 40``
    sentences ``sqrt(40 / n)`` of that.
    """
    said = [chain.text[start:end] for chain in chains for start, end in chain.places]
    times = Counter(said)
    sizes = [len(chain.places) for chain in chains]
    long = np.minimum(1.0, np.sqrt(40 / np.maximum(1, np.repeat(sizes, sizes))))
    return long / np.sqrt([times[sentence] for sentence in said])


# --- predictions for chains that were not trained on -------------------------------------


def cross_predict(data: Data, unseen: str = "questions") -> np.ndarray:
    """Probabilities ``[n, N]`` of every row from rows of other questions; with ``unseen``
    ``models`` from rows of other sources *and* other questions."""
    fold = data.question % FOLDS
    if unseen == "questions":
        data = replace(data, source=np.zeros_like(data.source))
    sources = np.unique(data.source)
    found = np.full((len(data.truth), len(data.names)), np.nan)
    for left_out in sources:
        for part in np.unique(fold):
            test = (data.source == left_out) & (fold == part)
            train = (fold != part) & ((data.source != left_out) | (len(sources) == 1))
            if test.any():
                model = fit(data[train])
                for one in np.unique(data.chain[test]):
                    rows = np.flatnonzero(data.chain == one)
                    found[rows] = model.probabilities(as_features(data.matrix[rows]))
    return found


def log_prior(truth: np.ndarray, n: int) -> np.ndarray:
    """Logarithms of the shares of the ``n`` labels ``[N]``."""
    return np.log(np.bincount(truth[truth >= 0], minlength=n) / (truth >= 0).sum())


def best_correction(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The share of the prior to take out that gives the largest kappa."""
    known, n = truth >= 0, probabilities.shape[1]
    logs, prior = np.log(probabilities[known]), log_prior(truth, n)
    choices = [(logs - correction * prior).argmax(axis=1) for correction in CORRECTIONS]
    kappas = [kappa(confusion(truth[known], chosen, n)) for chosen in choices]
    return float(CORRECTIONS[int(np.argmax(kappas))])


def cross_decide(
    probabilities: np.ndarray, data: Data, unseen: str = "questions"
) -> np.ndarray:
    """Labels of every row; with ``unseen`` ``models`` the correction too is chosen on the other
    sources."""
    if unseen == "questions":
        data = replace(data, source=np.zeros_like(data.source))
    chosen = np.zeros(len(data.truth), dtype=int)
    for one in np.unique(data.source):
        here = data.source == one
        other = here if here.all() else ~here
        correction = best_correction(probabilities[other], data.truth[other])
        prior = log_prior(data.truth[other], len(data.names))
        chosen[here] = (np.log(probabilities[here]) - correction * prior).argmax(axis=1)
    return chosen


# --- the numbers of the card -------------------------------------------------------------


def confusion(first: np.ndarray, second: np.ndarray, n: int, weight: Any = None) -> np.ndarray:
    """Counts ``[N, N]`` of pairs of ``n`` labels, rows the first; ``weight`` counts instead of
    1."""
    return np.bincount(first * n + second, weight, n * n).reshape(n, n)


def measure(
    chains: Sequence[Chain],
    data: Data,
    probabilities: np.ndarray,
    chosen: np.ndarray,
    names: Sequence[str],
) -> dict[str, Any]:
    """All numbers of the card.

    ``probabilities [n, N]`` and ``chosen [n]`` are held-out predictions for the sentences of
    ``chains``, in order; sentences without a true label are left out. The cue words of
    ``lexical`` stand beside for the paper's labels, which they know.
    """
    known, n = data.truth >= 0, len(data.names)
    said = [chain.text[slice(*place)] for chain in chains for place in chain.places]
    by_rules = heard(chains)[known] if data.names == PAPER.names else None
    without, data, chosen = int((~known).sum()), data[known], chosen[known]
    probabilities, said = probabilities[known], [said[i] for i in np.flatnonzero(known)]
    truth, table = data.truth, confusion(data.truth, chosen, n)
    tables = np.zeros((len(chains), n, n))
    np.add.at(tables, (data.chain, truth, chosen), 1)
    size = np.array([len(text) for text in said])
    rules = None
    if by_rules is not None:
        rules = {
            "kappa": kappa(confusion(truth, by_rules, n)),
            "accuracy": float((truth == by_rules).mean()),
        }
    given = {"judge": truth, "labels": chosen, "rules": by_rules}
    ways = {way: np.eye(n)[labels] for way, labels in given.items() if labels is not None}
    ways = {"judge": ways["judge"], "expected": probabilities, **ways}
    return {
        "chains": len(chains),
        "sentences": len(truth),
        "without_label": without,
        "labels": list(data.names),
        "kappa": kappa(table),
        "kappa_interval": _kappa_interval(tables),
        "by_source": _by_source(data.source, data.chain, tables, names),
        "kappa_by_length": kappa(confusion(truth, chosen, n, size)),
        "accuracy": float((truth == chosen).mean()),
        "log_loss": float(-np.log(probabilities[np.arange(len(truth)), truth]).mean()),
        "rules": rules,
        "judge_with_itself": _repeats(said, truth, n),
        "confusion": table.tolist(),
        "per_label": _per_label(truth, chosen, tables, data.names),
        "fractions": _fractions(data.source, ways, names),
        "shrinkage": _shrinkage(data.chain, ways, data.names),
        "calibration": _calibration(truth, probabilities),
    }


def _kappa_interval(tables: np.ndarray) -> list[float]:
    """95 % of the kappas of resampled chains."""
    draws = np.random.default_rng(0).integers(len(tables), size=(RESAMPLES, len(tables)))
    kappas = [kappa(tables[draw].sum(axis=0)) for draw in draws]
    return np.percentile(kappas, [2.5, 97.5]).tolist()


def _by_source(source, chain, tables: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Chains, sentences and kappa of each source."""
    of = pd.Series(source).groupby(chain).first()
    return {name: _agreed(tables[of.index[of == k]]) for k, name in enumerate(names)}


def _agreed(tables: np.ndarray) -> dict[str, Any]:
    """Chains, sentences and kappa with its interval, from the confusions of chains."""
    whole = tables.sum(axis=0)
    return {
        "chains": len(tables),
        "sentences": int(whole.sum()),
        "kappa": kappa(whole),
        "kappa_interval": _kappa_interval(tables),
        "labels": [kappa(one_against_all(whole, i)) for i in range(len(whole))],
    }


def _repeats(said: Sequence[str], truth: np.ndarray, n: int) -> dict[str, float]:
    """Agreement of the judge with itself on sentences that occur word for word again."""
    seen = defaultdict(list)
    for text, label in zip(said, truth, strict=True):
        seen[text].append(label)
    pairs = np.array([pair for labels in seen.values() for pair in pairwise(labels)])
    if not len(pairs):
        return {"pairs": 0, "kappa": float("nan")}
    return {"pairs": len(pairs), "kappa": kappa(confusion(*pairs.T, n))}


def _per_label(
    truth: np.ndarray, chosen: np.ndarray, tables: np.ndarray, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    scores = precision_recall_fscore_support(
        truth, chosen, labels=range(len(names)), zero_division=np.nan
    )
    keys = ("precision", "recall", "f1", "sentences")
    found: dict[str, dict[str, Any]] = {}
    for i, (name, row) in enumerate(zip(names, zip(*scores, strict=True), strict=True)):
        mine = one_against_all(tables, i)
        found[name] = dict(zip(keys, (score.item() for score in row), strict=True))
        found[name]["kappa"] = kappa(mine.sum(axis=0))
        found[name]["kappa_interval"] = _kappa_interval(mine)
    return found


def abroad(model: offline.Classifier, paths: Sequence[str | Path]) -> dict[str, Any]:
    """How the finished classifier does on the chains of files that it never saw: by file, and
    the cue words of ``lexical`` beside."""
    found, n = {}, len(model.labels)
    for path in paths:
        chains = read_chains(path)
        data = prepare(chains, [chains[0].source])
        found_here = np.zeros((len(chains), n, n))
        for i, chain in enumerate(chains):
            chosen = model.decide(
                model.probabilities(offline.of_chain(chain.text, chain.places))
            )
            known = chain.truth >= 0
            np.add.at(found_here[i], (chain.truth[known], chosen[known]), 1)
        rules, known = heard(chains), data.truth >= 0
        cues = kappa(confusion(data.truth[known], rules[known], n))
        found[Path(path).name] = _agreed(found_here) | {"rules": cues}
    return found


def heard(chains: Sequence[Chain]) -> np.ndarray:
    """The label of every sentence by its cue words alone."""
    return np.array(
        [
            PAPER.names.index(sentences.label(chain.text[slice(*place)], i))
            for chain in chains
            for i, place in enumerate(chain.places)
        ]
    )


def _means(rows: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Means of the rows of every group, groups in order."""
    return pd.DataFrame(rows).groupby(by).mean().to_numpy()


def _fractions(
    source: np.ndarray, ways: dict[str, np.ndarray], names: Sequence[str]
) -> dict[str, Any]:
    """Label fractions of every source: by the judge, expected, by labels, by rules."""
    shares = {way: _means(rows, source) for way, rows in ways.items()}
    found = {
        name: {way: share[k].tolist() for way, share in shares.items()}
        for k, name in enumerate(names)
    }
    errors = {
        way: np.abs(share - shares["judge"]).mean(axis=1).tolist()
        for way, share in shares.items()
        if way != "judge"
    }
    means = {way: float(np.mean(values)) for way, values in errors.items()}
    return {"sources": found, "mean_error": means, "errors": errors}


def _shrinkage(
    chain: np.ndarray, ways: dict[str, np.ndarray], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Slope of a chain's fraction on the judge's: 1 where differences keep their size."""
    judge = _means(ways["judge"], chain)
    true = judge - judge.mean(axis=0)
    scale = (true**2).sum(axis=0)
    slopes = {
        way: (true * _means(ways[way], chain)).sum(axis=0) / scale
        for way in ("expected", "labels")
    }
    return {
        name: {way: float(slope[i]) for way, slope in slopes.items()}
        for i, name in enumerate(names)
    }


def _calibration(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """All label probabilities in ten bins: mean probability against share of hits."""
    flat = probabilities.ravel()
    every = pd.DataFrame({"said": flat, "true": np.eye(probabilities.shape[1])[truth].ravel()})
    every["bin"] = np.minimum((flat * 10).astype(int), 9)
    bins = every.groupby("bin").agg(
        count=("said", "size"), said=("said", "mean"), true=("true", "mean")
    )
    error = (bins["count"] * (bins["said"] - bins["true"]).abs()).sum() / len(flat)
    return {"bins": bins.reset_index().to_dict("records"), "expected_error": float(error)}


# --- the card ----------------------------------------------------------------------------

_PAGE = """\
# The offline annotator: what it is worth

Written by `python training/offline.py`; do not edit. Every prediction below is for a
{which}
The truth is the given label of most of a sentence's characters. Trained on {chains}
chains, {sentences:,} labelled sentences; the weights take {megabytes:.2f} MB; it labels
{speed:,.0f} sentences a second (on {threads} threads of the machine that wrote this).

{summary}

Intervals are 95 % of resampled chains. Weighing sentences by their length, kappa is
{kappa_by_length:.3f}. Who gave the labels agrees with themselves on sentences that occur again
word for word ({judge_with_itself[pairs]:,} pairs) at the kappa of the last row. Penalty, sizes
and features were chosen on this same cross-validation: expect slightly less on your own chains.
{elsewhere}
## Good for
* contrasts between groups of chains and the direction of an effect, without an API or its cost;
* label fractions of a set of chains: use `ledger["expected"]`, the mean of the probabilities,
  not counts of labels;
* a second opinion beside a judge (`agreement.compare`).

## Not good for
* ranking models that are alike: a model's fractions are off by {error:.1f}
  points on average, and up to {worst:.1f};
* the size of an effect: differences between chains, steering effects among them, come out
  shrunk to about {slope_expected:.0f} % (expected) or
  {slope_labels:.0f} % (labels) of those that the given labels show (slopes below);
* single sentences, other languages than English, or chains of another style than it was trained
  on: train on labels of your own then (`python training/offline.py --data annotations.jsonl`).

## Labels
{per_label_table}

## Confusion, in sentences
Rows the given labels, columns this annotator.

{confusion_table}

## Fractions, in %
{fractions_table}

## Calibration
Expected calibration error {calibration[expected_error]:.3f}; log loss {log_loss:.3f} nats.

{calibration_table}
"""


_UNSEEN = """\
chain whose model **and** question the classifier had not seen: each of the
{} files left out in turn, crossed with five folds of questions."""
_UNSEEN_QUESTIONS = """\
chain whose question the classifier had not seen, in five folds of questions. It had seen
other chains of the same source: on those of another model expect less."""
_ELSEWHERE = """
## On chains of others
Measured, not trained on. The labels of these files are those of another school (a judge with
another prompt, other texts), and that is what a run on a model of your own looks like.

{}
"""


def page(n: dict[str, Any]) -> str:
    """The card as Markdown."""
    files = len(n["fractions"]["sources"])
    errors, slopes = n["fractions"]["errors"]["expected"], n["shrinkage"].values()
    return _PAGE.format(
        **{name: value for name, value in n.items() if name != "elsewhere"},
        which=_UNSEEN.format(files) if n["unseen"] == "models" else _UNSEEN_QUESTIONS,
        elsewhere=_ELSEWHERE.format(_agreement_table(n["elsewhere"], n["labels"]))
        if n["elsewhere"]
        else "",
        megabytes=n["weights_bytes"] / 1e6,
        summary=_summary(n),
        error=100 * n["fractions"]["mean_error"]["expected"],
        worst=100 * max(errors),
        slope_expected=100 * np.mean([slope["expected"] for slope in slopes]),
        slope_labels=100 * np.mean([slope["labels"] for slope in slopes]),
        per_label_table=_table(
            [
                "label",
                "sentences",
                "kappa",
                "precision",
                "recall",
                "F1",
                "slope expected",
                "slope labels",
            ],
            [
                [name, row["sentences"], _with_interval(row)]
                + [f"{row[key]:.2f}" for key in ("precision", "recall", "f1")]
                + [f"{n['shrinkage'][name][key]:.2f}" for key in ("expected", "labels")]
                for name, row in n["per_label"].items()
            ],
        ),
        confusion_table=_table(
            ["", *n["labels"]],
            [[name, *row] for name, row in zip(n["labels"], n["confusion"], strict=True)],
        ),
        fractions_table=_table(
            ["model", "by", *n["labels"]],
            [
                [name, way, *(f"{100 * share:.1f}" for share in ways[way])]
                for name, ways in n["fractions"]["sources"].items()
                for way in ("judge", "expected", "labels")
            ],
        ),
        calibration_table=_table(
            ["probability", "label probabilities", "mean said", "share true"],
            [
                [
                    f"{b['bin'] / 10:.1f} to {b['bin'] / 10 + 0.1:.1f}",
                    b["count"],
                    *(f"{b[key]:.3f}" for key in ("said", "true")),
                ]
                for b in n["calibration"]["bins"]
            ],
        ),
    )


def _summary(n: dict[str, Any]) -> str:
    errors = {way: f"{100 * error:.1f}" for way, error in n["fractions"]["mean_error"].items()}
    own = f"{errors['expected']} expected, {errors['labels']} labels"
    sources = [
        [f"this annotator, on {name}", _with_interval(one), "", ""]
        for name, one in n["by_source"].items()
        if len(n["by_source"]) > 1
    ]
    rules, itself = n["rules"], n["judge_with_itself"]["kappa"]
    cues = []
    if rules:
        numbers = f"{rules['kappa']:.3f}", f"{rules['accuracy']:.3f}", errors["rules"]
        cues = [["cue words (`lexical`)", *numbers]]
    return _table(
        ["", "kappa", "accuracy", "error of a source's fractions, points"],
        [
            ["this annotator", _with_interval(n), f"{n['accuracy']:.3f}", own],
            *sources,
            *cues,
            ["the given labels, on repeated sentences", f"{itself:.3f}", "", ""],
        ],
    )


def _with_interval(row: dict[str, Any]) -> str:
    low, high = row["kappa_interval"]
    return f"{row['kappa']:.2f} ({low:.2f} to {high:.2f})"


def _agreement_table(rows: dict[str, Any], labels: Sequence[str]) -> str:
    return _table(
        ["file", "chains", "sentences", "kappa", "cue words", *labels],
        [
            [name, row["chains"], row["sentences"], _with_interval(row), f"{row['rules']:.2f}"]
            + [f"{value:.2f}" for value in row["labels"]]
            for name, row in rows.items()
        ],
    )


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# --- the command -------------------------------------------------------------------------


def save(model: offline.Classifier, path: Path) -> None:
    """Write the hashed weights in 8 bits each, the others in 32; ``Classifier.load`` reads."""
    stored = {}
    for name, array in model.arrays.items():
        if name in offline.EIGHT_BITS:
            scale = np.maximum(np.abs(array).max(axis=0), 1e-12) / 127
            stored[name] = np.round(array / scale).astype(np.int8)
            stored[name + "_scale"] = scale.astype(np.float32)
        else:
            stored[name] = array.astype(np.float32)
    metadata = {"labels": model.labels, "correction": model.correction, **model.metadata}
    np.savez_compressed(path, metadata=np.array(json.dumps(metadata)), **stored)


def prepare(chains: Sequence[Chain], names: Sequence[str], labels: LabelSet = PAPER) -> Data:
    """The sentences of all chains; ``names`` are the sources."""
    asked = list(dict.fromkeys(chain.question for chain in chains))
    sizes = [len(chain.places) for chain in chains]
    return Data(
        matrix=design(chains),
        truth=np.concatenate([chain.truth for chain in chains]),
        source=np.repeat([names.index(chain.source) for chain in chains], sizes),
        question=np.repeat([asked.index(chain.question) for chain in chains], sizes),
        chain=np.repeat(np.arange(len(chains)), sizes),
        weight=row_weights(chains),
        names=labels.names,
    )


def train(
    paths: Sequence[str | Path],
    out: str | Path,
    labels: LabelSet = PAPER,
    *,
    unseen: str = "questions",
    of_grammar: int = 0,
    elsewhere: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Train on ``paths`` and on ``of_grammar`` chains of the grammar, write ``out``,
    ``<out>_card.md`` and ``<out>_card.json``; where ``out`` is no ``.npz``, into a folder,
    under the names of the shipped ones. What is measured: the module's text.

    Raises:
        ValueError: files without chains, fewer than two labels, or a label that a fold of the
            cross-validation has no sentence of.

    """
    out = Path(out)
    out = out if out.suffix == ".npz" else out / offline.WEIGHTS.name
    if len(labels.names) < 2:
        raise ValueError(f"labels {labels.name!r}: give at least two labels to tell apart")
    chains = [chain for path in paths for chain in read_chains(path, labels)]
    chains += grammar_chains(of_grammar)
    names = sorted({chain.source for chain in chains})
    if not chains:
        raise ValueError(f"{', '.join(map(str, paths))}: no labelled chain to train on")
    data = prepare(chains, names, labels)
    probabilities = cross_predict(data, unseen)
    chosen = cross_decide(probabilities, data, unseen)
    digests = {Path(p).name: hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths}
    correction = best_correction(probabilities, data.truth)
    out.parent.mkdir(parents=True, exist_ok=True)
    if of_grammar:
        digests["grammar"] = str(of_grammar)
    save(replace(fit(data, {"trained_on": digests}), correction=correction), out)
    numbers = measure(chains, data, probabilities, chosen, names)
    numbers |= {"trained_on": digests, "correction": correction, "penalty": PENALTY}
    model = offline.Classifier.load(out)
    numbers |= {"unseen": unseen, "elsewhere": abroad(model, elsewhere)}
    numbers |= {"speed": _speed(model, chains), "threads": torch.get_num_threads()}
    text = json.dumps(numbers | {"weights_bytes": out.stat().st_size})
    numbers = json.loads(text, parse_float=lambda number: round(float(number), 5))
    stem = out.with_name(out.stem + "_card")
    stem.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(page(numbers), encoding="utf-8")
    return numbers


def _speed(model: offline.Classifier, chains: Sequence[Chain]) -> float:
    """Sentences a second, features included."""
    some, began = chains[:100], time.perf_counter()
    for chain in some:
        model.probabilities(offline.of_chain(chain.text, chain.places))
    return sum(len(chain.places) for chain in some) / (time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", metavar="FILE", help="(default: what ships)")
    parser.add_argument("--labels", metavar="FILE", help="your own labels, as YAML")
    parser.add_argument("--out", default="offline.npz", metavar="FILE", help="or a folder")
    parser.add_argument("--unseen", choices=("questions", "models"), default="questions")
    parser.add_argument("--measure", nargs="*", default=(), metavar="FILE")
    options = parser.parse_args(arguments)
    labels = LabelSet.load(options.labels) if options.labels else PAPER
    numbers = train(
        options.data or [corpus.FOLDER / "chains.jsonl"],
        options.out,
        labels,
        unseen=options.unseen,
        of_grammar=0 if options.data else GRAMMAR,
        elsewhere=options.measure,
    )
    print(f"kappa {numbers['kappa']:.3f} on unseen {options.unseen}; wrote {options.out}")


if __name__ == "__main__":
    main()
