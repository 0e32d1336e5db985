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

Rows (:mod:`stllms.rows`) go in chunks of ``max_rows``, so no mask is larger than
``[max_rows, T + max_rows]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from nnsight import save
from torch import Tensor

from stllms import means, metrics, spans
from stllms.effects import (
    SETS,
    LayerEffects,
    fingerprint,
    ledger_of,
    measurable,
    null_key,
)
from stllms.models import Model
from stllms.progress import each
from stllms.records import Annotation, Response
from stllms.rows import Rows
from stllms.vectors import SteeringVectors

OBJECTIVES: tuple[str, ...] = ("kl", "published")
#: Responses between two saves of :func:`collect`.
SAVE_EVERY = 10
#: Rows of one short pass.
MAX_ROWS = 256
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
    max_rows: int = MAX_ROWS,
) -> Tensor:
    """Effects of all directions at every layer and position of one response.

    Args:
        input_ids: ``[T]``, prompt and output.
        positions: ``[P]`` positions ``t`` in ``1 .. T - 1``; ``s - 1`` for a span ``[s, e)``.
        directions: ``[N, L, D]``; ``"published"`` uses them at unit length.
        objective: ``"kl"`` (nats, full-length directions times ``coefficient``) or
            ``"published"`` (absolute values; takes no coefficient).
        max_rows: rows of a short pass; in float32 the result does not depend on it, in
            bfloat16 it does by its rounding ("Precision" above).

    Returns:
        ``[N, L, P]`` float32 on the CPU.

    Raises:
        ValueError: positions out of range, at 0 or missing, directions of another shape or not
            finite, an unknown objective, or a model whose attention cannot take a mask.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
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
    effects = [
        _published(rows, chunk, directions)
        if objective == "published"
        else _exact(rows, chunk, directions * coefficient, max_rows)
        for chunk in where.split(max_rows)
    ]
    return torch.cat(effects, dim=-1)


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


def _exact(rows: Rows, positions: Tensor, vectors: Tensor, max_rows: int) -> Tensor:
    """``KL(p_clean || p_patched)`` of some positions: ``[N, L, R]``."""
    model = rows.model
    n, n_layers, _ = vectors.shape
    with torch.no_grad(), model.nn.trace(**rows.inputs(positions)):
        hidden = save([])
        for envoy in model.nn_layers:
            hidden.append(envoy.output[0].clone())
        clean = save(model.nn.output.logits[0])
    vectors = vectors.to(hidden[0].device, hidden[0].dtype)
    effects = torch.zeros(n, n_layers, len(positions))
    # All (layer, direction, position), by layer, so that a chunk skips as much as it can.
    grid = torch.cartesian_prod(
        torch.arange(n_layers), torch.arange(n), torch.arange(len(positions))
    )
    for items in grid.split(max_rows):
        layers, which, row = items.T
        patched = _patched_logits(
            rows, positions[row], row, layers, vectors[which, layers], hidden
        )
        effects[which, layers, row] = _kl(clean, row, patched)
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
    nulls: Tensor | None = None,
    max_rows: int = MAX_ROWS,
    path: Path | None = None,
    progress: bool = True,
) -> LayerEffects:
    """Effects of every response, averaged over its positions: all behaviours, both sets.

    The positions of all spans of a response go through :func:`layer_effects` together, once an
    objective; ``own`` averages those of a behaviour's own spans, ``others`` those of all other
    behaviours' (METHOD, section 7). Responses without a usable position are not among
    ``response_ids``; ``ledger`` counts them.

    Args:
        nulls: ``[K, L, D]`` directions that mean nothing, as long as the real ones, that the
            objective ``"kl"`` measures too, at every behaviour's own positions.
        max_rows: rows of a short pass, as in :func:`layer_effects`.
        path: a cache of this computation, saved after every :data:`SAVE_EVERY` responses. Layer
            effects there that began the same work (model, dtype, directions, objectives, ids
            and spans) are taken up and completed; of a file with more responses the first ones
            are returned and the file stays. Layer effects of any other work are replaced.

    Raises:
        ValueError: lists of different length or of other tasks, a task twice, or effects that
            are not finite (naming the response).
        artifacts.BadFile: ``path`` is a file of something else; it stays as it is.
    """
    names = steering_vectors.behaviours
    pairs = measurable(responses, annotations) if names else []
    directions = steering_vectors.directions
    nulls = directions[:0] if nulls is None else nulls
    keys = [f"{objective}/{which}" for objective in objectives for which in SETS]
    if "kl" in objectives:
        keys += [null_key(k) for k in range(len(nulls))]
    held = LayerEffects(
        dict.fromkeys(keys, torch.empty(0, *directions.shape[:2])),
        (),
        names,
        model.name,
        means.digest(torch.cat([directions, nulls])),
        str(model.dtype),
        ledger=ledger_of(annotations),
    ).resume(path, [fingerprint(*pair) for pair in pairs])
    result = held.first(len(pairs))
    todo = pairs[len(result.response_ids) :]
    done = len(result.response_ids)
    for pair in each(todo, "layer effects", unit="responses", done=done, enabled=progress):
        found = _of_response(model, *pair, steering_vectors, objectives, nulls, max_rows)
        result = result.plus(pair[0].task_id, fingerprint(*pair), found)
        if path is not None and len(result.response_ids) % SAVE_EVERY == 0:
            result.save(path)
    if path is not None and len(held.response_ids) <= len(pairs):
        result.save(path)
    return result


def _of_response(
    model: Model,
    response: Response,
    annotation: Annotation,
    steering_vectors: SteeringVectors,
    objectives: Sequence[str],
    nulls: Tensor,
    max_rows: int,
) -> dict[str, Tensor]:
    """The new entry of one response: ``[N, L]`` under every key."""
    spans.check(response, annotation.spans)
    starts = sorted({span.start - 1 for span in annotation.spans if span.start > 1})
    column = {position: place for place, position in enumerate(starts)}
    ids = [*response.prompt_ids, *response.output_ids]
    names = steering_vectors.behaviours
    found: dict[str, Tensor] = {}
    for objective in objectives:
        random = nulls if objective == "kl" else nulls[:0]
        directions = torch.cat([steering_vectors.directions, random])
        effects = layer_effects(
            model, ids, starts, directions, objective=objective, max_rows=max_rows
        )
        if not torch.isfinite(effects).all():
            raise ValueError(f"{response.task_id}: {objective} effects are not finite")
        real, chance = effects[: len(names)], effects[len(names) :]
        for which in SETS:
            places = [
                [column[t] for t in metrics.positions(annotation.spans, name, which)]
                for name in names
            ]
            found[f"{objective}/{which}"] = _averaged(real, places)
            if which == "own":
                for k, one in enumerate(chance):
                    found[null_key(k)] = _averaged(one.expand_as(real), places)
    return found


def _averaged(effects: Tensor, places: Sequence[Sequence[int]]) -> Tensor:
    """``[N, L, P]`` averaged over the positions of each of ``N`` behaviours: ``[N, L]``, NaN
    where there is none."""
    averages = torch.full(effects.shape[:2], float("nan"))
    for row, mine in enumerate(places):
        if mine:
            averages[row] = effects[row][:, mine].mean(-1)
    return averages
