"""Old address of names that moved; deleted at the end."""

from stllms.annotation.offline import (WEIGHTS, log_softmax, Classifier, Offline)  # noqa: F401
