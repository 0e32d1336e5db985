"""Stage 01: tasks -> responses.

``prompts``: what a model is asked, how its output is read, and chains of a person's file.
``sampling``: the noise, the choice of a token, and the audit of both. ``interventions``: what
is done to the residual stream. ``decode``: the batched loop. ``chains``: the stage itself,
resumable. ``remote``: the same for a model behind an API. ``likelihood``: how far a chain is
from what the unsteered model would have written. The stage takes a model and tasks and gives
:class:`stllms.records.Response`.
"""

from stllms.generation import chains, decode, likelihood, prompts, remote, sampling
from stllms.generation.chains import responses
from stllms.generation.sampling import gumbel

__all__ = [
    "chains",
    "decode",
    "gumbel",
    "likelihood",
    "prompts",
    "remote",
    "responses",
    "sampling",
]
