"""How a token is drawn from logits (method, section 13).

**Noise**: ``g = -log(-log(u))``, ``u = (k + 1/2) / 2**52``, ``k`` the upper 52 bits of a 64-bit
hash of (seed, key of the row, step, token): :func:`gumbel`. **Choice**: the maximum over the
vocabulary of ``log p / temperature + g``, in two stages: :func:`choose`. **Measure**: what
:mod:`stllms.runs.audit` adds up over the tokens of a run: :func:`measure`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from hashlib import sha256

import torch
from torch import Tensor

from stllms.runs.audit import RARE

#: Tokens of a block. Noise values per row: ``V / BLOCK + BLOCK``, least near ``sqrt(V)``.
BLOCK = 512
#: Logits that are worked on at once: on a CPU they stay in its cache.
_SLICE, _SLICE_ELSEWHERE = 2**20, 2**25
#: Stands for the logarithm of a probability that no float32 holds.
_LOG_ZERO = -200.0


# -- the noise -----------------------------------------------------------------------------


def hash_key(seed: int, key: str) -> int:
    """A 62-bit integer of the seed and the key of a row."""
    return int.from_bytes(sha256(f"{seed}/{key}".encode()).digest()[:8], "little") >> 2


def gumbel(key: Tensor, step: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise ``[B, K]`` in float64, for ``key [B]`` (:func:`hash_key`), ``step
    [B]`` and ``ids`` ``[K]`` or ``[B, K]``: a token's id, and ``-1 - b`` for block ``b``.

    Integer arithmetic modulo ``2**64``: the same bits in every batch and on every device. Rows
    of one key (a task, plain and steered) share their noise. Within a row and a step no two ids
    have the same hash: it is a bijection of the id.
    """
    row = _mix(key ^ _mix(step * _WEYL))[:, None]
    return of_bits(_mix(row ^ (ids * _WEYL)))


def of_bits(bits: Tensor) -> Tensor:
    """The noise of 64 random bits, given as int64.

    Every ``u`` is a float64 between ``2**-53`` and ``1 - 2**-53``, so the noise is finite for
    each of them, from -3.6 to 36.7. A run of ``10**10`` tokens draws about ``10**13`` values
    and does not see a cell of ``2**-52``.
    """
    uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _signed(word: int) -> int:
    """The int64 that has the bits of an unsigned 64-bit word."""
    return word - 2**64 if word >= 2**63 else word


