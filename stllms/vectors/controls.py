"""Stub: the names of this module still live at their old addresses."""

from stllms.controls import (table)  # noqa: F401
from stllms.vectors import (MATCHED, isotropic, controls, Controls, control_directions, Stability, stability, relative_error, expected_cosine, precision)  # noqa: F401
