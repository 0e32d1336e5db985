"""The sampler as its documentation says it, with Python's integers, one token at a time."""

from __future__ import annotations

import hashlib
import math

import torch

WORD = 2**64
BLOCK = 512


def mix(x: int) -> int:
    """SplitMix64's finaliser on an unsigned word."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WORD
    return x ^ (x >> 31)


def noise(seed: int, key: str, step: int, number: int) -> float:
    """Of a token (from 0) or of block ``b`` (``-1 - b``)."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    name = int.from_bytes(digest[:8], "little") >> 2
    row = mix(name ^ mix(step * 0x9E3779B97F4A7C15 % WORD))
    bits = mix(row ^ (number * 0x9E3779B97F4A7C15 % WORD))
    return -math.log(-math.log(((bits >> 12) + 0.5) / 2**52))


def draw(logits: torch.Tensor, temperature: float, seed: int, key: str, step: int) -> int:
    """A token from ``logits [V]``: a block by its mass, then a token of it."""
    scaled = (logits.float() / temperature).double()
    p = torch.softmax(scaled, -1)
    first = max(
        range(0, len(p), BLOCK),
        key=lambda first: (
            p[first : first + BLOCK].sum().log().item()
            + noise(seed, key, step, -1 - first // BLOCK)
        ),
    )
    return max(
        range(first, min(first + BLOCK, len(p))),
        key=lambda token: scaled[token].item() + noise(seed, key, step, token),
    )
