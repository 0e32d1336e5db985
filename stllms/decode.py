"""The batched decoding loop, with or without an intervention a row.

Rows share batches whatever is done to them: a plain row, a ``+`` and a ``-`` row differ by the
vectors they carry. Rows that end leave the batch and waiting ones take their places, so short
chains do not wait for long ones.

**Sampling** (:mod:`stllms.sampling`) is a function of the logits and of ``(seed, key of the
row, step)`` alone. So the batch, its order and a restart change nothing, and rows with one key
(a task, plain and steered) share their noise. Every token is measured where it is drawn, and a
row comes with the sums that its audit needs.

**Interventions** are made through ``nnsight``: ``h[l, t] += delta`` at the output of decoder
layer ``l`` at every step. A batch without any uses the plain forward of the same model.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from nnsight import save
from torch import Tensor

from stllms import memory, sampling
from stllms.kvcache import BatchCache
from stllms.models import Model
from stllms.provenance import digest

#: A batch is refilled once this share of its rows has ended.
REFILL = 0.25
#: Stands for the row number at a place whose row has ended.
ENDED = -1


def add(hidden: Tensor, vector: Tensor, coefficient: Tensor) -> Tensor:
    """``c * v``, the paper's operation (METHOD, section 8). All ``[B, T or 1, D or 1]``."""
    return (coefficient * vector).expand_as(hidden)


def ablate(hidden: Tensor, vector: Tensor, coefficient: Tensor) -> Tensor:
    """``-c * <h, u> u`` with ``u = v / ||v||``: projects the direction out at ``c = 1``.

    Directional ablation, Arditi et al. 2024 (arXiv 2406.11717), equation 4.
    """
    unit = vector / vector.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vector.dtype).tiny)
    return -coefficient * (hidden.to(unit.dtype) * unit).sum(-1, keepdim=True) * unit


#: name -> ``(hidden [B, T, D], vector [B, 1, D], coefficient [B, 1, 1]) -> delta [B, T, D]``.
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "add": add,
    "ablate": ablate,
}
WHERE = ("all", "generated", "thinking")


@dataclass(frozen=True)
class Intervention:
    """What is done to the residual stream of one row.

    ``direction [D]`` acts at the output of ``layer`` (0-based) with ``coefficient``;
    ``operation`` is a name of :data:`OPERATIONS`; ``where`` is ``"all"`` positions, prompt
    included (the paper's), ``"generated"`` tokens only, or ``"thinking"``: generated tokens
    before ``</think>``. Raises ``ValueError`` naming what exists.
    """

    direction: Tensor
    layer: int
    coefficient: float
    operation: str = "add"
    where: str = "all"

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"unknown operation {self.operation!r}: {', '.join(OPERATIONS)}")
        if self.where not in WHERE:
            raise ValueError(f"unknown place {self.where!r}: {', '.join(WHERE)}")
        if self.direction.ndim != 1 or not torch.isfinite(self.direction).all():
            raise ValueError(
                f"a direction is a finite vector [D], not {tuple(self.direction.shape)}"
            )


def fingerprints(interventions: Mapping[tuple, Intervention | None]) -> dict[str, str]:
    """Hashes of what is added, by direction and layer: rows of other directions are not those
    of these, whatever they are called."""
    return {
        f"direction of {name} at layer {layer}": digest(edit.direction)
        for (name, layer, *_), edit in interventions.items()
        if edit is not None
    }


@dataclass(frozen=True)
class Row:
    """One chain to be written: its prompt, the key of its noise, its interventions."""

    prompt_ids: tuple[int, ...]
    key: str
    interventions: tuple[Intervention, ...] = ()


@dataclass(frozen=True)
class Written:
    """A chain that was written: its new ids, the one that ended it included, and its audit
    (:func:`stllms.sampling.entry`)."""

    ids: tuple[int, ...]
    audit: dict[str, float]


