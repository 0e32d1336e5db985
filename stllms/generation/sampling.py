"""How a token is drawn from logits, and how a run shows that it was (method, section 13).

**Noise**: ``g = -log(-log(u))``, ``u = (k + 1/2) / 2**52``, ``k`` the upper 52 bits of a 64-bit
hash of (seed, key of the row, step, token): :func:`gumbel`. **Choice**: the maximum over the
vocabulary of ``log p / temperature + g``, in two stages: :func:`choose`. **Audit**: given what
was written before it, a token drawn from ``p`` has ``E[-log p(token)] = H(p)`` and
``Var[-log p(token)] = E[(log p)^2] - H^2``; over a run the sum of ``-log p(token) - H`` is a
martingale, zero up to a standard error that is known token by token: :func:`measure`,
:func:`audit`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
from scipy.special import ndtr, pdtrc
from torch import Tensor

from stllms.records import Response

#: Tokens of a block. Noise values per row: ``V / BLOCK + BLOCK``, least near ``sqrt(V)``.
BLOCK = 512
#: A token below this probability is rare.
RARE = 1e-6
#: Standard errors beyond which an audit fails.
LIMIT = 5.0
#: What is summed over the tokens of a sampled row, and of a greedy one.
SAMPLED = ("surprise", "entropy", "variance", "rare", "rare_expected")
GREEDY = ("not_argmax",)
#: Those of them that are whole numbers.
COUNTS = ("rare", "not_argmax")

#: Logits that are worked on at once: on a CPU they stay in its cache.
_SLICE, _SLICE_ELSEWHERE = 2**20, 2**25
#: Stands for the logarithm of a probability that no float32 holds.
_LOG_ZERO = -200.0


class SamplingError(RuntimeError):
    """Tokens were not drawn from the distribution that the logits describe."""


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


def columns(temperature: float) -> tuple[str, ...]:
    """The names of the columns of :func:`measure`."""
    return GREEDY if temperature == 0 else SAMPLED


def entry(tokens: int, temperature: float, sums: Sequence[float]) -> dict[str, float]:
    """``Response.audit`` of a row: its tokens, and the sums of :func:`measure` over them."""
    named = zip(columns(temperature), sums, strict=True)
    return {"tokens": tokens} | {
        name: int(total) if name in COUNTS else float(f"{total:.9g}") for name, total in named
    }


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found in some chains.

    ``excess`` is the mean of ``-log p(token)`` minus the mean entropy, in nats, over
    ``tokens`` sampled tokens, and ``standard_error`` its own; ``rare`` of them had a
    probability below :data:`RARE` where ``rare_expected`` were to be expected.
    ``not_argmax`` of ``greedy_tokens`` were not the likeliest. ``unaudited`` chains have no
    numbers: they came from a file or an API, or were written before there was an audit.
    ``shared`` is the largest number of chains of one task, which share their noise.
    """

    tokens: int
    excess: float
    standard_error: float
    rare: int
    rare_expected: float
    greedy_tokens: int
    not_argmax: int
    unaudited: int
    shared: int

    @property
    def z(self) -> float:
        """``excess`` in standard errors."""
        if self.standard_error == 0:
            return math.copysign(math.inf, self.excess) if self.excess else 0.0
        return self.excess / self.standard_error

    @property
    def line(self) -> str:
        """The audit for people."""
        parts = []
        if self.tokens:
            parts.append(
                f"{self.tokens:,} tokens; mean -log p - entropy = {self.excess:+.4f} +- "
                f"{self.standard_error:.4f} nats (z = {self.z:+.1f}); tokens below {RARE:g}: "
                f"{self.rare} ({self.rare_expected:.2g} expected)"
            )
        if self.greedy_tokens:
            parts.append(
                f"{self.greedy_tokens:,} greedy tokens; {self.not_argmax} are not the likeliest"
            )
        if self.unaudited:
            parts.append(f"{self.unaudited} chains have no entries and were not audited")
        return f"sampling audit: {'; '.join(parts) or 'no tokens'}"

    @property
    def recorded(self) -> dict[str, Any]:
        """The numbers and the line, for ``run.json``."""
        return {**asdict(self), "line": self.line}

    def check(self) -> Audit:
        """Itself, or :class:`SamplingError` that says which number is impossible.

        The mean fails beyond :data:`LIMIT` standard errors, with the allowance that
        Bernstein's inequality makes for single unlikely tokens and that matters in short
        texts only: with the sum ``S`` of variance ``V`` and steps of at most ``c``,
        ``Pr(S > x) <= exp(-x^2 / (2 V + 2 c x / 3))`` (Freedman 1975), solved for the ``x``
        at which it is ``exp(-LIMIT^2 / 2)``. ``c = -log(RARE)``; rarer tokens are counted
        instead: theirs is a Poisson tail below that of :data:`LIMIT` standard errors.
        Both hold for chains that share their noise, which count as one (Hoelder).
        """
        wrong = []
        jump = LIMIT**2 / 2 * -math.log(RARE) / 3 * self.shared
        allowed = jump + math.hypot(jump, LIMIT * self.standard_error * self.tokens)
        if abs(self.excess) * self.tokens > allowed:
            wrong.append(
                f"over {self.tokens:,} tokens the mean of -log p(token) differs from the mean "
                f"entropy by {self.excess:+.4f} nats, {abs(self.z):.1f} standard errors"
            )
        seen = math.ceil(self.rare / max(1, self.shared))
        if seen and pdtrc(seen - 1, self.rare_expected / self.shared) < ndtr(-LIMIT):
            wrong.append(
                f"{self.rare} sampled tokens had a probability below {RARE:g} where "
                f"{self.rare_expected:.2g} are expected"
            )
        if self.not_argmax:
            wrong.append(
                f"{self.not_argmax} of {self.greedy_tokens:,} greedy tokens are not the "
                "likeliest"
            )
        if wrong:
            raise SamplingError(
                f"sampling audit: {'; '.join(wrong)}: the tokens are not drawn from the "
                "model's distribution, so use none of these chains; make them again with "
                "--fresh, and if that fails too report it with the versions in run.json"
            )
        return self


