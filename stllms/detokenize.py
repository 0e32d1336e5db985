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
    ends = _windowed_ends(decode, ids, whole)
    if ends is None:
        ends = [_common(decode(ids[: k + 1]), whole) for k in range(len(ids))]
    return np.maximum.accumulate(ends).tolist() if ends else []


def character_ranges(ends: Sequence[int], length: int) -> np.ndarray:
    """Half-open character ranges int64 ``[T, 2]`` from the ends of :func:`character_ends`.

    A token that completes no character (it holds the first bytes of one) gets the range of the
    character that later tokens complete, so that a span starting there keeps all its tokens.
    ``length`` is the number of characters of the whole text.
    """
    stops = np.asarray(ends, dtype=np.int64)
    starts = np.concatenate([[0], stops[:-1]]) if len(stops) else stops
    return np.stack([starts, np.maximum(stops, np.minimum(starts + 1, length))], axis=1)


def _windowed_ends(decode: Decode, ids: Sequence[int], whole: str) -> list[int] | None:
    """The ends, decoding short windows: the open group of tokens (up to the first whose text
    ends in a finished character) behind the group before it, as context. ``None`` where the
    windows do not add up to ``whole``.
    """
    ends: list[int] = []
    settled, begin, group = 0, 0, 0
    prefix = ""
    for k in range(len(ids)):
        text = decode(ids[begin : k + 1])
        if text.endswith(REPLACEMENT) and k + 1 < len(ids):
            continue
        added = text[len(prefix) :]
        if not text.startswith(prefix) or not whole.startswith(added, settled):
            return None
        parts = [decode(ids[begin : j + 1]) for j in range(group, k)]
        ends += [settled + max(0, _common(part, text) - len(prefix)) for part in parts]
        settled += len(added)
        ends.append(settled)
        begin, group = group, k + 1
        prefix = decode(ids[begin:group])
    return ends if settled == len(whole) else None


def _common(a: str, b: str) -> int:
    """Length of the common prefix of two texts."""
    if b.startswith(a):
        return len(a)
    limit = min(len(a), len(b))
    return next((k for k in range(limit) if a[k] != b[k]), limit)
