"""What other directions give beside the paper's: other estimators, and meaningless ones.

A number such as AUC .9 says little until one knows what a direction gives that means nothing.
So the same three numbers are measured for every way to make a direction, each made from the
*build* half of the responses and measured on the *test* half (:mod:`stllms.means`), at the
layer where the behaviour is steered:

* ``AUC`` of the projection: a span of the behaviour lies further along it than another span;
* ``cosine`` with the difference of means of the test half. For the difference of means itself
  this is the split-half cosine ``r``: a yardstick for the others, no ceiling. Both its sides
  are noisy, so a direction without noise would reach about ``sqrt(r)``, which is more;
* ``length``: ``||mean - overall|| / ||overall||`` before rescaling, for means alone.

Two kinds are meaningless. ``shuffled labels``: the difference of means after the labels of all
build spans were permuted; what every span has in common against the whole text stays in it.
``random``: uniform on the sphere.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stllms import vectors
from stllms.means import MIN_SPANS, Means, area

MEANINGLESS: tuple[str, ...] = ("shuffled labels", "random")
QUANTITIES: tuple[str, ...] = ("AUC", "cosine", "length")
COLUMNS = ("behaviour", "layer", "direction", "quantity", "value", "low", "high")


def table(
    means: Means,
    layers: Mapping[str, int],
    *,
    draws: int = 200,
    seed: int = 0,
    min_spans: int = MIN_SPANS,
) -> pd.DataFrame:
    """The numbers above, one row a behaviour, direction and quantity.

    Args:
        means: collected with ``keep=`` the layers asked for.
        layers: behaviour -> layer. Behaviours with fewer than ``min_spans`` spans in either
            half are left out, and so are directions that have no other spans to compare with.
        draws: shuffles, and random directions; ``value`` is then their mean, ``low`` and
            ``high`` their central 95 %. Missing elsewhere.
        seed: of both.

    Raises:
        ValueError: the span means of a layer were not kept.
    """
    build, test = means.half("build"), means.half("test")
    least = torch.minimum(build.counts.sum(0), test.counts.sum(0))
    spans = dict(zip(means.behaviours, least.tolist(), strict=True))
    generator = torch.Generator().manual_seed(seed)
    rows: list[tuple] = []
    for layer in dict.fromkeys(layers.values()):
        names = [b for b, at in layers.items() if at == layer and spans.get(b, 0) >= min_spans]
        if not names:
            continue
        made = {e: vectors.differences(build, e, [layer])[:, 0] for e in vectors.ESTIMATORS}
        for name in names:
            b = means.behaviours.index(name)
            candidates = {e: raw[b, None] for e, raw in made.items() if raw[b].any()}
            candidates["shuffled labels"] = _shuffled(build, b, layer, draws, generator)
            candidates["random"] = torch.randn(
                draws, means.width, generator=generator, dtype=torch.float64
            )
            for direction, raw in candidates.items():
                for quantity, values in _measure(direction, raw, test, b, layer).items():
                    rows.append((name, layer, direction, quantity, *_summary(values)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _shuffled(build: Means, b: int, layer: int, draws: int, generator) -> Tensor:
    """``[draws, D]``: the difference of means of as many spans as behaviour ``b`` has, drawn
    without replacement from all, which is what a permutation of the labels leaves to it."""
    x = build.samples[:, build.sample_layers.index(layer)].double()
    n = int(build.counts[:, b].sum())
    drawn = torch.rand(draws, len(x), generator=generator).argsort(1)[:, :n]
    chosen = torch.zeros(draws, len(x), dtype=torch.float64).scatter_(1, drawn, 1.0 / n)
    return chosen @ x - build.overall()[layer]


def _measure(direction: str, raw: Tensor, test: Means, b: int, layer: int) -> dict[str, Tensor]:
    """The quantities of directions ``raw [K, D]`` on the test half, ``[K]`` each."""
    x = test.samples[:, test.sample_layers.index(layer)].double()
    units = torch.nn.functional.normalize(raw, dim=-1)
    own = (test.sample_labels == b).numpy()
    real = vectors.differences(test, "difference-of-means", [layer])[b, 0]
    found = {
        "AUC": torch.from_numpy(area((x @ units.T).numpy(), own)),
        "cosine": torch.nn.functional.cosine_similarity(units, real[None], dim=-1),
    }
    if direction in ("difference-of-means", "shuffled labels"):
        found["length"] = raw.norm(dim=-1) / test.overall()[layer].norm()
    return found


def _summary(values: Tensor) -> tuple[float, float, float]:
    """Mean and central 95 % of draws; one value has no spread."""
    if len(values) == 1:
        return float(values[0]), float("nan"), float("nan")
    low, high = np.quantile(values.numpy(), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
