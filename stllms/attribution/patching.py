"""Layer effects: how much a direction at a layer and a position matters to the next token.

Method, section 7, in one pass. Position ``t`` reaches the logits at ``t`` only through its own
stream. One forward pass over the response keeps keys and values; then every row of a second,
short pass is one token at its own position, attending to the cached positions before it and to
itself. One backward pass there gives every gradient; exact patching adds a row for each layer,
direction and position. A row patched at layer ``l`` equals the clean one below ``l``, so it
begins with the clean output of layer ``l`` and the layers before are skipped: half the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nnsight import save
from torch import Tensor
from transformers import DynamicCache

from stllms.models.model import Model

OBJECTIVES: tuple[str, ...] = ("kl", "published")
#: Bytes of the logits of one short pass. At a real vocabulary the unembedding of every row is
#: most of the work: there only fewer rows help.
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

    * ``"kl"``, the exact causal effect, in nats: add ``c * direction[b][l]`` to ``h[l, t]`` at
      that one position, run the rest, and take ``KL(p_clean || p_patched)`` of the next token.
    * ``"published"``: ``| < u[b][l], dJ(t)/dh[l, t] > |`` with the unit direction ``u`` and the
      :func:`surrogate` ``J`` of the released values.

    In bfloat16 a coefficient of 0 need not give 0 nats: products of another size round
    otherwise.

    Args:
        input_ids: ``[T]``, prompt and output.
        positions: ``[P]`` positions ``t`` in ``1 .. T - 1``; ``s - 1`` for a span ``[s, e)``.
        directions: ``[N, L, D]``.
        objective: ``"kl"`` or ``"published"``, which takes no coefficient.
        max_rows: rows of a short pass (:func:`rows_of`, unless said); in float32 the result
            does not depend on it.

    Returns:
        ``[N, L, P]`` float32 on the CPU.

    Raises:
        ValueError: positions out of range, at 0 or missing, directions of another shape or not
            finite, an unknown objective, or a model whose attention cannot take a mask.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
    if objective == "published" and coefficient != 1.0:
        raise ValueError('objective "published" is a gradient: it takes no coefficient')
    max_rows = rows_of(model) if max_rows is None else max_rows
    if max_rows < 1:
        raise ValueError(f"max_rows should be at least 1, it is {max_rows}")
    where = torch.as_tensor(positions)
    if where.is_floating_point() and len(where):
        raise ValueError(f"positions are tokens, whole numbers, not {where.dtype}")
    where = where.long()
    prefix = Prefix(model, torch.as_tensor(input_ids, dtype=torch.long), where, directions)
    if objective == "published":
        chunks = [_gradients(prefix, chunk, directions) for chunk in where.split(max_rows)]
        return torch.cat(chunks, dim=-1)
    n, p = len(directions), len(where)
    which = torch.arange(n).repeat_interleave(p)
    effects = exact(prefix, directions * coefficient, which, where.repeat(n), max_rows)
    return effects.unflatten(0, (n, p)).transpose(1, 2)


def rows_of(model: Model) -> int:
    """Rows of a short pass whose logits fit into :data:`BUDGET`, :data:`MAX_ROWS` at most."""
    vocabulary = model.hf.get_input_embeddings().weight.shape[0]
    return max(1, min(MAX_ROWS, BUDGET // (vocabulary * model.dtype.itemsize)))


# --- the cached response -----------------------------------------------------------------


class _Cache(DynamicCache):
    """Keys and values of the response. Once frozen, rows see them and leave nothing behind.

    A plain ``DynamicCache`` evicts nothing under sliding windows; the windows are in the masks.
    """

    frozen = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values a layer attends to: the stored ones, then those of the rows."""
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **more)
        layer = self.layers[layer_idx]
        keys = torch.cat([layer.keys, key_states], dim=-2)
        return keys, torch.cat([layer.values, value_states], dim=-2)


