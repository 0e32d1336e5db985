"""The card of a trained annotator: its numbers, and what they allow one to say.

Written by :mod:`stllms.annotate.train` from held-out predictions alone; every number in the
page is in the JSON file beside it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from stllms import agreement
from stllms.annotate import lexical
from stllms.records import BEHAVIOURS

_RESAMPLES = 1000


def confusion(first: np.ndarray, second: np.ndarray, weight=None) -> np.ndarray:
    """Counts ``[N, N]`` of label pairs, rows the first; ``weight`` counts instead of 1."""
    counts = np.zeros((len(BEHAVIOURS), len(BEHAVIOURS)))
    np.add.at(counts, (first, second), 1.0 if weight is None else weight)
    return counts


def measure(chains, probabilities: np.ndarray, chosen: np.ndarray, names) -> dict[str, Any]:
    """All numbers of the card.

    ``probabilities [n, N]`` and ``chosen [n]`` are held-out predictions for the sentences of
    ``chains``, in order; sentences without a true label are left out.
    """
    edges = np.cumsum([0] + [len(chain.places) for chain in chains])
    truth = np.concatenate([chain.truth for chain in chains])
    size = np.array([end - start for chain in chains for start, end in chain.places])
    rules = np.array(
        [
            BEHAVIOURS.index(lexical.label(chain.text[start:end], i))
            for chain in chains
            for i, (start, end) in enumerate(chain.places)
        ]
    )
    known = truth >= 0
    source = np.repeat([names.index(c.source) for c in chains], np.diff(edges))
    table = confusion(truth[known], chosen[known])
    low, high = _kappa_interval(truth, chosen, edges)
    by_rules = confusion(truth[known], rules[known])
    by_length = confusion(truth[known], chosen[known], size[known])
    return {
        "chains": len(chains),
        "sentences": int(known.sum()),
        "without_label": int((~known).sum()),
        "labels": list(BEHAVIOURS),
        "kappa": agreement.kappa(table),
        "kappa_interval": [low, high],
        "kappa_by_length": agreement.kappa(by_length),
        "accuracy": float(np.trace(table) / table.sum()),
        "log_loss": float(-np.log(probabilities[known, truth[known]]).mean()),
        "rules": {
            "kappa": agreement.kappa(by_rules),
            "accuracy": float(np.trace(by_rules) / by_rules.sum()),
        },
        "judge_with_itself": _repeats(chains),
        "confusion": table.astype(int).tolist(),
        "per_label": _per_label(table),
        "fractions": _fractions(truth, probabilities, chosen, rules, source, names),
        "shrinkage": _shrinkage(truth, probabilities, chosen, edges),
        "calibration": _calibration(truth[known], probabilities[known]),
    }


def _kappa_interval(truth, chosen, edges) -> tuple[float, float]:
    """95 % of the kappas of resampled chains."""
    rng = np.random.default_rng(0)
    tables = []
    for start, end in pairwise(edges):
        known = truth[start:end] >= 0
        tables.append(confusion(truth[start:end][known], chosen[start:end][known]))
    stacked = np.array(tables)
    draws = rng.integers(len(stacked), size=(_RESAMPLES, len(stacked)))
    kappas = [agreement.kappa(stacked[draw].sum(axis=0)) for draw in draws]
    low, high = np.percentile(kappas, [2.5, 97.5])
    return float(low), float(high)


def _repeats(chains) -> dict[str, float]:
    """Agreement of the judge with itself on sentences that occur word for word again."""
    seen = defaultdict(list)
    for chain in chains:
        for (start, end), label in zip(chain.places, chain.truth, strict=True):
            if label >= 0:
                seen[chain.text[start:end]].append(label)
    pairs = [pair for labels in seen.values() for pair in pairwise(labels)]
    if not pairs:
        return {"pairs": 0, "kappa": float("nan")}
    first, second = np.array(pairs).T
    return {"pairs": len(pairs), "kappa": agreement.kappa(confusion(first, second))}


def _per_label(table: np.ndarray) -> dict[str, dict[str, float]]:
    found = {}
    for i, name in enumerate(BEHAVIOURS):
        said, true, hit = table[:, i].sum(), table[i].sum(), table[i, i]
        found[name] = {
            "sentences": int(true),
            "precision": float(hit / said) if said else float("nan"),
            "recall": float(hit / true) if true else float("nan"),
            "f1": float(2 * hit / (said + true)) if said + true else float("nan"),
        }
    return found


def _fractions(truth, probabilities, chosen, rules, source, names) -> dict[str, Any]:
    """Label fractions of every source: by the judge, expected, by labels, by rules."""
    found, errors = {}, defaultdict(list)
    for k, name in enumerate(names):
        here = (source == k) & (truth >= 0)
        judge = _shares(truth[here])
        rows = {
            "expected": probabilities[here].mean(axis=0),
            "labels": _shares(chosen[here]),
            "rules": _shares(rules[here]),
        }
        for way, shares in rows.items():
            errors[way].append(float(np.abs(shares - judge).mean()))
        found[name] = {"judge": judge.tolist()} | {w: s.tolist() for w, s in rows.items()}
    means = {way: float(np.mean(values)) for way, values in errors.items()}
    return {"sources": found, "mean_error": means, "errors": dict(errors)}


def _shares(labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels, minlength=len(BEHAVIOURS)) / max(1, len(labels))


def _shrinkage(truth, probabilities, chosen, edges) -> dict[str, dict[str, float]]:
    """Slope of a chain's fraction on the judge's: 1 where differences keep their size."""
    judge, expected, labels = [], [], []
    for start, end in pairwise(edges):
        known = truth[start:end] >= 0
        if known.any():
            judge.append(_shares(truth[start:end][known]))
            expected.append(probabilities[start:end][known].mean(axis=0))
            labels.append(_shares(chosen[start:end][known]))
    true = np.array(judge) - np.mean(judge, axis=0)
    spread = (true**2).sum(axis=0)
    slopes = [(true * np.array(values)).sum(axis=0) / spread for values in (expected, labels)]
    return {
        name: {"expected": float(slopes[0][i]), "labels": float(slopes[1][i])}
        for i, name in enumerate(BEHAVIOURS)
    }


def _calibration(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """All label probabilities in ten bins: mean probability against share of hits."""
    hits = np.eye(len(BEHAVIOURS))[truth].ravel()
    flat = probabilities.ravel()
    bins = np.minimum((flat * 10).astype(int), 9)
    rows, error = [], 0.0
    for b in range(10):
        here = bins == b
        if here.any():
            said, true = float(flat[here].mean()), float(hits[here].mean())
            rows.append({"bin": b, "count": int(here.sum()), "said": said, "true": true})
            error += here.mean() * abs(said - true)
    return {"bins": rows, "expected_error": float(error)}


# --- the page ----------------------------------------------------------------------------


def write(numbers: dict[str, Any], stem: Path) -> None:
    """``<stem>.json`` and ``<stem>.md``, the page of exactly the numbers in the other."""
    numbers = _rounded(numbers)
    stem.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(page(numbers), encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def page(numbers: dict[str, Any]) -> str:
    """The card as Markdown."""
    n, low, high = numbers, *numbers["kappa_interval"]
    errors = n["fractions"]["mean_error"]
    slopes = n["shrinkage"].values()
    mean_slope = {way: np.mean([s[way] for s in slopes]) for way in ("expected", "labels")}
    return f"""# The offline annotator: what it is worth

