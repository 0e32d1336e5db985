from stllms.config import GYM, SIZES, hardware, has_name, one_of, real, whole  # noqa: F401
