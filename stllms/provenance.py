from stllms.hashes import LARGE, digest, file_hash, remembered_hash  # noqa: F401
from stllms.runs.files import (  # noqa: F401
    RUN,
    BadFile,
    DamagedFile,
    LockedFolder,
    Record,
    StaleArtefact,
    check,
    locked,
    read_json,
    remove,
    replacing,
    write_json,
)
from stllms.runs.store import INPUTS  # noqa: F401
