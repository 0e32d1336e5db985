"""A language model as annotator, behind any OpenAI-compatible server.

:mod:`stllms.annotate.protocols` says what is asked and how a reply is read, :mod:`stllms.api`
sends and stores. A chain that this judge, with this prompt, has judged is never sent again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from stllms import api
from stllms.annotate import protocols
from stllms.records import Annotation, Response
from stllms.replies import Request, default_folder


class Judge:
    """Labels chains with the model ``model``; ``name`` is ``openai:MODEL``.

    ``protocol`` is ``"rewrite"`` (default) or ``"indexed"``, also written ``MODEL#indexed``;
    an indexed judge has that in its name, for it is another annotator. ``reader`` reads what a
    rewriting judge returned. Replies are stored in
    ``folder``, by default one folder for all of a person's runs. ``max_cost`` bounds what its
    replies cost together; ``base_url`` and further ``options`` are those of
    :class:`stllms.api.Client`.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        protocol: str | None = None,
        reader: str = "tolerant",
        folder: str | os.PathLike[str] | None = None,
        max_cost: float | None = None,
        **options: Any,
    ) -> None:
        model, _, suffix = model.partition("#")
        self.protocol = protocols.protocol(protocol or suffix or "rewrite", reader)
        other = "" if self.protocol.name == "rewrite" else f"#{self.protocol.name}"
        self.name = f"openai:{model}{other}"
        self.client = api.Client(
            model,
            folder=default_folder() if folder is None else folder,
            base_url=base_url,
            max_cost=max_cost,
            **options,
        )

    def annotate(self, responses: Sequence[Response]) -> list[Annotation]:
        """One annotation a response, in the same order; a failed chain says why in ``failed``.

        Raises the errors of :meth:`stllms.api.Client.replies` where going on is useless.
        """
        asked = [self.protocol.requests(response) for response in responses]
        replies = iter(self.client.replies(_flat(asked), self.protocol.unusable))
        return [
            self.protocol.annotation(response, [next(replies) for _ in requests], self.name)
            for response, requests in zip(responses, asked, strict=True)
        ]

    def estimate(self, responses: Sequence[Response]) -> api.Estimate:
        """Calls, tokens and cost that :meth:`annotate` would need now. Sends nothing."""
        asked = [self.protocol.requests(response) for response in responses]
        return self.client.estimate(_flat(asked), self.protocol.unusable)


def _flat(asked: Sequence[Sequence[Request]]) -> list[Request]:
    return [request for requests in asked for request in requests]
