"""Prompts that are read once: rows are one row until an intervention tells them apart.

All conditions of a task have its prompt. Its plain rows and the rows that are steered at layer
``l`` have the same residual stream up to the output of ``l``, so the layers up to ``l`` read it
once: ``[C_0, T, D]`` enters the first layer with one row for each prompt, and behind a layer
where rows part the stream has more rows, ``B`` at most. A family whose layers take what is not
known here (:data:`TAKEN`) reads every row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stllms.models.engines.engine import Row
from stllms.models.engines.interventions import Edit
from stllms.models.model import Model

#: What a layer is given beside the stream that has one row for each prompt.
_BY_PROMPT = ("attention_mask", "position_ids", "position_embeddings")
#: What layers may take for their prompts to be shared.
TAKEN = {"self", "hidden_states", *_BY_PROMPT, "past_key_values", "use_cache", "kwargs"}


class Classes:
    """Which rows are still one.

    ``of[l] [B]`` is the number of a row's class as the stream enters layer ``l`` (``of[L]``:
    leaves the last), ``first[l] [C_l]`` the first row of each class.
    """

    def __init__(self, model: Model, rows: Sequence[Row]) -> None:
        layer_class = type(model.layers[0])  # nnsight wraps the method of the object
        alone = not TAKEN.issuperset(inspect.signature(layer_class.forward).parameters)
        self.of, self.first = [], []
        for layer in range(model.n_layers + 1):
            numbers: dict[Any, int] = {}
            of, first = [], []
            for i, row in enumerate(rows):
                done = [
                    id(x) for x in row.interventions if x.where == "all" and x.layer < layer
                ]
                key = i if alone else (row.prompt_ids, *done)
                if key not in numbers:
                    first.append(i)
                of.append(numbers.setdefault(key, len(numbers)))
            self.of.append(torch.tensor(of))
            self.first.append(torch.tensor(first))

    def acting(self, edits: Sequence[Edit]) -> list[tuple[Edit, Tensor]]:
        """What acts on prompts, for the rows that there are behind its layer."""
        found = []
        for edit in edits:
            if edit.where == "all":
                rows = self.first[edit.layer + 1].to(edit.vector.device)
                found.append((replace(edit, vector=edit.vector[rows]), edit.coefficient[rows]))
        return found

    @contextmanager
    def parting(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Inside the block a forward of ``first[0]`` parts its rows as they come to differ;
        hooks that are registered inside see them parted."""
        with ExitStack() as hooks:
            for n, layer in enumerate(layers):
                before, behind = self.first[n], self.first[n + 1]
                if len(before) > len(self.first[0]):
                    given = _spread(self.of[0][before])
                    handle = layer.register_forward_pre_hook(given, with_kwargs=True)
                    hooks.callback(handle.remove)
                if len(behind) > len(before):
                    handle = layer.register_forward_hook(_parted(self.of[n][behind]))
                    hooks.callback(handle.remove)
            yield


def _spread(prompts: Tensor) -> Any:
    """Gives a layer what belongs to the prompts of its rows."""

    def take(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(take, x))
        return x if x is None or len(x) == 1 else x[prompts.to(x.device)]

    def hook(_layer: nn.Module, args: tuple, given: dict[str, Any]) -> tuple:
        taken = {name: take(given[name]) for name in _BY_PROMPT if name in given}
        return args, given | taken

    return hook


def _parted(rows: Tensor) -> Any:
    def hook(_layer: nn.Module, _args: tuple, hidden: Tensor) -> Tensor:
        return hidden[rows.to(hidden.device)]

    return hook
