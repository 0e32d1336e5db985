"""Old address, deleted at the end."""

from stllms.plotting.text import P_VALUES, by_name, intervals, layer_text, layers, shown, wide  # noqa: F401, E501


def growth(stability, layer: int):
    from stllms.plotting import text

    cosines = stability.cosines[..., layer]
    return text.growth(cosines, stability.counts, stability.shares, stability.behaviours)
