"""Ways to make a direction of span means: an estimator is a few lines, found by its name.

Each takes :class:`~stllms.vectors.means.Means` and layers, and gives ``[N, len(layers), D]``
float64, a row for each behaviour, of any length (:func:`stllms.vectors.directions.estimate`
rescales); a row of zeros where there is nothing to compare with. A person's own is registered
in the same way: ``@registry.estimator("mine")``.

All but the first two need the span means themselves: ``activations.collect(..., keep=layers)``.
Contrast pairs keep them at every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stllms import registry
from stllms.vectors.means import Means

#: Of the probe: the weight of ``||a||^2 / 2`` beside the mean loss.
PENALTY = 1e-2


def differences(means: Means, estimator: str, layers: Sequence[int]) -> Tensor:
    """What a named estimator gives, checked: ``[N, len(layers), D]`` float64.

    Raises:
        ValueError: an unknown estimator, one that gives another shape or numbers that are not
            finite, no spans at all, or span means that were not kept.
    """
    layers = list(layers)
    found = torch.as_tensor(registry.estimator.find(estimator)(means, layers)).double()
    shape = (len(means.behaviours), len(layers), means.width)
    if tuple(found.shape) != shape:
        raise ValueError(
            f"estimator {estimator!r} gave {tuple(found.shape)}, expected [N, layers, D] = "
            f"{shape}"
        )
    if not found.isfinite().all():
        row = int((~found.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"estimator {estimator!r} gave numbers that are not finite for "
            f"{means.behaviours[row]}"
        )
    return found


@registry.estimator("difference-of-means")
def difference_of_means(means: Means, layers: Sequence[int]) -> Tensor:
    """``mean[b] - overall`` (the paper, method, section 6)."""
    return means.mean()[:, layers] - means.overall()[layers]


@registry.estimator("difference-from-others")
def difference_from_others(means: Means, layers: Sequence[int]) -> Tensor:
    """``mean[b] - mean of the spans of all other behaviours``, as in contrastive activation
    addition (Rimsky et al. 2023, arXiv 2312.06681)."""
    counts = means.counts.sum(0)
    others = (counts.sum() - counts)[:, None, None]
    sums = means.sums[:, :, layers]
    rest = (sums.sum((0, 1)) - sums.sum(0)) / others.clamp(min=1)
    return torch.where(others > 0, means.mean()[:, layers] - rest, 0.0)


@registry.estimator("probe")
def probe(means: Means, layers: Sequence[int]) -> Tensor:
    """Normal of a logistic regression of "span of b" on the span mean (Alain and Bengio 2016,
    arXiv 1610.01644).

    Span means are standardised per coordinate; the two classes have equal weight, the weights
    of spans sum to 1, and the intercept is not penalised.
    """
    from sklearn.linear_model import LogisticRegression  # a second to import

    def normal(x: Tensor, own: Tensor) -> Tensor:
        scale = x.std(0).clamp(min=1e-12)
        weights = torch.where(own, 0.5 / own.sum(), 0.5 / (~own).sum()).double()
        fitted = LogisticRegression(C=1 / PENALTY, tol=1e-8, max_iter=500)
        fitted.fit(
            ((x - x.mean(0)) / scale).numpy(), own.numpy(), sample_weight=weights.numpy()
        )
        return torch.from_numpy(fitted.coef_[0]) / scale

    return _each(means, layers, normal)


@registry.estimator("pca")
def pca(means: Means, layers: Sequence[int]) -> Tensor:
    """First principal axis, about the origin, of the behaviour's span means, each less the mean
    of all spans of its response; of the two signs that with a positive mean projection.

    For contrast pairs this is the first axis of the paired differences, as in representation
    engineering (Zou et al. 2023, arXiv 2310.01405) and in repeng.
    """
    _, response = means.sample_responses.unique(return_inverse=True)
    sizes = torch.bincount(response)[:, None]

    def axis(x: Tensor, own: Tensor) -> Tensor:
        middle = x.new_zeros(len(sizes), x.shape[1]).index_add_(0, response, x) / sizes
        centred = (x - middle[response])[own]
        found = torch.linalg.svd(centred, full_matrices=False).Vh[0]
        projected = float((centred @ found).mean())
        return found * (-1 if projected < 0 else 1) * bool(centred.any())

    return _each(means, layers, axis)


@registry.estimator("lda")
def lda(means: Means, layers: Sequence[int]) -> Tensor:
    """Whitened difference ``S^-1 (mean[b] - mean of all other spans)``, with the covariance
    ``S`` within both (Fisher 1936), each shrunk as in Ledoit and Wolf (2004) after its
    coordinates are standardised, and weighted by its spans: scikit-learn's
    ``LinearDiscriminantAnalysis``. Zero with fewer than two spans on a side."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    def whitened(x: Tensor, own: Tensor) -> Tensor:
        if min(int(own.sum()), int((~own).sum())) < 2:
            return x.new_zeros(x.shape[1])
        fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        return torch.from_numpy(fitted.fit(x.numpy(), own.numpy()).coef_[0])

    return _each(means, layers, whitened)


def _each(
    means: Means, layers: Sequence[int], of: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """``of(span means [S, D], mask of a behaviour's own [S]) -> [D]`` for every behaviour and
    layer; zero for a behaviour without spans or without others."""
    found = torch.zeros(len(means.behaviours), len(layers), means.width, dtype=torch.float64)
    for place, layer in enumerate(layers):
        x = means.at(layer)
        for b in range(len(found)):
            own = means.sample_labels == b
            if 0 < int(own.sum()) < len(own):
                found[b, place] = of(x, own)
    return found
