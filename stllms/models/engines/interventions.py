"""What is done to the residual stream: one operation, at one layer, for one row of a batch.

Forward hooks do it: :func:`intervene` those of the decoding loop and of likelihoods, which know
their positions; :func:`applied` those of scripts that bring their own generation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stllms.hashes import digest
from stllms.models.model import Model, ModelError, find_layers, runs_on
from stllms.records import CLOSE
from stllms.registry import operator

# An operator is ``(hidden [B, T, D], vector [B, 1, D], coefficient [B, 1 or T, 1])`` -> what is
# added to ``hidden``, of its shape. Where the coefficient is 0 nothing is added, whatever it
# gives: so rows and positions are left alone, and coefficient 0 is the plain model.


@operator("add")
def add(hidden: Tensor, vector: Tensor, coefficient: Tensor) -> Tensor:
    """``c * v``, the paper's operation (method, section 8). All ``[B, T or 1, D or 1]``."""
    return (coefficient * vector).expand_as(hidden)


@operator("ablate")
def ablate(hidden: Tensor, vector: Tensor, coefficient: Tensor) -> Tensor:
    """``-c * <h, u> u`` with ``u = v / ||v||``: projects the direction out at ``c = 1``.

    Directional ablation, Arditi et al. 2024 (arXiv 2406.11717), equation 4.
    """
    unit = vector / vector.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vector.dtype).tiny)
    return -coefficient * (hidden.to(unit.dtype) * unit).sum(-1, keepdim=True) * unit


WHERE = ("all", "generated", "thinking")


@dataclass(frozen=True)
class Intervention:
    """What is done to the residual stream of one row.

    ``direction [D]`` acts at the output of ``layer`` (0-based) with ``coefficient``;
    ``operation`` is the name of a registered operator; ``where`` is ``"all"`` positions, prompt
    included (the paper's), ``"generated"`` tokens only, or ``"thinking"``: generated tokens
    before ``</think>``. Raises ``ValueError`` naming what exists.
    """

    direction: Tensor
    layer: int
    coefficient: float
    operation: str = "add"
    where: str = "all"

    def __post_init__(self) -> None:
        operator.find(self.operation)
        if self.where not in WHERE:
            raise ValueError(f"unknown place {self.where!r}: {', '.join(WHERE)}")
        if self.direction.ndim != 1 or not torch.isfinite(self.direction).all():
            raise ValueError(
                f"a direction is a finite vector [D], not {tuple(self.direction.shape)}"
            )

    def __getstate__(self) -> dict[str, Any]:
        # On its way to a worker; a view would take all directions that it is a row of along.
        return vars(self) | {"direction": self.direction.clone()}


def fingerprints(interventions: Mapping[tuple, Intervention | None]) -> dict[str, str]:
    """Hashes of what is added, by direction and layer: rows of other directions are not those
    of these, whatever they are called."""
    return {
        f"direction of {name} at layer {layer}": digest(item.direction)
        for (name, layer, *_), item in interventions.items()
        if item is not None
    }


def fingerprint(items: Sequence[Intervention]) -> str:
    """A hash of what the interventions of a row do."""
    return digest(
        [
            [digest(one.direction), one.layer, float(one.coefficient), one.operation, one.where]
            for one in items
        ]
    )


@dataclass
class Edit:
    """One operation at one layer for the whole batch; rows without it carry zeros.

    ``vector [B, 1, D]``, ``coefficient [B, 1, 1]``, on the device where ids go in.
    """

    layer: int
    operation: str
    where: str
    vector: Tensor
    coefficient: Tensor


def edits(model: Model, interventions: Sequence[Sequence[Intervention]]) -> list[Edit]:
    """The interventions of every row of a batch, as one :class:`Edit` for each layer,
    operation, place and rank among those of its row."""
    return _grouped(interventions, model.d_model, model.dtype, model.device)


def _grouped(
    interventions: Sequence[Sequence[Intervention]],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Edit]:
    groups: dict[tuple, list[tuple[int, Intervention]]] = defaultdict(list)
    for row, items in enumerate(interventions):
        seen: Counter[tuple] = Counter()
        for item in items:
            name = (item.layer, item.operation, item.where)
            seen[name] += 1
            groups[*name, seen[name]].append((row, item))
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    made = []
    for (layer, operation, where, _), members in sorted(groups.items()):
        vector = torch.zeros(len(interventions), 1, width, dtype=dtype)
        coefficient = torch.zeros(len(interventions), 1, 1, dtype=dtype)
        for row, item in members:
            vector[row, 0] = item.direction.to(dtype)
            coefficient[row] = item.coefficient
        edit = Edit(layer, operation, where, vector.to(device), coefficient.to(device))
        made.append(edit)
    return made


