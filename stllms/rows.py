"""Rows: single tokens at positions of a cached response, in passes of their own.

Position ``t`` reaches the logits at ``t`` through its own stream alone; its keys and values are
seen by later positions only. So a row is one token at its own position that attends to the
cached positions before it and to itself, and any number of rows make one short sequence
(METHOD, section 7). The prefix lives in a plain ``DynamicCache``, which evicts nothing under
sliding windows; the windows are in the masks, one for each layer type of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from stllms.models import Model


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


class Rows:
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
