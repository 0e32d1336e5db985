from stllms.models.api import (FILE, default_folder, clean, digest, tokens, Request, Reply, Store)  # noqa: F401
