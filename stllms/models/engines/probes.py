"""Was it steered? Asked of every batch of an engine that is not ours.

Engines have been found to leave requests unsteered without a word. So every steered batch has
one probe for each different set of interventions in it: a prompt and one token to write. Its
next-token distributions, steered (``s``) and plain (``p``), were computed by ``transformers``
beforehand. That of the engine (``e``) must be nearer to ``s`` than to ``p``, and within
:data:`TOLERANCE` of ``s``, or nothing of the batch is kept:

    ``KL(e || s) <= TOLERANCE`` and ``KL(e || s) < KL(e || p)``.

A probe can tell where ``KL(s || p)`` is :data:`TELLS` times the tolerance: of some prompts the
beginning is taken behind which it is largest; where it is too small behind all of them, the
interventions of the probe are scaled up, which its report says. Every batch, steered or not,
has a plain probe too: it fails where the engine computes with other weights, or where a vector
of a neighbour reaches a request without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stllms.hashes import digest
from stllms.models.engines.engine import Can, Row, Written
from stllms.models.engines.interventions import Intervention, edits, fingerprint, intervene
from stllms.models.model import Model

Items = tuple[Intervention, ...]

#: Nats that two engines may differ by, by the type that they compute in.
TOLERANCE = {
    torch.float64: 1e-7,
    torch.float32: 1e-7,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}
#: A probe whose steered and plain distributions differ by this many tolerances can tell.
TELLS = 30.0
#: Nats with which no other prompt is tried, prompts that are, tokens of each, and factors of
#: the interventions.
ENOUGH, PROMPTS, TOKENS, SCALES = 0.3, 4, 64, (1.0, 4.0, 16.0, 64.0)
#: The name of the probe without interventions.
PLAIN = "plain"
#: Sets of interventions that are computed at once.
SETS = 8


class SteeringError(RuntimeError):
    """An engine did not do to the residual stream what it was asked to."""


@dataclass(frozen=True)
class Probe:
    """A prompt and interventions, ``scale`` times those that are probed, with the logits
    ``[V]`` behind it by ``transformers``: ``steered``, and ``plain``."""

    prompt_ids: tuple[int, ...]
    interventions: Items
    scale: float
    steered: Tensor
    plain: Tensor

    @property
    def apart(self) -> float:
        """``KL(s || p)`` in nats: what there is to be seen."""
        return float(kl(self.steered, self.plain))


class Probed:
    """An engine whose steered batches carry probes.

    Subclasses have ``name`` and ``can``, write rows (:meth:`write`), and give the memory and
    the weights of the model back (:meth:`close`). ``report`` has an entry for every set of
    interventions so far: what the probe was, its distances in nats (the largest, of several
    batches), and in how many batches it passed.
    """

    name: str
    can: Can

    def __init__(self, model: Model) -> None:
        self.model = model
        self.report: list[dict[str, Any]] = []
        self._probes: dict[str, Probe] = {}
        self._reported: dict[str, dict[str, Any]] = {}

    def write(self, rows: Sequence[Row], *_: Any, **options: Any) -> list[Written]:
        """What is written for every row, probes among them:
        :func:`stllms.models.engines.generate`."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives the memory back, and the weights to the model."""
        raise NotImplementedError

    def generate(self, rows: Sequence[Row], **options: Any) -> list[Written]:
        """What is written for every row (:func:`stllms.models.engines.generate`), if every
        probe passes.

        Raises:
            SteeringError: where one does not, naming the intervention and the distances.
        """
        sets = {PLAIN: (), **different(row.interventions for row in rows)} if rows else {}
        unknown = {key: items for key, items in sets.items() if key not in self._probes}
        if unknown:
            self.close()  # the probes are computed with the weights of the model
            self._probes |= made(self.model, unknown, [row.prompt_ids for row in rows])
        probes = [(key, self._probes[key]) for key in sets]
        asked = [Row(one.prompt_ids, key, one.interventions, probe=True) for key, one in probes]
        written = self.write([*asked, *rows], **options)
        for (key, probe), answer in zip(probes, written, strict=False):
            self._check(key, sets[key], probe, answer.logits)
        return written[len(asked) :]

    def _check(self, key: str, items: Items, probe: Probe, logits: Tensor | None) -> None:
        if logits is None:
            raise SteeringError(f"engine {self.name} gave no logits for a probe")
        steered, plain = (float(kl(logits, of)) for of in (probe.steered, probe.plain))
        allowed = TOLERANCE[self.model.dtype]
        if not items and not plain <= allowed:
            raise SteeringError(
                f"engine {self.name} does not compute what the plain model computes: the next "
                f"token of a request without steering is {plain:.2g} nats from that of "
                f"transformers (at most {allowed:.2g}). Its weights are others, or steering of "
                "another request reached it; no row of this batch is kept"
            )
        if items and not (steered <= allowed and steered < plain):  # NaN fails, too
            raise SteeringError(
                f"engine {self.name} did not steer as it was asked to ({_named(items)}): its "
                f"next token is {steered:.2g} nats from that of the steered model (at most "
                f"{allowed:.2g}) and {plain:.2g} from that of the plain one, which are "
                f"{probe.apart:.2g} apart. No row of this batch is kept; stllms engines check "
                f"{self.model.name} says more, and engine transformers steers"
            )
        entry = self._reported.get(key)
        if entry is None:
            entry = self._reported[key] = {
                "interventions": _named(items),
                "scaled by": probe.scale,
                "prompt tokens": len(probe.prompt_ids),
                "steered from plain": _short(probe.apart),
                "engine from steered": 0.0,
                "engine from plain": 0.0,
                "batches": 0,
            }
            self.report.append(entry)
        for name, value in (("steered", steered), ("plain", plain)):
            entry[f"engine from {name}"] = max(entry[f"engine from {name}"], _short(value))
        entry["batches"] += 1


