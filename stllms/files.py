from stllms.runs.files import (  # noqa: F401
    DPI,
    FLOAT_FORMAT,
    draw,
    load_table,
    load_tensors,
    save_table,
    save_tensors,
)
from stllms.runs.store import Rows, resumed  # noqa: F401
