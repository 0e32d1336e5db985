"""stllms: steering vectors for the reasoning behaviours of thinking language models.

The package reproduces, stage by stage, *Understanding Reasoning in Thinking Language
Models via Steering Vectors* (arXiv 2506.18167). The notebooks hold the story, the package
holds the work: one folder a stage, one file an idea.

Dimension letters, used in every docstring:

====  =====================================================================
``B``  rows of a batch
``T``  tokens of a row (prompt and output together)
``L``  decoder layers, 0-based; ``h[l, t]`` is the *output* of layer ``l``
``D``  width of the residual stream
``V``  vocabulary
``P``  positions (span starts)
``N``  behaviours
====  =====================================================================

Tensors are float32 on the CPU unless a docstring says otherwise.

The verbs (``stllms.load``, ``generate``, ``annotate``, ``train``, ``contrast``,
``layer_effects``, ``steer``, ``compare``) are those of :mod:`stllms.verbs`, imported on first
use: ``import stllms`` brings nothing heavy.

Where to change what:

=============================  ====================================================
the sampling noise             ``models/engines/sampling.py``: ``gumbel``, ``choose``
a model family's layers        ``models/model.py``: ``LAYER_PATHS``
parts of one's own             ``registry.py``; docs/extend.md
tokens that a span averages    ``vectors/activations.py``: ``_job``
exact and published effects    ``attribution/patching.py``
the choice of the layer        ``attribution/effects.py``: ``best_layer``
null intervals of steering     ``steering/measures.py``: ``_null``
who writes an artefact         the notebooks; its name is in ``runs/files.py``
what makes one stale           ``runs/files.py``: ``Record``; ``app/stages.py``
=============================  ====================================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stllms.verbs import (
        annotate,
        compare,
        contrast,
        generate,
        layer_effects,
        load,
        steer,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "annotate",
    "compare",
    "contrast",
    "generate",
    "layer_effects",
    "load",
    "steer",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.verbs"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
