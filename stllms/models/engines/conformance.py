"""Does an engine write what ours writes? Every check of it, against ``transformers``.

In float32 chains are compared token by token, for the noise of a token is ours in every engine.
In other types rounding differs between engines and decides near ties: there the distributions
at the first difference must be within :data:`~stllms.models.engines.probes.TOLERANCE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from scipy.stats import chisquare

from stllms.models import selfcheck
from stllms.models.engines import probes
from stllms.models.engines.engine import Row, Written
from stllms.models.engines.interventions import Intervention
from stllms.models.engines.probes import TOLERANCE, Probed, SteeringError, kl
from stllms.models.engines.transformers import Transformers
from stllms.models.model import Model
from stllms.records import Response
from stllms.runs import audit

#: Mixed requests, those of them that are also asked alone, and the tokens that the prompts of
#: these have at least: more than a block of a cache.
REQUESTS, ALONE, LONG = 32, 9, 80
#: The length of a direction, by the median norm of the residual stream at its layer.
LENGTH = 1.0
TEMPERATURE = 0.65
#: First tokens that are drawn with as many keys, and the p value below which they disagree.
DRAWS, LEVEL = 512, 1e-4
#: The smallest count to be expected in a bin of the chi-square test.
EXPECTED = 5.0


@dataclass(frozen=True)
class Check:
    """What was checked, whether it holds, and the numbers."""

    name: str
    passed: bool
    numbers: str

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.numbers}"


def check(
    model: Model, engine: Probed, prompts: Sequence[Sequence[int]], *, tokens: int = 32
) -> Iterator[Check]:
    """The checks of an engine for a model, one after the other; ``prompts`` of different
    lengths are steered and written from, ``tokens`` long."""
    made = _Conformance(model, engine, [tuple(ids) for ids in prompts], tokens)
    yield made.greedy()
    yield made.order()
    yield from made.alone()
    yield made.positions()
    yield made.sampled()
    yield from made.drawn()
    yield made.probed()


class _Conformance:
    def __init__(
        self, model: Model, engine: Probed, prompts: list[tuple[int, ...]], tokens: int
    ) -> None:
        self.model, self.engine, self.tokens = model, engine, tokens
        first = [ids * -(-LONG // len(ids)) for ids in prompts[: ALONE // 3]]
        self.rows = mixed(model, first + prompts[ALONE // 3 :])
        # All that needs the weights, before an engine takes them.
        ours = Transformers(model)
        self.expected = ours.generate(self.rows, max_new_tokens=tokens)
        drawn = {"max_new_tokens": tokens, "temperature": TEMPERATURE, "seed": 1}
        self.expected_sampled = ours.generate(self.rows, **drawn)

    def greedy(self) -> Check:
        """Plain, + and - in one batch."""
        written = self.engine.write(self.rows, max_new_tokens=self.tokens)
        others = sum(
            one.ids != self.expected[i - i % 3].ids
            for i, one in enumerate(self.expected)
            if self.rows[i].interventions
        )
        name = f"{len(self.rows)} mixed requests, greedy"
        made = self._compared(name, self.rows, written, self.expected)
        return replace(made, numbers=f"{made.numbers}; {others} steered ones are not as plain")

    def order(self) -> Check:
        """The same, the other way round."""
        written = self.engine.write(self.rows[::-1], max_new_tokens=self.tokens)
        return self._compared("in another order", self.rows, written[::-1], self.expected)

    def alone(self) -> Iterator[Check]:
        """One at a time, without neighbours; and plain ones after steered ones of their
        prompt, whose keys and values a cache may still hold."""
        triples = [(i + 1, i + 2, i) for i in range(0, ALONE, 3)]
        places = [i for triple in triples for i in triple]
        after = {i: replace(self.rows[i], probe=True) for _, _, i in triples}
        asked = [
            row for i in places for row in ([after[i]] if i in after else []) + [self.rows[i]]
        ]
        written = self.engine.write(asked, max_new_tokens=self.tokens, batch_size=1)
        self.engine.close()
        found = [one for row, one in zip(asked, written, strict=True) if not row.probe]
        expected = [self.expected[i] for i in places]
        rows = [self.rows[i] for i in places]
        yield self._compared("one by one", rows, found, expected)
        told = [one for row, one in zip(asked, written, strict=True) if row.probe]
        apart = max(
            float(kl(_given(one), probes.logits(self.model, row.prompt_ids, [()])[0, -1]))
            for row, one in zip(after.values(), told, strict=True)
        )
        passed = apart <= TOLERANCE[self.model.dtype]
        yield Check("plain after steered", passed, f"at most {apart:.2g} nats from plain")

    def positions(self) -> Check:
        """All positions are steered, not the last one only."""
        # Behind the last layer no position sees another: a row of the first, up to where it
        # shows most.
        self.engine.close()
        row = next(one for one in self.rows if one.interventions)
        told = probes.logits(self.model, row.prompt_ids, [(), row.interventions])[:, 1:]
        most = 2 + int(kl(told[1], told[0]).argmax())
        row = replace(row, prompt_ids=row.prompt_ids[:most], probe=True)
        (answer,) = self.engine.write([row], max_new_tokens=1)
        self.engine.close()
        everywhere = probes.logits(self.model, row.prompt_ids, [row.interventions])[0, -1]
        nowhere = probes.logits(self.model, row.prompt_ids, [()])[0, -1]
        last = _last_only(self.model, row)
        given = _given(answer)
        found = {
            name: float(kl(given, one))
            for name, one in (("all", everywhere), ("the last", last), ("none", nowhere))
        }
        allowed = TOLERANCE[self.model.dtype]
        passed = found["all"] <= allowed < min(found["the last"], found["none"])
        numbers = ", ".join(f"{value:.2g} nats from {name}" for name, value in found.items())
        return Check(f"steered positions of a prompt of {len(row.prompt_ids)}", passed, numbers)

    def sampled(self) -> Check:
        """With the noise of each row."""
        written = self.engine.write(
            self.rows, max_new_tokens=self.tokens, temperature=TEMPERATURE, seed=1
        )
        self.drawn_rows = written
        name = f"sampled at {TEMPERATURE}"
        return self._compared(name, self.rows, written, self.expected_sampled)

    def drawn(self) -> Iterator[Check]:
        """First tokens of many keys against the distribution, and the audit of what was
        sampled."""
        row = self.rows[1]
        many = [replace(row, key=f"draw {i}") for i in range(DRAWS)]
        written = self.engine.write(many, max_new_tokens=1, temperature=1.0, seed=2)
        self.engine.close()
        p = probes.logits(self.model, row.prompt_ids, [row.interventions])[0, -1]
        expected = DRAWS * p.double().softmax(-1)
        counts = torch.bincount(
            torch.tensor([one.ids[0] for one in written]), minlength=len(p)
        ).double()
        large = expected >= EXPECTED
        bins = [
            torch.cat([one[large], one[~large].sum(0, keepdim=True)])
            for one in (counts, expected)
        ]
        test = chisquare(bins[0].numpy(), bins[1].numpy())
        numbers = f"chi-square {test.statistic:.1f} in {len(bins[0])} bins, p {test.pvalue:.2g}"
        passed = bool(test.pvalue > LEVEL)
        yield Check(f"first tokens of {DRAWS} keys", passed, numbers)

        audited = audit.audit(
            _response(row, one) for row, one in zip(self.rows, self.drawn_rows, strict=True)
        )
        try:
            audited.check()
        except audit.SamplingError as error:
            yield Check("sampling audit", False, str(error))
        else:
            yield Check("sampling audit", True, audited.line.partition(": ")[2])

    def probed(self) -> Check:
        """A probe for every set of interventions, as in every batch of a stage."""
        name = "probes"
        try:
            self.engine.generate(self.rows, max_new_tokens=1)
        except SteeringError as error:
            return Check(name, False, str(error))
        told = [one for one in self.engine.report if one["interventions"] != "none"]
        most = max(one["engine from steered"] for one in told)
        least = min(one["engine from plain"] for one in told)
        numbers = (
            f"{len(told)} different interventions: at most {most:.2g} nats from steered, at "
            f"least {least:.2g} from plain"
        )
        return Check(name, True, numbers)

    def _compared(
        self,
        name: str,
        rows: Sequence[Row],
        written: Sequence[Written],
        expected: Sequence[Written],
    ) -> Check:
        """Chains token by token. Where one differs, the distributions at the first difference
        are compared."""
        other = {
            i: _first_difference(one.ids, its.ids)
            for i, (one, its) in enumerate(zip(written, expected, strict=True))
            if one.ids != its.ids
        }
        equal = len(rows) - len(other)
        tokens = sum(len(one.ids) for one in expected)
        numbers = f"{equal} of {len(rows)} equal, {tokens} tokens"
        if not other:
            return Check(name, True, numbers)
        same = tokens - sum(len(expected[i].ids) - at for i, at in other.items())
        apart = max(self._apart(rows, expected, other))
        numbers += f", {same / tokens:.1%} before a first difference, there {apart:.2g} nats"
        exact = self.model.dtype in (torch.float32, torch.float64)
        return Check(name, not exact and apart <= TOLERANCE[self.model.dtype], numbers)

    def _apart(
        self, rows: Sequence[Row], expected: Sequence[Written], at: dict[int, int]
    ) -> list[float]:
        """How far the next-token distributions are apart behind ``at`` tokens of some rows."""
        asked = [
            replace(
                rows[i], prompt_ids=rows[i].prompt_ids + expected[i].ids[:place], probe=True
            )
            for i, place in at.items()
        ]
        written = self.engine.write(asked, max_new_tokens=1)
        self.engine.close()
        found = []
        for row, one in zip(asked, written, strict=True):
            ours = probes.logits(self.model, row.prompt_ids, [row.interventions])[0, -1]
            found.append(float(kl(_given(one), ours)))
        return found


def mixed(model: Model, prompts: Sequence[tuple[int, ...]]) -> list[Row]:
    """Plain, + and - requests in turn: a direction a prompt, at the first, a middle and the
    last layer in turn."""
    norms = model.norms or tuple(selfcheck.residual(model))
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for i in range(REQUESTS):
        at, sign = divmod(i, 3)
        ids = prompts[at % len(prompts)]
        layer = (0, model.n_layers // 2, model.n_layers - 1)[at % 3]
        if sign == 0:
            rows.append(Row(ids, f"request {at}"))
            direction = torch.randn(model.d_model, generator=generator)
            direction *= LENGTH * norms[layer] / direction.norm()
        else:
            item = Intervention(direction, layer, 1.0 if sign == 1 else -1.0)
            rows.append(Row(ids, f"request {at}", (item,)))
    return rows


@torch.no_grad()
def _last_only(model: Model, row: Row) -> torch.Tensor:
    """Logits ``[V]`` behind a prompt of which the last position alone is steered."""
    (item,) = row.interventions
    added = item.coefficient * item.direction.to(model.device)

    def hook(_module: object, _inputs: object, hidden: torch.Tensor) -> torch.Tensor:
        changed = hidden.clone()
        changed[:, -1] += added.to(hidden.dtype)
        return changed

    handle = model.layers[item.layer].register_forward_hook(hook)
    try:
        return probes.logits(model, row.prompt_ids, [()])[0, -1]
    finally:
        handle.remove()


def _given(answer: Written) -> torch.Tensor:
    if answer.logits is None:
        raise SteeringError("the engine gave no logits for a probe")
    return answer.logits


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    shorter = min(len(one), len(other))
    return next((k for k, (a, b) in enumerate(pairs) if a != b), shorter)


def _response(row: Row, written: Written) -> Response:
    """A response for the audit, without its text."""
    return Response(
        task_id=row.key,
        category="",
        prompt_text="",
        prompt_ids=row.prompt_ids,
        output_ids=written.ids,
        text="",
        thinking="",
        thinking_start=0,
        answer="",
        closed=True,
        finished=True,
        audit=written.audit,
    )
