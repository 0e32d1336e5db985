"""How far steering takes a chain from what the plain model would have written.

A written chain is fed again, once as it was written (with its interventions) and once plain,
one forward each. Over its output tokens ``t`` (at temperature 1, whatever it was sampled at):

* ``perplexity = exp(-mean_t log p_plain(token_t))``, of the chain under the plain model;
* ``kl = mean_t KL(p_steered || p_plain)``, in nats per token, what the intervention changed in
  the distributions it was sampled from. For a plain chain it is 0.

The states of a batch of chains are computed at once, their logits a slice of positions at a
time: a whole batch of them, ``B * T * V``, would not fit at a real vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stllms.hashes import digest
from stllms.models.engines.interventions import (
    Edit,
    Intervention,
    edits,
    fingerprints,
    intervene,
    think_end,
)
from stllms.models.engines.transformers import default_batch_size
from stllms.models.model import Model
from stllms.records import STEERED_KEY, Steered
from stllms.runs.files import StaleArtefact
from stllms.runs.store import Rows, resumed
from stllms.runs.workers import Tick
from stllms.terminal import token_bar

#: Chains in a chunk, the unit of flush and resume.
CHUNK = 512
#: Tokens of a batch, prompts and padding included.
TOKENS = 2**14
#: Logits at once: 2**24 values are 64 MB in float32, and there are up to eight such tensors.
LOGITS, LOGITS_ELSEWHERE = 2**24, 2**28


def scores(
    model: Model,
    chains: Sequence[Steered],
    interventions: Mapping[tuple, Intervention | None],
    *,
    store: Rows | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """One row per chain, in order: its key, ``kl`` and ``perplexity``, ``None`` if empty.

    Args:
        interventions: what each condition does, by ``(direction, layer, coefficient,
            operation)``.
        store: rows by the key of a steered chain; a chunk of which a row is missing is
            computed whole, and the missing rows are added.

    Raises:
        ValueError: for a chain whose condition is not among ``interventions``.
        StaleArtefact: where the rows of ``store`` are of another model, other directions or
            other chains.
    """
    strange = sorted({one.key[1:] for one in chains} - interventions.keys())
    if strange:
        raise ValueError(f"chains of conditions without an intervention: {strange[0]}, ...")
    if store is not None:
        store.bind({**model.identity, **fingerprints(interventions)})
        _same_chains(store, chains)

    with token_bar(len(chains), "likelihood", enabled=progress) as bar:
        keys = [one.key for one in chains]
        make = partial(_scored, interventions=interventions)
        return resumed(keys, chains, make, size=CHUNK, model=model, store=store, bar=bar)


def _scored(
    model: Model,
    part: Sequence[Steered],
    tick: Tick,
    *,
    interventions: Mapping[tuple, Intervention | None],
) -> list[dict[str, Any]]:
    """The rows of a chunk of chains, batches of similar length together."""
    found: dict[tuple, dict[str, float | None]] = {}
    for batch in _batches(model, part):
        rows = _compare(model, batch, [interventions[one.key[1:]] for one in batch])
        found |= {one.key: row for one, row in zip(batch, rows, strict=True)}
        tick(sum(len(one.response.output_ids) for one in batch), len(batch))
    return [
        dict(zip(STEERED_KEY, one.key, strict=True)) | {"of": _of(one)} | found[one.key]
        for one in part
    ]


def _of(one: Steered) -> str:
    """A hash of the chain that a row is about."""
    return digest([*one.response.prompt_ids, -1, *one.response.output_ids])


def _same_chains(store: Rows, chains: Sequence[Steered]) -> None:
    """Raises ``StaleArtefact`` for a stored row about another chain of its key."""
    stored = store.by_key()
    for one in chains:
        row = stored.get(one.key)
        if row is not None and row.get("of") != _of(one):
            raise StaleArtefact(
                f"{store.path.name} is of other chains: that of {one.key} changed. --fresh "
                f"makes it again; or move {store.path} away"
            )


def _batches(model: Model, chains: Sequence[Steered]) -> list[list[Steered]]:
    """Chains of similar length, as many as :data:`TOKENS` and the device allow."""

    def length(one: Steered) -> int:
        return len(one.response.prompt_ids) + len(one.response.output_ids)

    most = min(default_batch_size(model), model.fits)
    batches: list[list[Steered]] = []
    for one in sorted(chains, key=length, reverse=True):
        size = len(batches[-1]) + 1 if batches else 0
        if 0 < size <= most and size * length(batches[-1][0]) <= TOKENS:
            batches[-1].append(one)
        else:
            batches.append([one])
    return batches


@torch.no_grad()
def _compare(
    model: Model,
    chains: Sequence[Steered],
    interventions: Sequence[Intervention | None],
) -> list[dict[str, float | None]]:
    """``kl`` and ``perplexity`` of every chain of a batch."""
    lengths = [len(one.response.output_ids) for one in chains]
    ids, mask, position = model.left_pad(
        [(*one.response.prompt_ids, *one.response.output_ids) for one in chains]
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": position,
        "use_cache": False,
    }
    back = torch.arange(ids.shape[1], 0, -1, device=model.device)
    written = back[None] <= torch.tensor(lengths, device=model.device)[:, None]
    before = written.roll(-1, dims=1)  # the state before a token predicts it
    before[:, -1] = False
    plain = model.decoder(**inputs).last_hidden_state.to(model.device)[before]
    acting = edits(model, [() if item is None else (item,) for item in interventions])
    steered = _steered(model, inputs, acting, written)[before] if acting else None
    kl, surprise = _reduce(model, plain, steered, ids[written])
    return [
        {"kl": max(0.0, float(a.mean())), "perplexity": float(b.mean().exp())}
        if len(a)
        else {"kl": None, "perplexity": None}
        for a, b in zip(kl.split(lengths), surprise.split(lengths), strict=True)
    ]


def _steered(
    model: Model, inputs: dict[str, Any], acting: Sequence[Edit], written: Tensor
) -> Tensor:
    """Decoder outputs ``[B, T, D]`` with the interventions, each where it acted."""
    closing = (inputs["input_ids"] == think_end(model)) & written
    places = {
        "all": torch.ones_like(written),
        "generated": written,
        "thinking": written & (closing.cumsum(-1) == 0),
    }
    placed = [(edit, edit.coefficient * places[edit.where][:, :, None]) for edit in acting]
    with intervene(model.layers, placed):
        return model.decoder(**inputs).last_hidden_state.to(model.device)


def _reduce(
    model: Model, plain: Tensor, steered: Tensor | None, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """``KL(p_steered || p_plain)`` and ``-log p_plain(token)``, ``[N]`` float64 on the CPU.

    ``plain`` and ``steered`` are the states ``[N, D]`` before the ``tokens [N]``; a slice of
    them at a time is unembedded.
    """
    kl = torch.zeros(len(tokens), dtype=torch.float64)
    surprise = torch.zeros(len(tokens), dtype=torch.float64)
    most = LOGITS if model.device.type == "cpu" else LOGITS_ELSEWHERE
    size = max(1, most // model.text_config.vocab_size)
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        log_plain = model.logits(plain[None, part])[0].float().log_softmax(-1)
        surprise[part] = -log_plain.gather(-1, tokens[part, None])[:, 0].double().cpu()
        if steered is not None:
            log_steered = model.logits(steered[None, part])[0].float().log_softmax(-1)
            kl[part] = (log_steered.exp() * (log_steered - log_plain)).sum(-1).double().cpu()
    return kl, surprise
