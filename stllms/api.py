from stllms.models.api import ApiError, Client, CostLimit, Estimate, MissingKey, Reply, Request, estimate, tokens  # noqa: E501, F401
