"""Directions of behaviours: difference of means, two other estimators, cosines and files.

Method, section 6, with the mean over spans ``mean[b][l]`` and the mean over responses
``overall[l]``::

    direction[b][l] = (mean[b][l] - overall[l]) * ||overall[l]|| / ||mean[b][l] - overall[l]||

so that coefficient 1 adds a vector as long as the average residual at that layer. A behaviour
with fewer than ``MIN_SPANS`` spans has no direction: it is in ``.unavailable``, so that no NaN
ever reaches a figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.nn.functional import normalize

from stllms.hashes import file_hash
from stllms.labels import BEHAVIOURS, STEERED
from stllms.registry import FIXTURES
from stllms.runs.files import BadFile, is_plain, load_tensors, load_torch, save_tensors
from stllms.vectors.means import MIN_SPANS, Means

ESTIMATORS: tuple[str, ...] = ("difference-of-means", "difference-from-others", "probe")
#: The tensors of a file of directions.
DTYPES = dict.fromkeys(("directions", "means", "overall"), torch.float32)
DTYPES["counts"] = torch.int64
#: Of the probe: the weight of ``||a||^2 / 2`` beside the mean loss.
PENALTY = 1e-2
#: Rows of an embedding that are held in float32 at once.
ROWS = 16384


class _Metadata(BaseModel, strict=True, extra="forbid"):
    """What a file of directions says beside its tensors."""

    behaviours: list[str]
    model: str
    config: dict[str, Any]
    unavailable: dict[str, int]
    left_out: dict[str, int]


@dataclass(frozen=True)
class SteeringVectors:
    """Directions of ``N`` behaviours at ``L`` layers.

    ``directions`` and ``means`` ``[N, L, D]``, ``overall [L, D]``, float32; ``counts [N]``
    spans; ``unavailable``: behaviours with too few spans, and how many; ``left_out``: labels of
    a released file that are no behaviours, and their spans.
    """

    behaviours: tuple[str, ...]
    directions: Tensor
    means: Tensor
    overall: Tensor
    counts: Tensor
    model: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    unavailable: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = tuple(self.overall.shape)
        whole = (len(self.behaviours), *size)
        shapes = {"directions": whole, "means": whole, "overall": size, "counts": whole[:1]}
        for name, shape in shapes.items():
            tensor, dtype = getattr(self, name), DTYPES[name]
            if tensor.shape != shape or tensor.dtype != dtype or len(size) != 2:
                raise ValueError(
                    f"{name} should have shape {shape} and {dtype}, with overall [L, D]; "
                    f"it has {tuple(tensor.shape)} and {tensor.dtype}"
                )
        if len(set(self.behaviours)) < len(self.behaviours):
            raise ValueError(f"behaviours are given twice: {', '.join(self.behaviours)}")
        finite = (self.directions.isfinite() & self.means.isfinite()).flatten(1).all(1)
        if not finite.all():
            broken = [self.behaviours[row] for row in (~finite).nonzero().flatten()]
            raise ValueError(f"direction of {', '.join(broken)} is not finite")

    @property
    def n_layers(self) -> int:
        """``L``."""
        return self.overall.shape[0]

    def index(self, behaviour: str) -> int:
        """The row of a behaviour.

        Raises:
            ValueError: naming the spans it had, or the behaviours there are.
        """
        if behaviour in self.behaviours:
            return self.behaviours.index(behaviour)
        if behaviour in self.unavailable:
            raise ValueError(
                f"{behaviour!r} is unavailable: {self.unavailable[behaviour]} spans, "
                f"at least {MIN_SPANS} are needed"
            )
        raise ValueError(
            f"no direction of {behaviour!r}; there are {', '.join(self.behaviours)}"
        )

    def direction(self, behaviour: str, layer: int) -> Tensor:
        """The direction of a behaviour at a layer, ``[D]``.

        Raises:
            ValueError: for a behaviour or a layer that is not there, naming those that are.
        """
        row = self.index(behaviour)
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layer {layer} is not in 0 .. {self.n_layers - 1}")
        return self.directions[row, layer]

    def save(self, path: str | Path) -> None:
        """Write as safetensors, everything that is no tensor in its metadata."""
        tensors = {name: getattr(self, name) for name in DTYPES}
        save_tensors(path, tensors, {n: getattr(self, n) for n in _Metadata.model_fields})

    @classmethod
    def load(cls, path: str | Path) -> SteeringVectors:
        """The inverse of :meth:`save`, bit for bit.

        Raises:
            BadFile: a file of other tensors, or one that :meth:`save` did not write.
        """
        tensors, metadata = load_tensors(path)
        if set(tensors) != set(DTYPES):
            raise BadFile(f"{path}: no directions of behaviours, but {', '.join(tensors)}")
        try:
            known = _Metadata.model_validate(metadata)
            return cls(**tensors, **{**vars(known), "behaviours": tuple(known.behaviours)})
        except ValidationError as error:
            wrong = {str(one["loc"][0]) for one in error.errors()}
            raise BadFile(
                f"{path}: not written by stllms ({', '.join(sorted(wrong))})"
            ) from None
        except ValueError as error:  # shapes that differ, values that are not finite
            raise BadFile(f"{path}: {error}") from None


# --- estimators --------------------------------------------------------------------------


def difference_of_means(means: Means) -> SteeringVectors:
    """The paper's directions (formula above) from collected means.

    Raises:
        ValueError: no spans at all, or a direction of length zero.
    """
    counts, overall = means.counts.sum(0), means.overall()
    enough = counts >= MIN_SPANS
    named = list(zip(means.behaviours, counts.tolist(), strict=True))
    available = tuple(name for name, n in named if n >= MIN_SPANS)
    raw = differences(means, "difference-of-means", range(means.n_layers))
    config = {name: value for name, value in means.config.items() if name != "controls"}
    return SteeringVectors(
        behaviours=available,
        directions=rescale(raw[enough], overall, available).float(),
        means=means.mean()[enough].float(),
        overall=overall.float(),
        counts=counts[enough],
        model=means.model,
        config={**config, "estimator": "difference-of-means", "min_spans": MIN_SPANS},
        unavailable={name: n for name, n in named if n < MIN_SPANS},
    )


def differences(means: Means, estimator: str, layers: Sequence[int]) -> Tensor:
    """What is rescaled to a direction, by a named estimator: ``[N, len(layers), D]`` float64;
    zero where there are no other spans to compare with.

    * ``"difference-of-means"``: ``mean[b] - overall`` (the paper, method, section 6).
    * ``"difference-from-others"``: ``mean[b] - mean of the spans of all other behaviours``, as
      in contrastive activation addition (Rimsky et al. 2023, arXiv 2312.06681).
    * ``"probe"``: normal of a logistic regression of "span of b" on the span mean (Alain and
      Bengio 2016, arXiv 1610.01644). It needs the span means themselves:
      ``activations.collect(..., keep=layers)``.

    Raises:
        ValueError: unknown estimator, no spans at all, or nothing kept for the probe.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is not one of {', '.join(ESTIMATORS)}")
    layers = list(layers)
    if estimator == "probe":
        return torch.stack([_normals(means, layer) for layer in layers], dim=1)
    mean = means.mean()[:, layers]
    if estimator == "difference-of-means":
        return mean - means.overall()[layers]
    counts = means.counts.sum(0)
    others = (counts.sum() - counts)[:, None, None]
    sums = means.sums[:, :, layers]
    rest = (sums.sum((0, 1)) - sums.sum(0)) / others.clamp(min=1)
    return torch.where(others > 0, mean - rest, 0.0)


