"""Logistic regression: the linear probe among the estimators.

For span means ``x`` of a layer, standardised to zero mean and unit variance a coordinate, and
targets ``y`` (1 for the spans of a behaviour), the probe minimises, with the two classes
weighted equally,

    sum_i w_i * log(1 + exp(-(2 y_i - 1)(a . x_i + b))) + penalty / 2 * ||a||^2 ,  sum_i w_i = 1

(Alain and Bengio 2016, arXiv 1610.01644) by L-BFGS, all behaviours of a layer together: their
losses share ``x`` and nothing else. The direction is ``a`` carried back to the residual
stream: ``a / scale``, the gradient of the logit there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stllms.means import Means

PENALTY = 1e-2
ITERATIONS = 500
TOLERANCE = 1e-9


def logistic_directions(
    means: Means, layers: Sequence[int], *, penalty: float = PENALTY
) -> Tensor:
    """Probe normals of every behaviour at some layers, ``[N, len(layers), D]`` float64, not
    rescaled; zero for a behaviour without spans or without others.

    Raises:
        ValueError: where the span means of some layer were not kept.
    """
    layers = list(layers)
    if not set(layers) <= set(means.sample_layers) or not len(means.samples):
        raise ValueError(
            f"the probe needs the span means of layers {layers}: "
            f"activations.collect(..., keep={layers}); "
            f"{len(means.samples)} spans are kept, at layers {list(means.sample_layers)}"
        )
    n = len(means.behaviours)
    targets = torch.nn.functional.one_hot(means.sample_labels, n).double()
    some = targets.sum(0)
    rows = ((some > 0) & (some < len(targets))).nonzero().flatten()
    normals = torch.zeros(n, len(layers), means.width, dtype=torch.float64)
    if not len(rows):
        return normals
    for place, layer in enumerate(layers):
        x = means.samples[:, means.sample_layers.index(layer)].double()
        scale = x.std(0).clamp(min=1e-12)
        standard = (x - x.mean(0)) / scale
        normals[rows, place] = fit(standard, targets[:, rows], penalty=penalty) / scale
    return normals


def fit(x: Tensor, targets: Tensor, *, penalty: float = PENALTY) -> Tensor:
    """Weights ``a [N, D]`` of balanced logistic regressions of ``targets [S, N]`` (0 or 1, both
    present in every column) on ``x [S, D]``. The intercepts are fitted and not penalised."""
    balance = 0.5 * (targets / targets.sum(0) + (1 - targets) / (1 - targets).sum(0))
    weights = torch.zeros(targets.shape[1], x.shape[1], dtype=x.dtype, requires_grad=True)
    intercepts = torch.zeros(targets.shape[1], dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights, intercepts],
        max_iter=ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        margins = (2 * targets - 1) * (x @ weights.T + intercepts)
        misfit = (balance * torch.nn.functional.softplus(-margins)).sum()
        value = misfit + 0.5 * penalty * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return weights.detach()
