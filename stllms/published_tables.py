from stllms.comparison.released import (EARLY, read_vectors, left_out, labels, Effects as Released, read_effects, peaks, load_comparison as read_counts, members, changes)  # noqa: F401
