"""Stage 01: tasks -> responses.

``prompts``: what a model is asked, how its output is read, and chains of a person's file.
``chains``: the stage itself, resumable; what writes is the model's engine
(:mod:`stllms.models.engines`). ``remote``: the same for a model behind an API. ``likelihood``:
how far a chain is from what the unsteered model would have written. The stage takes a model
and tasks and gives :class:`stllms.records.Response`.
"""

from stllms.generation import chains, likelihood, prompts, remote
from stllms.generation.chains import responses
from stllms.models.engines.sampling import gumbel

__all__ = [
    "chains",
    "gumbel",
    "likelihood",
    "prompts",
    "remote",
    "responses",
]
