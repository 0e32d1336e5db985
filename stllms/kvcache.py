"""Shim, deleted at the end: this module is now :mod:`stllms.generation.decode`."""

import sys

from stllms.generation import decode

sys.modules[__name__] = decode
