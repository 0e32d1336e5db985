"""Old address of names that moved; deleted at the end."""

from stllms.annotation.offline import (BITS, Features, of_chain, AROUND)  # noqa: F401
