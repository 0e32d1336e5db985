"""Stage 02: from labelled responses to directions of behaviours.

Takes responses with the token spans of their annotations, gives :class:`SteeringVectors`, a
direction per behaviour and layer, and the control directions to compare it with.

* :mod:`.activations` reads span means off the model; :mod:`.means` is what is kept of them
* :mod:`.estimators` are the ways to make directions of them, by name
* :mod:`.directions` gives directions their length, reads released ones, compares them
* :mod:`.contrast` makes them of pairs of texts; :mod:`.reading` reads one along a text
* :mod:`.nulls` makes directions that mean nothing
* :mod:`.contrast` takes pairs of texts in place of labelled spans
* :mod:`.reading` reads a direction along a text
* :mod:`.quality` says how good directions are
* :mod:`.export` writes them for other engines (safetensors, GGUF)
"""

from stllms.vectors import activations, directions, nulls, quality
from stllms.vectors.directions import (
    SteeringVectors,
    cosines,
    difference_of_means,
    load_published,
)
from stllms.vectors.nulls import controls

__all__ = [
    "SteeringVectors",
    "activations",
    "controls",
    "cosines",
    "difference_of_means",
    "directions",
    "load_published",
    "nulls",
    "quality",
]