@contextmanager
def intervene(
    layers: Sequence[nn.Module], placed: Sequence[tuple[Edit, Tensor]]
) -> Iterator[None]:
    """Inside the block each edit acts at its layer, with coefficients ``[B, 1 or T, 1]``; a
    batch of ``k * B`` rows has each row ``k`` times in a row."""
    with ExitStack() as hooks:
        for edit, coefficient in placed:
            handle = layers[edit.layer].register_forward_hook(_hook(edit, coefficient))
            hooks.callback(handle.remove)
        yield


def _changed(operation: str, hidden: Tensor, vector: Tensor, coefficient: Tensor) -> Tensor:
    """``hidden [B, T, D]`` with what an operator adds to it, in its own dtype and on its own
    device, since a model may lie on several.

    Raises:
        ValueError: the operator gives another shape.
    """
    vector, coefficient = vector.to(hidden.device), coefficient.to(hidden.device)
    delta = operator.find(operation)(hidden, vector, coefficient)
    if delta.shape != hidden.shape:
        raise ValueError(
            f"operator {operation!r} gave {tuple(delta.shape)} for {tuple(hidden.shape)}: it "
            "should give what is added to every position"
        )
    return hidden + torch.where(coefficient == 0, 0, delta).to(hidden.dtype)


@contextmanager
def applied(
    hf: nn.Module, interventions: Intervention | Sequence[Intervention | None]
) -> Iterator[nn.Module]:
    """A bare ``transformers`` model, steered inside the block: in its forwards and whatever
    calls them, such as ``hf.generate``. The hooks are gone behind it, after an error too.

    Args:
        interventions: one for every row, or one for each row of the batches to come (``None``
            leaves a row alone). A batch of ``k`` times as many rows has each row ``k`` times in
            a row, as ``num_return_sequences=k`` does.

    Raises:
        ValueError: a layer or a width that the model does not have, a ``where`` other than
            ``"all"`` (a forward does not say which tokens are generated), or, within the
            block, a batch of another size.
        ModelError: no decoder layers were found, or their output is no tensor.
    """
    if isinstance(interventions, Intervention):
        interventions = [interventions]
    items = list(interventions)
    decoder, name = find_layers(hf)
    layers = getattr(hf.get_submodule(decoder), name)
    width = int(hf.config.get_text_config().hidden_size)  # type: ignore[union-attr]
    for item in items:
        if item is not None:
            check(item, len(layers), width, type(hf).__name__)
            if item.where != "all":
                raise ValueError(
                    f"where={item.where!r} needs a decoding loop that knows what it has "
                    "written: use stllms.steer, or where='all'"
                )
    rows = [() if item is None else (item,) for item in items]
    made = _grouped(rows, width, hf.dtype, runs_on(hf))
    with intervene(layers, [(edit, edit.coefficient) for edit in made]):
        yield hf


def _hook(edit: Edit, coefficient: Tensor) -> Callable[[nn.Module, Any, Any], Tensor]:
    """Adds an edit to the output of its layer."""
    n = len(edit.vector)

    def hook(_module: nn.Module, _inputs: Any, hidden: Any) -> Tensor:
        if not isinstance(hidden, Tensor):
            raise ModelError(
                f"the output of layer {edit.layer} is a {type(hidden).__name__}, no tensor: "
                "transformers 5.22 or later is needed"
            )
        if len(hidden) % n:
            raise ValueError(f"{n} interventions for a batch of {len(hidden)} rows")
        vector, by = (
            x.repeat_interleave(len(hidden) // n, 0) for x in (edit.vector, coefficient)
        )
        return _changed(edit.operation, hidden, vector, by)

    return hook


def check(item: Intervention, n_layers: int, width: int, name: str) -> None:
    """Raises ``ValueError`` where a model of ``n_layers`` and ``width``, called ``name``, has
    no place for an intervention."""
    if not 0 <= item.layer < n_layers:
        raise ValueError(
            f"layer {item.layer} does not exist: {name} has layers 0 to {n_layers - 1}"
        )
    if len(item.direction) != width:
        raise ValueError(
            f"the direction has width {len(item.direction)}, {name} has {width}: it belongs to "
            "another model"
        )


def think_end(model: Model) -> int:
    """The id of ``</think>``, -1 for a tokenizer without such a token."""
    found = model.tokenizer.convert_tokens_to_ids(CLOSE)  # that of <unk> where there is none
    known = found is not None and model.tokenizer.convert_ids_to_tokens(found) == CLOSE
    return found if known else -1
