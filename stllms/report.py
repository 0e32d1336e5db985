"""Old address, deleted at the end."""

from stllms.app.report import COMPARISON, FIRST, NAME, ensure, is_current, main, write  # noqa: F401
from stllms.runs.files import BadFile  # noqa: F401
