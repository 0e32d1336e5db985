"""Which characters of a decoded text each token holds; pure functions of a ``decode``.

Decoding one token at a time is not decoding the text: a character may be spread over tokens,
and SentencePiece decoders treat the first token apart. So the *end* of token ``k`` is defined
by whole texts: the length of the longest common prefix of ``decode(ids[:k + 1])`` and
``decode(ids)``. :func:`character_ends` computes that with short windows in linear time, checks
the result against the whole text, and decodes every prefix only where the windows disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Decode = Callable[[Sequence[int]], str]

#: What decoders write for bytes that are no character (yet).
REPLACEMENT = "\ufffd"


def character_ends(decode: Decode, ids: Sequence[int], whole: str) -> list[int]:
    """For every token, how many characters of ``whole = decode(ids)`` are complete after it.

    Returns ``T`` numbers that never fall; the last is ``len(whole)``.
    """
    return _marks(decode, ids, whole)[0].tolist()


def character_ranges(decode: Decode, ids: Sequence[int], whole: str) -> np.ndarray:
    """Half-open ranges int64 ``[T, 2]`` of the characters of ``whole = decode(ids)``.

    A character whose bytes are spread over tokens is in the range of each of them: of the
    token that holds its first bytes, be it alone or behind a space or a letter (``" \xc3"`` and
    ``"\xb1"`` make ``" ñ"``), of those between, and of the one that completes it.
    """
    ends, reached = _marks(decode, ids, whole)
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    stops = np.maximum(reached, np.minimum(starts + 1, len(whole)))
    return np.stack([starts, stops], axis=1)


def _marks(decode: Decode, ids: Sequence[int], whole: str) -> tuple[np.ndarray, np.ndarray]:
    """After every token: how many characters are complete, and how many are begun."""
    marks = _windowed(decode, ids, whole)
    if marks is None:
        marks = [_mark(decode(ids[: k + 1]), whole) for k in range(len(ids))]
    table = np.array(marks, dtype=np.int64).reshape(-1, 2)
    table = np.maximum.accumulate(table, axis=0)
    return table[:, 0], np.minimum(table[:, 1], len(whole))


def _windowed(decode: Decode, ids: Sequence[int], whole: str) -> list[tuple[int, int]] | None:
    """The marks, decoding short windows: the open group of tokens (up to the first whose text
    ends in a finished character) behind the group before it, as context. ``None`` where the
    windows do not add up to ``whole``.
    """
    marks: list[tuple[int, int]] = []
    settled, begin, group = 0, 0, 0
    prefix = ""
    for k in range(len(ids)):
        text = decode(ids[begin : k + 1])
        if text.endswith(REPLACEMENT) and k + 1 < len(ids):
            continue
        added = text[len(prefix) :]
        if not text.startswith(prefix) or not whole.startswith(added, settled):
            return None
        for j in range(group, k):
            found = _mark(decode(ids[begin : j + 1]), text)
            marks.append(tuple(settled + max(0, n - len(prefix)) for n in found))
        settled += len(added)
        marks.append((settled, settled))
        begin, group = group, k + 1
        prefix = decode(ids[begin:group])
    return marks if settled == len(whole) else None


def _mark(part: str, whole: str) -> tuple[int, int]:
    """Characters of ``whole`` that a decoded prefix has complete, and those it has begun: what
    it writes beyond its common prefix with ``whole`` are bytes of the next character."""
    complete = _common(part, whole)
    return complete, complete + (len(part) > complete)


def _common(a: str, b: str) -> int:
    """Length of the common prefix of two texts."""
    if b.startswith(a):
        return len(a)
    limit = min(len(a), len(b))
    return next((k for k in range(limit) if a[k] != b[k]), limit)
