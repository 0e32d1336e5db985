from stllms.generation.remote import (PROTOCOL, responses, requests, entry_of, check_limit, withheld, unusable, to_response, failures)  # noqa: E501, F401
