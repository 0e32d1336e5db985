"""Old address, deleted at the end."""

from stllms.steering.dose import (LIMITS, broken, side_effects as costs, suggested, summary, sweep, table, warning)  # noqa: F401, E501
