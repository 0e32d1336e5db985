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

import torch
from torch import Tensor

from stllms.means import Means

PENALTY = 1e-2
ITERATIONS = 500
TOLERANCE = 1e-9


def logistic_directions(means: Means, *, penalty: float = PENALTY) -> Tensor:
    """Probe normals of every behaviour and layer, ``[N, L, D]`` float64, not rescaled; zero for
    a behaviour without spans or without others.

    Raises:
        ValueError: where the span means of some layer were not kept.
    """
    if means.sample_layers != tuple(range(means.n_layers)) or not len(means.samples):
        raise ValueError(
            "the probe needs the span means of every layer: "
            "activations.collect(..., keep=range(n_layers)); kept layers are "
            f"{list(means.sample_layers)} of {means.n_layers}"
        )
    n = len(means.behaviours)
    targets = torch.nn.functional.one_hot(means.sample_labels, n).double()
    some = targets.sum(0)
    rows = ((some > 0) & (some < len(targets))).nonzero().flatten()
    normals = torch.zeros(n, means.n_layers, means.width, dtype=torch.float64)
    for layer in range(means.n_layers):
        x = means.samples[:, layer].double()
        scale = x.std(0).clamp(min=1e-12)
        standard = (x - x.mean(0)) / scale
        normals[rows, layer] = fit(standard, targets[:, rows], penalty=penalty) / scale
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
