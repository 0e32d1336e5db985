"""Old address, deleted at the end."""

from stllms.plotting.axes import (HEAD_AND_FOOT, LINE_HEIGHT, MOST_LINES, chains, doses, pair as twins, released_effects, sweep)  # noqa: E501, F401


def confusions(panels, compared):
    from stllms import agreement
    from stllms.plotting import axes

    shares, report = agreement.confusions(compared), agreement.report(compared)
    return axes.confusions(panels, shares, report, reference=compared[0].first)
