"""Stub: the names of this module still live at their old addresses."""

from stllms.annotate import (Annotator, annotator, from_markup, NAMES)  # noqa: F401
from stllms.annotate.stage import (KEY, for_run, annotations, made_from, steered, labelled, load, table)  # noqa: F401
from stllms.annotate.lexical import (CUES, label, merged, Lexical)  # noqa: F401
