from stllms.comparison.released import (RANKS, views)  # noqa: F401
