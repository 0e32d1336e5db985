"""Stub: the names of this module still live at their old addresses."""

from stllms.annotate.offline import (WEIGHTS, log_softmax, Classifier, Offline)  # noqa: F401
from stllms.annotate.features import (BITS, Features, of_chain, AROUND)  # noqa: F401
