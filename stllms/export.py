"""Shim: these names live at another address; deleted at the end."""

import sys

from stllms.vectors.export import (gguf, main, safetensors)  # noqa: F401

if __name__ == "__main__":
    sys.exit(main())
