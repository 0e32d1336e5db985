"""Shim, deleted at the end: this module is now :mod:`stllms.app.demo`."""

import sys

from stllms.app import demo

sys.modules[__name__] = demo
