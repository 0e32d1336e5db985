"""Old address of names that moved; deleted at the end."""

from stllms.annotation.agreement import (Agreement, report, confusions, kappa, compare)  # noqa: F401


def annotators(setup):
    from stllms.annotation import agreement

    return agreement.annotators(setup.annotator, embedded=setup.embedded)
