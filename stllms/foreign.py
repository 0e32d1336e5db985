"""JSON that others wrote: one way to parse it, one kind of error.

A file of a stranger, a line of a log, the answer of a server or of a judge may be nested
2,500 deep, hold a number of 5,000 digits or half a surrogate pair. :mod:`stllms.files` reads
what the package wrote itself; the replies, the requests' answers and the judges' labels are
read on floors above and beside it, and all of them need this.
"""

from __future__ import annotations

import json
import math
from typing import Any

#: Deeper lists and objects are refused: nothing that is read here has more than ten levels.
DEEPEST = 100


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ``ValueError``, one line, for everything else: no JSON, nested deeper than
    :data:`DEEPEST`, a number of thousands of digits, bytes that are no UTF-8. ``NaN`` and
    ``Infinity`` are read as Python does: check numbers with :func:`amount`.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [child for one in level for child in _children(one)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {DEEPEST} levels")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def amount(value: Any) -> float | None:
    """A number that counts or costs: finite and not negative, no boolean; else ``None``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) and number >= 0 else None


def kind(value: Any) -> str:
    """What a value of JSON is, in the words of JSON, for messages."""
    for name, types in _KINDS.items():
        if isinstance(value, types):
            return name
    return "null" if value is None else type(value).__name__


_KINDS = {"a boolean": bool, "a number": (int, float), "a text": str, "a list": list,
          "an object": dict}  # fmt: skip
