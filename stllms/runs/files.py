"""Stub: the names of this module still live at their old addresses."""

from stllms.provenance import (BadFile, DamagedFile, StaleArtefact, digest, file_hash, remembered_hash, replacing, write_json, read_json, check, remove)  # noqa: F401
from stllms.files import (save_tensors, load_tensors, save_table, load_table, draw, DPI, FLOAT_FORMAT)  # noqa: F401
from stllms.released import (load_torch, is_plain, check_size)  # noqa: F401
