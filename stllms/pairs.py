"""Shim, deleted at the end: this module is now :mod:`stllms.app.bench`."""

import sys

from stllms.app import bench

sys.modules[__name__] = bench
