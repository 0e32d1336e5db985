"""Stub: the names of this module still live at their old addresses."""

from stllms.annotate.judge import (Judge)  # noqa: F401
from stllms.annotate.protocols import (LONGEST, EMPTY, UNKNOWN_LABEL, WRONG_NUMBER, TWICE, NO_ITEM, Protocol, Rewrite, Indexed, PROTOCOLS, protocol, cut, pieces, place)  # noqa: F401
from stllms.annotate.replay import (NO_REPLY, Replay)  # noqa: F401
