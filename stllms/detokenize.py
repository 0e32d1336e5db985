from stllms.models.model import REPLACEMENT, Decode, character_ranges  # noqa: F401
