"""Directions of behaviours: made by an estimator, with a length, cosines and files.

Method, section 6, with the mean over spans ``mean[b][l]`` and the mean over responses
``overall[l]``::

    direction[b][l] = (mean[b][l] - overall[l]) * ||overall[l]|| / ||mean[b][l] - overall[l]||

so that coefficient 1 adds a vector as long as the average residual at that layer. A behaviour
with fewer than ``min_spans`` spans has no direction: it is in ``.unavailable``, so that no NaN
ever reaches a figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn
from torch.nn.functional import normalize

from stllms.hashes import file_hash
from stllms.labels import PAPER, LabelSet
from stllms.models.engines import interventions
from stllms.models.engines.interventions import Intervention
from stllms.models.model import Model
from stllms.records import Response
from stllms.registry import FIXTURES
from stllms.runs.files import BadFile, is_plain, load_tensors, load_torch, save_tensors
from stllms.vectors import reading
from stllms.vectors.estimators import differences
from stllms.vectors.means import MIN_SPANS, Means
from stllms.vectors.reading import Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The tensors of a file of directions.
DTYPES = dict.fromkeys(("directions", "means", "overall"), torch.float32)
DTYPES["counts"] = torch.int64
#: Rows of an embedding that are held in float32 at once.
ROWS = 16384


class _Metadata(BaseModel, strict=True, extra="forbid"):
    """What a file of directions says beside its tensors."""

    behaviours: list[str]
    model: str
    config: dict[str, Any]
    unavailable: dict[str, int]
    left_out: dict[str, int]


@dataclass(frozen=True, repr=False)
class SteeringVector:
    """The direction of one behaviour: ``directions`` and ``overall`` are ``[L, D]`` float32,
    ``model`` the name of the model that they were made from."""

    name: str
    directions: Tensor
    overall: Tensor
    model: str = ""

    def __repr__(self) -> str:
        n_layers, width = self.directions.shape
        return f"SteeringVector({self.name!r}, {n_layers} layers of {width}, {self.model!r})"

    def at(self, layer: int) -> Tensor:
        """The direction at a layer, ``[D]``; ``ValueError`` for a layer that is not there."""
        if not 0 <= layer < len(self.directions):
            raise ValueError(f"layer {layer} is not in 0 .. {len(self.directions) - 1}")
        return self.directions[layer]

    def applied(
        self,
        hf: nn.Module,
        *,
        layer: int,
        coefficient: float | Sequence[float] = 1.0,
        operation: str = "add",
    ) -> AbstractContextManager[nn.Module]:
        """A bare ``transformers`` model, steered inside a ``with`` block at every position.

        One ``coefficient`` for every row, or one for each row of the batches to come. Several
        directions, and errors: :func:`stllms.models.engines.interventions.applied`.
        """
        direction = self.at(layer)
        each = np.atleast_1d(np.asarray(coefficient, dtype=float)).tolist()
        if not each:
            raise ValueError("no coefficient: give a number, or one for each row")
        rows = [Intervention(direction, layer, one, operation) for one in each]
        return interventions.applied(hf, rows)

    def read(self, model: Model, text: str | Response, layer: int) -> Reading:
        """Read along a text or a response: :func:`stllms.vectors.reading.read_direction`."""
        return reading.read_direction(
            model, text, self.at(layer), self.overall[layer], self.name, layer
        )

    def words(self, model: Model, layer: int, k: int = 10) -> pd.DataFrame:
        """The tokens it raises and lowers most: :func:`stllms.vectors.reading.words`."""
        return reading.words(model, self.at(layer), k)


@dataclass(frozen=True, repr=False)
class SteeringVectors:
    """Directions of ``N`` behaviours at ``L`` layers.

    ``directions`` and ``means`` ``[N, L, D]``, ``overall [L, D]``, float32; ``counts [N]``
    spans; ``unavailable``: behaviours with too few spans, and how many; ``left_out``: labels of
    a released file that are no behaviours, and their spans. ``collected``: what they were made
    from, where :mod:`stllms.verbs` made them; a file does not have it.
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
    collected: Means | None = field(default=None, compare=False)

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
            least = self.config.get("min_spans", MIN_SPANS)
            raise ValueError(
                f"{behaviour!r} is unavailable: {self.unavailable[behaviour]} spans, "
                f"at least {least} are needed"
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

    def __getitem__(self, behaviour: str) -> SteeringVector:
        """The directions of one behaviour; ``ValueError`` as :meth:`index`."""
        row = self.index(behaviour)
        return SteeringVector(behaviour, self.directions[row], self.overall, self.model)

    def __iter__(self) -> Iterator[str]:
        return iter(self.behaviours)

    def only(self, names: Sequence[str]) -> SteeringVectors:
        """Those of some behaviours alone, in this order; ``ValueError`` as :meth:`index`."""
        if isinstance(names, str):
            raise ValueError(f"only({names!r}): give a list of names, as in only([{names!r}])")
        rows = [self.index(name) for name in names]
        return replace(
            self,
            behaviours=tuple(names),
            directions=self.directions[rows],
            means=self.means[rows],
            counts=self.counts[rows],
            unavailable={},
            left_out={},
        )

    def to_frame(self) -> pd.DataFrame:
        """A row for each behaviour and layer: ``length``, ``||mean - overall|| / ||overall||``
        before rescaling, and ``spans``."""
        lengths = (self.means - self.overall).double().norm(dim=-1)
        lengths = lengths / self.overall.double().norm(dim=-1)
        rows = [
            (name, layer, float(lengths[row, layer]), int(self.counts[row]))
            for row, name in enumerate(self.behaviours)
            for layer in range(self.n_layers)
        ]
        return pd.DataFrame(rows, columns=["behaviour", "layer", "length", "spans"])

    def plot(self, layer: int | None = None, ax: Axes | None = None) -> Axes:
        """Cosines between the directions at a layer, the middle one unless said."""
        from matplotlib import pyplot  # these take seconds to import

        from stllms.plotting import axes

        layer = default_layer(self.n_layers) if layer is None else layer
        values = cosines(self, dict.fromkeys(self.behaviours, layer)).numpy()
        with axes.styled():
            ax = pyplot.subplots(figsize=(5, 4.2))[1] if ax is None else ax
            axes.heatmap(ax, values, self.behaviours).set_title(f"layer {layer}")
        return ax

    def __repr__(self) -> str:
        size = f"{self.n_layers} layers of {self.overall.shape[1]}"
        return f"SteeringVectors({self._named()}; {size}, {self.model!r}{self._lacking()})"

    def _repr_html_(self) -> str:
        counted = zip(self.behaviours, self.counts.tolist(), strict=True)
        table = pd.DataFrame(counted, columns=["behaviour", "spans"])
        for name, n in self.unavailable.items():
            table.loc[len(table)] = [f"{name} (unavailable)", n]
        return f"<code>{escape(repr(self))}</code>{table.to_html(index=False)}"

    def _named(self) -> str:
        return ", ".join(self.behaviours) or "no direction"

    def _lacking(self) -> str:
        few = ", ".join(f"{name} ({n} spans)" for name, n in self.unavailable.items())
        return f"; unavailable: {few}" if few else ""

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


def difference_of_means(means: Means, *, min_spans: int = MIN_SPANS) -> SteeringVectors:
    """The paper's directions (formula above) from collected means; see :func:`estimate`."""
    return estimate(means, min_spans=min_spans)


def estimate(
    means: Means, estimator: str = "difference-of-means", *, min_spans: int = MIN_SPANS
) -> SteeringVectors:
    """Directions by a registered estimator (:mod:`stllms.vectors.estimators`), rescaled.

    Args:
        min_spans: a behaviour with fewer spans (of contrast pairs: fewer pairs) has no
            direction; it is in ``unavailable``.

    Raises:
        ValueError: what :func:`~stllms.vectors.estimators.differences` raises, a direction of
            length zero, or ``min_spans`` below 1.
    """
    if min_spans < 1:
        raise ValueError(f"min_spans should be at least 1, it is {min_spans}")
    counts, overall = means.counts.sum(0), means.overall()
    enough = counts >= min_spans
    named = list(zip(means.behaviours, counts.tolist(), strict=True))
    available = tuple(name for name, n in named if n >= min_spans)
    raw = differences(means, estimator, range(means.n_layers))
    config = {name: value for name, value in means.config.items() if name != "controls"}
    return SteeringVectors(
        behaviours=available,
        directions=rescale(raw[enough], overall, available).float(),
        means=means.mean()[enough].float(),
        overall=overall.float(),
        counts=counts[enough],
        model=means.model,
        config={**config, "estimator": estimator, "min_spans": min_spans},
        unavailable={name: n for name, n in named if n < min_spans},
    )


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
    are; labels that are none of the paper's are reported in ``.left_out``.

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
    names = tuple(b for b in PAPER.names if found.get(b, 0) >= MIN_SPANS)
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
            unavailable={b: found.get(b, 0) for b in PAPER.names if b not in names},
            left_out={k: n for k, n in found.items() if k not in (*PAPER.names, "overall")},
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
    """Where the directions of a model that ships are: beside its folder, for inside it other
    loaders would take ``*.safetensors`` for weights."""
    return FIXTURES / f"{name}.vectors.safetensors"


def shipped(name: str) -> bool:
    """Whether directions ship for a model."""
    return shipped_file(name).is_file()


def load_shipped(name: str) -> SteeringVectors:
    """The directions that ship with a model.

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
    """Twelve hex digits of a hash of the weights, or the adapter, of a model that ships."""
    (weights,) = (FIXTURES / name).glob("*.safetensors")
    return file_hash(weights)[:12]


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


def steering_layers(
    published: Mapping[str, int] | None, n_layers: int, labels: LabelSet = PAPER
) -> dict[str, int]:
    """The layer each target is steered at: the model's own (method, section 8), else the middle
    layer, until layer effects choose one."""
    known = published or {}
    return {name: known.get(name, default_layer(n_layers)) for name in labels.targets}


def heatmap_layers(
    steering_vectors: SteeringVectors,
    steering_layers: Mapping[str, int],
    labels: Sequence[str],
) -> dict[str, int]:
    """The layer of each label for :func:`cosines`: its steering layer, that of the first target
    for a label without one (method, section 10); unavailable labels are left out.

    ``steering_layers`` are in the order of the targets."""
    middle = default_layer(steering_vectors.n_layers)
    default = next(iter(steering_layers.values()), middle)
    available = [b for b in labels if b in steering_vectors.behaviours]
    return {b: steering_layers.get(b, default) for b in available}
