"""Layer effects: how much a direction at a layer and a position matters to the next token.

METHOD, section 7. Positions ``t = s - 1`` are the tokens *before* span starts ``s``.

* ``"kl"``, the exact causal effect, in nats: add ``c * direction[b][l]`` to ``h[l, t]`` at that
  one position, run the rest, and take ``KL(p_clean || p_patched)`` of the next token at ``t``.
* ``"published"``: ``| < u[b][l], dJ(t)/dh[l, t] > |`` with the unit direction ``u`` and the
  surrogate ``J(t) = -(1/V) * sum_j stopgrad(log p_j) * log p_j`` of the released values.

**One pass.** Position ``t`` reaches the logits at ``t`` only through its own stream. One
forward over the response keeps keys and values; then every row of a second, short pass is one
token at its own position, attending to the cached positions before it and to itself. One
backward there gives every gradient; exact patching adds a row for each layer, direction and
position. A row patched at layer ``l`` equals the clean one below ``l``, so the layers up to
``l`` are skipped (nnsight's ``skip``) and the row begins with the clean output of layer ``l``:
half the work.

**Precision.** In float32 this equals the naive loops to rounding. In bfloat16 products of
another size round otherwise: a coefficient of 0 need not give 0 nats (smollm2 gave some
thousandths), and effects depend a little on ``max_rows``. No benchmark keeps these numbers.

Rows (:mod:`stllms.rows`) go in chunks of ``max_rows``, by default as many as their logits fit
into :data:`BUDGET` bytes, so no mask is larger than ``[max_rows, T + max_rows]``. At a real
vocabulary the unembedding of every row is most of the work: there only fewer rows help, and
:func:`collect` measures the exact effects at a seeded sample of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from nnsight import save
from torch import Tensor

from stllms import means, metrics, spans
from stllms.effects import (
    PAIRED,
    SETS,
    LayerEffects,
    Sample,
    fingerprint,
    ledger_of,
    measurable,
    null_key,
    sample,
)
from stllms.models import Model
from stllms.progress import token_bar
from stllms.records import Annotation, Response
from stllms.rows import Rows
from stllms.vectors import Controls, SteeringVectors

OBJECTIVES: tuple[str, ...] = ("kl", "published")
#: Responses between two saves of :func:`collect`.
SAVE_EVERY = 10
#: Bytes of the logits of one short pass.
BUDGET = 2**27
#: Rows of one short pass at most: they attend to each other's columns, masked, in vain.
MAX_ROWS = 512
#: Rows whose distribution over the vocabulary is held in float32 at once.
KL_ROWS = 64


def layer_effects(
    model: Model,
    input_ids: Tensor | Sequence[int],
    positions: Tensor | Sequence[int],
    directions: Tensor,
    *,
    objective: str = "kl",
    coefficient: float = 1.0,
    max_rows: int | None = None,
) -> Tensor:
    """Effects of all directions at every layer and position of one response.

    Args:
        input_ids: ``[T]``, prompt and output.
        positions: ``[P]`` positions ``t`` in ``1 .. T - 1``; ``s - 1`` for a span ``[s, e)``.
        directions: ``[N, L, D]``; ``"published"`` uses them at unit length.
        objective: ``"kl"`` (nats, full-length directions times ``coefficient``) or
            ``"published"`` (absolute values; takes no coefficient).
        max_rows: rows of a short pass (:func:`rows_of`, unless said); in float32 the result
            does not depend on it, in bfloat16 it does by its rounding ("Precision" above).

    Returns:
        ``[N, L, P]`` float32 on the CPU.

    Raises:
        ValueError: positions out of range, at 0 or missing, directions of another shape or not
            finite, an unknown objective, or a model whose attention cannot take a mask.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
    max_rows = rows_of(model) if max_rows is None else max_rows
    if max_rows < 1:
        raise ValueError(f"max_rows should be at least 1, it is {max_rows}")
    ids = torch.as_tensor(input_ids, dtype=torch.long)
    where = torch.as_tensor(positions)
    if where.is_floating_point() and len(where):
        raise ValueError(f"positions are tokens, whole numbers, not {where.dtype}")
    where = where.long()
    _check(model, ids, where, directions)
    if objective == "published" and coefficient != 1.0:
        raise ValueError('objective "published" is a gradient: it takes no coefficient')
    rows = Rows(model, ids, where)
    effects = []
    for chunk in where.split(max_rows):
        if objective == "published":
            effects.append(_published(rows, chunk, directions))
            continue
        pairs = list(product(range(len(directions)), range(len(chunk))))
        found = _exact(rows, chunk, directions * coefficient, pairs, max_rows)
        effects.append(found.unflatten(0, (len(directions), len(chunk))).transpose(1, 2))
    return torch.cat(effects, dim=-1)


