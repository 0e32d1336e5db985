from stllms.records import DEEPEST, amount, kind, loads  # noqa: F401
