from stllms.comparison.released import (PATTERNS, OUTPUTS as MADE, TREATMENTS, run, ensure, find, listing, _list_left_out)  # noqa: F401
