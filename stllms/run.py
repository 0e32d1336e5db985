"""Old address of :mod:`stllms.app.runner` and :mod:`stllms.app.stages`; deleted at the end."""

import sys

from stllms.app import cli
from stllms.app.stages import STAGES, StageError, ensure, finish  # noqa: F401


def main(argv=None) -> int:
    return cli.main(["run", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
