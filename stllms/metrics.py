"""Old address, deleted at the end; ``positions`` moves to annotation or attribution."""

from __future__ import annotations

from collections.abc import Sequence

from stllms.records import TokenSpan
from stllms.stats import (Interval, bootstrap, holm, resamples, sign_flip)  # noqa: F401


def positions(spans: Sequence[TokenSpan], behaviour: str, which: str = "own") -> list[int]:
    """Positions ``t = s - 1`` before span starts, in order, each once (METHOD, section 7).

    ``"own"``: the spans of ``behaviour`` (the text of the paper); ``"others"``: those of all
    other behaviours (``"published"`` is the same). A span at ``s <= 1`` has no earlier position
    with a prefix and is left out.
    """
    if which not in ("own", "others", "published"):
        raise ValueError(f"unknown position set {which!r}: own, others or published")
    wanted = which == "own"
    return sorted(
        {s.start - 1 for s in spans if (s.label == behaviour) == wanted and s.start > 1}
    )


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    from stllms.steering import measures

    return getattr(measures, name)
