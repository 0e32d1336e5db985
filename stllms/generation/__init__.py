"""Stage 1, generation: tasks -> responses.

``prompts``: what a model is asked, how its output is read, and chains of a person's file.
``sampling``: the noise, the choice of a token, and the audit of both. ``decode``: the batched
loop, with interventions. ``chains``: the stage itself, resumable. ``remote``: the same for a
model behind an API. ``likelihood``: how far a chain is from what the plain model would have
written. The stage takes a model and tasks and gives :class:`stllms.records.Response`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stllms.generation.chains import responses
    from stllms.generation.sampling import gumbel

__all__ = ["gumbel", "responses"]


def __getattr__(name: str) -> Any:  # on first use: both bring torch
    if name == "responses":
        from stllms.generation.chains import responses

        return responses
    if name == "gumbel":
        from stllms.generation.sampling import gumbel

        return gumbel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
