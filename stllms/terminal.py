"""What others wrote, as a terminal may be given it: :func:`plain`, the one place for it.

A terminal obeys what it prints. A model, a judge, a server or a stranger's file may write an
escape sequence (a colour, a link that shows another address, the clipboard: OSC 8 and 52), a
carriage return that hides what stands before it, or a mark that turns the order of letters
around. Every line of this package that can hold such a text passes here before it is printed;
in notebooks too, whose viewers obey colours, backspaces and carriage returns.
"""

from __future__ import annotations

import re

#: Controls but for line feed and tab (C0, DEL and C1, U+0085 among them), separators of lines
#: that only some viewers break at, marks and overrides of direction, marks of annotations, tags
#: that nobody sees, and halves of surrogate pairs.
OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def plain(text: object) -> str:
    r"""``str(text)`` with every character of :data:`OBEYED` written out, like ``\u001b``.

    That is how JSON writes it: the text of a JSON value stays the text of the same value.
    Lines that end as on Windows end in a line feed; other carriage returns are written out.
    """
    return OBEYED.sub(_written, str(text).replace("\r\n", "\n"))


def _written(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))

from stllms.progress import (  # noqa: E402, F401
    CHANNEL, FEW, SHOWN_EVERY, STEP, WINDOW, Bar, Meter, State, about, clock, followed, read, report, token_bar, words,
)
