"""Shim, deleted at the end: this module is now :mod:`stllms.generation.chains`; ``options`` is
``RunConfig.decoding``."""

import sys

from stllms.generation import chains

chains.options = lambda setup: setup.decoding
sys.modules[__name__] = chains
