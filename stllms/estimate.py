"""Old address of :mod:`stllms.app.preflight`; deleted at the end."""

import sys

from stllms.app import preflight

sys.modules[__name__] = preflight