@dataclass
class _Batch:
    """The rows under way. ``mask [B, T]`` covers what the cache holds.

    ``measured [B, n]`` is what the audit needs of ``token``.
    """

    rows: list[int]
    cache: BatchCache
    mask: Tensor
    position: Tensor
    token: Tensor
    step: Tensor
    key: Tensor
    thinking: Tensor
    measured: Tensor | None = None
    edits: list[Edit] = field(default_factory=list)


@dataclass
class Edit:
    """One operation at one layer for the whole batch; rows without it carry zeros."""

    layer: int
    operation: str
    where: str
    vector: Tensor
    coefficient: Tensor


def default_batch_size(model: Model) -> int:
    """Rows a batch that suit the model and its device."""
    parameters = sum(p.numel() for p in model.hf.parameters())
    if model.device.type == "cuda":
        return 256 if parameters < 4e9 else 64
    return 128 if parameters < 5e7 else 32


@torch.no_grad()
def run(
    model: Model,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], Any] | None = None,
    watch: Callable[[Sequence[Sequence[int]]], Any] | None = None,
) -> list[Written]:
    """What is written for every row.

    Args:
        rows: in any order; the result is in theirs.
        max_new_tokens: limit of a row.
        batch_size: rows at a time (``None``: :func:`default_batch_size`). If fewer fit into the
            free memory (:mod:`stllms.memory`), that many, with a warning; if the device runs
            out of memory all the same, half, and the rows start again. Later runs of this
            model stay at what fitted.
        temperature: 0 is greedy.
        seed: of the noise.
        progress: called with (new tokens, rows that ended) after every step, and with what was
            told so far, below 0, when the rows start again.
        watch: called after every step with the ids of every row so far, in the order of
            ``rows``; to be read, not kept or changed. What it raises ends the run.

    Raises:
        ValueError: for a row that does not fit the model (context, layer, width), naming both.
        SamplingError: for logits that are not finite, naming the row.
    """
    for row in rows:
        _check(model, row, max_new_tokens)
    size = _fitting(model, rows, max_new_tokens, batch_size or default_batch_size(model))
    counted = [0, 0]

    def tell(tokens: int, ended: int) -> None:
        counted[:] = counted[0] + tokens, counted[1] + ended
        if progress is not None:
            progress(tokens, ended)

    while True:
        try:
            return _run(model, rows, max_new_tokens, size, temperature, seed, tell, watch)
        except torch.OutOfMemoryError:
            tell(-counted[0], -counted[1])
            if size == 1:
                raise
            size = model.fits = max(1, min(size, len(rows)) // 2)
            warnings.warn(f"out of memory: going on with batches of {size} rows", stacklevel=2)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _fitting(model: Model, rows: Sequence[Row], new: int, size: int) -> int:
    """``size``, or as many of the longest rows as fit into the free memory."""
    size = min(size, model.fits)
    most, why = memory.rows(model, max((len(r.prompt_ids) for r in rows), default=0), new)
    if most >= min(size, len(rows)):
        return size
    model.fits = max(1, most)
    warnings.warn(f"batches of {model.fits} rows, not {size}: {why}", stacklevel=3)
    return model.fits


def _run(model, rows, limit, batch_size, temperature, seed, progress, watch):
    """The loop. Between turns ``batch.token`` is chosen, and neither written nor fed."""
    waiting = deque(sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt_ids)))
    written: list[list[int]] = [[] for _ in rows]
    sums = torch.zeros(len(rows), len(sampling.columns(temperature)), dtype=torch.float64)
    batch: _Batch | None = None
    while waiting or batch is not None:
        room = batch_size - (0 if batch is None else len(batch.rows))
        if waiting and room:
            new = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            fresh = _prefill(model, rows, new, temperature, seed)
            batch = fresh if batch is None else _join(model, rows, batch, fresh)
        live = sum(row >= 0 for row in batch.rows)
        _add_up(rows, batch, written, sums)
        ended = _record(model, batch, written, limit)
        progress(live, ended)
        if watch is not None:
            watch(written)
        batch = _drop(model, rows, batch)
        if batch is not None:
            _advance(model, batch, temperature)
    return [
        Written(tuple(ids), sampling.entry(len(ids), temperature, total))
        for ids, total in zip(written, sums.tolist(), strict=True)
    ]


