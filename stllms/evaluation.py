"""What steering did: measurements a chain, paired with the plain chain of the same task.

:func:`measure` gives one row a chain, :func:`table` what ``steering.csv`` holds: for every
direction, coefficient and metric the mean over tasks with a bootstrap interval, the sign-flip
p-value of the paired difference from the plain chain with Holm's correction over the
behaviours' own rows, and the range of the control directions of the same coefficient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from stllms import metrics, tasks
from stllms.organism import grammar
from stllms.records import BEHAVIOURS, STEERED, STEERED_KEY, Steered, Task, is_control

#: Metrics of a chain that are no behaviour's: name -> what a reader should know.
SIDE_EFFECTS: dict[str, str] = {
    "accuracy": "share of correct answers among tasks that have one",
    "tokens": "output tokens",
    "closed": "share of chains whose thinking ended",
    "truncated": "share of chains cut at the token limit",
    "loops": "share of word 4-grams that occurred before in the chain",
    "compression": "size after zlib over size before",
    "labelled": "share of the text that the annotator labelled",
    "kl": "KL of the steered from the plain model along the chain, nats a token",
    "log perplexity": "of the chain under the plain model, nats a token",
    "well-formed": "share of chains that the grammar could have written",
}
FRACTION, SHARE = "token fraction", "token share"


def measure(
    chains: Sequence[Steered],
    asked: Sequence[Task],
    scores: Sequence[Mapping[str, Any]] | None = None,
    *,
    empty: str = "apart",
) -> pd.DataFrame:
    """One row a chain: its key, token fractions, token shares, side effects.

    ``token fraction`` columns are of the four steered behaviours (the paper's metric),
    ``token share`` columns of all six. Answers are scored by :func:`stllms.tasks.score`;
    tasks without one give NaN, and a chain that gives no answer is wrong. ``scores`` are
    those of :func:`stllms.likelihood.scores` for the same chains. Raises ``ValueError`` for
    a chain without an annotation, of a task that is not among ``asked``, or without its score.
    """
    lacking = sum(one.annotation is None for one in chains)
    if lacking:
        raise ValueError(f"{lacking} of {len(chains)} chains have no annotation")
    annotations = [one.annotation for one in chains]
    by_id = {task.id: task for task in asked}
    strange = sorted({one.task_id for one in chains} - by_id.keys())
    if strange:
        raise ValueError(
            f"{len(strange)} tasks of the chains were not asked: {strange[0]}, ..."
        )
    fractions = metrics.token_fractions(annotations, STEERED, empty=empty)
    shares = metrics.token_fractions(annotations, BEHAVIOURS, empty=empty)
    rows = []
    for place, one in enumerate(chains):
        row = {
            "task_id": one.task_id,
            "direction": one.direction,
            "layer": one.layer,
            "coefficient": one.coefficient,
            "operation": one.operation,
        }
        row |= {f"{FRACTION}/{b}": fractions[place, i] for i, b in enumerate(STEERED)}
        row |= {f"{SHARE}/{b}": shares[place, i] for i, b in enumerate(BEHAVIOURS)}
        rows.append(row | _side_effects(one, by_id[one.task_id]))
    made = pd.DataFrame(rows)
    return made if scores is None else _with_scores(made, scores)


def _with_scores(made: pd.DataFrame, scores: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    given = pd.DataFrame(scores, columns=[*STEERED_KEY, "kl", "perplexity"])
    given["log perplexity"] = np.log(given.pop("perplexity").astype(float))
    given["kl"] = given["kl"].astype(float)
    joined = made.merge(given, on=list(STEERED_KEY), how="left", validate="1:1", indicator=True)
    lacking = (joined.pop("_merge") == "left_only").sum()
    if lacking:
        raise ValueError(f"{lacking} of {len(made)} chains have no score")
    return joined


def _side_effects(one: Steered, task: Task) -> dict[str, float]:
    response, annotation = one.response, one.annotation
    signs = metrics.coherence(response.thinking)
    found = {
        "accuracy": tasks.score(task, response.answer),
        "tokens": float(len(response.output_ids)),
        "closed": float(response.closed),
        "truncated": float(not response.finished),
        "loops": signs.loops,
        "compression": signs.compression,
        "labelled": np.nan if annotation.failed else annotation.ledger["coverage"],
    }
    if annotation.annotator == "grammar":
        thinker = response.thinking != response.answer  # a text without tags is both
        found["well-formed"] = float(grammar.well_formed(response, thinker=thinker))
    return found


def table(measured: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """The rows of ``steering.csv``, from :func:`measure`.

    ``behaviour`` is empty for a side effect. ``null_low`` and ``null_high`` are the range of
    the control directions at the same layer and coefficient (NaN without any), ``null_n`` the
    tasks that it is from. Controls may be measured on some of the tasks only: the mean
    difference of each from the plain chains of its own tasks is added to the mean of all plain
    chains, so that every value of a row is for the same tasks.
    """
    names, by_arm = _arms(measured)
    plain = by_arm[PLAIN]
    null = _null(by_arm)
    rows = []
    for (direction, layer, coefficient), found in by_arm.items():
        low, high, tasks_of = null.get((layer, coefficient), ({}, {}, {}))
        for name in names:
            metric, _, behaviour = name.partition("/")
            interval = metrics.bootstrap(found[name], seed=seed)
            p = np.nan
            if direction != "none":
                p = metrics.sign_flip(found[name] - plain[name].reindex(found.index), seed=seed)
            rows.append(
                {
                    "behaviour": behaviour,
                    "direction": direction,
                    "layer": layer,
                    "coefficient": coefficient,
                    "metric": metric,
                    "value": interval.value,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "n": interval.n,
                    "p": p,
                    "null_low": low.get(name, np.nan),
                    "null_high": high.get(name, np.nan),
                    "null_n": tasks_of.get(name, 0),
                }
            )
    made = pd.DataFrame(rows)
    made.insert(10, "p_holm", _corrected(made))
    return made


#: The arm in which nothing is done: (direction, layer, coefficient).
PLAIN = ("none", -1, 0.0)


def _arms(measured: pd.DataFrame) -> tuple[list[str], dict[tuple, pd.DataFrame]]:
    """The measured columns, and the rows of every (direction, layer, coefficient) by task.

    Raises ``ValueError`` without plain chains, or where an arm has a task twice.
    """
    names = [c for c in measured.columns if c not in STEERED_KEY]
    arm_of = ["direction", "layer", "coefficient"]
    if not (measured["direction"] == PLAIN[0]).any():
        raise ValueError("there are no plain chains (direction 'none') to compare with")
    twice = measured[measured.duplicated(["task_id", *arm_of])]
    if len(twice):
        raise ValueError(
            f"{dict(twice.iloc[0][['task_id', *arm_of]])} is there more than once: measure "
            "the chains of each operation apart"
        )
    groups = measured.groupby(arm_of, sort=False)
    return names, {arm: rows.set_index("task_id")[names] for arm, rows in groups}


def _null(by_arm: Mapping[tuple, pd.DataFrame]) -> dict[tuple, tuple]:
    """(layer, coefficient) -> smallest and largest control, and the fewest tasks of any."""
    plain = by_arm[PLAIN]
    values: dict[tuple, list[pd.Series]] = {}
    counts: dict[tuple, list[pd.Series]] = {}
    for (direction, *place), found in by_arm.items():
        if is_control(direction):
            change = found - plain.reindex(found.index)
            values.setdefault(tuple(place), []).append(plain.mean() + change.mean())
            counts.setdefault(tuple(place), []).append(change.notna().sum())
    made = {}
    for place, found in values.items():
        every, n = pd.DataFrame(found), pd.DataFrame(counts[place])
        made[place] = every.min(), every.max(), n.where(n > 0).min().fillna(0).astype(int)
    return made


def _corrected(made: pd.DataFrame) -> np.ndarray:
    """Holm over the tests that the paper's figure makes: a behaviour under its own vector."""
    own = ((made["metric"] == FRACTION) & (made["behaviour"] == made["direction"])).to_numpy()
    corrected = np.full(len(made), np.nan)
    corrected[own] = metrics.holm(made["p"].to_numpy(float)[own])
    return corrected


def bars(rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's bars: token fraction of each behaviour plain and under its own +-1.

    Columns ``behaviour``, ``mode`` (plain, positive, negative), ``value``, ``low``, ``high``,
    ``n``, ``null_low``, ``null_high``, ``null_n``; a behaviour without a direction has NaN.
    """
    found = rows[rows["metric"] == FRACTION].set_index(
        ["behaviour", "direction", "coefficient"]
    )
    values = ["value", "ci_low", "ci_high", "n", "null_low", "null_high", "null_n"]
    found = found.reindex(columns=values)  # a file of an earlier version has no null_n
    made = []
    for behaviour in STEERED:
        for mode, arm in MODES.items():
            key = (behaviour, arm[0] or behaviour, arm[1])
            cells = found.loc[key, values] if key in found.index else [np.nan] * len(values)
            made.append((behaviour, mode, *cells))
    columns = ["behaviour", "mode", "value", "low", "high", "n"]
    columns += ["null_low", "null_high", "null_n"]
    return pd.DataFrame(made, columns=columns)


#: The bars of the paper: mode -> (direction, ``None`` for the behaviour's own; coefficient).
MODES = {"plain": ("none", 0.0), "positive": (None, 1.0), "negative": (None, -1.0)}


def differences(measured: pd.DataFrame, rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Own token fraction under each direction minus that of the plain chain, paired by task.

    Mean difference with its bootstrap interval; p-values are those of :func:`table`.
    """
    _, by_arm = _arms(measured)
    tested = rows[rows["p_holm"].notna()]
    made = []
    for _, row in tested.iterrows():
        name = f"{FRACTION}/{row['behaviour']}"
        mine = by_arm[row["direction"], row["layer"], row["coefficient"]][name]
        found = metrics.bootstrap(mine - by_arm[PLAIN][name].reindex(mine.index), seed=seed)
        place = (row["behaviour"], row["layer"], row["coefficient"])
        made.append(
            (*place, found.value, found.low, found.high, found.n, row["p"], row["p_holm"])
        )
    columns = [
        "behaviour",
        "layer",
        "coefficient",
        "difference",
        "low",
        "high",
        "n",
        "p",
        "p_holm",
    ]
    return pd.DataFrame(made, columns=columns)


def showcase(
    chains: Sequence[Steered], measured: pd.DataFrame, behaviours: Sequence[str]
) -> tuple[Steered, Steered] | None:
    """(plain, positive) of the finished chain whose own token fraction rose most, over all
    ``behaviours`` and their positive coefficients; the earlier behaviour where two rose alike.
    ``None`` where nothing was steered or nothing rose (the share of repeated 4-grams off it).
    """
    at = {one.key[:4]: one for one in chains}
    _, by_arm = _arms(measured)
    best = None
    for arm, rows in by_arm.items():
        if arm[0] not in behaviours or arm[2] <= 0:
            continue
        name = f"{FRACTION}/{arm[0]}"
        rise = (rows[name] - by_arm[PLAIN][name].reindex(rows.index)).fillna(-1)
        whole = rise - rows["truncated"] - rows["loops"]
        rank = (whole.max(), -behaviours.index(arm[0]))
        if best is None or rank > best[0]:
            best = rank, whole.idxmax(), arm
    if best is None or best[0][0] <= 0:
        return None
    _, task, arm = best
    return at[task, *PLAIN], at[task, *arm]


def texts(chains: Sequence[Steered]) -> pd.DataFrame:
    """One row a segment of some chains: the data of a figure that shows them."""
    rows = [
        (one.task_id, one.direction, one.coefficient, s.label, s.start, s.end, s.text)
        for one in chains
        for s in one.annotation.segments
    ]
    columns = ["task_id", "direction", "coefficient", "label", "start", "end", "text"]
    return pd.DataFrame(rows, columns=columns)


def changes(rows: pd.DataFrame, coefficient: float = 1.0) -> pd.DataFrame:
    """What else moves: change of the token share of all six behaviours (columns) under every
    behaviour's direction (index ``direction``) against the plain chains."""
    shares = rows[rows["metric"] == SHARE]
    plain = shares[shares["direction"] == "none"].set_index("behaviour")["value"]
    steered = shares[(shares["coefficient"] == coefficient) & shares["direction"].isin(STEERED)]
    wide = steered.pivot(index="direction", columns="behaviour", values="value")
    order = [b for b in STEERED if b in wide.index]
    return wide.reindex(index=order, columns=BEHAVIOURS) - plain[list(BEHAVIOURS)]
