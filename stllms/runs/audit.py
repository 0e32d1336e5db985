"""The sampling audit: were the tokens of a run drawn from the model (method, section 13)?

Given what was written before it, a token drawn from ``p`` has ``E[-log p(token)] = H(p)`` and
``Var[-log p(token)] = E[(log p)^2] - H^2``; over a run the sum of ``-log p(token) - H`` is a
martingale, zero up to a standard error that is known token by token. Every chain carries its
sums (:func:`entry`), so that stored rows can be audited without the model: :func:`audit`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stllms.records import Response

#: A token below this probability is rare.
RARE = 1e-6
#: Standard errors beyond which an audit fails.
LIMIT = 5.0
#: What is summed over the tokens of a sampled row, and of a greedy one.
SAMPLED = ("surprise", "entropy", "variance", "rare", "rare_expected")
GREEDY = ("not_argmax",)
#: Those of them that are whole numbers.
COUNTS = ("rare", "not_argmax")


class SamplingError(RuntimeError):
    """Tokens were not drawn from the distribution that the logits describe."""


def columns(temperature: float) -> tuple[str, ...]:
    """The names of the sums: the columns of :func:`stllms.models.engines.sampling.measure`."""
    return GREEDY if temperature == 0 else SAMPLED


def entry(tokens: int, temperature: float, sums: Sequence[float]) -> dict[str, float]:
    """``Response.audit`` of a row: its tokens, and the sums of its columns over them."""
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
        from scipy.special import ndtr, pdtrc  # a run's folder is opened without scipy

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
