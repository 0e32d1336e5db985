"""The batched decoding loop, with or without interventions on each row.

Rows share batches whatever is done to them: a plain row, a ``+`` and a ``-`` row differ by the
vectors they carry. Rows that end leave the batch and waiting ones take their places. A token is
a function of the logits and of ``(seed, key of the row, step)`` alone (``sampling``), so the
batch, its order and a restart change nothing, and rows of one key (a task, plain and steered)
share their noise. An intervention adds to the output of a decoder layer at every step
(``interventions``). A prompt is read once for the rows that share it (``prompts``).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from stllms.models.engines import sampling
from stllms.models.engines.engine import Can, Row, Written
from stllms.models.engines.interventions import edits, intervene, think_end
from stllms.models.engines.sharing import Classes
from stllms.models.model import Model
from stllms.runs import audit as sampling_audit

#: A batch is refilled once this share of its rows has ended.
REFILL = 0.25
#: Tokens of prompts that are read at once: what a layer makes of them stays in the caches.
PORTION = 2048
#: Columns that the cache has room for when it grows.
ROOM = 64
#: The share of the free memory that a batch may take; the rest is for what is not counted.
SHARE = 0.8
#: Bytes a logit takes beside the model's own: float32 and float64 copies for sampling.
SAMPLING = 4 + 8 + 8


# -- the loop ------------------------------------------------------------------------------


class Transformers:
    """Our own loop as an engine: the reference of every other one."""

    name = "transformers"
    can = Can()

    def __init__(self, model: Model) -> None:
        self.model = model

    def generate(self, rows: Sequence[Row], **options: Any) -> list[Written]:
        """What is written for every row: :func:`run`."""
        return run(self.model, rows, **options)

    def close(self) -> None:
        """Nothing to give back: the weights are the model's own."""


def default_batch_size(model: Model) -> int:
    """Rows per batch that suit the model and its device; on a CPU nine conditions of twenty
    tasks, which steering hands over at a time."""
    if model.device.type == "cuda":
        return 256 if sum(p.numel() for p in model.hf.parameters()) < 4e9 else 64
    return 180


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
    """What is written for every row: :func:`stllms.models.engines.generate`.

    ``batch_size`` ``None`` is :func:`default_batch_size`. If fewer rows fit into the free
    memory (:func:`row_bytes`), that many, with a warning; if the device runs out of memory all
    the same, half, and the rows start again. Later runs of this model stay at what fitted.
    """
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


#: The tensors of a batch that have one value for each row.
_COLUMNS = ("position", "token", "step", "key", "thinking", "measured")


@dataclass
class _Batch:
    """The rows under way; ``places`` are theirs in the result, ``live`` says which go on.

    ``mask [B, T]`` covers what the cache holds. ``token [B]`` is chosen, and neither written
    nor fed; ``measured [B, n]`` is what the audit needs of it.
    """

    model: Model
    rows: list[Row]
    places: list[int]
    cache: DynamicCache
    mask: Tensor
    position: Tensor
    token: Tensor
    step: Tensor
    key: Tensor
    thinking: Tensor
    measured: Tensor

    def __post_init__(self) -> None:
        self.live = [True] * len(self.rows)
        self.edits = edits(self.model, [row.interventions for row in self.rows])


def _run(
    model: Model,
    rows: Sequence[Row],
    limit: int,
    batch_size: int,
    temperature: float,
    seed: int,
    progress: Callable[[int, int], Any],
    watch: Callable[[Sequence[Sequence[int]]], Any] | None,
) -> list[Written]:
    """The loop of :func:`run` at one batch size, longest prompts first."""
    waiting = deque(sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt_ids)))
    written: list[list[int]] = [[] for _ in rows]
    sums = torch.zeros(len(rows), len(sampling_audit.columns(temperature)), dtype=torch.float64)
    batch: _Batch | None = None
    while waiting or batch is not None:
        room = batch_size - (0 if batch is None else len(batch.rows))
        if waiting and room:  # at the start, or ended rows have just been dropped
            new = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            fresh = (
                _prefill(model, [rows[i] for i in part], part, temperature, seed)
                for part in _portions(rows, new)
            )
            batch = _join([*fresh] if batch is None else [batch, *fresh])
        assert batch is not None, "a new one, where there was none"
        living = sum(batch.live)
        _record(batch, written, sums, limit)
        progress(living, living - sum(batch.live))
        if watch is not None:
            watch(written)
        batch = _drop(batch)
        if batch is not None:
            _advance(batch, temperature)
    return [
        Written(tuple(ids), sampling_audit.entry(len(ids), temperature, total))
        for ids, total in zip(written, sums.tolist(), strict=True)
    ]


