"""``python -m stllms`` is the command ``stllms``."""

import sys

from stllms.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
