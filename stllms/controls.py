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

Three kinds mean nothing, those of :func:`stllms.vectors.controls`, drawn here from the span
means of the build half. ``shuffled``: the difference of means after the labels were permuted
within each response; what all spans have in common against the whole text, and which responses
show the behaviour, stays in it. ``covariance``: a random combination of centred span means.
``isotropic``: uniform on the sphere.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stllms import vectors
from stllms.means import MIN_SPANS, Means, area
from stllms.records import CONTROLS

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
        draws: control directions of each kind; ``value`` is then their mean, ``low`` and
            ``high`` their central 95 %. Missing elsewhere.
        seed: of all of them.

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
            candidates |= _controls(build, b, layer, draws, generator)
            for direction, raw in candidates.items():
                for quantity, values in _measure(direction, raw, test, b, layer).items():
                    rows.append((name, layer, direction, quantity, *_summary(values)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _controls(build: Means, b: int, layer: int, draws: int, generator) -> dict[str, Tensor]:
    """``[draws, D]`` of every kind, before rescaling."""
    x = build.samples[:, build.sample_layers.index(layer)].double()
    own = (_permuted(build, draws, generator) == b).double()
    signs = 1 - 2 * torch.randint(0, 2, (draws, len(x)), generator=generator).double()
    noise = torch.randn(draws, build.width, generator=generator, dtype=torch.float64)
    shuffled = own @ x / own.sum(1, keepdim=True) - build.overall()[layer]
    made = (shuffled, signs @ (x - x.mean(0)), noise)
    return dict(zip(CONTROLS, made, strict=True))


def _permuted(build: Means, draws: int, generator) -> Tensor:
    """``[draws, S]``: the labels of the spans, permuted within each response. Spans lie in
    blocks of a response; random numbers below 1 on top of the block's number, sorted, permute
    each block within itself."""
    _, response = build.sample_responses.unique(return_inverse=True)
    blocks = response.argsort(stable=True)
    noise = torch.rand(draws, len(blocks), generator=generator, dtype=torch.float64)
    within = (noise + response[blocks]).argsort(1)
    labels = torch.empty(draws, len(blocks), dtype=torch.int64)
    labels[:, blocks] = build.sample_labels[blocks][within]
    return labels


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
    if direction in ("difference-of-means", "shuffled"):
        found["length"] = raw.norm(dim=-1) / test.overall()[layer].norm()
    return found


def _summary(values: Tensor) -> tuple[float, float, float]:
    """Mean and central 95 % of draws; one value has no spread."""
    if len(values) == 1:
        return float(values[0]), float("nan"), float("nan")
    low, high = np.quantile(values.numpy(), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
