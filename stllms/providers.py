from stllms.models.api import (KEY, NO_KEY, STARTED, PRICES, MissingKey, PROVIDERS, base_url, is_local, key_names, api_key, redacted, setting, Price, price)  # noqa: E501, F401