def _portions(rows: Sequence[Row], places: Sequence[int]) -> Iterator[list[int]]:
    """Places of rows whose prompts are read together: :data:`PORTION` tokens or one row,
    padding included; longest first, so that there is little of it."""
    size = max(1, PORTION // len(rows[places[0]].prompt_ids))
    for start in range(0, len(places), size):
        yield list(places[start : start + size])


def _prefill(
    model: Model, rows: list[Row], places: list[int], temperature: float, seed: int
) -> _Batch:
    """A new batch whose prompts are read and whose first tokens are chosen."""
    classes = Classes(model, rows)
    ids, mask, position = model.left_pad([row.prompt_ids for row in rows])
    key = torch.tensor([sampling.hash_key(seed, row.key) for row in rows], device=model.device)
    batch = _Batch(
        model,
        rows,
        places,
        cache=_cache(),
        mask=mask,
        position=position[:, -1:],
        token=ids[:, -1],
        step=torch.zeros_like(key),
        key=key,
        thinking=torch.ones_like(key, dtype=torch.bool),
        measured=torch.empty(0),
    )
    one = classes.first[0].to(ids.device)
    acting = classes.acting(batch.edits)
    with classes.parting(model.layers), intervene(model.layers, acting):
        logits = _forward(batch, ids[one], mask[one], position[one])
    for layer, of, first in zip(batch.cache.layers, classes.of, classes.first, strict=False):
        if len(first) < len(rows):
            layer.take(of, 0)
    _choose(batch, logits[classes.of[-1].to(logits.device)], temperature)
    return batch


def _advance(batch: _Batch, temperature: float) -> None:
    """Feed the last tokens and choose the next ones."""
    batch.thinking = batch.thinking & (batch.token != think_end(batch.model))
    batch.mask = pad(batch.mask, (0, 1), value=1)
    batch.position = batch.position + 1
    batch.step = batch.step + 1
    holds = {"all": 1, "generated": 1, "thinking": batch.thinking[:, None, None]}
    acting = [(edit, edit.coefficient * holds[edit.where]) for edit in batch.edits]
    with intervene(batch.model.layers, acting):
        logits = _forward(batch, batch.token[:, None], batch.mask, batch.position)
    _choose(batch, logits, temperature)


def _choose(batch: _Batch, logits: Tensor, temperature: float) -> None:
    batch.token = sampling.choose(logits, batch.key, batch.step, temperature)
    batch.measured = sampling.measure(logits, batch.token, temperature)


def _forward(batch: _Batch, ids: Tensor, mask: Tensor, position: Tensor) -> Tensor:
    """Logits ``[B, V]`` of the last column."""
    return batch.model.hf(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position,
        past_key_values=batch.cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def _record(batch: _Batch, written: list[list[int]], sums: Tensor, limit: int) -> None:
    """Writes the chosen tokens down, adds what was measured of them to ``sums [rows, n]``, and
    strikes out the rows that end."""
    measured, tokens = batch.measured.cpu().double(), batch.token.tolist()
    broken = measured.isnan().any(-1).tolist()
    for i, place in enumerate(batch.places):
        if not batch.live[i]:
            continue
        if broken[i]:
            raise sampling_audit.SamplingError(
                f"{batch.rows[i].key}: the logits after {len(written[place])} new tokens are "
                "not finite, so no token can be drawn: use a smaller coefficient, or dtype "
                "float32"
            )
        sums[place] += measured[i]
        written[place].append(tokens[i])
        batch.live[i] = tokens[i] not in batch.model.eos_ids and len(written[place]) < limit


def _drop(batch: _Batch) -> _Batch | None:
    """The batch without ended rows and unneeded columns, once enough rows have ended."""
    kept = [i for i, live in enumerate(batch.live) if live]
    if not kept:
        return None
    if len(batch.rows) - len(kept) < max(1, REFILL * len(batch.rows)):
        return batch
    index = torch.tensor(kept, device=batch.mask.device)
    mask = batch.mask[index]
    first = int(mask.any(dim=0).to(torch.int8).argmax())
    for layer in batch.cache.layers:
        layer.take(index, first)
    return replace(
        batch,
        rows=[batch.rows[i] for i in kept],
        places=[batch.places[i] for i in kept],
        mask=mask[:, first:],
        **{name: getattr(batch, name)[index] for name in _COLUMNS},
    )


def _join(batches: Sequence[_Batch]) -> _Batch:
    """Batches, whose rows all go on, as one."""
    first = batches[0]
    if len(batches) == 1:
        return first
    for layers in zip(*(one.cache.layers for one in batches), strict=True):
        layers[0].append(layers[1:])
    width = max(one.mask.shape[1] for one in batches)
    return replace(
        first,
        rows=[row for one in batches for row in one.rows],
        places=[place for one in batches for place in one.places],
        mask=torch.cat([pad(one.mask, (width - one.mask.shape[1], 0)) for one in batches]),
        **{name: torch.cat([getattr(one, name) for one in batches]) for name in _COLUMNS},
    )


# -- the cache -----------------------------------------------------------------------------


class _Layer(DynamicLayer):
    """Keys and values ``[B, heads, T, head_dim]`` of a layer, padding on the left, in memory
    that has room for columns to come: a step writes its own and copies no others."""

    room: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_more: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds columns and returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if not self.room or self.room[0].shape[-2] < end:
            room = end + ROOM - start
            self.room = tuple(pad(x, (0, 0, 0, room)) for x in (self.keys, self.values))
        columns = torch.arange(start, end, device=key_states.device)
        for memory, new in zip(self.room, (key_states, value_states), strict=True):
            memory.index_copy_(2, columns, new)
        self.keys, self.values = (memory.narrow(2, 0, end) for memory in self.room)
        return self.keys, self.values

    def take(self, rows: Tensor, first: int) -> None:
        """Keeps ``rows`` (indices) and the columns from ``first`` on."""
        rows = rows.to(self.keys.device)
        kept = (x[:, :, first:].index_select(0, rows) for x in (self.keys, self.values))
        self._hold(*kept)

    def append(self, others: Sequence[_Layer]) -> None:
        """Adds the rows of ``others`` below; the shorter ones are padded on the left."""
        every = (self, *others)
        width = max(one.keys.shape[-2] for one in every)

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat([pad(x, (0, 0, width - x.shape[-2], 0)) for x in parts])

        self._hold(joined([x.keys for x in every]), joined([x.values for x in every]))

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.room = keys, values, ()


def _cache() -> DynamicCache:
    """An empty cache. Sliding windows are in the masks: nothing is evicted."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = _Layer
    return cache


# -- memory --------------------------------------------------------------------------------


def _fitting(model: Model, rows: Sequence[Row], new: int, size: int) -> int:
    """``size``, or as many of the longest rows as fit into the free memory."""
    size = min(size, model.fits)
    prompt = max((len(row.prompt_ids) for row in rows), default=0)
    each = [
        (row_bytes(model, prompt, new, share), model.portion * free_bytes(device), device)
        for device, share in model.shares.items()
    ]
    needed, free, device = min(each, key=lambda one: one[1] / one[0])
    most = int(SHARE * free) // needed
    if most >= min(size, len(rows)):
        return size
    model.fits = max(1, most)
    warnings.warn(
        f"batches of {model.fits} rows, not {size}: a row of {prompt} + {new} tokens takes "
        f"{needed / 1e9:.2g} GB for keys, values and logits, {free / 1e9:.2g} GB are free on "
        f"{device}",
        stacklevel=3,
    )
    return model.fits


def row_bytes(model: Model, prompt: int, new: int, share: float = 1.0) -> int:
    """Bytes that a row of ``prompt`` tokens takes until ``new`` more are written: twice the
    cache, which grows by copying and gives its old memory back late; and the larger of a step's
    logits with their copies, and of the hidden states of one layer while the prompt is read.
    On a device with a ``share`` of the layers, with that share of the cache."""
    config, size = model.text_config, model.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * model.d_model
    states = prompt * (8 * model.d_model + 3 * inner) * size
    logits = config.vocab_size * (size + SAMPLING)
    cache = cache_bytes(config, model.dtype, prompt + new)
    return int(2 * share * cache) + max(states, logits)


def cache_bytes(text_config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the keys and values of one row, ``2 * layers * kv_heads * head_dim * tokens *
    bytes of the type``; with DeepSeek's latent attention one latent and one rotated key for
    all heads."""
    heads = text_config.num_attention_heads
    if getattr(text_config, "kv_lora_rank", None):
        width = text_config.kv_lora_rank + text_config.qk_rope_head_dim
    else:
        head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
        width = 2 * head_dim * (getattr(text_config, "num_key_value_heads", None) or heads)
    return text_config.num_hidden_layers * width * tokens * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on a device: of the card, else of the machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available