def audit(responses: Iterable[Response]) -> Audit:
    """The audit of some chains, from the entries that they carry.

    Chains of one task share their noise and may be anything from equal to independent. The
    standard error is the largest that this allows: the standard deviations of a task's
    chains are added, then the squares of the tasks'. Raises ``ValueError`` for an entry that
    :func:`entry` does not write.
    """
    sums: Counter[str] = Counter()
    greedy: Counter[str] = Counter()
    deviations: dict[str, list[float]] = defaultdict(list)
    unaudited = 0
    for one in responses:
        if one.audit is None:
            unaudited += 1
        elif one.audit.keys() == {"tokens", *SAMPLED}:
            sums.update(one.audit)
            deviations[one.task_id].append(math.sqrt(max(0.0, one.audit["variance"])))
        elif one.audit.keys() == {"tokens", *GREEDY}:
            greedy.update(one.audit)
        else:
            raise ValueError(
                f"{one.task_id}: its audit has {', '.join(map(str, one.audit))}, expected "
                f"tokens with {', '.join(SAMPLED)}, or with {', '.join(GREEDY)}"
            )
    count = max(1, sums["tokens"])
    return Audit(
        tokens=sums["tokens"],
        excess=(sums["surprise"] - sums["entropy"]) / count,
        standard_error=math.hypot(*(sum(rows) for rows in deviations.values())) / count,
        rare=sums["rare"],
        rare_expected=float(sums["rare_expected"]),
        greedy_tokens=greedy["tokens"],
        not_argmax=greedy["not_argmax"],
        unaudited=unaudited,
        shared=max((len(rows) for rows in deviations.values()), default=0),
    )
