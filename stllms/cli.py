"""Old address of :mod:`stllms.app.cli`; deleted at the end."""

import sys

from stllms.app import cli

sys.modules[__name__] = cli
