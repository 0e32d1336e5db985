import importlib.util  # noqa: F401
from importlib import metadata  # noqa: F401

from stllms.config import GYM, SIZES, hardware, has_name, one_of, real, whole  # noqa: F401
