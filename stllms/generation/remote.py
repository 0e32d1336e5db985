"""Stub: the names of this module still live at their old addresses."""

from stllms.remote import (PROTOCOL, responses, requests, entry_of, check_limit, withheld, unusable, to_response, failures)  # noqa: F401
