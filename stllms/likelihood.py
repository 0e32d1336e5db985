"""Shim, deleted at the end: this module is now :mod:`stllms.generation.likelihood`."""

import sys

from stllms.generation import likelihood

sys.modules[__name__] = likelihood
