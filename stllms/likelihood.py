"""Stage 4: how far steering takes a chain from what the plain model would have written.

A written chain is fed again, once as it was written (with its interventions) and once plain, a
forward each. Over its output tokens ``t`` (at temperature 1, whatever it was sampled at):

* ``perplexity = exp(-mean_t log p_plain(token_t))``, of the chain under the plain model;
* ``kl = mean_t KL(p_steered || p_plain)``, in nats a token, what the push changed in the
  distributions it was sampled from. For a plain chain it is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nnsight import save
from torch import Tensor

from stllms import decode
from stllms.files import Rows, resumed
from stllms.models import Model
from stllms.progress import token_bar
from stllms.provenance import StaleArtefact, digest
from stllms.records import STEERED_KEY, Steered

#: Chains in a chunk, the unit of flush and resume.
CHUNK = 512
#: Logits of a batch at once: 2**27 values in float32 are half a gigabyte.
BUDGET = 2**27
#: Columns whose distributions are compared at once.
SLICE = 128


def scores(
    model: Model,
    chains: Sequence[Steered],
    interventions: Mapping[tuple, decode.Intervention | None],
    *,
    store: Rows | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """A row a chain, in order: its key, ``kl`` and ``perplexity`` (``None`` without output).

    Args:
        interventions: what each arm does (:func:`stllms.steering.by_arm`).
        store: rows by the key of a steered chain; a chunk of which a row is missing is
            computed whole, and the missing rows are added.

    Raises:
        ValueError: for a chain whose arm is not among ``interventions``.
        StaleArtefact: where the rows of ``store`` are of another model, other directions or
            other chains.
    """
    strange = sorted({one.key[1:] for one in chains} - interventions.keys())
    if strange:
        raise ValueError(f"chains of arms without an intervention: {strange[0]}, ...")
    if store is not None:
        store.bind({**model.identity, **decode.fingerprints(interventions)})
        _same_chains(store, chains)

    def make(start: int, stop: int) -> list[dict[str, Any]]:
        part, made = chains[start:stop], {}
        for batch in _batches(model, part):
            found = _compare(model, batch, [interventions[one.key[1:]] for one in batch])
            made |= {one.key: row for one, row in zip(batch, found, strict=True)}
            bar.tick(sum(len(one.response.output_ids) for one in batch), len(batch))
        return [
            dict(zip(STEERED_KEY, one.key, strict=True)) | {"of": _of(one)} | made[one.key]
            for one in part
        ]

    with token_bar(len(chains), "likelihood", enabled=progress) as bar:
        keys = [one.key for one in chains]
        return resumed(keys, make, size=CHUNK, store=store, skip=bar.skip)


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
    """Chains of like length, as many as the budget of logits and the device allow."""
    vocabulary, most = model.text_config.vocab_size, decode.default_batch_size(model)
    batches: list[list[Steered]] = []
    for one in sorted(chains, key=lambda one: len(one.response.output_ids), reverse=True):
        if batches:
            width = len(batches[-1][0].response.output_ids) + 1  # of the longest
            size = len(batches[-1]) + 1
            if size <= most and size * width * vocabulary <= BUDGET:
                batches[-1].append(one)
                continue
        batches.append([one])
    return batches


@torch.no_grad()
def _compare(model: Model, chains: Sequence[Steered], interventions) -> list[dict[str, float]]:
    """``kl`` and ``perplexity`` of every chain of a batch."""
    prompts = [one.response.prompt_ids for one in chains]
    outputs = [one.response.output_ids for one in chains]
    ids, mask, position = model.left_pad(
        [(*p, *o) for p, o in zip(prompts, outputs, strict=True)]
    )
    lengths = [len(o) for o in outputs]
    longest = max(1, *lengths)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": position,
        "use_cache": False,
        "logits_to_keep": longest + 1,
    }
    plain = model.hf(**inputs).logits[:, :-1]
    rows = [
        decode.Row(p, "", () if item is None else (item,))
        for p, item in zip(prompts, interventions, strict=True)
    ]
    edits = decode.edits(model, rows)
    steered = _steered(model, inputs, edits, ids, lengths)[:, :-1] if edits else plain
    return _reduce(plain, steered, ids[:, -longest:], _columns(lengths, longest, model.device))


def _columns(lengths: Sequence[int], width: int, device) -> Tensor:
    """``[B, width]``: which of the last columns are output."""
    back = torch.arange(width, 0, -1, device=device)
    return back[None] <= torch.tensor(lengths, device=device)[:, None]


def _steered(model: Model, inputs: dict, edits, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logits of the forward with the interventions, each where it acted."""
    generated = _columns(lengths, ids.shape[1], model.device)
    ended = ((ids == decode.think_end(model)) & generated).cumsum(-1) > 0
    places = {
        "all": torch.ones_like(generated),
        "generated": generated,
        "thinking": generated & ~ended,
    }
    placed = [(edit, edit.coefficient * places[edit.where][:, :, None]) for edit in edits]
    with model.nn.trace(**inputs):
        decode.intervene(model, placed)
        logits = save(model.nn.output.logits)
    return logits


def _reduce(plain: Tensor, steered: Tensor, written: Tensor, kept: Tensor):
    """Means over the kept columns, a slice of columns at a time in float32."""
    kl = torch.zeros(kept.shape, device=kept.device)
    surprise = torch.zeros(kept.shape, device=kept.device)
    for start in range(0, kept.shape[1], SLICE):
        part = slice(start, start + SLICE)
        log_plain = plain[:, part].float().log_softmax(-1)
        log_steered = steered[:, part].float().log_softmax(-1)
        kl[:, part] = (log_steered.exp() * (log_steered - log_plain)).sum(-1)
        surprise[:, part] = -log_plain.gather(-1, written[:, part, None])[..., 0]
    count = kept.sum(-1)
    mean_kl = ((kl * kept).sum(-1) / count).tolist()
    mean_surprise = ((surprise * kept).sum(-1) / count).exp().tolist()
    return [
        {"kl": max(0.0, a), "perplexity": b} if n else {"kl": None, "perplexity": None}
        for a, b, n in zip(mean_kl, mean_surprise, count.tolist(), strict=True)
    ]