class Prefix:
    """A response in the cache, and the input of short passes of single tokens against it.

    Raises ``ValueError`` for what :func:`layer_effects` refuses.
    """

    def __init__(
        self, model: Model, ids: Tensor, positions: Tensor, directions: Tensor
    ) -> None:
        _check(model, ids, positions, directions)
        self.model = model
        self.ids = ids.to(model.device)
        self.cache = _Cache()
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
        if strange := sorted(set(kinds) - set(known)):
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
    attention = model.text_config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"attention {attention!r} takes no mask of four dimensions: load {model.name} with "
            'attn_implementation="sdpa" or "eager"'
        )


# --- the published objective -------------------------------------------------------------


def _gradients(prefix: Prefix, positions: Tensor, directions: Tensor) -> Tensor:
    """``|<u, dJ/dh>|`` of some positions: ``[N, L, R]``, one forward and one backward."""
    model = prefix.model
    inputs = prefix.inputs(positions)
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

    Its gradient is that of the published objective, whose value is NaN (method, section 7).
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.detach() * log_p).mean(-1)


# --- exact effects -----------------------------------------------------------------------


def exact(
    prefix: Prefix,
    vectors: Tensor,
    which: Tensor,
    where: Tensor,
    max_rows: int,
    tick: Callable[[int], object] = lambda _rows: None,
) -> Tensor:
    """``KL(p_clean || p_patched)`` at every layer, ``[M, L]``, for ``M`` pairs: a row ``which
    [M]`` of ``vectors [N, L, D]`` and a position ``where [M]``. ``tick`` is told the rows of
    every pass."""
    effects = torch.zeros(len(which), vectors.shape[1])
    for chunk in where.unique().split(max_rows):
        mine = torch.isin(where, chunk).nonzero().flatten()
        row = torch.searchsorted(chunk, where[mine])
        effects[mine] = _of_chunk(prefix, chunk, vectors, which[mine], row, max_rows, tick)
    return effects


def _of_chunk(
    prefix: Prefix,
    positions: Tensor,
    vectors: Tensor,
    which: Tensor,
    row: Tensor,
    max_rows: int,
    tick: Callable[[int], object],
) -> Tensor:
    """:func:`exact` for the rows ``row [M]`` of few positions ``[R]``."""
    model, n_layers = prefix.model, vectors.shape[1]
    with torch.no_grad(), model.nn.trace(**prefix.inputs(positions)):
        hidden = save([])
        for envoy in model.nn_layers:
            hidden.append(envoy.output[0].clone())
        clean = save(model.nn.output.logits[0])
    vectors = vectors.to(hidden[0].device, hidden[0].dtype)
    effects = torch.zeros(len(row), n_layers)
    # All (layer, pair), by layer, so that a pass skips as much as it can.
    grid = torch.cartesian_prod(torch.arange(n_layers), torch.arange(len(row)))
    for items in grid.split(max_rows):
        layers, pair = items.T
        at = row[pair]
        added = vectors[which[pair], layers]
        patched = _patched_logits(prefix, positions[at], at, layers, added, hidden)
        effects[pair, layers] = _kl(clean, at, patched)
        tick(len(items))
    return effects


def _patched_logits(
    prefix: Prefix,
    positions: Tensor,
    row: Tensor,
    layers: Tensor,
    vectors: Tensor,
    hidden: list[Tensor],
) -> Tensor:
    """Logits ``[R, V]`` of rows at ``positions [R]``, each with its vector ``[R, D]`` added at
    its layer ``[R]``. Rows begin at the lowest of these layers from the clean ``hidden``."""
    model = prefix.model
    first, last = int(layers[0]), int(layers[-1])
    start = hidden[first][row]
    start[layers == first] += vectors[layers == first].to(start.device)
    start = start[None]
    with torch.no_grad(), model.nn.trace(**prefix.inputs(positions)):
        for layer in range(first + 1):
            model.nn_layers[layer].skip(start)
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