def _add_up(rows, batch: _Batch, written: list[list[int]], sums: Tensor) -> None:
    """Add what was measured of the chosen tokens to the rows' ``sums [rows, n]``."""
    places = [place for place, row in enumerate(batch.rows) if row != ENDED]
    live = [batch.rows[place] for place in places]
    measured = batch.measured.cpu().double()[places]
    for row in (row for row, one in zip(live, measured, strict=True) if one.isnan().any()):
        raise sampling.SamplingError(
            f"{rows[row].key}: the logits after {len(written[row])} new tokens are not finite, "
            "so no token can be drawn: use a smaller coefficient, or dtype float32"
        )
    sums[live] += measured


def _record(model: Model, batch: _Batch, written: list[list[int]], limit: int) -> int:
    """Write the chosen tokens down and strike out the rows that end; how many did."""
    ended = 0
    for place, (row, token) in enumerate(zip(batch.rows, batch.token.tolist(), strict=True)):
        if row < 0:
            continue
        written[row].append(token)
        if token in model.eos_ids or len(written[row]) >= limit:
            batch.rows[place] = ENDED
            ended += 1
    return ended


def _prefill(model: Model, rows, new: list[int], temperature: float, seed: int) -> _Batch:
    ids, mask, position = model.left_pad([rows[i].prompt_ids for i in new])
    batch = _Batch(
        rows=list(new),
        cache=BatchCache(model.n_layers),
        mask=mask,
        position=position[:, -1:],
        token=ids[:, -1],
        step=torch.zeros(len(new), dtype=torch.long, device=model.device),
        key=torch.tensor(
            [sampling.hash_key(seed, rows[i].key) for i in new], device=model.device
        ),
        thinking=torch.ones(len(new), dtype=torch.bool, device=model.device),
        edits=edits(model, [rows[i] for i in new]),
    )
    _choose(batch, _forward(model, batch, ids, position, prompt=True), temperature)
    return batch


def _advance(model: Model, batch: _Batch, temperature: float) -> None:
    """Feed the last tokens and choose the next ones."""
    batch.thinking = batch.thinking & (batch.token != think_end(model))
    batch.mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], dim=1)
    batch.position = batch.position + 1
    batch.step = batch.step + 1
    logits = _forward(model, batch, batch.token[:, None], batch.position, prompt=False)
    _choose(batch, logits, temperature)


def _choose(batch: _Batch, logits: Tensor, temperature: float) -> None:
    batch.token = sampling.choose(logits, batch.key, batch.step, temperature)
    batch.measured = sampling.measure(logits, batch.token, temperature)


def think_end(model: Model) -> int:
    """The id of ``</think>``, -1 for a tokenizer without such a token."""
    found = model.tokenizer.get_vocab().get("</think>")
    return -1 if found is None else found


