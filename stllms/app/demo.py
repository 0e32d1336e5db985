"""Stub: the names of this module still live at their old addresses."""

from stllms.demo import (load, show, opening, live, example, showcase)  # noqa: F401
from stllms.questions import (LISTED, NO_CHAINS, Listing, choices, listing)  # noqa: F401
from stllms.widgets import (PAUSE, LOOKING, LETTERS, OWN, EMPTY, WAITING, MODELS, FIELDS, render, Demo)  # noqa: F401
