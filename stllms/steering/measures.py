"""What steering did: measures of a response, paired with the baseline of the same task.

Two different shares go by "fraction" in the published scripts; here they have names:

* **token fraction** (method, section 8): the share of a target's tokens among the tokens of all
  targets (the paper's four steered behaviours);
* **segment fraction** (section 9): the share of a label's segments among those of all labels.

A response without any segment has no fraction. It is set apart as NaN (``empty="apart"``, the
default) or counts as zeros (``"published"``); a response with segments but no target's has
token fractions of zero. A failed annotation always gives NaN, and so does a label that occurs
in none of the responses that are measured together: nothing is known of it.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stllms import registry, stats
from stllms.annotation import annotators
from stllms.fixtures import grammar
from stllms.labels import PAPER, LabelSet, is_control
from stllms.records import STEERED_KEY, Annotation, Response, Steered, Task
from stllms.tasks import score

if TYPE_CHECKING:  # torch
    from stllms.models.model import Model

EMPTY = ("apart", "published")
#: Measures of a response that are no behaviour's: name -> what a reader should know.
SIDE_EFFECTS: dict[str, str] = {
    "accuracy": "share of correct answers among tasks that have one",
    "tokens": "output tokens",
    "closed": "share of responses whose thinking ended",
    "truncated": "share of responses cut at the token limit",
    "loops": "share of word 4-grams that occurred before in the thinking",
    "compression": "size after zlib over size before",
    "labelled": "share of the text that the annotator labelled",
    "kl": "KL of the steered from the plain model along the response, nats a token",
    "log perplexity": "of the response under the plain model, nats a token",
    "well-formed": "share of responses that the grammar could have written",
}
FRACTION, SHARE = "token fraction", "token share"
#: The condition in which nothing is done: (direction, layer, coefficient).
PLAIN = ("none", -1, 0.0)
#: The bars of the paper: mode -> (direction, ``None`` for the behaviour's own; coefficient).
MODES = {"plain": ("none", 0), "positive": (None, 1), "negative": (None, -1)}


# --- of one response ---------------------------------------------------------------------


def token_fractions(
    annotations: Sequence[Annotation],
    behaviours: Sequence[str] = PAPER.targets,
    *,
    empty: str = "apart",
) -> np.ndarray:
    """Token fraction of every behaviour in every response, ``[responses, N]``.

    Needs annotations with token spans. Raises ``ValueError`` for an unknown ``empty``.
    """
    sizes = np.zeros((len(annotations), len(behaviours)))
    for row, annotation in zip(sizes, annotations, strict=True):
        for span in annotation.spans:
            if span.label in behaviours:
                row[behaviours.index(span.label)] += span.end - span.start
    shares = _shares(sizes, np.array([bool(a.spans) for a in annotations], bool), empty)
    shares[[a.failed is not None for a in annotations]] = np.nan
    return shares


def segment_counts(
    annotations: Sequence[Annotation], behaviours: Sequence[str] = PAPER.names
) -> np.ndarray:
    """Segments of every behaviour in every response, ``[responses, N]``."""
    counted = [Counter(segment.label for segment in a.segments) for a in annotations]
    found = np.array([[c[b] for b in behaviours] for c in counted], dtype=float)
    return found.reshape(len(annotations), len(behaviours))


def segment_fractions(counts: np.ndarray, *, empty: str = "apart") -> np.ndarray:
    """Segment fractions from counts, ``[responses, N]`` -> ``[responses, N]``."""
    counts = np.asarray(counts, dtype=float)
    return _shares(counts, counts.sum(1) > 0, empty)


def _shares(sizes: np.ndarray, present: np.ndarray, empty: str) -> np.ndarray:
    if empty not in EMPTY:
        raise ValueError(f"unknown treatment of empty chains {empty!r}: {', '.join(EMPTY)}")
    total = sizes.sum(1, keepdims=True)
    shares = np.divide(sizes, total, out=np.zeros_like(sizes), where=total > 0)
    if empty == "apart":
        shares[~present] = np.nan
    return shares


def coherence(text: str) -> dict[str, float]:
    """Signs of broken text: ``loops`` is the share of word 4-grams that occurred before in the
    text, ``compression`` its size after zlib over the size before (low: repeats); 0 and 1 for a
    text that is too short to repeat itself.
    """
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    raw = text.encode()
    return {
        "loops": 1 - len(set(grams)) / len(grams) if grams else 0.0,
        "compression": min(1.0, len(zlib.compress(raw, 9)) / len(raw)) if raw else 1.0,
    }


def measure(
    steered: Sequence[Steered],
    tasks: Sequence[Task],
    scores: Sequence[Mapping[str, Any]] | None = None,
    *,
    empty: str = "apart",
    labels: LabelSet = PAPER,
) -> pd.DataFrame:
    """One row a response: its key, token fractions, token shares, side effects.

    ``token fraction`` columns are of the targets of ``labels`` (the paper's metric), ``token
    share`` columns of all labels; a label that never occurs has NaN. Every metric that a person
    registered (:func:`own_metrics`) has a column beside the side effects.

    Answers are scored by :func:`stllms.tasks.score`; tasks without one give NaN, and a response
    without an answer is wrong. ``scores`` are those of
    :func:`stllms.generation.likelihood.scores` for the same responses. Raises ``ValueError``
    for a response without an annotation, of a task that is not among ``tasks``, or without its
    score.
    """
    annotations = [one.annotation for one in steered if one.annotation is not None]
    if lacking := len(steered) - len(annotations):
        raise ValueError(f"{lacking} of {len(steered)} chains have no annotation")
    by_id = {task.id: task for task in tasks}
    strange = sorted({one.task_id for one in steered} - by_id.keys())
    if strange:
        raise ValueError(
            f"{len(strange)} tasks of the chains were not asked: {strange[0]}, ..."
        )
    found_labels = {span.label for annotation in annotations for span in annotation.spans}
    shares = pd.DataFrame(index=range(len(steered)))
    for what, names in ((FRACTION, labels.targets), (SHARE, labels.names)):
        values = token_fractions(annotations, names, empty=empty)
        values[:, [name not in found_labels for name in names]] = np.nan
        shares[[f"{what}/{name}" for name in names]] = values
    own = own_metrics()
    side = [
        _side_effects(one, annotation, by_id[one.task_id])
        | _measured(own, one.response, annotation, by_id[one.task_id])
        for one, annotation in zip(steered, annotations, strict=True)
    ]
    keys = pd.DataFrame([one.key for one in steered], columns=list(STEERED_KEY))
    found = pd.concat([keys, shares, pd.DataFrame(side)], axis=1)
    if scores is None:
        return found
    given = pd.DataFrame(scores, columns=[*STEERED_KEY, "kl", "perplexity"])
    given["log perplexity"] = np.log(given.pop("perplexity").astype(float))
    given["kl"] = given["kl"].astype(float)
    joined = found.merge(
        given, on=list(STEERED_KEY), how="left", validate="1:1", indicator=True
    )
    if lacking := (joined.pop("_merge") == "left_only").sum():
        raise ValueError(f"{lacking} of {len(found)} chains have no score")
    return joined


def _side_effects(one: Steered, annotation: Annotation, task: Task) -> dict[str, float]:
    response = one.response
    found = {
        "accuracy": score(task, response.answer),
        "tokens": float(len(response.output_ids)),
        "closed": float(response.closed),
        "truncated": float(not response.finished),
        **coherence(response.thinking),
        "labelled": np.nan if annotation.failed else annotation.ledger["coverage"],
    }
    if annotation.annotator == "grammar":
        thinker = response.thinking != response.answer  # a text without tags is both
        found["well-formed"] = float(grammar.well_formed(response, thinker=thinker))
    return found


def own_metrics() -> dict[str, Callable[[Response, Annotation, Task], float]]:
    """The metrics that a person registered: ``@registry.metric("name")`` on a function of a
    response, its annotation and its task; NaN where there is nothing to measure.

    Raises:
        ValueError: a name that a measure has already, or with a slash.
    """
    registry.load_entry_points()
    taken = (FRACTION, SHARE, *SIDE_EFFECTS, *STEERED_KEY)
    for name in registry.metric:
        if name in taken or "/" in name:
            raise ValueError(
                f"metric {name!r}: choose another name, without a slash; taken are "
                f"{', '.join(taken)}"
            )
    return dict(registry.metric)


def _measured(
    own: Mapping[str, Callable[[Response, Annotation, Task], float]],
    response: Response,
    annotation: Annotation,
    task: Task,
) -> dict[str, float]:
    found = {}
    for name, metric in own.items():
        value = metric(response, annotation, task)
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"metric {name!r} gave {value!r} for task {task.id}: expected a number, NaN "
                "where there is none"
            ) from None
    return found


# --- of all tasks ------------------------------------------------------------------------


def table(measured: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """The rows of ``steering.csv``, from :func:`measure`: means over tasks with a bootstrap
    interval, and the sign-flip p-value of the paired difference from the baseline.

    ``behaviour`` is empty for a side effect. ``p_holm`` corrects the tests of the paper's
    figure: a behaviour under its own vector. ``null_low`` and ``null_high`` are the null
    interval, the range of the control directions at the same layer and coefficient (NaN without
    any); ``null_n`` is how many tasks it is from. Where controls were measured on some of the
    tasks only, the mean difference of each from the baseline of its own tasks is added to the
    mean of the whole baseline, so that every value of a row is for the same tasks.
    """
    names, by_condition = _conditions(measured)
    plain, null = by_condition[PLAIN], _null(by_condition)
    rows = []
    for (direction, layer, coefficient), found in by_condition.items():
        controls = null.get((layer, coefficient), pd.DataFrame(index=names)).to_dict("index")
        changes = found - plain.reindex(found.index)
        for name in names:
            metric, _, behaviour = name.partition("/")
            interval = stats.bootstrap(found[name], seed=seed)
            is_plain = direction == PLAIN[0]
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
                    "p": np.nan if is_plain else stats.sign_flip(changes[name], seed=seed),
                    "p_holm": np.nan,
                    "null_low": np.nan,
                    "null_high": np.nan,
                    "null_n": 0,
                    **controls[name],
                }
            )
    made = pd.DataFrame(rows)
    own = (made["metric"] == FRACTION) & (made["behaviour"] == made["direction"])
    made.loc[own, "p_holm"] = stats.holm(made.loc[own, "p"])
    return made


def _conditions(measured: pd.DataFrame) -> tuple[list[str], dict[tuple, pd.DataFrame]]:
    """The measured columns, and the rows of every (direction, layer, coefficient) by task.

    Raises ``ValueError`` without a baseline, or where a condition has a task twice.
    """
    names = [c for c in measured.columns if c not in STEERED_KEY]
    condition = ["direction", "layer", "coefficient"]
    if not (measured["direction"] == PLAIN[0]).any():
        raise ValueError("there are no plain chains (direction 'none') to compare with")
    if measured.duplicated(["task_id", *condition]).any():
        raise ValueError("a condition has a task twice: measure each operation apart")
    groups = measured.groupby(condition, sort=False)
    return names, {place: rows.set_index("task_id")[names] for place, rows in groups}


def _null(by_condition: Mapping[tuple, pd.DataFrame]) -> dict[tuple, pd.DataFrame]:
    """(layer, coefficient) -> smallest and largest control, and the fewest tasks of any, a row
    a measure.
    """
    plain = by_condition[PLAIN]
    found: dict[tuple, list[tuple[pd.Series, pd.Series]]] = defaultdict(list)
    for (direction, *place), rows in by_condition.items():
        if is_control(direction):
            change = rows - plain.reindex(rows.index)
            found[tuple(place)].append((plain.mean() + change.mean(), change.count()))
    made = {}
    for at, controls in found.items():
        every, n = (pd.DataFrame(one) for one in zip(*controls, strict=True))
        fewest = n.where(n > 0).min().fillna(0).astype(int)
        edges = {"null_low": every.min(), "null_high": every.max(), "null_n": fewest}
        made[at] = pd.DataFrame(edges)
    return made


def shown_coefficient(rows: pd.DataFrame) -> float:
    """The coefficient of the figures that show one of each sign: 1, the paper's, where it was
    added; else the smallest with controls; else the smallest. NaN where nothing was steered.
    """
    added = rows[(rows["coefficient"] > 0) & ~rows["direction"].map(is_control)]
    if (added["coefficient"] == 1).any():
        return 1.0
    controlled = added.loc[added["null_n"] > 0, "coefficient"]
    return float(controlled.min() if len(controlled) else added["coefficient"].min())


def bars(rows: pd.DataFrame, *, labels: LabelSet = PAPER) -> pd.DataFrame:
    """The paper's bars: token fraction of each target plain, and with its own direction added
    and subtracted (:func:`shown_coefficient`).

    Columns ``behaviour``, ``mode`` (plain, positive, negative), ``value``, ``low``, ``high``,
    ``n``, ``null_low``, ``null_high``, ``null_n``; a behaviour without a direction has NaN.
    """
    found = rows[(rows["metric"] == FRACTION) & ~rows["direction"].map(is_control)]
    found = found.set_index(["behaviour", "direction", "coefficient"])
    size = shown_coefficient(rows)
    keys = [(b, own or b, c and c * size) for b in labels.targets for own, c in MODES.values()]
    values = ["value", "ci_low", "ci_high", "n", "null_low", "null_high", "null_n"]
    made = found.reindex(columns=values, index=keys).astype(float)
    made = made.rename(columns={"ci_low": "low", "ci_high": "high"}).reset_index("behaviour")
    made.insert(1, "mode", [*MODES] * len(labels.targets))
    return made.reset_index(drop=True)


def differences(measured: pd.DataFrame, rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Own token fraction under each direction minus that of the baseline, paired by task.

    Mean difference with its bootstrap interval; p-values are those of :func:`table`.
    """
    _, by_condition = _conditions(measured)
    place = ["behaviour", "layer", "coefficient"]
    tested = rows.loc[rows["p_holm"].notna(), [*place, "p", "p_holm"]].reset_index(drop=True)
    found = []
    for at in tested[place].itertuples(index=False):
        mine = by_condition[tuple(at)][f"{FRACTION}/{at.behaviour}"]
        plain = by_condition[PLAIN][mine.name].reindex(mine.index)
        found.append(asdict(stats.bootstrap(mine - plain, seed=seed)))
    intervals = pd.DataFrame(found, columns=["value", "low", "high", "n"])
    made = pd.concat([tested[place], intervals, tested[["p", "p_holm"]]], axis=1)
    return made.rename(columns={"value": "difference"})


def by_annotator(
    who: Sequence[annotators.Annotator],
    chains: Sequence[Steered],
    tasks: Sequence[Task],
    *,
    model: Model,
    seed: int = 0,
    **how: Any,
) -> pd.DataFrame:
    """:func:`differences` of the same chains by several annotators, with a column
    ``annotator``; the controls are left out. ``how`` is passed to :func:`measure`. What an
    annotator labelled already is not labelled again.
    """
    own = [one for one in chains if not is_control(one.direction)]
    found = {}
    for each in who:
        measured = measure(annotators.steered(each, own, model=model), tasks, **how)
        found[each.name] = differences(measured, table(measured, seed=seed), seed=seed)
    return pd.concat(found, names=["annotator"]).reset_index("annotator")


def changes(rows: pd.DataFrame, *, labels: LabelSet = PAPER) -> pd.DataFrame:
    """What else moves: change of the token share of all labels (columns) under every target's
    direction (index ``direction``) against the baseline (:func:`shown_coefficient`).
    """
    shares = rows[rows["metric"] == SHARE]
    plain = shares[shares["direction"] == PLAIN[0]].set_index("behaviour")["value"]
    added = shares["coefficient"] == shown_coefficient(rows)
    steered = shares[added & shares["direction"].isin(labels.targets)]
    wide = steered.pivot(index="direction", columns="behaviour", values="value")
    order = [b for b in labels.targets if b in wide.index]
    return wide.reindex(index=order, columns=labels.names) - plain[list(labels.names)]


# --- examples ----------------------------------------------------------------------------


def showcase(
    steered: Sequence[Steered], measured: pd.DataFrame, behaviours: Sequence[str]
) -> tuple[Steered, Steered] | None:
    """(baseline, positive) of the finished response whose own token fraction rose most, over
    all ``behaviours`` and their positive coefficients; the earlier behaviour where two rose
    alike. ``None`` where nothing was steered or nothing rose (the share of repeated 4-grams
    off it).
    """
    at = {one.key[:4]: one for one in steered}
    _, by_condition = _conditions(measured)
    best, pair = 0.0, None
    for behaviour in behaviours:
        name = f"{FRACTION}/{behaviour}"
        for place, rows in by_condition.items():
            if place[0] != behaviour or place[2] <= 0:
                continue
            rise = (rows[name] - by_condition[PLAIN][name].reindex(rows.index)).fillna(-1)
            whole = rise - rows["truncated"] - rows["loops"]
            if whole.max() > best:
                task = whole.idxmax()
                best, pair = whole.max(), (at[task, *PLAIN], at[task, *place])
    return pair


def texts(steered: Sequence[Steered]) -> pd.DataFrame:
    """One row a segment of some responses: the data of a figure that shows them."""
    rows = [
        (one.task_id, one.direction, one.coefficient, s.label, s.start, s.end, s.text)
        for one in steered
        for s in (one.annotation.segments if one.annotation else ())
    ]
    columns = ["task_id", "direction", "coefficient", "label", "start", "end", "text"]
    return pd.DataFrame(rows, columns=columns)