def rows_of(model: Model) -> int:
    """Rows of a short pass whose logits fit into :data:`BUDGET`, :data:`MAX_ROWS` at most."""
    vocabulary = model.hf.get_input_embeddings().weight.shape[0]
    return max(1, min(MAX_ROWS, BUDGET // (vocabulary * model.dtype.itemsize)))


def _check(model: Model, ids: Tensor, positions: Tensor, directions: Tensor) -> None:
    if ids.ndim != 1 or positions.ndim != 1:
        raise ValueError(
            "input_ids and positions should have one dimension, they have shapes "
            f"{tuple(ids.shape)} and {tuple(positions.shape)}"
        )
    if not len(positions):
        raise ValueError("there are no positions: a behaviour without spans has no effects")
    size = model.hf.get_input_embeddings().weight.shape[0]
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"ids run from {ids.min()} to {ids.max()}, {model.name} has {size}")
    bad = positions[(positions < 1) | (positions >= len(ids))]
    if len(bad):
        raise ValueError(
            f"positions {bad.tolist()} are not in 1 .. {len(ids) - 1}; a position is the token "
            "before a span, and position 0 has nothing before it to attend to"
        )
    wanted = (model.n_layers, model.d_model)
    if directions.ndim != 3 or tuple(directions.shape[1:]) != wanted:
        raise ValueError(
            f"directions have shape {tuple(directions.shape)}, expected [N, L, D] = "
            f"(N, {wanted[0]}, {wanted[1]}) for {model.name}"
        )
    finite = torch.isfinite(directions).all(-1)
    if not finite.all():
        row, layer = (~finite).nonzero()[0].tolist()
        raise ValueError(f"direction {row} at layer {layer} is not finite")
    attention = model.hf.config.get_text_config()._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"attention {attention!r} takes no mask of four dimensions: load {model.name} with "
            'attn_implementation="sdpa" or "eager"'
        )


def _published(rows: Rows, positions: Tensor, directions: Tensor) -> Tensor:
    """``|<u, dJ/dh>|`` of some positions: ``[N, L, R]``, one forward and one backward."""
    model = rows.model
    inputs = rows.inputs(positions)
    units = torch.nn.functional.normalize(directions.float(), dim=-1).to(model.device)
    with torch.enable_grad(), model.nn.trace(**inputs):
        gradients = save([])
        outputs = []
        for layer, envoy in enumerate(model.nn_layers):
            output = envoy.output
            if layer == 0:
                output.requires_grad_(True)
            outputs.append(output)
        objective = surrogate(model.nn.output.logits[0].float()).sum()
        with objective.backward():
            for output in reversed(outputs):
                gradients.append(output.grad[0].float().to(units.device))
    return torch.einsum("nld,lrd->nlr", units, torch.stack(gradients[::-1])).abs().cpu()


def surrogate(logits: Tensor) -> Tensor:
    """``J = -(1/V) * sum_j stopgrad(log p_j) * log p_j`` of ``[..., V]`` logits: ``[...]``.

    Its gradient is that of the published objective, whose value is NaN (METHOD, section 7).
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.detach() * log_p).mean(-1)


def _exact(
    rows: Rows,
    positions: Tensor,
    vectors: Tensor,
    pairs: Sequence[tuple[int, int]],
    max_rows: int,
    tick: Callable[[int], object] = lambda _rows: None,
) -> Tensor:
    """``KL(p_clean || p_patched)`` at every layer, ``[M, L]``, for ``M`` pairs of a row of
    ``vectors [N, L, D]`` and one of ``positions [R]``. ``tick`` is told of every pass' rows."""
    model = rows.model
    n_layers = vectors.shape[1]
    with torch.no_grad(), model.nn.trace(**rows.inputs(positions)):
        hidden = save([])
        for envoy in model.nn_layers:
            hidden.append(envoy.output[0].clone())
        clean = save(model.nn.output.logits[0])
    vectors = vectors.to(hidden[0].device, hidden[0].dtype)
    effects = torch.zeros(len(pairs), n_layers)
    which, row = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    # All (layer, pair), by layer, so that a chunk skips as much as it can.
    grid = torch.cartesian_prod(torch.arange(n_layers), torch.arange(len(pairs)))
    for items in grid.split(max_rows):
        layers, pair = items.T
        patched = _patched_logits(
            rows, positions[row[pair]], row[pair], layers, vectors[which[pair], layers], hidden
        )
        effects[pair, layers] = _kl(clean, row[pair], patched)
        tick(len(items))
    return effects


