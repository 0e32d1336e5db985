"""Layer effects of many responses: at which positions, and resumed where a run stopped.

The published objective is measured at all positions, in one pass for all behaviours; the exact
effect takes a row of a pass for each position, layer and direction, and is measured at a seeded
sample of positions, at a part of which the control directions are measured as well.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stllms.annotation.placing import check
from stllms.attribution.effects import PAIRED, SETS, LayerEffects, null_key
from stllms.attribution.patching import (
    OBJECTIVES,
    Prefix,
    exact,
    layer_effects,
    rows_of,
)
from stllms.models.model import Model
from stllms.records import Annotation, Response, Span
from stllms.runs.store import refuse_other_work
from stllms.runs.workers import Tick, over
from stllms.terminal import token_bar
from stllms.vectors.directions import SteeringVectors
from stllms.vectors.means import mark
from stllms.vectors.nulls import Controls

#: Responses between two saves of :func:`collect`.
SAVE_EVERY = 10
#: Of how many sampled positions one is measured with the control directions too.
CONTROL_SHARE = 4
#: Positions of one response: set (``own``, ``others``, ``controls``) -> behaviour -> positions.
Sample = dict[str, dict[str, tuple[int, ...]]]


def collect(
    model: Model,
    responses: Sequence[Response],
    annotations: Sequence[Annotation],
    steering_vectors: SteeringVectors,
    *,
    targets: Sequence[str] | None = None,
    controls: Controls | None = None,
    n_positions: int | None = None,
    seed: int = 0,
    path: Path | None = None,
    progress: bool = True,
) -> LayerEffects:
    """Effects of every response, averaged over its positions: all behaviours, both sets.

    ``own`` averages the positions of a behaviour's own spans, ``others`` those of all other
    behaviours' (method, section 7). Responses without a usable position are not among
    ``response_ids``; ``ledger`` counts them, and the positions that were measured.

    Args:
        model: whose logits.
        responses: those to measure, each task once.
        annotations: theirs, in the same order, with the spans.
        steering_vectors: whose directions.
        targets: the behaviours whose exact effects are measured, all unless said; those of the
            others are NaN.
        controls: control directions, whose exact effects are measured at a part of every
            target's own positions; the target's own effects at that part are under ``PAIRED``.
        n_positions: per behaviour and set, of :func:`sample`; ``None`` measures at all.
        seed: of the sample.
        path: a cache of this computation, saved after every :data:`SAVE_EVERY` responses. Layer
            effects there that began the same work (model, dtype, directions, controls,
            objectives, ids, spans and positions) are taken up and completed.
        progress: whether to show a bar.

    Raises:
        ValueError: lists of different length or of other tasks, a task twice, targets without
            a direction, or effects that are not finite (naming the response).
        StaleArtefact: ``path`` holds the effects of other work, which is named.
        BadFile: ``path`` is a file of something else. It stays as it is.
    """
    names = steering_vectors.behaviours
    targets = names if targets is None else tuple(targets)
    for name in targets:
        steering_vectors.index(name)
    pairs = measurable(responses, annotations) if names else []
    chosen = sample(pairs, targets, n_positions, seed=seed)
    work = _Work(steering_vectors, controls or Controls((), steering_vectors.directions[:0]))
    marks = [fingerprint(*pair, one) for pair, one in zip(pairs, chosen, strict=True)]
    result = _resume(path, work.nothing(model, _ledger(annotations, chosen)), marks)
    done = len(result.response_ids)
    rows = [work.rows(one) for one in chosen]
    with token_bar(sum(rows), "layer effects", enabled=progress) as bar:
        bar.skip(sum(rows[:done]))
        todo = [(*pair, one) for pair, one in zip(pairs, chosen, strict=True)][done:]
        made = over(model, work.of_response, todo, bar.tick)
        for (response, *_), mark, found in zip(todo, marks[done:], made, strict=True):
            result = result.plus(response.task_id, mark, found)
            if path is not None and len(result.response_ids) % SAVE_EVERY == 0:
                result.save(path)
    if path is not None:
        result.save(path)
    return result


# --- at which positions ------------------------------------------------------------------


def positions(spans: Sequence[Span], behaviour: str, which: str = "own") -> list[int]:
    """Positions ``t = s - 1`` before span starts, in order, each once (method, section 7).

    ``"own"``: the spans of ``behaviour`` (the text of the paper); ``"others"``: those of all
    other behaviours (the published code). A span at ``s <= 1`` has no earlier position with a
    prefix and is left out.
    """
    own = which == "own"
    return sorted({s.start - 1 for s in spans if (s.label == behaviour) == own and s.start > 1})


def sample(
    pairs: Sequence[tuple[Response, Annotation]],
    names: Sequence[str],
    n: int | None,
    *,
    seed: int = 0,
) -> list[Sample]:
    """Where the exact effects of each response are measured: ``n`` positions per behaviour and
    set over all responses (``None``: all positions), and for control directions the first
    :data:`CONTROL_SHARE`-th of its own ones.

    Responses take turns in a seeded order, each giving one of its positions, drawn without
    replacement, per turn. So every response has one before any has two, and the mean over
    responses of a response's mean stays what is estimated, with the least variance for ``n``.
    """
    few = None if n is None else max(1, n // CONTROL_SHARE)
    found: list[Sample] = [{which: {} for which in (*SETS, "controls")} for _ in pairs]
    for name in names:
        turns = {which: _turns(pairs, name, which, seed) for which in SETS}
        taken = {which: turns[which][:n] for which in SETS} | {"controls": turns["own"][:few]}
        for which, those in taken.items():
            for place, one in enumerate(found):
                one[which][name] = tuple(sorted(t for at, t in those if at == place))
    return found


def _turns(
    pairs: Sequence[tuple[Response, Annotation]], name: str, which: str, seed: int
) -> list[tuple[int, int]]:
    """(response, position) in the order in which they are taken."""
    turns = []
    for place, (response, annotation) in enumerate(pairs):
        rng = np.random.default_rng([seed, mark(f"{which}/{name}/{response.task_id}")])
        order = rng.random()
        mine = rng.permutation(positions(annotation.spans, name, which))
        turns += [(turn, order, place, int(t)) for turn, t in enumerate(mine)]
    return [(place, t) for _, _, place, t in sorted(turns)]


def measurable(
    responses: Sequence[Response], annotations: Sequence[Annotation]
) -> list[tuple[Response, Annotation]]:
    """The responses that have a usable span, each with its annotation.

    Raises:
        ValueError: lists of different length, in another order, or a task twice.
    """
    if len(responses) != len(annotations):
        raise ValueError(f"{len(responses)} responses but {len(annotations)} annotations")
    pairs = list(zip(responses, annotations, strict=True))
    for response, annotation in pairs:
        if response.task_id != annotation.task_id:
            raise ValueError(
                f"the annotation of {annotation.task_id} stands at the response of "
                f"{response.task_id}: both lists should be in one order"
            )
    for task_id, times in Counter(response.task_id for response in responses).items():
        if times > 1:
            raise ValueError(f"{times} responses have task id {task_id}: give each task once")
    return [pair for pair in pairs if any(span.start > 1 for span in pair[1].spans)]


def _ledger(annotations: Sequence[Annotation], chosen: Sequence[Sample]) -> dict[str, int]:
    """What is measured of these annotations, and what cannot be: a span at one of the first
    two tokens has no earlier position with a token before it. Of each set of the sample, the
    most positions that any behaviour has."""
    starts = [span.start for annotation in annotations for span in annotation.spans]
    late = sum(start > 1 for start in starts)
    ledger = {
        "responses": len(chosen),
        "responses without a usable span": len(annotations) - len(chosen),
        "spans": late,
        "spans at the first two tokens": len(starts) - late,
    }
    for which in (*SETS, "controls"):
        sizes: Counter[str] = Counter()
        for one in chosen:
            sizes.update({name: len(mine) for name, mine in one[which].items()})
        ledger[f"positions a behaviour, {which}"] = max(sizes.values(), default=0)
    return ledger


# --- resuming ----------------------------------------------------------------------------


def fingerprint(response: Response, annotation: Annotation, sampled: Sample) -> str:
    """A hash of all that the effects of one response depend on: task, ids, spans and the
    positions that are measured."""
    ids = [*response.prompt_ids, *response.output_ids]
    places = [(span.label, span.start, span.end) for span in annotation.spans]
    content = repr((response.task_id, ids, places, sampled))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _resume(path: Path | None, new: LayerEffects, wanted: Sequence[str]) -> LayerEffects:
    """What ``path`` holds of the work of ``new`` on the responses with the fingerprints
    ``wanted``; ``new`` where there is no file.

    Raises:
        StaleArtefact: effects of other work, naming what differs; the file stays.
    """
    if path is None or not path.is_file():
        return new
    found = LayerEffects.load(path)
    begun = replace(new, fingerprints=tuple(wanted)[: len(found.response_ids)])
    refuse_other_work(path, *(_made_from(effects) for effects in (found, begun)))
    return replace(found, ledger=new.ledger)


def _made_from(effects: LayerEffects) -> dict[str, Any]:
    return {
        "model": effects.model,
        "weights": effects.weights,
        "dtype": effects.dtype,
        "directions or controls": effects.directions,
        "behaviours": effects.behaviours,
        "controls": list(effects.effects),
        "responses, spans or sample of positions": effects.fingerprints,
    }


# --- one response ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What is measured of every response."""

    vectors: SteeringVectors
    controls: Controls

    @property
    def directions(self) -> Tensor:
        """Those of the behaviours, then the controls, ``[N + K, L, D]``."""
        return torch.cat([self.vectors.directions, self.controls.directions])

    @property
    def keys(self) -> list[str]:
        """Those of the effects that are measured."""
        keys = [f"{objective}/{which}" for objective in OBJECTIVES for which in SETS]
        if self.controls:
            keys += [PAIRED, *map(null_key, self.controls.names)]
        return keys

    def nothing(self, model: Model, ledger: dict[str, int]) -> LayerEffects:
        """The effects on a model of no response yet."""
        return LayerEffects(
            dict.fromkeys(self.keys, torch.empty(0, *self.vectors.directions.shape[:2])),
            (),
            self.vectors.behaviours,
            model.name,
            hashlib.sha256(self.directions.numpy().tobytes()).hexdigest(),
            str(model.dtype),
            ledger=ledger,
            weights=model.identity["weights"] or "",
        )

    def exact_means(self, chosen: Sample) -> list[tuple[int, dict[str, int], tuple[int, ...]]]:
        """The means of exact effects that a response's sample asks for: a behaviour's row, key
        of the effects -> row of :attr:`directions`, and the positions."""
        found, n = [], len(self.vectors.behaviours)
        controls = {null_key(name): n + k for k, name in enumerate(self.controls.names)}
        for which, by_name in chosen.items():
            for name, mine in by_name.items():
                row = self.vectors.index(name)
                if which in SETS:
                    found.append((row, {f"kl/{which}": row}, mine))
                elif controls:
                    found.append((row, {PAIRED: row, **controls}, mine))
        return [one for one in found if one[2]]

    def rows(self, chosen: Sample) -> int:
        """Rows of short passes that a response takes; the published objective counts as one."""
        return 1 + len(_pairs(self.exact_means(chosen))) * self.vectors.n_layers

    def of_response(
        self, model: Model, one: tuple[Response, Annotation, Sample], tick: Tick
    ) -> dict[str, Tensor]:
        """The new entry of one response: ``[N, L]`` under every key."""
        response, annotation, chosen = one
        check(response, annotation.spans)
        ids = torch.tensor([*response.prompt_ids, *response.output_ids])
        shape = self.vectors.directions.shape[:2]
        found = {key: torch.full(shape, torch.nan) for key in self.keys}
        starts = sorted({span.start - 1 for span in annotation.spans if span.start > 1})
        effects = layer_effects(
            model, ids, starts, self.vectors.directions, objective="published"
        )
        _refuse_not_finite(effects, response, "published")
        for row, name in enumerate(self.vectors.behaviours):
            for which in SETS:
                if mine := positions(annotation.spans, name, which):
                    columns = [starts.index(t) for t in mine]
                    found[f"published/{which}"][row] = effects[row][:, columns].mean(-1)
        tick(0, 1)
        means = self.exact_means(chosen)
        if pairs := _pairs(means):
            which, where = torch.tensor(list(pairs)).T
            prefix = Prefix(model, ids, where, self.directions)
            told = partial(tick, 0)
            effects = exact(prefix, self.directions, which, where, rows_of(model), told)
            _refuse_not_finite(effects, response, "kl")
        for row, directions, places in means:
            for key, direction in directions.items():
                found[key][row] = effects[[pairs[direction, t] for t in places]].mean(0)
        return found


def _pairs(
    means: Sequence[tuple[int, dict[str, int], tuple[int, ...]]],
) -> dict[tuple[int, int], int]:
    """(row of directions, position) -> place, each once."""
    pairs = ((d, t) for _, directions, mine in means for t in mine for d in directions.values())
    return {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}


def _refuse_not_finite(effects: Tensor, response: Response, objective: str) -> None:
    if not torch.isfinite(effects).all():
        raise ValueError(f"{response.task_id}: {objective} effects are not finite")
