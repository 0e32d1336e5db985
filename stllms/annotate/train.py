"""Train the offline annotator on annotated chains, measure it, write its card.

``python -m stllms.annotate.train --data FILE... [--out offline.npz]`` (needs scikit-learn:
``pip install "stllms[train]"``). A FILE is either a released comparison file (a JSON list with
``thinking_process`` and ``annotated_response``) or an ``annotations.jsonl`` of ours, with its
``responses.jsonl`` beside it. One file should hold the chains of one model.

The truth of a sentence is the label of most of its characters. Nothing is measured on what it
was trained on: a chain is labelled by a classifier that has seen neither its **model** (file)
nor its **question**. That matters: all released files answer the same 100 questions.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stllms import agreement, foreign, sentences, spans
from stllms.annotate import card, features, markup, offline
from stllms.provenance import BadFile, read_json
from stllms.records import (
    BEHAVIOURS,
    Annotation,
    annotation_from_row,
    from_rows,
    response_from_row,
)

#: Inverse strength of the penalty on the squared weights.
PENALTY = 0.02
#: Features of fewer training sentences are left out: no loss, and three times as fast.
LEAST = 3
#: The network: rows ``2 ** HIDDEN_BITS`` of hashed words, hidden units, passes over the data.
HIDDEN_BITS, HIDDEN, EPOCHS = 15, 32, 4
FOLDS = 5
_CORRECTIONS = np.round(np.arange(0.0, 1.01, 0.1), 1)


@dataclass(frozen=True)
class Chain:
    """A thinking text whose sentences ``places`` have the labels ``truth`` (-1: none)."""

    source: str
    question: str
    text: str
    places: list[tuple[int, int]]
    truth: np.ndarray


def read_chains(path: str | Path) -> list[Chain]:
    """The annotated chains of one file. Raises ``ValueError`` by name on any other file."""
    path = Path(path)
    if path.suffix == ".jsonl":
        beside = path.with_name("responses.jsonl")
        made = from_rows(_rows(beside), response_from_row, beside)
        texts = {one.task_id: one.thinking for one in made}
        records = from_rows(_rows(path), annotation_from_row, path)
        unknown = [record.task_id for record in records if record.task_id not in texts]
        if unknown:
            raise ValueError(f"{path}: task {unknown[0]!r} is not in {beside}")
        pairs = [(texts[one.task_id], one) for one in records if one.failed is None]
    else:
        rows = read_json(path)
        try:
            pairs = [
                (row["thinking_process"], _released(str(i), row)) for i, row in enumerate(rows)
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected a list of chains with thinking_process and "
                "annotated_response, or an annotations.jsonl"
            ) from error
    return [
        Chain(
            path.parent.name if path.suffix == ".jsonl" else path.stem,
            one.task_id,
            text,
            sentences.split(text),
            agreement.unit_labels(one, text, "sentence"),
        )
        for text, one in pairs
    ]


def _rows(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"{path}: cannot be read ({error})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [foreign.loads(line)] if line.strip() else []
        except ValueError as error:
            raise BadFile(f"{path}, line {number}: no JSON ({error})") from None
    return rows


def _released(task_id: str, row: dict) -> Annotation:
    segments = markup.read(row["annotated_response"]).segments
    placed = spans.align(segments, row["thinking_process"])
    return spans.annotation(placed, task_id, "released")


# --- fitting -----------------------------------------------------------------------------


def design(chains: Sequence[Chain]):
    """The features of every sentence, as a sparse matrix ``[n, 2 ** BITS + AROUND]``."""
    from scipy.sparse import csr_matrix, hstack, vstack

    blocks = []
    for chain in chains:
        rows = features.of_chain(chain.text, chain.places)
        shape = (len(chain.places), 1 << features.BITS)
        hashed = csr_matrix((rows.value, rows.index, rows.start), shape=shape)
        blocks.append(hstack([hashed, csr_matrix(rows.around)], format="csr"))
    matrix = vstack(blocks, format="csr")
    matrix.sum_duplicates()
    return matrix


def as_features(matrix) -> features.Features:
    """Rows of :func:`design` in the form that the annotator runs on."""
    hashed = matrix[:, : 1 << features.BITS]
    around = matrix[:, 1 << features.BITS :].toarray()
    return features.Features(hashed.indices, hashed.data, hashed.indptr, around)


def fit(matrix, truth, chain, weight, metadata=None) -> offline.Classifier:
    """Both models on the labelled rows, and the label transitions; no correction chosen yet.

    ``chain [n]`` says which chain a row belongs to (rows of a chain are in order), ``weight
    [n]`` how much it counts.
    """
    known = truth >= 0
    counts = np.bincount(truth[known], minlength=len(BEHAVIOURS))
    if not counts.all():
        missing = [name for name, count in zip(BEHAVIOURS, counts, strict=True) if not count]
        raise ValueError(f"no sentence of {', '.join(missing)} to train on: give more chains")
    pairs = (chain[1:] == chain[:-1]) & known[1:] & known[:-1]
    steps = 1 + card.confusion(truth[:-1][pairs], truth[1:][pairs])
    arrays = {
        "log_prior": np.log(counts / counts.sum()),
        "log_transitions": np.log(steps / steps.sum(axis=1, keepdims=True)),
    }
    arrays |= fit_linear(matrix[known], truth[known], weight[known])
    arrays |= fit_network(as_features(matrix[known]), truth[known], weight[known])
    return offline.Classifier(BEHAVIOURS, arrays, 0.0, metadata or {})


def fit_linear(rows, truth: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Multinomial logistic regression."""
    from sklearn.linear_model import LogisticRegression

    used = np.flatnonzero(np.bincount(rows.indices, minlength=rows.shape[1]) >= LEAST)
    model = LogisticRegression(C=PENALTY, max_iter=60, tol=1e-3)
    model.fit(rows[:, used], truth, weight)
    weights = np.zeros((rows.shape[1], len(BEHAVIOURS)), dtype=np.float32)
    weights[used] = model.coef_.T
    words, around = np.split(weights, [1 << features.BITS])
    return {"words": words, "around": around, "bias": model.intercept_}