#: Golden ratio times ``2**64``, odd: multiplying by it is a bijection modulo ``2**64``.
_WEYL = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, in Stafford's variant 13)."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, count: int) -> Tensor:
    """Shifted right with zeros; ``>>`` of an int64 copies the sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)


# -- the choice ----------------------------------------------------------------------------


def choose(logits: Tensor, key: Tensor, step: Tensor, temperature: float) -> Tensor:
    """The next tokens ``[B]`` from ``logits [B, V]``; greedy at temperature 0.

    ``key [B]`` (:func:`hash_key`) and ``step [B]`` name the noise. A logit of ``-inf`` is
    never chosen.

    By the Gumbel-max theorem the maximum of ``x_i + g_i`` is distributed like ``logsumexp(x) +
    g``, independently of where it lies. So the maximum over a block of :data:`BLOCK` tokens may
    be replaced by ``log P_b`` plus noise of the block's own, and where in the block it lies be
    asked afterwards, with the tokens' own noise:

        ``b = argmax_b (log P_b + g'_b)``, ``P_b`` the probability of block ``b``; then
        ``token = argmax_{j in b} (log p_j + g_j)``, hence
        ``Pr(token = j) = P_b * (p_j / P_b) = p_j``, exactly.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # Apple's MPS has no float64; it is a few thousand numbers per row.
    home = torch.device("cpu") if logits.device.type == "mps" else logits.device
    key, step = key.to(home), step.to(home)
    masses = _log_masses(logits, temperature).to(home).double()
    numbers = torch.arange(masses.shape[-1], device=home)
    block = (masses + gumbel(key, step, -1 - numbers)).argmax(-1, keepdim=True)
    ids = block * BLOCK + torch.arange(BLOCK, device=home)
    inside = ids.clamp(max=logits.shape[-1] - 1)
    scaled = logits.gather(-1, inside.to(logits.device)).float() / temperature
    scores = scaled.to(home).double() + gumbel(key, step, ids)
    best = scores.masked_fill(ids != inside, -math.inf).argmax(-1, keepdim=True)
    return ids.gather(-1, best)[:, 0].to(logits.device)


def _log_masses(logits: Tensor, temperature: float) -> Tensor:
    """``log P_b`` up to a constant of the row, ``[B, V // BLOCK + 1]``; the last block is
    what is left, and ``-inf`` where nothing is.

    Each is a sum of its own terms, so that a block of ``1e-30`` beside one of almost 1 keeps
    its digits.
    """
    whole = logits.shape[-1] // BLOCK
    found = []
    for part, (scaled,) in _slices(logits, 1):
        torch.div(logits[part].float(), temperature, out=scaled)
        scaled.sub_(scaled.amax(-1, keepdim=True)).exp_()
        blocks = scaled[:, : whole * BLOCK].unflatten(-1, (whole, BLOCK)).sum(-1)
        rest = scaled[:, whole * BLOCK :].sum(-1, keepdim=True)
        found.append(torch.cat([blocks, rest], -1))
    return torch.cat(found).log_()


def _slices(logits: Tensor, count: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ``logits`` to work on at once, with ``count`` float32 tensors of their shape to
    work in: fresh memory for every slice would cost more than the arithmetic."""
    most = _SLICE if logits.device.type == "cpu" else _SLICE_ELSEWHERE
    size = max(1, most // logits.shape[-1])
    shape = (count, min(size, len(logits)), logits.shape[-1])
    work = torch.empty(shape, dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), size):
        yield slice(start, start + size), work[:, : len(logits) - start]


# -- the audit -----------------------------------------------------------------------------


def measure(logits: Tensor, token: Tensor, temperature: float) -> Tensor:
    """What the audit needs of tokens ``[B]`` taken from ``logits [B, V]``: float32 ``[B, n]``.

    The columns are :data:`SAMPLED` (in nats, of the distribution after ``temperature``), or
    :data:`GREEDY` at temperature 0. Computed from the logits alone, apart from the choice. A
    row whose logits are no distribution (NaN, ``+inf``, or ``-inf`` everywhere) is NaN.
    """
    if temperature == 0:
        best = logits.amax(-1)
        wrong = logits.gather(-1, token[:, None])[:, 0] < best
        return torch.where(best.isfinite(), wrong.float(), math.nan)[:, None]
    found = []
    for part, (log_p, p) in _slices(logits, 2):
        torch.div(logits[part].float(), temperature, out=log_p)
        found.append(_measure(log_p, p, token[part]))
    return torch.cat(found)


def _measure(scaled: Tensor, p: Tensor, token: Tensor) -> Tensor:
    """In place, few passes; the second moment is taken around the mean."""
    scaled.sub_(scaled.amax(-1, keepdim=True)).clamp_(min=_LOG_ZERO)
    total = torch.exp(scaled, out=p).sum(-1, keepdim=True)
    p.div_(total)
    log_p = scaled.sub_(total.log())
    taken = log_p.gather(-1, token[:, None])[:, 0]
    entropy = -torch.linalg.vecdot(p, log_p)
    variance = torch.linalg.vecdot(p, log_p.add_(entropy[:, None]).square_())
    below = torch.nn.functional.threshold(p.neg_(), -RARE, 0.0, inplace=True)  # -p, or 0
    tail = below.sum(-1)
    return torch.stack([-taken, entropy, variance, (taken.exp() < RARE).float(), -tail], -1)
