"""Control directions: as long as a behaviour's, but meaning nothing (method, section 13).

* ``shuffled``: the directions' formula for one target behaviour, after the labels of the spans
  were permuted within each response. Would any spans of the same responses do as well?
* ``covariance``: ``sum_i e_i (m_i - m)`` over all span means ``m_i`` and their average ``m``,
  with random signs ``e_i``. Would any direction do along which spans differ?
* ``isotropic``: uniform on the sphere. Would any vector of that length do? A weak opponent: of
  ``D`` dimensions few matter to the model, and it lies mostly in the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stllms.labels import CONTROLS
from stllms.runs.files import BadFile, load_tensors, save_tensors
from stllms.vectors.directions import rescale
from stllms.vectors.means import MIN_SPANS, Means

#: The kinds of the default controls, in turn.
MATCHED: tuple[str, ...] = ("shuffled", "covariance")


def isotropic(overall: Tensor, n: int, seed: int) -> Tensor:
    """``n`` directions per layer, uniform on the sphere, as long as ``overall [L, D]`` there:
    ``[n, L, D]``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, *overall.shape, generator=generator)
    return rescale(noise.double(), overall.double(), range(n)).float()


def controls(kind: str, means: Means, n: int, *, seed: int = 0) -> Tensor:
    """``n`` control directions of a kind, as long as the behaviours' at each layer:
    ``[n, L, D]`` float32.

    ``means`` are collected with ``controls=n`` or more. ``seed`` is that of ``"isotropic"``;
    that of the first two kinds is the collection's.

    Raises:
        ValueError: another kind, fewer collected than asked for, or no span to make one from.
    """
    if kind not in CONTROLS:
        raise ValueError(f"controls {kind!r} are not one of {', '.join(CONTROLS)}")
    overall = means.overall()
    if kind == "isotropic":
        return isotropic(overall, n, seed)
    if n > len(means.signs):
        raise ValueError(
            f"{n} {kind} controls asked for, {len(means.signs)} were collected: collect "
            f"activations with controls={n}"
        )
    if kind == "shuffled":
        raw = means.shuffled[:n] / _spans_of_targets(means, n)[:, None, None] - overall
    else:
        middle = means.sums.sum((0, 1)) / means.counts.sum().clamp(min=1)
        raw = means.signed[:n] - means.signs[:n, None, None] * middle
    return rescale(raw, overall, [f"{kind}:{i}" for i in range(n)]).float()


def _spans_of_targets(means: Means, n: int) -> Tensor:
    """Spans of the behaviour that each of ``n`` shuffled controls imitates, ``[n]``."""
    rows = [means.behaviours.index(name) for name in means.config["controls"]["targets"]]
    if not rows:
        raise ValueError(
            f"no behaviour has the {MIN_SPANS} spans that a shuffled control needs: label "
            "more responses"
        )
    return means.counts.sum(0)[rows][torch.arange(n) % len(rows)]


@dataclass(frozen=True)
class Controls:
    """The control directions of a run: ``names [K]`` such as ``"shuffled:0"``, ``directions
    [K, L, D]`` float32, and in ``config`` how they were made."""

    names: tuple[str, ...]
    directions: Tensor
    config: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def first(self, n: int) -> Controls:
        """The first ``n``, or all if there are fewer; kinds alternate in a run's file."""
        return replace(self, names=self.names[:n], directions=self.directions[:n])

    def save(self, path: str | Path) -> None:
        """Write as safetensors, names and configuration in its metadata."""
        metadata = {"controls": self.names, "config": self.config}
        save_tensors(path, {"directions": self.directions}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Controls:
        """The inverse of :meth:`save`.

        Raises:
            BadFile: there is no such file, or it is one of something else.
        """
        tensors, metadata = load_tensors(path)
        names = tuple(metadata.get("controls", ()))
        if set(tensors) != {"directions"} or len(names) != len(tensors["directions"]):
            raise BadFile(f"{path}: no control directions, but {', '.join(tensors)}")
        return cls(names, tensors["directions"], metadata["config"])


def control_directions(means: Means, kind: str, n: int, *, seed: int = 0) -> Controls:
    """``n`` control directions of a run. ``kind`` is one of :func:`controls`, or ``"matched"``:
    shuffled and covariance in turn, so that any first few are of both. None, where no
    behaviour has spans enough for a direction: there is nothing to compare them with."""
    drawn = means.config.get("controls", {})
    if drawn and not drawn["targets"]:
        n = 0
    kinds = MATCHED if kind == "matched" else (kind,)
    directions = torch.zeros(n, means.n_layers, means.width)
    for place, one in enumerate(kinds[:n]):
        directions[place :: len(kinds)] = controls(
            one, means, len(range(place, n, len(kinds))), seed=seed
        )
    names = tuple(f"{kinds[i % len(kinds)]}:{i // len(kinds)}" for i in range(n))
    return Controls(names, directions, {"kind": kind, "seed": seed, **drawn})