def _patched_logits(
    rows: Rows,
    positions: Tensor,
    row: Tensor,
    layers: Tensor,
    vectors: Tensor,
    hidden: list[Tensor],
) -> Tensor:
    """Logits ``[R, V]`` of rows at ``positions [R]``, each with its vector ``[R, D]`` added at
    its layer ``[R]``. Rows begin at the lowest of these layers from the clean ``hidden``."""
    model = rows.model
    first, last = int(layers[0]), int(layers[-1])
    start = hidden[first][row]
    start[layers == first] += vectors[layers == first].to(start.device)
    start = start[None]
    with torch.no_grad(), model.nn.trace(**rows.inputs(positions)):
        for layer in range(first):
            model.nn_layers[layer].skip(start)
        model.nn_layers[first].skip(start)
        for layer in range(first + 1, last + 1):
            here = layers == layer
            output = model.nn_layers[layer].output
            output[:, here] += vectors[here].to(output.device)
        logits = save(model.nn.output.logits[0])
    return logits


def _kl(clean: Tensor, row: Tensor, patched: Tensor) -> Tensor:
    """``KL(clean[row] || patched)`` in float32, ``[R]``, on the CPU; rounding below 0 is 0."""
    values = []
    for at, logits in zip(row.split(KL_ROWS), patched.split(KL_ROWS), strict=True):
        log_p = clean[at].float().log_softmax(-1)
        log_q = logits.float().log_softmax(-1)
        values.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(values).clamp(min=0).cpu()


def collect(
    model: Model,
    responses: Sequence[Response],
    annotations: Sequence[Annotation],
    steering_vectors: SteeringVectors,
    *,
    objectives: Sequence[str] = OBJECTIVES,
    targets: Sequence[str] | None = None,
    controls: Controls | None = None,
    n_positions: int | None = None,
    seed: int = 0,
    max_rows: int | None = None,
    path: Path | None = None,
    progress: bool = True,
) -> LayerEffects:
    """Effects of every response, averaged over its positions: all behaviours, both sets.

    ``own`` averages the positions of a behaviour's own spans, ``others`` those of all other
    behaviours' (METHOD, section 7). The published objective is measured at all of them, in one
    pass for all behaviours; the exact one takes a row of a pass for each position, layer and
    direction, and is measured at ``n_positions`` a behaviour and set
    (:func:`stllms.effects.sample`). Responses without a usable position are not among
    ``response_ids``; ``ledger`` counts them, and the positions that were measured.

    Args:
        targets: the behaviours whose exact effects are measured, all unless said; those of the
            others are NaN.
        controls: directions that mean nothing, as long as the real ones, that the objective
            ``"kl"`` measures too, at a part of every target's own positions; the target's own
            effects at that part are under :data:`~stllms.effects.PAIRED`.
        n_positions: of the sample; ``None`` measures at all positions.
        seed: of the sample.
        max_rows: rows of a short pass, as in :func:`layer_effects`.
        path: a cache of this computation, saved after every :data:`SAVE_EVERY` responses. Layer
            effects there that began the same work (model, dtype, directions, controls,
            objectives, ids, spans and positions) are taken up and completed; of a file with
            more responses the first ones are returned and the file stays.

    Raises:
        ValueError: lists of different length or of other tasks, a task twice, targets without
            a direction, or effects that are not finite (naming the response).
        StaleArtefact: ``path`` holds the effects of other work, which is named.
        artifacts.BadFile: ``path`` is a file of something else. It stays as it is.
    """
    names = steering_vectors.behaviours
    targets = names if targets is None else tuple(targets)
    for name in targets:
        steering_vectors.index(name)
    pairs = measurable(responses, annotations) if names else []
    chosen = sample(pairs, targets, n_positions, seed=seed)
    if controls is None:
        controls = Controls((), steering_vectors.directions[:0])
    keys = [f"{objective}/{which}" for objective in objectives for which in SETS]
    if "kl" in objectives and len(controls):
        keys += [PAIRED, *map(null_key, controls.names)]
    marks = [fingerprint(*pair, one) for pair, one in zip(pairs, chosen, strict=True)]
    held = LayerEffects(
        dict.fromkeys(keys, torch.empty(0, *steering_vectors.directions.shape[:2])),
        (),
        names,
        model.name,
        means.digest(torch.cat([steering_vectors.directions, controls.directions])),
        str(model.dtype),
        ledger=ledger_of(annotations) | _counted(chosen),
        weights=model.identity["weights"],
    ).resume(path, marks)
    result = held.first(len(pairs))
    work = _Work(model, steering_vectors, controls, tuple(objectives), max_rows)
    done = len(result.response_ids)
    rows = [work.rows(one) for one in chosen]
    with token_bar(sum(rows), "layer effects", enabled=progress) as bar:
        bar.skip(sum(rows[:done]))
        for place in range(done, len(pairs)):
            found = work.of_response(*pairs[place], chosen[place], partial(bar.tick, 0))
            result = result.plus(pairs[place][0].task_id, marks[place], found)
            if path is not None and len(result.response_ids) % SAVE_EVERY == 0:
                result.save(path)
    if path is not None and len(held.response_ids) <= len(pairs):
        result.save(path)
    return result


