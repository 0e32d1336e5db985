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

Rows go in chunks of ``max_rows``, so no mask is larger than ``[max_rows, T + max_rows]``. The
prefix lives in a plain ``DynamicCache``, which evicts nothing under sliding windows; the
windows are in the masks, one for each layer type of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from nnsight import save
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from stllms import metrics, spans
from stllms.effects import SETS, LayerEffects
from stllms.models import Model
from stllms.records import Annotation, Response
from stllms.vectors import SteeringVectors

OBJECTIVES: tuple[str, ...] = ("kl", "published")
#: Responses between two saves of :func:`collect`.
SAVE_EVERY = 10
#: Rows of one short pass.
MAX_ROWS = 256
#: Rows whose distribution over the vocabulary is held in float32 at once.
KL_ROWS = 64


class Prefix(DynamicCache):
    """Keys and values of the response. Once frozen, rows see them and leave nothing behind."""

    frozen = False

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The keys and values a layer attends to: the stored ones, then those of the rows."""
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        keys = torch.cat([layer.keys, key_states], dim=-2)
        return keys, torch.cat([layer.values, value_states], dim=-2)


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
        max_rows: rows of a short pass; the result does not depend on it.

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
    rows = _Rows(model, ids, where)
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


class _Rows:
    """The cached response, and short passes of single tokens against it."""

    def __init__(self, model: Model, ids: Tensor, positions: Tensor) -> None:
        self.model = model
        self.ids = ids.to(model.device)
        self.cache = Prefix()
        prefix = self.ids[None, : int(positions.max())]
        with torch.no_grad():
            model.decoder(
                input_ids=prefix,
                attention_mask=torch.ones_like(prefix),
                past_key_values=self.cache,
                use_cache=True,
            )
        self.cache.frozen = True
        self.length = prefix.shape[1]

    def inputs(self, positions: Tensor) -> dict[str, Any]:
        """What the model takes for rows at ``positions [R]``: one sequence of ``R`` tokens."""
        positions = positions.to(self.ids.device)
        return {
            "input_ids": self.ids[None, positions],
            "position_ids": positions[None],
            "attention_mask": self._masks(positions),
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def _masks(self, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """``[1, 1, R, length + R]``, zero where a row may look; a dictionary of them for models
        with layer types."""
        config = self.model.text_config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            return self._mask(positions, window)
        known = {"full_attention": None, "sliding_attention": window}
        strange = sorted(set(kinds) - set(known))
        if strange:
            raise ValueError(f"{self.model.name}: no masks for layers of type {strange}")
        return {kind: self._mask(positions, known[kind]) for kind in set(kinds)}

    def _mask(self, positions: Tensor, window: int | None) -> Tensor:
        keys = torch.arange(self.length, device=positions.device)
        seen = keys < positions[:, None]
        if window is not None:
            seen &= keys > positions[:, None] - window
        own = torch.eye(len(positions), dtype=torch.bool, device=positions.device)
        allowed = torch.cat([seen, own], dim=1)
        lowest = torch.finfo(self.model.dtype).min
        mask = torch.zeros(allowed.shape, dtype=self.model.dtype, device=positions.device)
        return mask.masked_fill(~allowed, lowest)[None, None]


def _published(rows: _Rows, positions: Tensor, directions: Tensor) -> Tensor:
    """``|<u, dJ/dh>|`` of some positions: ``[N, L, R]``, one forward and one backward."""
    model = rows.model
    inputs = rows.inputs(positions)
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
                gradients.append(output.grad[0].float())
    gradient = torch.stack(gradients[::-1])
    units = torch.nn.functional.normalize(directions.float(), dim=-1).to(gradient.device)
    return torch.einsum("nld,lrd->nlr", units, gradient).abs().cpu()


def surrogate(logits: Tensor) -> Tensor:
    """``J = -(1/V) * sum_j stopgrad(log p_j) * log p_j`` of ``[..., V]`` logits: ``[...]``.

    Its gradient is that of the published objective, whose value is NaN (METHOD, section 7).
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.detach() * log_p).mean(-1)


