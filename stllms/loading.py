from stllms.models.loading import (ModelError, read, pick_device, pick_dtype, quiet, source_of)  # noqa: F401