def _normals(means: Means, layer: int) -> Tensor:
    """Gradients of the logits of a linear probe for each behaviour, ``[N, D]``; zero for one
    without spans or without others.

    Span means are standardised per coordinate; the two classes have equal weight, the weights
    of spans sum to 1, and the intercept is not penalised.
    """
    from sklearn.linear_model import LogisticRegression  # a second to import

    x = means.at(layer)
    scale = x.std(0).clamp(min=1e-12)
    standard = ((x - x.mean(0)) / scale).numpy()
    normals = torch.zeros(len(means.behaviours), means.width, dtype=torch.float64)
    for b in range(len(normals)):
        own = means.sample_labels == b
        if 0 < int(own.sum()) < len(own):
            weights = torch.where(own, 0.5 / own.sum(), 0.5 / (~own).sum()).double()
            probe = LogisticRegression(C=1 / PENALTY, tol=1e-8, max_iter=500)
            probe.fit(standard, own.numpy(), sample_weight=weights.numpy())
            normals[b] = torch.from_numpy(probe.coef_[0]) / scale
    return normals


def rescale(raw: Tensor, overall: Tensor, names: Sequence[Any]) -> Tensor:
    """``raw * ||overall|| / ||raw||`` over the last dimension; ``[N, L, D]``, ``[L, D]``.

    Raises:
        ValueError: a direction of length zero, by its name (``names [N]``) and layer.
    """
    lengths = raw.norm(dim=-1, keepdim=True)
    for row, layer, _ in (lengths == 0).nonzero().tolist():
        raise ValueError(f"direction of {names[row]} at layer {layer} has length zero")
    return raw * (overall.norm(dim=-1, keepdim=True) / lengths)


# --- what else there is to read ----------------------------------------------------------


