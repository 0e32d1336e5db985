"""Stub: the names of this module still live at their old addresses."""

from stllms.sampling import (BLOCK, RARE, LIMIT, SAMPLED, GREEDY, COUNTS, SamplingError, hash_key, gumbel, of_bits, choose, measure, columns, entry, Audit, audit)  # noqa: F401
