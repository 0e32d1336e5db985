"""Sentences: where a reader would cut a text.

Decimals, abbreviations, list numbers and blocks of LaTeX stay whole; the end of a line always
cuts, since chains put list items and equations on lines of their own.
"""

from __future__ import annotations

import re

_ABBREVIATIONS = frozenset(
    """e.g i.e etc vs cf al mr mrs ms dr prof st jr sr fig figs eq eqs no nos vol ch sec ca viz
    resp approx est min max avg dept inc ltd""".split()  # noqa: SIM905
)
_LATEX = re.compile(
    r"\\\[.{0,2000}?\\\]|\$\$.{0,2000}?\$\$|\\begin\{(\w+\*?)\}.{0,2000}?\\end\{\1\}", re.DOTALL
)
# Repetitions are bounded, possessive or kept from starting twice: splitting is linear.
_BREAK = re.compile(
    r"""(?P<line>\n\s*+)                          # the end of a line
    |(?P<wide>[。！？])                           # full stops that need no space
    |(?<![.!?…])(?P<stop>[.!?…]++)(?P<tail>["'”’)\]*_]*+)(?P<gap>[^\S\n]++)(?=\S)""",
    re.VERBOSE,
)
_LIST_NUMBER = re.compile(r"(?:^|\n)\s*(?:[#>*-]+\s*)?(?:\*\*)?(?:\d{1,3}|[A-Za-z]|[ivx]+)$")
_LAST_WORD = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]+$")


def split(text: str) -> list[tuple[int, int]]:
    """Characters ``[start, end)`` of every sentence, in order.

    No sentence begins or ends with white space, none is empty, they do not overlap, and
    together they hold every character that is not white space.
    """
    shielded = [m.span() for m in _LATEX.finditer(text)]
    ends, begin = [], 0
    for match in _BREAK.finditer(text):
        cut = match.start("gap") if match["stop"] else match.end()
        while shielded and shielded[0][1] <= match.start():
            shielded.pop(0)
        if shielded and shielded[0][0] <= match.start() < shielded[0][1]:
            continue
        if match["stop"] and not _ends_sentence(text, begin, match):
            continue
        ends.append(cut)
        begin = cut
    found = []
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        part = text[start:end]
        lead = len(part) - len(part.lstrip())
        if part.strip():
            found.append((start + lead, start + lead + len(part.strip())))
    return found


def _ends_sentence(text: str, begin: int, match: re.Match[str]) -> bool:
    """Whether the stop sign of ``match`` ends the sentence that began at ``begin``."""
    following = text[match.end()]
    if following.islower():
        return False
    if match["stop"] != "." or match["tail"]:
        return True
    before = text[max(begin, match.start() - 40) : match.start()]
    if _LIST_NUMBER.search(before):
        return False
    word = _LAST_WORD.search(before)
    if word is None:
        return True
    name = word[0].lower()
    if name in ("no", "min", "max", "st", "al"):  # words of their own before anything else
        return not following.isdigit() and name != "st"
    if "." in name:
        return name not in _ABBREVIATIONS and following.isupper() and len(name) > 3
    return name not in _ABBREVIATIONS or (name == "etc" and following.isupper())