def _exact(rows: _Rows, positions: Tensor, vectors: Tensor, max_rows: int) -> Tensor:
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
    rows: _Rows,
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
    start[layers == first] += vectors[layers == first]
    start = start[None]
    with torch.no_grad(), model.nn.trace(**rows.inputs(positions)):
        for layer in range(first):
            model.nn_layers[layer].skip(start)
        model.nn_layers[first].skip(start)
        for layer in range(first + 1, last + 1):
            here = layers == layer
            model.nn_layers[layer].output[:, here] += vectors[here]
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
    path: Path | None = None,
    progress: bool = True,
) -> LayerEffects:
    """Effects of every response, averaged over its positions: all behaviours, both sets.

    The positions of all spans of a response go through :func:`layer_effects` together, once an
    objective; ``own`` averages those of a behaviour's own spans, ``others`` those of all other
    behaviours' (METHOD, section 7). Responses without a usable position are left out: they are
    not among ``response_ids``.

    Args:
        path: where to save, after every :data:`SAVE_EVERY` responses; a file of the same
            responses, directions and model that is there is taken up and completed.

    Raises:
        ValueError: lists of different length or of other tasks, or effects that are not finite
            (naming the response).
    """
    if len(responses) != len(annotations):
        raise ValueError(f"{len(responses)} responses but {len(annotations)} annotations")
    for response, annotation in zip(responses, annotations, strict=True):
        if response.task_id != annotation.task_id:
            raise ValueError(
                f"the annotation of {annotation.task_id} stands at the response of "
                f"{response.task_id}: both lists should be in one order"
            )
    names = steering_vectors.behaviours
    pairs = [
        (response, annotation)
        for response, annotation in zip(responses, annotations, strict=True)
        if names and any(span.start > 1 for span in annotation.spans)
    ]
    keys = [f"{objective}/{which}" for objective in objectives for which in SETS]
    nothing = LayerEffects({}, (), names, model.name, _digest(steering_vectors.directions))
    result = nothing.resume(path, keys, [response.task_id for response, _ in pairs])
    done = set(result.response_ids)
    todo = [(r, a) for r, a in pairs if r.task_id not in done]
    for response, annotation in tqdm(
        todo, desc="layer effects", unit="response", disable=not progress, leave=False
    ):
        found = _of_response(model, response, annotation, steering_vectors, objectives)
        result = result.plus(response.task_id, found)
        if path is not None and len(result.response_ids) % SAVE_EVERY == 0:
            result.save(path)
    if not result.effects:
        empty = torch.empty(0, *steering_vectors.directions.shape[:2])
        result = replace(result, effects=dict.fromkeys(keys, empty))
    if path is not None and (todo or not path.is_file()):
        result.save(path)
    return result


def _digest(directions: Tensor) -> str:
    return sha256(directions.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _of_response(model, response, annotation, steering_vectors, objectives):
    """The new entry of one response: ``{"<objective>/<set>": [N, L]}``."""
    spans.check(response, annotation.spans)
    starts = sorted({span.start - 1 for span in annotation.spans if span.start > 1})
    column = {position: place for place, position in enumerate(starts)}
    ids = [*response.prompt_ids, *response.output_ids]
    names = steering_vectors.behaviours
    found: dict[str, Tensor] = {}
    for objective in objectives:
        effects = layer_effects(
            model, ids, starts, steering_vectors.directions, objective=objective
        )
        if not torch.isfinite(effects).all():
            raise ValueError(f"{response.task_id}: {objective} effects are not finite")
        for which in SETS:
            means = torch.full(effects.shape[:2], float("nan"))
            for row, name in enumerate(names):
                mine = [column[t] for t in metrics.positions(annotation.spans, name, which)]
                if mine:
                    means[row] = effects[row][:, mine].mean(-1)
            found[f"{objective}/{which}"] = means
    return found
