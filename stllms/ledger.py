from stllms.comparison.ledger import (MARKS, COLUMNS, ledger, write, markdown, put, main)  # noqa: F401