def load_published(path: str | Path) -> SteeringVectors:
    """Directions from a released ``mean_vectors_*.pt``: label -> ``{"mean": [L, D], "count"}``.

    Read with ``weights_only=True``: a file with code in it is refused. Means are used as they
    are; labels that are no behaviour are reported in ``.left_out``.

    Raises:
        BadFile: missing, unsafe, of another structure, not finite or of length zero.
    """
    content = load_torch(path)
    expected = f"{path}: expected label -> {{'mean': [L, D], 'count': n}}"
    if not isinstance(content, Mapping):
        raise BadFile(expected)
    for label, entry in content.items():
        if not isinstance(label, str) or not _is_entry(entry):
            raise BadFile(f"{expected} at {label!r}")
    if "overall" not in content:
        raise BadFile(f"{path}: there is no 'overall' among {sorted(content)}")
    found = {label: entry["count"] for label, entry in content.items()}
    names = tuple(b for b in BEHAVIOURS if found.get(b, 0) >= MIN_SPANS)
    overall = content["overall"]["mean"].double()
    mean = overall.new_zeros(len(names), *overall.shape)
    for row, label in enumerate(names):
        one = content[label]["mean"]
        if one.shape != overall.shape:
            shapes = f"{tuple(one.shape)}, that of 'overall' {tuple(overall.shape)}"
            raise BadFile(f"{path}: the mean of {label} has shape {shapes}")
        mean[row] = one
    try:
        return SteeringVectors(
            behaviours=names,
            directions=rescale(mean - overall, overall, names).float(),
            means=mean.float(),
            overall=overall.float(),
            counts=torch.tensor([found[b] for b in names], dtype=torch.int64),
            model=Path(path).stem.removeprefix("mean_vectors_"),
            config={"source": Path(path).name, "min_spans": MIN_SPANS},
            unavailable={b: found.get(b, 0) for b in BEHAVIOURS if b not in names},
            left_out={k: n for k, n in found.items() if k not in (*BEHAVIOURS, "overall")},
        )
    except ValueError as error:  # of length zero, or not finite
        raise BadFile(f"{path}: {error}") from None


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or type(entry.get("count")) is not int:
        return False
    mean = entry.get("mean")
    whole = isinstance(mean, Tensor) and is_plain(mean) and mean.ndim == 2 and mean.numel() > 0
    return whole and 0 <= entry["count"] < 2**63


def shipped_file(name: str) -> Path:
    """Where the directions of an embedded model are: beside its folder, for inside it other
    loaders would take ``*.safetensors`` for weights."""
    return FIXTURES / f"{name}.vectors.safetensors"


def shipped(name: str) -> bool:
    """Whether directions ship for a model."""
    return shipped_file(name).is_file()


def load_shipped(name: str) -> SteeringVectors:
    """The directions that ship with an embedded model.

    Raises:
        ValueError: they were made for other weights.
    """
    path = shipped_file(name)
    found = SteeringVectors.load(path)
    if found.config.get("weights") != weights_of(name):
        raise ValueError(
            f"{path.name} was made for other weights than those of {name}: make it again"
        )
    return found


def weights_of(name: str) -> str:
    """Twelve hex digits of a hash of the weights of an embedded model."""
    return file_hash(FIXTURES / name / "model.safetensors")[:12]


# --- layers and cosines ------------------------------------------------------------------


def cosines(steering_vectors: SteeringVectors, layers: Mapping[str, int]) -> Tensor:
    """Cosine similarity between directions, each at its own layer: ``[N, N]``.

    Rows and columns are the keys of ``layers`` in their order: behaviour -> layer.
    """
    rows = [steering_vectors.direction(b, layer) for b, layer in layers.items()]
    if not rows:
        return torch.zeros(0, 0)
    units = normalize(torch.stack(rows).double(), dim=-1)
    return (units @ units.T).float()


def max_cosine(directions: Tensor, matrix: Tensor) -> Tensor:
    """Largest cosine between a direction and any row of an (un)embedding, per layer.

    ``directions [N, L, D]``, ``matrix [V, D]`` -> ``[N, L]``. Rows of zeros (padding of the
    vocabulary) count as cosine 0.
    """
    units = normalize(directions.float(), dim=-1)
    best = torch.full(units.shape[:-1], -1.0)
    for rows in matrix.split(ROWS):
        best = torch.maximum(best, (units @ normalize(rows.float(), dim=-1).T).amax(-1))
    return best


def default_layer(n_layers: int) -> int:
    """The layer to steer at where nothing speaks for another one: the middle one."""
    return n_layers // 2


def steering_layers(published: Mapping[str, int] | None, n_layers: int) -> dict[str, int]:
    """The layer each behaviour is steered at: the model's own (method, section 8), else the
    middle layer for all, until layer effects choose one."""
    return dict(published) if published else dict.fromkeys(STEERED, default_layer(n_layers))


def heatmap_layers(
    steering_vectors: SteeringVectors,
    steering_layers: Mapping[str, int],
    labels: Sequence[str],
) -> dict[str, int]:
    """The layer of each label for :func:`cosines`: its steering layer, that of backtracking
    for a label without one (method, section 10); unavailable labels are left out."""
    default = steering_layers["backtracking"]
    available = [b for b in labels if b in steering_vectors.behaviours]
    return {b: steering_layers.get(b, default) for b in available}
