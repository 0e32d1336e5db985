from stllms.models.api import ASKS, ApiError, Check, CostLimit, cost_of  # noqa: F401


class Limits:
    """Deleted at the end: now ``api.ASKS``."""

    asks = ASKS