def fit_network(
    rows: features.Features, truth: np.ndarray, weight: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """One hidden layer over hashed words and surroundings, with dropout on both."""
    import torch

    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    shift, scale = rows.around.mean(axis=0), rows.around.std(axis=0) + 1e-3
    around = torch.from_numpy(((rows.around - shift) / scale).astype(np.float32))
    index = torch.from_numpy(rows.index.astype(np.int64) >> (features.BITS - HIDDEN_BITS))
    value = torch.from_numpy(rows.value / 3)
    target, weights = torch.from_numpy(truth), torch.from_numpy(weight.astype(np.float32))
    words = torch.nn.EmbeddingBag(1 << HIDDEN_BITS, HIDDEN, mode="sum", sparse=True)
    torch.nn.init.normal_(words.weight, std=0.1)
    bias = torch.nn.Parameter(torch.zeros(HIDDEN))
    near = torch.nn.Linear(around.shape[1], HIDDEN // 2)
    out = torch.nn.Linear(HIDDEN + HIDDEN // 2, len(BEHAVIOURS))
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


def cross_predict(matrix, truth, source, question, chain, weight) -> np.ndarray:
    """Probabilities ``[n, N]`` of every row from rows of other sources *and* other questions.

    All arguments but ``matrix`` are ``[n]``; a chain has one source and one question. With a
    single source, from rows of other questions.
    """
    fold = question % FOLDS
    sources = np.unique(source)
    found = np.full((len(truth), len(BEHAVIOURS)), np.nan)
    for left_out in sources:
        for part in np.unique(fold):
            test = (source == left_out) & (fold == part)
            train = (fold != part) & ((source != left_out) | (len(sources) == 1))
            if test.any():
                model = fit(matrix[train], truth[train], chain[train], weight[train])
                for one in np.unique(chain[test]):
                    rows = np.flatnonzero(chain == one)
                    found[rows] = model.probabilities(as_features(matrix[rows]))
    return found


def best_correction(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The share of the prior to take out that gives the largest kappa."""
    known = truth >= 0
    prior = np.bincount(truth[known], minlength=len(BEHAVIOURS)) / known.sum()
    scores = []
    for correction in _CORRECTIONS:
        chosen = (np.log(probabilities[known]) - correction * np.log(prior)).argmax(axis=1)
        scores.append(agreement.kappa(card.confusion(truth[known], chosen)))
    return float(_CORRECTIONS[int(np.argmax(scores))])


def cross_decide(probabilities: np.ndarray, truth: np.ndarray, source) -> np.ndarray:
    """Labels of every row; the correction too is chosen on the other sources."""
    chosen = np.zeros(len(truth), dtype=int)
    for one in np.unique(source):
        here = source == one
        other = ~here if len(np.unique(source)) > 1 else here
        correction = best_correction(probabilities[other], truth[other])
        prior = np.bincount(truth[other & (truth >= 0)], minlength=len(BEHAVIOURS))
        log_prior = np.log(prior / prior.sum())
        chosen[here] = (np.log(probabilities[here]) - correction * log_prior).argmax(axis=1)
    return chosen


# --- the command -------------------------------------------------------------------------


def train(paths: Sequence[str | Path], out: str | Path) -> dict:
    """Train on ``paths``, write ``out``, ``<out>_card.md`` and ``<out>_card.json``."""
    out = Path(out)
    chains = [chain for path in paths for chain in read_chains(path)]
    names = sorted({chain.source for chain in chains})
    questions = {name: i for i, name in enumerate(dict.fromkeys(c.question for c in chains))}
    sizes = [len(chain.places) for chain in chains]
    truth = np.concatenate([chain.truth for chain in chains])
    source = np.repeat([names.index(chain.source) for chain in chains], sizes)
    question = np.repeat([questions[chain.question] for chain in chains], sizes)

    chain = np.repeat(np.arange(len(chains)), sizes)
    matrix, weight = design(chains), row_weights(chains)
    probabilities = cross_predict(matrix, truth, source, question, chain, weight)
    chosen = cross_decide(probabilities, truth, source)
    digests = {Path(p).name: hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths}
    final = fit(matrix, truth, chain, weight, {"trained_on": digests})
    final = offline.Classifier(
        **{**vars(final), "correction": best_correction(probabilities, truth)}
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    final.save(out)
    numbers = card.measure(chains, probabilities, chosen, names)
    numbers |= {"trained_on": digests, "correction": final.correction, "penalty": PENALTY}
    numbers["weights_bytes"] = out.stat().st_size
    card.write(numbers, out.with_name(out.stem + "_card"))
    return numbers


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stllms.annotate.train", description=__doc__
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", default="offline.npz", metavar="FILE")
    options = parser.parse_args(arguments)
    numbers = train(options.data, options.out)
    print(f"kappa {numbers['kappa']:.3f} on unseen models and questions; wrote {options.out}")


if __name__ == "__main__":
    main()
