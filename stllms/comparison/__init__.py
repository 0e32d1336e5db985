"""Models beside each other, and the paper's numbers beside ours (notebook 05).

* :mod:`~stllms.comparison.groups`: segment counts of several models -> averages, differences
  of pairs, and which of them may be averaged at all;
* :mod:`~stllms.comparison.released`: the files released with the paper -> the same tables and
  figures, without a model;
* :mod:`~stllms.comparison.ledger`: every claim of the paper against the artefacts of a results
  folder.

Takes annotations, tables and released files; gives tables, captions and verdicts.
"""

from stllms.comparison import groups, released

__all__ = ["groups", "released"]
