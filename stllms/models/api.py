"""Stub: the names of this module still live at their old addresses."""

from stllms.api import (T, Estimate, Client, run)  # noqa: F401
from stllms.providers import (KEY, NO_KEY, STARTED, PRICES, MissingKey, Provider, PROVIDERS, base_url, is_local, key_names, api_key, redacted, setting, env_files, read_env, Price, price)  # noqa: F401
from stllms.replies import (FILE, default_folder, clean, digest, tokens, Request, Reply, message_of, text_of, Store)  # noqa: F401
from stllms.sending import (Check, RETRIED, ApiError, CostLimit, Limits, Target, Outcome, read_answer, retry_after, Window, Sending, cost_of)  # noqa: F401
