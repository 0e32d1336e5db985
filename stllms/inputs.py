"""Shim, deleted at the end: this module is now :mod:`stllms.generation.prompts`."""

import sys

from stllms.generation import prompts

sys.modules[__name__] = prompts
