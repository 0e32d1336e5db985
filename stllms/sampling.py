"""Shim, deleted at the end: this module is now :mod:`stllms.generation.sampling`."""

import sys

from stllms.generation import sampling

sys.modules[__name__] = sampling
