"""What is kept of activations: counts, sums and second moments of span means.

The mean of a span is one vector per layer (method, section 6), and directions need only sums of
them. Sums are kept in :data:`PARTS` parts; a response's part is a hash of its task, so that
order and batch size do not matter. The first half of the parts is the *build* half, the rest
the *test* half: what is made from one is measured on the other (:mod:`stllms.vectors.quality`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

#: Parts that the responses fall into.
PARTS = 8
#: The parts of each half.
HALVES: dict[str, slice] = {"build": slice(PARTS // 2), "test": slice(PARTS // 2, None)}
#: A behaviour with fewer spans has no direction.
MIN_SPANS = 10


def part_of(task_id: str) -> int:
    """The part of a response, from a hash of its task alone: ``0 .. PARTS - 1``."""
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:4], "big") % PARTS


def mark(task_id: str) -> int:
    """An integer of 63 bits for a response, from a hash of its task alone."""
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[8:16], "big") >> 1


def is_build(task_id: str) -> bool:
    """Whether a response belongs to the half from which directions are built."""
    return part_of(task_id) < PARTS // 2


def random_halves(pairs: int, draws: int, generator: torch.Generator) -> Tensor:
    """Which of the contrast pairs a control takes the other way round: ``[draws, pairs]``
    float64, 1 for exactly one half of them, drawn anew each time, 0 for the other, and 1/2 for
    the one that is left over of an odd number.

    So what all pairs share cancels. With a coin for each pair it would be left in, and not
    grow smaller beside the rest with more pairs.
    """
    half = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    half = half.repeat_interleave(torch.tensor([pairs // 2, pairs % 2, pairs // 2]))
    rows = [torch.randperm(pairs, generator=generator) for _ in range(draws)]
    return half[torch.stack(rows)] if rows else half.new_zeros(0, pairs)


@dataclass(frozen=True)
class Means:
    """Span means in sums. ``H`` parts, ``N`` behaviours, ``L`` layers, ``D`` width.

    ``counts [H, N]`` spans, ``sums [H, N, L, D]`` of span means, ``squares [H, N, L, D]`` of
    their elementwise squares, ``overall_sums [H, L, D]`` of the responses' averages and
    ``overall_counts [H]`` responses: all float64 or int64.

    ``projections [S, L, N]`` are projections of each span of the test half on the unit
    directions of the build half, ``projection_labels [S]`` the behaviours of those spans.
    ``samples [S, K, D]`` are the span means themselves at ``sample_layers``, empty unless asked
    for, the build half first; ``sample_responses [S]`` says by :func:`mark` which response a
    span is from.

    Of the control directions (method, section 13), ``shuffled [K, L, D]`` are sums of the span
    means that carry the label of the control's target after a permutation of the labels within
    each response, ``signed [K, L, D]`` sums of all span means with random signs, and ``signs
    [K]`` sums of those signs; of contrast pairs both go by :func:`random_halves`.

    ``ledger`` counts what was used and what was not.
    """

    behaviours: tuple[str, ...]
    model: str
    counts: Tensor
    sums: Tensor
    squares: Tensor
    overall_sums: Tensor
    overall_counts: Tensor
    projections: Tensor
    projection_labels: Tensor
    samples: Tensor
    sample_labels: Tensor
    sample_responses: Tensor
    shuffled: Tensor
    signed: Tensor
    signs: Tensor
    sample_layers: tuple[int, ...] = ()
    ledger: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def zeros(
        cls,
        behaviours: tuple[str, ...],
        n_layers: int,
        width: int,
        *,
        model: str = "",
        sample_layers: tuple[int, ...] = (),
        controls: int = 0,
        **rest: Any,
    ) -> Means:
        """Nothing seen yet."""
        real = partial(torch.zeros, dtype=torch.float64)
        whole = partial(torch.zeros, dtype=torch.int64)
        n, size = len(behaviours), (n_layers, width)
        return cls(
            behaviours=behaviours,
            model=model,
            counts=whole(PARTS, n),
            sums=real(PARTS, n, *size),
            squares=real(PARTS, n, *size),
            overall_sums=real(PARTS, *size),
            overall_counts=whole(PARTS),
            projections=real(0, n_layers, n, dtype=torch.float32),
            projection_labels=whole(0),
            samples=real(0, len(sample_layers), width, dtype=torch.float32),
            sample_labels=whole(0),
            sample_responses=whole(0),
            shuffled=real(controls, *size),
            signed=real(controls, *size),
            signs=whole(controls),
            sample_layers=sample_layers,
            **rest,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def n_layers(self) -> int:
        """``L``."""
        return self.sums.shape[2]

    @property
    def width(self) -> int:
        """``D``."""
        return self.sums.shape[3]

    def overall(self, parts: slice | list[int] = slice(None)) -> Tensor:
        """``overall[l]``, the average over responses of their averages: ``[L, D]`` float64.

        Raises:
            ValueError: there is no response with spans.
        """
        n = int(self.overall_counts[parts].sum())
        if not n:
            raise ValueError("no response with spans in these parts: there is no overall mean")
        return self.overall_sums[parts].sum(0) / n

    def mean(self, parts: slice | list[int] = slice(None)) -> Tensor:
        """``mean[b][l]`` over all spans of a behaviour, ``[N, L, D]`` float64; zero where it
        has none (look at ``counts``)."""
        n = self.counts[parts].sum(0).clamp(min=1)
        return self.sums[parts].sum(0) / n[:, None, None]

    def units(self, parts: slice) -> Tensor:
        """Unit ``mean - overall`` of some parts, ``[N, L, D]`` float64; zero without any
        response there."""
        if not int(self.overall_counts[parts].sum()):
            return torch.zeros_like(self.sums[0])
        return normalize(self.mean(parts) - self.overall(parts), dim=-1)

    def at(self, layer: int) -> Tensor:
        """The span means kept of a layer, ``[S, D]`` float64.

        Raises:
            ValueError: those of this layer were not kept.
        """
        if layer not in self.sample_layers or not len(self.samples):
            raise ValueError(
                f"the span means of layer {layer} are needed: activations.collect(..., "
                f"keep=[{layer}]); {len(self.samples)} spans are kept, at layers "
                f"{list(self.sample_layers)}"
            )
        return self.samples[:, self.sample_layers.index(layer)].double()

    def half(self, which: str) -> Means:
        """The ``"build"`` or the ``"test"`` half alone, without sums of control directions,
        which are not kept by part."""
        parts = HALVES[which]
        n = int(self.counts[HALVES["build"]].sum())
        rows = slice(n) if which == "build" else slice(n, None)
        changed = {}
        for name in ("counts", "sums", "squares", "overall_sums", "overall_counts"):
            changed[name] = torch.zeros_like(getattr(self, name))
            changed[name][parts] = getattr(self, name)[parts]
        for name in ("samples", "sample_labels", "sample_responses"):
            changed[name] = getattr(self, name)[rows]
        for name in ("shuffled", "signed", "signs"):
            changed[name] = getattr(self, name)[:0]
        return replace(self, **changed)
