"""Annotators: thinking text -> labelled parts, behind one protocol.

``annotator(name).annotate(responses)`` returns one :class:`~stllms.records.Annotation` a
response, in the same order, with its segments placed in ``response.thinking`` and ``spans``
still empty (:func:`stllms.spans.with_spans` fills them from the tokens' offsets).

=================  ======================================================================
``grammar``        the truth about the embedded model's chains, from its own grammar
``lexical``        cue words and a few rules; no training, no dependence on a judge
``offline``        a sentence classifier trained on published annotations (offline_card.md)
``openai:MODEL``   a language model as judge, through any OpenAI-compatible server
``replay:FOLDER``  the stored replies of a judge
=================  ======================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from stllms import spans
from stllms.annotate.markup import Reading, parse, read
from stllms.records import Annotation, Response

__all__ = ["NAMES", "Annotator", "Reading", "annotator", "from_markup", "parse", "read"]

#: What :func:`annotator` accepts.
NAMES = ("grammar", "lexical", "offline", "openai:MODEL", "replay:FOLDER")


@runtime_checkable
class Annotator(Protocol):
    """Anything with a ``name`` that labels chains."""

    name: str

    def annotate(self, responses: Sequence[Response]) -> list[Annotation]:
        """One annotation a response, in the same order; ``spans`` empty."""
        ...


def annotator(name: str, **options: Any) -> Annotator:
    """The annotator called ``name``, one of :data:`NAMES`; ``options`` are its own."""
    kind, colon, rest = name.partition(":")
    if kind in ("openai", "replay") and rest:
        if kind == "openai":
            from stllms.annotate import judge

            return judge.Judge(rest, **options)
        from stllms.annotate import replay

        return replay.Replay(rest, **options)
    if not colon and kind == "grammar":
        from stllms.organism import grammar

        return grammar.Annotator(**options)
    if not colon and kind == "lexical":
        from stllms.annotate import lexical

        return lexical.Lexical(**options)
    if not colon and kind == "offline":
        from stllms.annotate import offline

        return offline.Offline(**options)
    raise ValueError(f"no annotator {name!r}: choose one of {', '.join(NAMES)}")


def from_markup(
    response: Response,
    markup: str,
    annotator: str,
    *,
    reader: str = "tolerant",
    **ledger: Any,
) -> Annotation:
    """The annotation of one chain from a judge's reply in the wire format.

    ``reader="published"`` also aligns as published (first exact occurrence). The characters
    of pieces that the reader rejected are counted under the reader's reason; ``ledger`` are
    more keys to record, such as usage or a prompt version.
    """
    reading = read(markup, reader=reader)
    alignment = spans.align(
        [segment for segment, _ in reading.pieces],
        response.thinking,
        method="published" if reader == "published" else "tolerant",
        reasons=reading.reasons,
    )
    ledger = {"reader": reader, "forms": reading.forms, **ledger}
    return spans.annotation(alignment, response.task_id, annotator, **ledger)