Written by `python -m stllms.annotate.train`; do not edit. Every prediction below is for a
chain whose model **and** question the classifier had not seen: each of the
{len(n["fractions"]["sources"])} files left out in turn, crossed with five folds of questions.
The truth is the judge's label of most of a sentence's characters. Trained on {n["chains"]}
chains, {n["sentences"]:,} labelled sentences; the weights take {
        n["weights_bytes"] / 1e6:.2f} MB.

{
        _table(
            ["", "kappa", "accuracy", "error of a model's fractions, points"],
            [
                [
                    "this annotator",
                    f"{n['kappa']:.3f} ({low:.3f} to {high:.3f})",
                    f"{n['accuracy']:.3f}",
                    f"{100 * errors['expected']:.1f} expected, "
                    f"{100 * errors['labels']:.1f} labels",
                ],
                [
                    "cue words (`lexical`)",
                    f"{n['rules']['kappa']:.3f}",
                    f"{n['rules']['accuracy']:.3f}",
                    f"{100 * errors['rules']:.1f}",
                ],
                [
                    "the judge, on repeated sentences",
                    f"{n['judge_with_itself']['kappa']:.3f}",
                    "",
                    "",
                ],
            ],
        )
    }

The interval is 95 % of resampled chains. Weighing sentences by their length, kappa is
{n["kappa_by_length"]:.3f}. The judge's own agreement is a ceiling, measured on
{
        n["judge_with_itself"][
            "pairs"
        ]:,} pairs of sentences that occur again word for word. Penalty, sizes and
features were chosen on this same cross-validation: expect slightly less on chains of your own.

## Good for
* contrasts between groups of chains and the direction of an effect, without an API or its cost;
* label fractions of a set of chains: use `ledger["expected"]`, the mean of the probabilities,
  not counts of labels;
* a second opinion beside a judge (`agreement.compare`).

## Not good for
* ranking models that are alike: a model's fractions are off by {100 * errors["expected"]:.1f}
  points on average, and up to {100 * max(n["fractions"]["errors"]["expected"]):.1f};
* the size of an effect: differences between chains, steering effects among them, come out
  shrunk to about {100 * mean_slope["expected"]:.0f} % (expected) or
  {100 * mean_slope["labels"]:.0f} % (labels) of those that the judge sees (slopes below);
* single sentences, other languages than English, or a judge with another prompt: train on its
  replies instead (`python -m stllms.annotate.train --data annotations.jsonl`).

## Labels
{
        _table(
            [
                "label",
                "sentences",
                "precision",
                "recall",
                "F1",
                "slope expected",
                "slope labels",
            ],
            [
                [
                    name,
                    row["sentences"],
                    *(f"{row[key]:.2f}" for key in ("precision", "recall", "f1")),
                    *(f"{n['shrinkage'][name][key]:.2f}" for key in ("expected", "labels")),
                ]
                for name, row in n["per_label"].items()
            ],
        )
    }

## Confusion, in sentences
Rows the judge, columns this annotator.

{
        _table(
            ["", *n["labels"]],
            [[name, *row] for name, row in zip(n["labels"], n["confusion"], strict=True)],
        )
    }

## Fractions, in %
{
        _table(
            ["model", "by", *n["labels"]],
            [
                [name, way, *(f"{100 * share:.1f}" for share in shares)]
                for name, ways in n["fractions"]["sources"].items()
                for way, shares in ways.items()
                if way != "rules"
            ],
        )
    }

## Calibration
Expected calibration error {n["calibration"]["expected_error"]:.3f}; log loss {
        n["log_loss"]:.3f} nats.

{
        _table(
            ["probability", "label probabilities", "mean said", "share true"],
            [
                [
                    f"{row['bin'] / 10:.1f} to {row['bin'] / 10 + 0.1:.1f}",
                    row["count"],
                    f"{row['said']:.3f}",
                    f"{row['true']:.3f}",
                ]
                for row in n["calibration"]["bins"]
            ],
        )
    }
"""
