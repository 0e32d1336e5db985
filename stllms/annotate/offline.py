"""Old address of names that moved; deleted at the end."""

from stllms.annotation.offline import (WEIGHTS, Classifier, Offline)  # noqa: F401
