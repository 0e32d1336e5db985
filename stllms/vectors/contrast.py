"""Directions from contrast pairs: two texts that differ in what is asked for.

A pair is read out at one place of each side. Both read-outs go into the same :class:`Means` as
labelled spans do, the sides as two labels and the pair as the response: estimators, halves and
tables are those of :mod:`stllms.vectors`. So are the controls, but a ``shuffled`` one swaps
exactly half of the pairs, and the signs of a ``covariance`` one add up to zero on each side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnsight import save
from torch import Tensor
from torch.nn.functional import normalize

from stllms.models.model import Model
from stllms.records import loads
from stllms.terminal import token_bar
from stllms.vectors.activations import WINDOW
from stllms.vectors.means import HALVES, PARTS, Means, is_build, mark, part_of, random_halves

#: Where a side is read out: its last token; the mean over its tokens; the window of the paper
#: over given characters (method, section 6). The first token of a sequence is left out of
#: means: models attend to it where there is nothing to attend to, and its length (on SmolLM2 a
#: hundred times that of any other) would make the direction one of short texts.
POSITIONS = ("last", "mean", "span")
#: What the negative side of a pair is called.
OTHER_SIDE = "other"
#: Fields of a line of a file of pairs.
FIELDS = ("positive", "negative", "prompt", "positive_span", "negative_span", "id")

#: A text as it is, or the messages of a chat (``{"role", "content"}``).
Text = str | Sequence[dict[str, str]]


@dataclass(frozen=True)
class Pair:
    """Two texts, or two continuations of one ``prompt``.

    A prompt, or a side without one, may be a list of chat messages, which goes through the
    model's template.

    ``positive_span`` and ``negative_span`` are half-open ranges of characters of their sides.

    Raises:
        ValueError: a side that is empty, equal sides, a span outside its side.
    """

    positive: Text
    negative: Text
    prompt: Text | None = None
    positive_span: tuple[int, int] | None = None
    negative_span: tuple[int, int] | None = None
    id: str = ""

    def __post_init__(self) -> None:
        for name, side, span in self._sides():
            messages = not isinstance(side, str)
            if not side or (isinstance(side, str) and not side.strip()):
                raise ValueError(f"pair {self.id}: {name} is empty: a pair needs both sides")
            if messages and self.prompt is not None:
                raise ValueError(f"pair {self.id}: {name} should be a text behind its prompt")
            if span is not None and (messages or not 0 <= span[0] < span[1] <= len(side)):
                raise ValueError(
                    f"pair {self.id}: {name}_span {list(span)} is no range of its {len(side)} "
                    "characters"
                )
        if self.positive == self.negative:
            raise ValueError(f"pair {self.id}: both sides are the same")

    def _sides(self) -> Iterable[tuple[str, Text, tuple[int, int] | None]]:
        yield "positive", self.positive, self.positive_span
        yield "negative", self.negative, self.negative_span


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a JSONL file: ``positive`` and ``negative``, and any other of
    :data:`FIELDS`.

    Raises:
        ValueError: a file that cannot be read or holds no pair, or the first line that is none,
            by its number.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"pairs: cannot read {path} ({error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(as_pair(loads(line), str(number)))
            except (ValueError, json.JSONDecodeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path} holds no pair: a line is a JSON object with {FIELDS[:2]}")
    return found


def as_pair(value: Any, name: str = "") -> Pair:
    """A pair from a :class:`Pair`, ``(positive, negative)``, or a dictionary of
    :data:`FIELDS`; ``name`` where it has no ``id``."""
    if isinstance(value, Pair):
        return value
    if isinstance(value, tuple | list) and len(value) == 2:
        return Pair(value[0], value[1], id=name)
    if not isinstance(value, dict):
        raise ValueError(f"pair {name}: expected two texts, or an object with {FIELDS[:2]}")
    if strange := sorted(set(value) - set(FIELDS)):
        raise ValueError(f"pair {name}: unknown field {strange[0]!r}: {', '.join(FIELDS)}")
    for side in FIELDS[:2]:
        if side not in value:
            raise ValueError(f"pair {name}: there is no {side!r}: a pair needs both sides")
    spans = {k: tuple(value[k]) for k in FIELDS[3:5] if value.get(k) is not None}
    one = {k: value[k] for k in FIELDS[:3] if k in value}
    return Pair(**one, **spans, id=str(value.get("id", name)))


def collect(
    model: Model,
    pairs: Sequence[Pair],
    *,
    name: str = "positive",
    position: str = "last",
    controls: int = 10,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Means:
    """Read-outs of both sides of every pair, at every layer.

    Args:
        name: what the positive side is called; the other one is :data:`OTHER_SIDE`.
        position: one of :data:`POSITIONS`; ``"span"`` needs spans in every pair.
        controls: control directions of each kind, as in
            :func:`stllms.vectors.activations.collect`.
        batch_size: sides in a forward pass; the result does not depend on it.

    Raises:
        ValueError: no pairs, the name of the other side, ids that occur twice, an unknown
            position, a pair without spans where they are asked for, a side longer than the
            context, read-outs that are not finite.
    """
    if position not in POSITIONS:
        raise ValueError(f"position {position!r} is not one of {', '.join(POSITIONS)}")
    if not pairs:
        raise ValueError("there are no pairs")
    if name == OTHER_SIDE:
        raise ValueError(f"{name!r} is what the negative side is called: choose another name")
    ids = [pair.id or str(i) for i, pair in enumerate(pairs)]
    twice = sorted({one for one in ids if ids.count(one) > 1})
    if twice:
        raise ValueError(f"ids of pairs must differ; more than once: {', '.join(twice)}")
    order = sorted(range(len(pairs)), key=lambda i: not is_build(ids[i]))  # build half first
    sides = [side for i in order for side in _sides(model, pairs[i], position)]
    read = []
    with token_bar(len(sides), "pairs", unit="sides", enabled=progress) as bar:
        for start in range(0, len(sides), batch_size):
            batch = sides[start : start + batch_size]
            read.append(_read(model, batch))
            bar.tick(sum(len(side[0]) for side in batch), len(batch))
    values = torch.cat(read).unflatten(0, (len(pairs), 2))
    if not values.isfinite().all():
        broken = order[int((~values.isfinite()).flatten(1).any(1).nonzero()[0])]
        raise ValueError(f"activations are not finite: pair {ids[broken]!r}")
    config = {"position": position, "controls": {"seed": seed, "targets": [name]}}
    names = (name, OTHER_SIDE)
    return _means(values, [ids[i] for i in order], names, model.name, config, controls)


def _sides(
    model: Model, pair: Pair, position: str
) -> list[tuple[tuple[int, ...], tuple[int, int]]]:
    """Ids of both sides, and the half-open window of tokens that each is averaged over."""
    found = []
    for name, side, span in pair._sides():
        ids, start, offsets = _tokens(model, pair.prompt, side)
        if len(ids) > model.max_context:
            raise ValueError(
                f"pair {pair.id}: {name} has {len(ids)} tokens, {model.name} has a context of "
                f"{model.max_context}"
            )
        least = min(1, len(ids) - 1)  # never the first token of a sequence, if there are more
        window = {"last": (len(ids) - 1, len(ids)), "mean": (max(least, start), len(ids))}.get(
            position
        )
        if window is None:
            if span is None:
                raise ValueError(f"pair {pair.id}: position 'span' needs a {name}_span")
            own = [k for k, (a, b) in enumerate(offsets) if a < span[1] and b > span[0]]
            first, end = start + own[0], start + own[-1] + 1
            begin = max(least, first - 1)
            window = (begin, max(begin + 1, min(end - 1, begin + WINDOW)))
        found.append((ids, window))
    return found


def _tokens(
    model: Model, prompt: Text | None, side: Text
) -> tuple[tuple[int, ...], int, list[tuple[int, int]]]:
    """Ids of prompt and side, where the side begins, and the characters of its tokens.

    The side is tokenised by itself, as what a model writes behind a prompt is; one without a
    prompt keeps the token that the tokenizer begins a text with, which is never read out.
    """
    if not isinstance(side, str):
        return model.prompt_ids(side)[1], 0, []
    found = model.tokenizer(side, add_special_tokens=False, return_offsets_mapping=True)
    own, offsets = found["input_ids"], found["offset_mapping"]
    if prompt is None:
        whole = model.tokenizer(side)["input_ids"]
        before = whole[: len(whole) - len(own)] if whole[-len(own) :] == own else []
    elif isinstance(prompt, str):
        before = model.tokenizer(prompt)["input_ids"]
    else:
        before = model.prompt_ids(prompt)[1]
    return (*before, *own), len(before), offsets


def _read(model: Model, batch: Sequence[tuple[tuple[int, ...], tuple[int, int]]]) -> Tensor:
    """Means of the windows at every layer, ``[B, L, D]`` float32 on the CPU. Rows are padded on
    the right, where a causal model does not look."""
    ids = torch.full((len(batch), max(len(one) for one, _ in batch)), model.pad_id)
    weights = torch.zeros(*ids.shape)
    for row, (one, (start, stop)) in enumerate(batch):
        ids[row, : len(one)] = torch.tensor(one)
        weights[row, start:stop] = 1.0 / (stop - start)
    inputs = {"input_ids": ids.to(model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad(), model.nn_decoder.trace(**inputs, use_cache=False):
        layers = save([])
        for envoy in model.nn_layers:
            h = envoy.output
            layers.append(torch.einsum("bt,btd->bd", weights.to(h.device), h.float()))
    return torch.stack([layer.cpu() for layer in layers], dim=1)


def _means(
    values: Tensor,
    ids: Sequence[str],
    names: tuple[str, str],
    model: str,
    config: dict[str, Any],
    controls: int,
) -> Means:
    """:class:`Means` of read-outs ``[P, 2, L, D]`` of pairs, the build half first."""
    p, _, n_layers, width = values.shape
    means = Means.zeros(
        names,
        n_layers,
        width,
        model=model,
        sample_layers=tuple(range(n_layers)),
        controls=controls,
        ledger={"pairs": p},
        config=config,
    )
    x = values.double()
    parts = torch.tensor([part_of(one) for one in ids])
    for sums, one in ((means.sums, x), (means.squares, x.square())):
        sums.index_add_(0, parts, one)
    means.counts.add_(torch.bincount(parts, minlength=PARTS)[:, None])
    means.overall_sums.index_add_(0, parts, x.sum(1))
    means.overall_counts.add_(2 * torch.bincount(parts, minlength=PARTS))
    generator = torch.Generator().manual_seed(config["controls"]["seed"])
    rank = torch.tensor(np.argsort(np.argsort(ids)))  # the order of the pairs does not matter
    halves = random_halves(p, 3 * controls, generator)[:, rank].unflatten(0, (controls, 3))
    chosen = torch.stack([1 - halves[:, 0], halves[:, 0]], 1)  # [K, 2, P]: which side counts
    signs = 1 - 2 * halves[:, 1:]  # of every side; they add up to zero on either
    means.shuffled.add_(torch.einsum("ksp,psld->kld", chosen, x))
    means.signed.add_(torch.einsum("ksp,psld->kld", signs, x))
    labels = torch.tensor([0, 1]).repeat(p)
    filled = {
        "samples": values.flatten(0, 1),
        "sample_labels": labels,
        "sample_responses": torch.tensor([mark(one) for one in ids]).repeat_interleave(2),
    }
    if n_build := sum(map(is_build, ids)):
        build = HALVES["build"]
        units = normalize(means.mean(build) - means.overall(build), dim=-1).float()
        test = values[n_build:].flatten(0, 1)
        filled["projections"] = torch.einsum("sld,nld->sln", test, units)
        filled["projection_labels"] = labels[2 * n_build :]
    return replace(means, **filled)