def active(items: Sequence[Intervention]) -> Items:
    """Those that do anything: with a coefficient and a direction other than 0."""
    return tuple(one for one in items if one.coefficient != 0 and bool(one.direction.any()))


def different(rows: Iterable[Sequence[Intervention]]) -> dict[str, Items]:
    """The sets of active interventions of some rows, by a hash of what they do."""
    known: dict[int, Items] = {}
    sets: dict[str, Items] = {}
    for row in rows:
        if id(row) not in known and (items := active(row)):
            known[id(row)] = items
            sets.setdefault(fingerprint(items), items)
    return sets


def made(
    model: Model, sets: dict[str, Items], prompts: Sequence[tuple[int, ...]]
) -> dict[str, Probe]:
    """A probe for every set of interventions.

    Raises:
        SteeringError: for a set that changes nothing that could be seen, behind any prompt and
            with any scale.
    """
    tells = TELLS * TOLERANCE[model.dtype]
    beginnings = list(dict.fromkeys(ids[:TOKENS] for ids in prompts))[:PROMPTS]
    best: dict[str, Probe] = {}
    plain = sets.get(PLAIN)
    sets = {key: items for key, items in sets.items() if items}
    for scale in SCALES:
        wanted = max(tells, ENOUGH) if scale == 1 else tells
        for ids in beginnings:
            left = [key for key in sets if key not in best or best[key].apart < wanted]
            for start in range(0, len(left), SETS):
                part = left[start : start + SETS]
                scaled = [_scaled(sets[key], scale) for key in part]
                for key, found in zip(part, _told(model, ids, scaled, scale), strict=True):
                    if key not in best or found.apart > best[key].apart:
                        best[key] = found
    for key, probe in best.items():
        if not probe.apart >= tells:
            raise SteeringError(
                f"{_named(sets[key])} changes the next token of {model.name} by "
                f"{probe.apart:.2g} nats, {probe.scale:g} times as strong: too little to see "
                "whether an engine steers; take engine transformers"
            )
    if plain is not None:
        its = logits(model, beginnings[0], [()])[0, -1].clone()
        best[PLAIN] = Probe(beginnings[0], (), 1.0, its, its)
    return best


def _told(
    model: Model, ids: tuple[int, ...], sets: Sequence[Items], scale: float
) -> Iterator[Probe]:
    """For every set the beginning of ``ids`` behind which it changes most."""
    plain, *steered = logits(model, ids, [(), *sets])
    for items, its in zip(sets, steered, strict=True):
        place = int(kl(its, plain).argmax())
        yield Probe(ids[: place + 1], items, scale, its[place].clone(), plain[place].clone())


@torch.no_grad()
def logits(model: Model, ids: Sequence[int], sets: Sequence[Items]) -> Tensor:
    """Logits ``[sets, T, V]`` behind every token of a prompt, by ``transformers``: float32 on
    the CPU. Every position is steered."""
    inputs, mask, position = model.left_pad([ids] * len(sets))
    given = {"input_ids": inputs, "attention_mask": mask, "position_ids": position}
    placed = [(edit, edit.coefficient) for edit in edits(model, sets)]
    with intervene(model.layers, placed):
        return model.hf(**given, use_cache=False).logits.float().cpu()


def kl(first: Tensor, second: Tensor) -> Tensor:
    """``KL(first || second)`` in nats, of the distributions of logits ``[..., V]``."""
    a, b = (one.double().log_softmax(-1) for one in (first, second))
    return (a.exp() * (a - b)).sum(-1).clamp(min=0)


def _scaled(items: Items, scale: float) -> Items:
    return tuple(replace(one, coefficient=scale * one.coefficient) for one in items)


def _named(items: Items) -> str:
    said = [
        f"{one.operation} {one.coefficient:+g} times direction {digest(one.direction)[:8]}"
        f" at layer {one.layer}"
        for one in items
    ]
    return "; ".join(said) or "none"


def _short(nats: float) -> float:
    return float(f"{nats:.3g}")
