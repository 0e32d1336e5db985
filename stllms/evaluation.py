"""Old address, deleted at the end."""

from stllms.steering.measures import (FRACTION, MODES, PLAIN, SHARE, SIDE_EFFECTS, bars, changes, differences, measure, showcase, table, texts)  # noqa: F401, E501
