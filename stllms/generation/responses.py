"""Stub, deleted at the end: the module is :mod:`stllms.generation.chains`, because
``generation.responses`` is the function."""

from stllms.generation.chains import (CHUNK, read, responses, summary)  # noqa: F401


def options(setup):  # noqa: D103 - RunConfig.decoding
    return setup.decoding