def _counted(chosen: Sequence[Sample]) -> dict[str, int]:
    """The most positions a behaviour that any has in each set of a sample."""
    found = {}
    for which in (*SETS, "controls"):
        names = {name for one in chosen for name in one[which]}
        sizes = [sum(len(one[which][name]) for one in chosen) for name in names]
        found[f"positions a behaviour, {which}"] = max(sizes, default=0)
    return found


@dataclass(frozen=True)
class _Work:
    """What is measured of every response."""

    model: Model
    vectors: SteeringVectors
    controls: Controls
    objectives: tuple[str, ...]
    max_rows: int | None

    def pairs(self, chosen: Sample) -> dict[tuple[int, int], int]:
        """(direction, position) of the exact effects -> its place; controls come after the
        behaviours."""
        n = len(self.vectors.behaviours)
        found = [
            (self.vectors.index(name), t)
            for which in SETS
            for name, mine in chosen[which].items()
            for t in mine
        ]
        found += [
            (n + k, t)
            for mine in chosen["controls"].values()
            for t in mine
            for k in range(len(self.controls))
        ]
        return {pair: place for place, pair in enumerate(dict.fromkeys(found))}

    def rows(self, chosen: Sample) -> int:
        """Rows of short passes that a response takes; the published objective counts as one."""
        exact = len(self.pairs(chosen)) * self.vectors.n_layers
        return exact * ("kl" in self.objectives) + ("published" in self.objectives)

    def of_response(
        self, response: Response, annotation: Annotation, chosen: Sample, tick
    ) -> dict[str, Tensor]:
        """The new entry of one response: ``[N, L]`` under every key."""
        spans.check(response, annotation.spans)
        ids = torch.tensor([*response.prompt_ids, *response.output_ids])
        found: dict[str, Tensor] = {}
        if "published" in self.objectives:
            found |= self._published(response, ids, annotation)
            tick(1)
        if "kl" in self.objectives:
            found |= self._exact(response, ids, chosen, tick)
        return found

    def _published(self, response: Response, ids: Tensor, annotation: Annotation):
        starts = sorted({span.start - 1 for span in annotation.spans if span.start > 1})
        effects = layer_effects(
            self.model, ids, starts, self.vectors.directions, objective="published",
            max_rows=self.max_rows,
        )  # fmt: skip
        _refuse_not_finite(effects, response, "published")
        column = {position: place for place, position in enumerate(starts)}
        found = {}
        for which in SETS:
            rows = torch.full(effects.shape[:2], torch.nan)
            for row, name in enumerate(self.vectors.behaviours):
                if mine := metrics.positions(annotation.spans, name, which):
                    rows[row] = effects[row][:, [column[t] for t in mine]].mean(-1)
            found[f"published/{which}"] = rows
        return found

    def _exact(self, response: Response, ids: Tensor, chosen: Sample, tick):
        pairs = self.pairs(chosen)
        n = len(self.vectors.behaviours)
        directions = torch.cat([self.vectors.directions, self.controls.directions])
        where = torch.tensor(sorted({t for _, t in pairs}), dtype=torch.long)
        effects = torch.zeros(len(pairs), self.vectors.n_layers)
        if pairs:
            _check(self.model, ids, where, directions)
            rows, size = Rows(self.model, ids, where), self.max_rows or rows_of(self.model)
            for chunk in where.split(size):
                column = {t: place for place, t in enumerate(chunk.tolist())}
                mine = [(which, column[t]) for which, t in pairs if t in column]
                places = [place for (_, t), place in pairs.items() if t in column]
                effects[places] = _exact(rows, chunk, directions, mine, size, tick)
        _refuse_not_finite(effects, response, "kl")

        def averaged(which: str, control: int | None = None) -> Tensor:
            found = torch.full((n, self.vectors.n_layers), torch.nan)
            for name, mine in chosen[which].items():
                row = self.vectors.index(name)
                one = row if control is None else n + control
                if mine:
                    found[row] = effects[[pairs[one, t] for t in mine]].mean(0)
            return found

        found = {f"kl/{which}": averaged(which) for which in SETS}
        if len(self.controls):
            found[PAIRED] = averaged("controls")
            for k, name in enumerate(self.controls.names):
                found[null_key(name)] = averaged("controls", k)
        return found


def _refuse_not_finite(effects: Tensor, response: Response, objective: str) -> None:
    if not torch.isfinite(effects).all():
        raise ValueError(f"{response.task_id}: {objective} effects are not finite")
