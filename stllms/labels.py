"""The labels of the paper's annotation: their order, their roles and their colours.

Nothing is imported, so that every floor can use them.
"""

from __future__ import annotations

#: The six labels, in the order used everywhere.
BEHAVIOURS: tuple[str, ...] = (
    "initializing",
    "deduction",
    "adding-knowledge",
    "example-testing",
    "uncertainty-estimation",
    "backtracking",
)

#: The four behaviours that the paper steers, in the order of its figures.
STEERED: tuple[str, ...] = (
    "backtracking",
    "uncertainty-estimation",
    "example-testing",
    "adding-knowledge",
)

#: The rows of the paper's cosine heatmap.
HEATMAP: tuple[str, ...] = (
    "initializing",
    "backtracking",
    "uncertainty-estimation",
    "adding-knowledge",
    "deduction",
)

#: Kinds of control directions (method, section 13): a direction is called ``"shuffled:0"``.
CONTROLS: tuple[str, ...] = ("shuffled", "covariance", "isotropic")

#: One colour per label, distinct for colour-blind readers (the palette of Okabe and Ito).
COLOURS: dict[str, str] = {
    "initializing": "#999999",
    "deduction": "#0072B2",
    "adding-knowledge": "#009E73",
    "example-testing": "#E69F00",
    "uncertainty-estimation": "#CC79A7",
    "backtracking": "#D55E00",
}

#: The colour of any other label (the published reader keeps unknown ones).
OTHER = "#555555"


def is_control(direction: str) -> bool:
    """Whether the name of a direction is that of a control."""
    kind, colon, number = direction.partition(":")
    return kind in CONTROLS and bool(colon) and number.isdigit()
