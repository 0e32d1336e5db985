"""What is kept of activations: counts, sums and second moments of span means, which add up.

The mean of a span is one vector a layer (METHOD, section 6); its sums over spans are all that
directions need. Sums are kept in ``H`` = :data:`PARTS` parts, a response's part being a hash
of its task, so that any shard, order or batch size gives the same parts: the first half of
the parts is the *build* half, the rest the *test* half, and stability can be read at 1/8,
1/4 and 1/2 of the spans. Written by :mod:`stllms.activations`, read by :mod:`stllms.vectors`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from stllms import artifacts

#: Parts that the responses fall into; the first half builds, the second half tests.
PARTS = 8
#: A behaviour with fewer spans has no direction (DESIGN: unavailable).
MIN_SPANS = 10
#: What the ledger of merged shards counts where their projections had to be dropped.
NOT_PROJECTED = "spans of the test half not projected"


def part_of(task_id: str) -> int:
    """The part of a response, from a hash of its task alone: ``0 .. PARTS - 1``."""
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:4], "big") % PARTS


def mark(task_id: str) -> int:
    """A whole number of 63 bits for a response, from a hash of its task alone."""
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[8:16], "big") >> 1


def is_build(task_id: str) -> bool:
    """Whether a response belongs to the half from which directions are built."""
    return part_of(task_id) < PARTS // 2


def digest(directions: Tensor) -> str:
    """A hash of directions, by their values in float32."""
    values = directions.detach().float().cpu().contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Means:
    """Span means in sums. ``H`` parts, ``N`` behaviours, ``L`` layers, ``D`` width.

    ``counts [H, N]`` spans, ``sums [H, N, L, D]`` of span means, ``squares [H, N, L, D]`` of
    their elementwise squares, ``overall_sums [H, L, D]`` of the responses' averages, and
    ``overall_counts [H]`` responses: all float64 or int64. ``projections [S, L, N]`` are
    projections of each span of the test half on unit directions, ``projection_labels [S]`` the
    behaviours of those spans; ``readout`` is :func:`digest` of directions that were given,
    ``""`` for those of the record's own build half. ``samples [S, K, D]`` are the span means
    themselves at ``sample_layers``, those of the build half first, empty unless asked for;
    ``sample_responses [S]`` tells by :func:`mark` which response a span is of.

    Of the control directions (METHOD, section 13) ``shuffled [K, L, D]`` are sums of the span
    means that carry the label of the control's target after a permutation of the labels within
    each response (``config["controls"]``: seed and targets in turn), ``signed [K, L, D]`` are
    sums of all span means with random signs and ``signs [K]`` sums of these signs.

    ``ledger`` counts what was used and what not; ``task_ids``, sorted, are of the responses.
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
    readout: str = ""
    task_ids: tuple[str, ...] = ()
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
        readout: str = "",
        controls: int = 0,
        config: Mapping[str, Any] | None = None,
    ) -> Means:
        """Nothing seen yet."""
        n, shape = len(behaviours), (n_layers, width)
        real, whole = torch.float64, torch.int64
        return cls(
            behaviours=behaviours,
            model=model,
            counts=torch.zeros(PARTS, n, dtype=whole),
            sums=torch.zeros(PARTS, n, *shape, dtype=real),
            squares=torch.zeros(PARTS, n, *shape, dtype=real),
            overall_sums=torch.zeros(PARTS, *shape, dtype=real),
            overall_counts=torch.zeros(PARTS, dtype=whole),
            projections=torch.zeros(0, n_layers, n),
            projection_labels=torch.zeros(0, dtype=whole),
            samples=torch.zeros(0, len(sample_layers), width),
            sample_labels=torch.zeros(0, dtype=whole),
            sample_responses=torch.zeros(0, dtype=whole),
            shuffled=torch.zeros(controls, *shape, dtype=real),
            signed=torch.zeros(controls, *shape, dtype=real),
            signs=torch.zeros(controls, dtype=whole),
            sample_layers=tuple(sample_layers),
            readout=readout,
            config=dict(config or {}),
        )

    @property
    def n_layers(self) -> int:
        return self.sums.shape[2]

    @property
    def width(self) -> int:
        return self.sums.shape[3]

    def overall(self, parts: slice | list[int] = slice(None)) -> Tensor:
        """``overall[l]``, the average over responses of their averages: ``[L, D]`` float64."""
        n = int(self.overall_counts[parts].sum())
        if not n:
            raise ValueError("no response with spans in these parts: there is no overall mean")
        return self.overall_sums[parts].sum(0) / n

    def mean(self, parts: slice | list[int] = slice(None)) -> Tensor:
        """``mean[b][l]`` over all spans of a behaviour, ``[N, L, D]`` float64; zero without
        spans (look at ``counts``)."""
        n = self.counts[parts].sum(0).clamp(min=1)
        return self.sums[parts].sum(0) / n[:, None, None]

    def half(self, which: str) -> Means:
        """The parts and the kept spans of the ``"build"`` or ``"test"`` half alone."""
        if which not in ("build", "test"):
            raise ValueError(f"a half is 'build' or 'test', not {which!r}")
        keep = torch.zeros(PARTS, dtype=torch.int64)
        keep[: PARTS // 2] = int(which == "build")
        keep[PARTS // 2 :] = int(which == "test")
        chosen = self.only(keep)
        n = self._kept_of_build() if len(self.samples) else 0
        rows = slice(n) if which == "build" else slice(n, None)
        names = ("samples", "sample_labels", "sample_responses")
        return replace(chosen, **{name: getattr(self, name)[rows] for name in names})

    def _kept_of_build(self) -> int:
        """How many of the kept spans, which come first, are of the build half.

        Raises:
            ValueError: the labels of the kept spans are not those that were counted.
        """
        counts = self.counts[: PARTS // 2].sum(0)
        n = int(counts.sum())
        found = torch.bincount(self.sample_labels[:n], minlength=len(self.behaviours))
        if not torch.equal(found, counts):
            raise ValueError(
                f"the first {n} kept spans should be those of the build half, "
                f"{counts.tolist()} by behaviour; they are {found.tolist()}"
            )
        return n

    def only(self, keep: Tensor) -> Means:
        """Counts, sums, squares and tasks of the parts where ``keep [H]`` is one. Sums of
        control directions are of all parts and are left out; the rest of the record, which is
        not kept by parts, is left as it is."""
        return replace(
            self,
            task_ids=tuple(one for one in self.task_ids if keep[part_of(one)]),
            counts=self.counts * keep[:, None],
            sums=self.sums * keep[:, None, None, None],
            squares=self.squares * keep[:, None, None, None],
            overall_sums=self.overall_sums * keep[:, None, None],
            overall_counts=self.overall_counts * keep,
            shuffled=self.shuffled[:0],
            signed=self.signed[:0],
            signs=self.signs[:0],
        )

    def merge(self, other: Means) -> Means:
        """Both together: counts and sums add, kept spans follow each other half by half.

        Projections of spans on different directions make no common distribution. They are
        joined if all are on one ``readout``, so collect shards with the same ``readout=``; a
        shard without spans in the test half needs none. Otherwise they are dropped: the ledger
        counts the spans that are then :data:`NOT_PROJECTED`, and :func:`separability` refuses
        the record. Everything else does not depend on them.

        Raises:
            ValueError: naming the field in which the two cannot belong together, or a response
                that is in both.
        """
        for name in ("behaviours", "model", "sample_layers", "config"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"cannot merge means: {name} is {mine!r} and {theirs!r}")
        for name in ("sums", "shuffled"):
            mine, theirs = (tuple(getattr(m, name).shape) for m in (self, other))
            if mine != theirs:
                raise ValueError(f"cannot merge means: {name} has shape {mine} and {theirs}")
        twice = sorted({*self.task_ids} & {*other.task_ids})
        if twice:
            raise ValueError(
                f"cannot merge means: response {twice[0]!r} is in both, one of {len(twice)}; "
                "collect each in one shard only"
            )
        added = ("counts", "sums", "squares", "overall_sums", "overall_counts")
        added += ("shuffled", "signed", "signs")
        projected, readout = self._projections_with(other)
        halves = [m.half(which) for which in ("build", "test") for m in (self, other)]
        return replace(
            self,
            **{name: getattr(self, name) + getattr(other, name) for name in added},
            **projected,
            **{
                name: torch.cat([getattr(half, name) for half in halves])
                for name in ("samples", "sample_labels", "sample_responses")
            },
            readout=readout,
            task_ids=tuple(sorted([*self.task_ids, *other.task_ids])),
            ledger=self._ledger_with(other, len(projected["projections"])),
        )

    @property
    def tested(self) -> int:
        """Spans in the test half."""
        return int(self.counts[PARTS // 2 :].sum())

    def _projections_with(self, other: Means) -> tuple[dict[str, Tensor], str]:
        """Projections of both and their readout; none unless all are on the same one."""
        tested = [m for m in (self, other) if m.tested]
        readouts = {m.readout for m in tested or (self, other)}
        shared = len(readouts) == 1 and all(len(m.projections) == m.tested for m in tested)
        if tested and readouts == {""}:  # on the build half of one, which the other changes
            shared = shared and not all(int(m.overall_counts.sum()) for m in (self, other))
        kept = tested if shared else []
        names = ("projections", "projection_labels")
        parts = {n: [getattr(self, n)[:0], *(getattr(m, n) for m in kept)] for n in names}
        joined = {name: torch.cat(found) for name, found in parts.items()}
        return joined, readouts.pop() if shared else ""

    def _ledger_with(self, other: Means, projected: int) -> dict[str, int]:
        names = {**self.ledger, **other.ledger}
        ledger = {name: self.ledger.get(name, 0) + other.ledger.get(name, 0) for name in names}
        ledger.pop(NOT_PROJECTED, None)
        lost = self.tested + other.tested - projected
        return {**ledger, NOT_PROJECTED: lost} if lost else ledger

    def save(self, path: str | Path) -> None:
        """Write everything as safetensors."""
        metadata = {name: getattr(self, name) for name in METADATA}
        artifacts.save_tensors(path, {name: getattr(self, name) for name in TENSORS}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Means:
        """The inverse of :meth:`save`, bit for bit; ``BadFile`` for a file of other tensors."""
        tensors, metadata = artifacts.load_tensors(path)
        known = set(tensors) == set(TENSORS) and set(metadata) == set(METADATA)
        if not known or tensors["squares"].shape != tensors["sums"].shape:
            found = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
            raise artifacts.BadFile(f"{path}: no span means of this version, but {found}")
        for name in ("behaviours", "sample_layers", "task_ids"):
            metadata[name] = tuple(metadata[name])
        return cls(**tensors, **metadata)


TENSORS: tuple[str, ...] = (
    "counts", "sums", "squares", "overall_sums", "overall_counts",
    "projections", "projection_labels", "samples", "sample_labels", "sample_responses",
    "shuffled", "signed", "signs",
)  # fmt: skip
METADATA: tuple[str, ...] = (
    "behaviours", "model", "sample_layers", "readout", "task_ids", "ledger", "config",
)  # fmt: skip


@dataclass(frozen=True)
class Separability:
    """How well the projection on a direction of the build half tells the spans of a behaviour
    from all others, on the spans of the test half: ``d_prime`` and ``auc``, ``[N, L]``."""

    behaviours: tuple[str, ...]
    d_prime: Tensor
    auc: Tensor
    counts: Tensor


def separability(means: Means, *, min_spans: int = MIN_SPANS) -> Separability:
    """d' and AUC of every behaviour and layer, held out.

    With projections ``x`` of the behaviour's own spans and ``y`` of all others, both of the
    test half: ``d' = (mean x - mean y) / sqrt((var x + var y) / 2)`` and ``AUC = P(x > y)``
    (ties count one half; Mann-Whitney). Behaviours with fewer than ``min_spans`` spans in
    either half are left out, never NaN.

    Raises:
        ValueError: spans of the test half without a projection (:meth:`Means.merge`).
    """
    labels = means.projection_labels.numpy()
    total = means.tested
    build = means.counts[: PARTS // 2].sum(0)
    tests = means.counts[PARTS // 2 :].sum(0).tolist()
    chosen = [
        b
        for b, n in enumerate(tests)
        if n >= min_spans and total - n >= min_spans and int(build[b]) >= min_spans
    ]
    if chosen and len(labels) != total:
        raise ValueError(
            f"{len(labels)} of {total} spans of the test half are projected on one readout: "
            "collect all shards with the same readout=, then merge them"
        )
    d_prime = np.zeros((len(chosen), means.n_layers))
    auc = np.zeros_like(d_prime)
    for row, b in enumerate(chosen):
        own = labels == b
        values = means.projections[:, :, b].numpy().astype(np.float64)
        x, y = values[own], values[~own]
        spread = np.sqrt((x.var(0, ddof=1) + y.var(0, ddof=1)) / 2)
        d_prime[row] = (x.mean(0) - y.mean(0)) / np.maximum(spread, 1e-30)
        auc[row] = area(values, own)
    return Separability(
        tuple(means.behaviours[b] for b in chosen),
        torch.from_numpy(d_prime).float(),
        torch.from_numpy(auc).float(),
        torch.tensor([tests[b] for b in chosen]),
    )


def area(values: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Area under the ROC curve ``P(x > y)``, ties one half, of every column.

    ``values [S, ...]`` and a mask ``own [S]`` of the spans ``x``, all others being ``y``; from
    ranks (Mann and Whitney 1947). NaN without one of the two.
    """
    n, m = int(own.sum()), int((~own).sum())
    if not n or not m:
        return np.full(values.shape[1:], np.nan)
    ranks = rankdata(values, axis=0)[own].sum(0)
    return (ranks - n * (n + 1) / 2) / (n * m)
