"""Old address of names that moved; deleted at the end."""

from stllms.fixtures.families import (NAMES, THINGS, COLOURS, POINTS, DAYS, KINDS, TRAITS, COMPARATIVES, CAUSES, GROUPS, USES, MATTER, FACTS)  # noqa: F401
