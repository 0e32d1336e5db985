from stllms.comparison.ledger import (slug_of)  # noqa: F401
