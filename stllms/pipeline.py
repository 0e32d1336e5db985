"""Old address of :mod:`stllms.app.stages`; deleted at the end."""

import sys

from stllms.app import stages

sys.modules[__name__] = stages
