"""The folder of a run and the files in it.

:mod:`~.files` reads and writes single files, with a record of what each was made from;
:mod:`~.store` keeps rows that can be resumed; :mod:`~.audit` tells from stored rows whether
they were sampled right; :mod:`~.artifacts` is the folder as a whole: whose it is, its lock, and
:func:`verify`. Nothing here imports torch, pandas or matplotlib before a file needs it.
"""

from stllms.runs import audit, files
from stllms.runs.artifacts import Folder, environment, verify
from stllms.runs.store import Rows

__all__ = ["Folder", "Rows", "audit", "environment", "files", "verify"]
