"""Models: load one by name, or wrap one that is already built; ``model`` knows its layers.

``load(name)`` gives a checked :class:`Model`, ``wrap(hf, tokenizer, name=...)`` one around a
``transformers`` model. Beside these, :mod:`stllms.models.api` asks models behind an API and
needs no torch; that is why the names below are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stllms.models.loading import load
    from stllms.models.model import Model, wrap

__all__ = ["Model", "load", "wrap"]

_HOME = {"Model": "model", "load": "loading", "wrap": "model"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
