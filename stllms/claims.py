from stllms.comparison.ledger import (Run as Made, display)  # noqa: F401
