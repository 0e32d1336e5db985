from stllms.released import (  # noqa: F401
    load_comparison,
    load_layer_effects,
    load_torch,
    published,
)
from stllms.runs.artifacts import (  # noqa: F401
    AUDIT,
    ChangedConfiguration,
    Finding,
    Folder,
    commit,
    now,
    save_figure,
    verify,
    versions,
)
from stllms.runs.files import ARTEFACTS as STANDARD  # noqa: F401
from stllms.runs.files import (  # noqa: F401
    BadFile,
    DamagedFile,
    LockedFolder,
    StaleArtefact,
    load_table,
    load_tensors,
    read_json,
    save_table,
    save_tensors,
    write_json,
)
from stllms.runs.store import Rows  # noqa: F401
