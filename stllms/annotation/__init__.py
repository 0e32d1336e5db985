"""Stage 02, first half: chains -> labelled segments, placed in characters and in tokens.

Takes :class:`~stllms.records.Response` and gives :class:`~stllms.records.Annotation`, whose
``ledger`` accounts for every character (method, section 4).

``markup`` reads what a judge wrote; ``placing`` finds it in the text and its tokens;
``sentences`` cuts texts and knows cue words; ``annotators`` has the protocol, the annotators
and the stage (``annotators.annotations``); ``offline`` is the trained annotator, ``judge`` a
language model; ``agreement`` says how far two of them agree.
"""

from stllms.annotation import agreement, annotators, markup, placing
from stllms.annotation.annotators import Annotator, annotator
from stllms.annotation.markup import parse
from stllms.annotation.placing import align

__all__ = [
    "Annotator",
    "agreement",
    "align",
    "annotator",
    "annotators",
    "markup",
    "parse",
    "placing",
]
