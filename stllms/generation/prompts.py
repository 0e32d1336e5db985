"""Stub: the names of this module still live at their old addresses."""

from stllms.prompts import (STYLES, STEP_BY_STEP, OPEN, CLOSE, prompt, kind_of, opening, split, before, irregular, same, as_used, response)  # noqa: F401
from stllms.inputs import (read)  # noqa: F401