def _forward(model: Model, batch: _Batch, ids: Tensor, position: Tensor, *, prompt: bool):
    """Logits of the last column, ``[B, V]``."""
    inputs = {
        "input_ids": ids,
        "attention_mask": batch.mask,
        "position_ids": position,
        "past_key_values": batch.cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    edits = [(edit, _strength(edit, batch, prompt)) for edit in batch.edits]
    if not edits:
        return model.hf(**inputs).logits[:, -1]
    with model.nn.trace(**inputs):
        intervene(model, edits)
        logits = save(model.nn.output.logits)
    return logits[:, -1]


def intervene(model: Model, edits: Sequence[tuple[Edit, Tensor]]) -> None:
    """Inside a trace: each edit at its layer, with coefficients ``[B, 1 or T, 1]``."""
    for edit, strength in edits:
        hidden = model.nn_layers[edit.layer].output
        delta = OPERATIONS[edit.operation](hidden, edit.vector, strength)
        model.nn_layers[edit.layer].output = hidden + delta.to(hidden.dtype)


def _strength(edit: Edit, batch: _Batch, prompt: bool) -> Tensor:
    """The coefficients ``[B, 1, 1]`` that hold at this step."""
    if edit.where != "all" and prompt:
        return torch.zeros_like(edit.coefficient)
    if edit.where == "thinking":
        return edit.coefficient * batch.thinking[:, None, None]
    return edit.coefficient


def edits(model: Model, rows: Sequence[Row]) -> list[Edit]:
    """The interventions of all rows, one a (layer, operation, place, rank in its row)."""
    groups: dict[tuple, list[tuple[int, Intervention]]] = {}
    for place, row in enumerate(rows):
        seen: dict[tuple, int] = {}
        for item in row.interventions:
            name = (item.layer, item.operation, item.where)
            seen[name] = seen.get(name, 0) + 1
            groups.setdefault((*name, seen[name]), []).append((place, item))
    work = torch.float64 if model.dtype == torch.float64 else torch.float32
    made = []
    for (layer, operation, where, _), members in sorted(groups.items()):
        vector = torch.zeros(len(rows), 1, model.d_model, dtype=work)
        coefficient = torch.zeros(len(rows), 1, 1, dtype=work)
        for place, item in members:
            vector[place, 0] = item.direction.to(work)
            coefficient[place] = item.coefficient
        moved = (vector.to(model.device), coefficient.to(model.device))
        made.append(Edit(layer, operation, where, *moved))
    return made


def _drop(model: Model, rows, batch: _Batch) -> _Batch | None:
    """The batch without ended rows and unneeded columns, once enough rows have ended."""
    kept = [place for place, row in enumerate(batch.rows) if row != ENDED]
    if not kept:
        return None
    if len(batch.rows) - len(kept) < max(1, REFILL * len(batch.rows)):
        return batch
    index = torch.tensor(kept, device=model.device)
    mask = batch.mask[index]
    first = int(mask.any(dim=0).to(torch.int8).argmax())
    batch.cache.select(index, first)
    left = [batch.rows[place] for place in kept]
    return _Batch(
        rows=left,
        cache=batch.cache,
        mask=mask[:, first:],
        edits=edits(model, [rows[i] for i in left]),
        **{name: getattr(batch, name)[index] for name in _COLUMNS},
    )


#: The columns of a batch, one value a row.
_COLUMNS = ("position", "token", "step", "key", "thinking", "measured")


def _join(model: Model, rows, old: _Batch, new: _Batch) -> _Batch:
    """Both batches as one."""
    old.cache.join(new.cache)
    width = max(old.mask.shape[1], new.mask.shape[1])
    masks = [
        torch.nn.functional.pad(part.mask, (width - part.mask.shape[1], 0))
        for part in (old, new)
    ]
    live = [rows[i] if i != ENDED else Row((), "") for i in old.rows + new.rows]
    return _Batch(
        rows=old.rows + new.rows,
        cache=old.cache,
        mask=torch.cat(masks),
        edits=edits(model, live),
        **{name: torch.cat([getattr(old, name), getattr(new, name)]) for name in _COLUMNS},
    )


def _check(model: Model, row: Row, max_new_tokens: int) -> None:
    if len(row.prompt_ids) + max_new_tokens > model.max_context:
        raise ValueError(
            f"{row.key}: {len(row.prompt_ids)} prompt tokens and {max_new_tokens} new ones "
            f"exceed the context of {model.name}, {model.max_context} tokens"
        )
    for item in row.interventions:
        if not 0 <= item.layer < model.n_layers:
            raise ValueError(
                f"layer {item.layer} does not exist: {model.name} has layers 0 to "
                f"{model.n_layers - 1}"
            )
        if item.where == "thinking" and think_end(model) < 0:
            raise ValueError(
                f"{model.name} has no token </think>: where='thinking' would be all that it "
                "writes, which is where='generated'"
            )
        if len(item.direction) != model.d_model:
            raise ValueError(
                f"the direction has width {len(item.direction)}, {model.name} has "
                f"{model.d_model}: it belongs to another model"
            )
