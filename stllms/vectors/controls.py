"""Shim: these names live at another address; deleted at the end."""

from stllms.vectors.nulls import (MATCHED, Controls, control_directions, controls, isotropic)  # noqa: F401
from stllms.vectors.quality import (Stability, expected_cosine, precision, relative_error, stability, table)  # noqa: E501, F401
