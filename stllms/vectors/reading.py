"""A direction read along a text: where it lights up, and which tokens it speaks for.

With ``u`` the direction at layer ``l``, of length 1, the reading of token ``t`` is ::

    < h[l, t] - overall[l], u > / ||overall[l]||

so that it counts in coefficients: adding the direction with coefficient 1 raises it by 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from nnsight import save
from torch import Tensor
from torch.nn.functional import normalize

from stllms import stats
from stllms.models.model import Model, ModelError
from stllms.plotting import text as shown
from stllms.records import Response, Span
from stllms.terminal import token_bar

#: Logits at once: 2**24 values are 64 MB in float32.
LOGITS = 2**24
#: Where a family of transformers has the norm between its layers and its output head.
NORMS = ("norm", "ln_f", "final_layer_norm", "norm_f", "final_layernorm")


class Directions(Protocol):
    """What is read of :class:`~stllms.vectors.directions.SteeringVectors`, whose module reads
    through this one."""

    @property
    def behaviours(self) -> tuple[str, ...]:
        """``[N]`` names."""
        ...

    @property
    def overall(self) -> Tensor:
        """``[L, D]``."""
        ...

    def direction(self, behaviour: str, layer: int) -> Tensor:
        """``[D]``; an error for what is not there."""
        ...


@dataclass(frozen=True)
class Reading:
    """A direction along ``T`` tokens: ``tokens`` (their texts), ``values [T]`` in coefficients,
    and ``surprise [T]``, ``-log p(token)`` in nats (NaN for the first)."""

    behaviour: str
    layer: int
    tokens: tuple[str, ...]
    values: np.ndarray
    surprise: np.ndarray

    def __repr__(self) -> str:
        return (
            f"Reading({self.behaviour!r}, layer={self.layer}, {len(self.tokens)} tokens, "
            f"{self.values.min():+.2f} to {self.values.max():+.2f})"
        )

    def to_frame(self) -> pd.DataFrame:
        """A row for each token: ``token``, ``value``, ``surprise``."""
        return pd.DataFrame(
            {"token": self.tokens, "value": self.values, "surprise": self.surprise}
        )

    def _repr_html_(self) -> str:
        return shown.html_tokens(
            self.tokens, self.values.tolist(), self.surprise.tolist(), title=repr(self)
        )


def read(
    model: Model, text: str | Response, vectors: Directions, behaviour: str, layer: int
) -> Reading:
    """The direction of a behaviour at a layer along a text, or along prompt and output of a
    response. Errors are those of ``vectors.direction`` and of :func:`read_direction`."""
    direction = vectors.direction(behaviour, layer)
    return read_direction(model, text, direction, vectors.overall[layer], behaviour, layer)


def read_direction(
    model: Model,
    text: str | Response,
    direction: Tensor,
    overall: Tensor,
    name: str,
    layer: int,
) -> Reading:
    """:func:`read` of any ``direction [D]`` beside ``overall [D]``, the mean residual there.

    Raises:
        ValueError: a text without tokens or longer than the context, or directions of another
            width than the model's.
    """
    if isinstance(text, Response):
        ids = [*text.prompt_ids, *text.output_ids]
    else:
        ids = model.tokenizer(text)["input_ids"]
    if not 0 < len(ids) <= model.max_context:
        raise ValueError(f"{len(ids)} tokens; a text has 1 to {model.max_context} here")
    if len(direction) != model.d_model:
        raise ValueError(
            f"the direction has width {len(direction)}, {model.name} has {model.d_model}: it "
            "belongs to another model"
        )
    values, hidden = _along(model, ids, [(layer, direction, overall)])
    tokens = tuple(model.decode_all([i]) for i in ids)
    return Reading(name, layer, tokens, values[:, 0], _surprise(model, hidden, ids))


def onset(
    model: Model,
    responses: Sequence[Response],
    spans_per_response: Sequence[Sequence[Span]],
    vectors: Directions,
    layers: Mapping[str, int],
    *,
    before: int = 8,
    after: int = 12,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Readings around the start of spans: does a direction rise before the first word?

    A row for each behaviour of ``layers``, ``of`` (``"own"`` spans or those of ``"others"``)
    and ``offset`` in tokens from the start of the span, ``-before .. after - 1``: ``value``,
    the mean over responses of their spans' mean, its bootstrap interval ``low`` and ``high``,
    and ``n`` responses. Tokens after the end of a span are left out.

    Where the directions were made from the same spans they are high there by construction: take
    directions of the build half and responses of the test half.
    """
    names = [name for name in layers if name in vectors.behaviours]
    chosen = [
        (layers[n], vectors.direction(n, layers[n]), vectors.overall[layers[n]]) for n in names
    ]
    sums: dict[tuple, list[float]] = {}
    with token_bar(len(responses), "reading", unit="responses", enabled=progress) as bar:
        for response, spans in zip(responses, spans_per_response, strict=True):
            ids = [*response.prompt_ids, *response.output_ids]
            values, _ = _along(model, ids, chosen) if spans and names else (None, None)
            found: dict[tuple, list[float]] = {}
            for span in spans:
                for offset in range(-before, min(after, span.end - span.start)):
                    if values is None or span.start + offset < 0:
                        continue
                    for column, name in enumerate(names):
                        key = (name, "own" if span.label == name else "others", offset)
                        found.setdefault(key, []).append(values[span.start + offset, column])
            for key, some in found.items():
                sums.setdefault(key, []).append(float(np.mean(some)))
            bar.tick(len(ids), 1)
    rows = []
    for key in sorted(sums, key=lambda key: (names.index(key[0]), key[1] != "own", key[2])):
        one = stats.bootstrap(sums[key], draws=1000, seed=seed)
        rows.append((*key, one.value, one.low, one.high, one.n))
    columns = ["behaviour", "of", "offset", "value", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


@torch.no_grad()
def words(model: Model, direction: Tensor, k: int = 10) -> pd.DataFrame:
    """The ``k`` tokens that a direction ``[D]`` raises and lowers most, seen through the final
    norm and the output head (the logit lens, nostalgebraist 2020): ``token``, ``logit`` and
    ``side`` (``"raised"`` or ``"lowered"``), largest first. Logits are of the direction alone,
    without their mean over the vocabulary.

    Raises:
        ModelError: a model whose final norm is none of :data:`NORMS`.
    """
    names = [
        name
        for name in NORMS
        if isinstance(getattr(model.decoder, name, None), torch.nn.Module)
    ]
    if not names:
        raise ModelError(f"{model.name}: no final norm found: looked for {', '.join(NORMS)}")
    norm = getattr(model.decoder, names[0])
    where = next(norm.parameters(), model.unembedding())
    logits = model.logits(norm(direction.to(where)[None, None]))[0, 0].float().cpu()
    logits = logits - logits.mean()
    order = logits.argsort(descending=True).tolist()
    rows = [(i, "raised") for i in order[:k]] + [(i, "lowered") for i in order[-k:]]
    return pd.DataFrame(
        [(model.decode_all([i]), float(logits[i]), side) for i, side in rows],
        columns=["token", "logit", "side"],
    )


@torch.no_grad()
def _along(
    model: Model, ids: Sequence[int], directions: Sequence[tuple[int, Tensor, Tensor]]
) -> tuple[np.ndarray, Tensor]:
    """Readings ``[T, N]`` of (layer, direction ``[D]``, overall ``[D]``), and decoder outputs
    ``[T, D]``."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)], device=model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    kept: dict[int, Tensor] = {}
    with model.nn_decoder.trace(**inputs, use_cache=False):
        for layer in sorted({layer for layer, _, _ in directions}):
            kept[layer] = save(model.nn_layers[layer].output)
        last = save(model.nn_decoder.output.last_hidden_state)
    columns = []
    for layer, direction, overall in directions:
        unit, mean = normalize(direction.double(), dim=0), overall.double()
        hidden = kept[layer][0].cpu().double()
        columns.append(((hidden - mean) @ unit / mean.norm()).numpy())
    return np.stack(columns, axis=1), last[0]


@torch.no_grad()
def _surprise(model: Model, hidden: Tensor, ids: Sequence[int]) -> np.ndarray:
    """``-log p(token)`` of every token but the first, which has NaN: ``[T]``."""
    found = [torch.tensor([torch.nan], dtype=torch.float64)]
    size = max(1, LOGITS // model.text_config.vocab_size)
    following = torch.tensor(list(ids[1:]), device=hidden.device)
    for start in range(0, len(following), size):
        tokens = following[start : start + size]
        logits = model.logits(hidden[None, start : start + len(tokens)])[0].float()
        chosen = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        found.append(-chosen.double().cpu())
    return torch.cat(found).numpy()
