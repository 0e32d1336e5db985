"""Noise, choice and audit against scipy, closed forms and a restatement in plain Python."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import naive_sampling
import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from tiny import OPTIONS, TASKS

from stllms.generation import chains
from stllms.models.engines import sampling
from stllms.models.engines import transformers as decode
from stllms.models.engines.interventions import Intervention
from stllms.records import Response
from stllms.runs import audit as runs_audit
from stllms.runs.store import Rows
from stllms.steering import conditions

REAL = 151_936  # the vocabulary of Qwen2.5


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([sampling.hash_key(seed, str(i)) for i in range(count)])


def zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.long)


def draws(logits: torch.Tensor, count: int, temperature: float, seed: int = 0) -> torch.Tensor:
    """``count`` tokens from one distribution ``[V]``, 64 rows at a time."""
    named = keys(count, seed)
    return torch.cat(
        [
            sampling.choose(logits.expand(len(part), -1), part, zeros(len(part)), temperature)
            for part in named.split(64)
        ]
    )


def peaked(size: int, seed: int = 0) -> torch.Tensor:
    """Half of the mass on one token, nearly all on a hundred, a tail of all others."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return (-1.6 * (order + 1.0).log()).float()


def flat(size: int, seed: int = 0) -> torch.Tensor:
    return 0.5 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def chi_square(tokens: torch.Tensor, p: np.ndarray, bins: int = 40) -> float:
    """p-value of the counts of tokens, the tokens put into bins of about equal mass: in the
    order of their probability, so that a tail that is drawn too often fills its bin."""
    order = np.argsort(-p, kind="stable")
    into = np.empty(len(p), dtype=int)
    into[order] = np.minimum((np.cumsum(p[order]) * bins).astype(int), bins - 1)
    mass = np.bincount(into, weights=p, minlength=bins)
    seen = np.bincount(into[tokens.numpy()], minlength=bins)
    wanted = mass / mass.sum() * len(tokens)
    few = wanted < 5
    seen, wanted = (np.append(each[~few], each[few].sum()) for each in (seen, wanted))
    kept = wanted > 0
    return stats.chisquare(seen[kept], wanted[kept]).pvalue


# -- the noise -------------------------------------------------------------------------------


def test_the_noise_is_finite_and_its_tail_right_to_the_last_bit():
    """All zeros, all ones, the largest, the smallest int64."""
    bits = torch.tensor([0, -1, 2**63 - 1, -(2**63), -(2**12), 2**12 - 1])
    found = sampling.of_bits(bits)
    assert found.isfinite().all()
    edge = 53 * math.log(2)  # -log(2^-53), and -log(-log(1 - 2^-53)) but for 2^-54
    assert found[0].item() == pytest.approx(-math.log(edge), abs=1e-12)
    assert found[1].item() == pytest.approx(edge, abs=1e-12)
    assert found[1] == found[4], "the lower bits are spare"
    for from_the_top in (0, 1, 2, 1000, 10**6, 10**9, 10**12, 2**51):
        bits = torch.tensor([sampling._signed(((2**52 - 1 - from_the_top) << 12) | 7)])
        tail = (from_the_top + 0.5) / 2**52
        assert sampling.of_bits(bits).item() == pytest.approx(stats.gumbel_r.isf(tail), 1e-12)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return sampling.gumbel(keys(256), torch.arange(256), torch.arange(8192)).numpy()


def test_moments_distribution_and_tail_are_gumbels(noise):
    size, law = noise.size, stats.gumbel_r
    mean, variance, skew, kurtosis = (float(m) for m in law.stats(moments="mvsk"))
    assert abs(noise.mean() - mean) < 4 * math.sqrt(variance / size)
    assert abs(noise.var() - variance) < 4 * variance * math.sqrt((kurtosis + 2) / size)
    assert abs(stats.skew(noise, axis=None) - skew) < 0.03
    assert stats.kstest(noise.ravel()[::4], law.cdf).pvalue > 1e-3
    for tail in (1e-2, 1e-3, 1e-4, 1e-5):
        for seen in ((noise > law.isf(tail)).sum(), (noise < law.ppf(tail)).sum()):
            assert stats.binomtest(int(seen), size, tail).pvalue > 1e-4


def test_rows_steps_and_tokens_have_noise_of_their_own(noise):
    assert len(np.unique(noise)) == noise.size, "no value twice among two million"
    uniform = stats.gumbel_r.cdf(noise)
    limit = 5 / math.sqrt(noise.shape[1])
    assert abs(np.corrcoef(uniform[:64]) - np.eye(64)).max() < limit, "rows"
    for lag in (1, 2, 512):
        shifted = np.corrcoef(uniform[:, :-lag].ravel(), uniform[:, lag:].ravel())[0, 1]
        assert abs(shifted) < 5 / math.sqrt(noise.size), "tokens"
    later = sampling.gumbel(keys(256), torch.arange(256) + 1, torch.arange(8192)).numpy()
    assert not (later == noise).any()
    assert abs(np.corrcoef(noise.ravel(), later.ravel())[0, 1]) < 5 / math.sqrt(noise.size)


def test_the_noise_is_the_documented_hash_in_any_batch():
    numbers = torch.tensor([0, 1, 511, 512, 49_151, REAL - 1, -1, -2, -297])
    steps = torch.tensor([0, 1, 999])
    named = torch.tensor([sampling.hash_key(7, name) for name in ("a", "b", "task-9")])
    found = sampling.gumbel(named, steps, numbers)
    for row, (name, step) in enumerate(zip(("a", "b", "task-9"), steps.tolist(), strict=True)):
        wanted = [naive_sampling.noise(7, name, step, int(n)) for n in numbers]
        assert found[row].tolist() == pytest.approx(wanted, rel=1e-13)
    many = torch.arange(3001)
    whole = sampling.gumbel(named, steps, many)
    for row in range(3):
        alone = sampling.gumbel(named[row : row + 1], steps[row : row + 1], many)
        assert torch.equal(alone[0], whole[row])
    some = torch.randperm(3001, generator=torch.Generator().manual_seed(0))[:777]
    assert torch.equal(sampling.gumbel(named, steps, some), whole[:, some])


# -- the choice ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [peaked, flat])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_counts_are_the_probabilities_at_a_real_vocabulary(make, temperature):
    logits = make(REAL)
    p = torch.softmax(logits.double() / temperature, -1).numpy()
    found = draws(logits, 4000, temperature)
    assert chi_square(found, p) > 1e-3
    within = np.bincount(found.numpy() % 512 // 16, minlength=32)
    columns = np.bincount(np.arange(REAL) % 512 // 16, weights=p, minlength=32)
    assert stats.chisquare(within, columns * len(found)).pvalue > 1e-3, "place in the block"


@pytest.mark.parametrize("size", [1, 2, 259, 511, 512, 513, 1024, 1300])
def test_counts_are_the_probabilities_whatever_the_vocabulary(size):
    logits = 1.5 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    found = draws(logits, 6000, 0.8)
    p = torch.softmax(logits.double() / 0.8, -1).numpy()
    assert int(found.min()) >= 0
    assert int(found.max()) < size
    if size > 1:
        assert chi_square(found, p) > 1e-3


def test_it_is_the_documented_choice():
    logits = 3 * torch.randn(24, 1300, generator=torch.Generator().manual_seed(0))
    named = torch.tensor([sampling.hash_key(4, f"t{i}") for i in range(24)])
    found = sampling.choose(logits, named, torch.arange(24), 0.9).tolist()
    assert found == [naive_sampling.draw(x, 0.9, 4, f"t{i}", i) for i, x in enumerate(logits)]
    greedy = sampling.choose(logits, named, torch.arange(24), 0.0)
    assert greedy.tolist() == np.argmax(logits.numpy(), -1).tolist()


@pytest.mark.parametrize("size", [300, 5000, 60_000])
def test_a_row_is_drawn_alike_in_every_batch(size):
    logits = 2 * torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    found = sampling.choose(logits, keys(40), torch.arange(40), 0.7)
    mixed = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    again = sampling.choose(logits[mixed], keys(40)[mixed], mixed, 0.7)
    assert torch.equal(again, found[mixed])
    one = [sampling.choose(logits[i : i + 1], keys(40)[i : i + 1], mixed.new([i]), 0.7)
           for i in range(40)]  # fmt: skip
    assert torch.equal(torch.cat(one), found)


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((2000,), -math.inf)
    logits[[3, 700, 1999]] = torch.tensor([0.0, 1.0, 2.0])
    found = draws(logits, 3000, 1.0)
    assert set(found.tolist()) == {3, 700, 1999}
    counts = np.array([(found == token).sum() for token in (3, 700, 1999)])
    assert stats.chisquare(counts, stats.boltzmann.pmf([2, 1, 0], 1.0, 3) * 3000).pvalue > 1e-3
    logits[[3, 700]] = -1e30
    assert set(draws(logits, 50, 1.0).tolist()) == {1999}


def test_conditions_of_a_task_share_their_noise_token_by_token():
    """Raising one token can only move a choice to that token's block: everything else keeps
    its noise, whatever its rank."""
    count, token = 4000, 777
    logits = 2 * torch.randn(3000, generator=torch.Generator().manual_seed(0))
    raised = logits.clone()
    raised[token] += 6.0
    before, after = draws(logits, count, 1.0), draws(raised, count, 1.0)
    moved = before != after
    p, q = (torch.softmax(one.double(), -1) for one in (logits, raised))
    distance = 0.5 * float((p - q).abs().sum())
    assert 0.05 < distance < 0.5
    assert distance * count * 0.8 < int(moved.sum()) < distance * count * 1.5
    assert (after[moved] // sampling.BLOCK == token // sampling.BLOCK).all()
    inside = moved & (before // sampling.BLOCK == token // sampling.BLOCK)
    assert (after[inside] == token).all()
    strangers = draws(raised, count, 1.0, seed=1)
    assert int((before != strangers).sum()) > 0.9 * count


# -- what is measured ------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.65])
@pytest.mark.parametrize(("size", "scale"), [(3, 1.0), (1024, 30.0), (REAL, 0.0), (REAL, 4.0)])
def test_measures_are_those_of_torch_and_scipy(temperature, size, scale):
    logits = scale * torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    token = torch.tensor([0, 1, 2, int(logits[3].argmax())])
    law = torch.distributions.Categorical(logits=logits.double() / temperature)
    surprise, entropy, variance, rare, tail = sampling.measure(logits, token, temperature).T
    close = {"rtol": 2e-5, "atol": 2e-5}
    shown = surprise < 100  # beyond lies what no float32 holds, cut at 200
    assert torch.allclose(surprise.double()[shown], -law.log_prob(token)[shown], **close)
    assert (surprise[~shown] <= 201).all()
    assert torch.allclose(entropy.double(), law.entropy(), **close)
    assert entropy.tolist() == pytest.approx(stats.entropy(law.probs, axis=-1), 2e-5, 2e-5)
    for row, p in enumerate(law.probs.numpy()):
        spread = np.cov(-np.log(np.maximum(p, 1e-300)), aweights=p, ddof=0)
        assert variance[row].item() == pytest.approx(float(spread), rel=1e-4, abs=1e-5)
        assert tail[row].item() == pytest.approx(p[p < 1e-6].sum(), rel=1e-3, abs=1e-9)
        assert rare[row].item() == (p[token[row]] < 1e-6)


def test_measures_of_impossible_tokens_are_finite_and_of_no_distribution_nan():
    logits = torch.zeros(6, 1000)
    logits[0, 10:] = -math.inf
    logits[1, 5] = math.nan
    logits[2, 5] = math.inf
    logits[3] = -math.inf
    token = torch.tensor([50, 0, 0, 0, 0, 0])
    found = sampling.measure(logits, token, 1.0)
    assert found.isnan().any(-1).tolist() == [False, True, True, True, False, False]
    assert found[0, 1].item() == pytest.approx(math.log(10), abs=1e-5)
    assert found[0, 0] > 100, "the token cannot be drawn from this distribution"
    assert found[0, 3] == 1
    greedy = sampling.measure(logits, token, 0.0)
    assert greedy.isnan().any(-1).tolist() == [False, True, True, True, False, False]
    assert greedy[[0, 4, 5], 0].tolist() == [1, 0, 0]


# -- the audit -------------------------------------------------------------------------------


def chain(task: str, audit: dict | None) -> Response:
    return Response(task, "c", "", (), (), "", "", 0, "", True, True, audit)


def audited(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> list[Response]:
    """Chains whose tokens, ``[rows, n]``, were taken from one distribution ``[V]``."""
    made = []
    for number, row in enumerate(tokens):
        measured = sampling.measure(logits.expand(len(row), -1), row, temperature)
        sums = measured.double().sum(0).tolist()
        made.append(chain(f"t{number}", runs_audit.entry(len(row), temperature, sums)))
    return made


def old_draws(logits: torch.Tensor, count: int) -> torch.Tensor:
    """The sampler of the first real run: uniforms of 24 bits, rounded up to 1 in float32."""
    rng = np.random.default_rng(0)
    one, found = logits.numpy(), []
    for _ in range(count):
        bits = rng.integers(0, 2**24, len(one), dtype=np.uint32)
        uniform = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2**-24)
        with np.errstate(divide="ignore"):
            found.append(int(np.argmax(one - np.log(-np.log(uniform)))))
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("logits", "temperature"),
    [(peaked(REAL), 1.0), (flat(REAL), 1.0), (peaked(1024), 0.65), (5 * flat(259), 0.65)],
    ids=["peaked", "flat", "small", "bytes"],
)
def test_a_right_sampler_passes(logits, temperature):
    found = runs_audit.audit(
        audited(logits, draws(logits, 1280, temperature).view(32, 40), temperature)
    )
    assert found.check() is found
    assert abs(found.z) < 3.5
    assert found.tokens == 1280
    law = torch.distributions.Categorical(logits=logits.double() / temperature)
    spread = float((law.probs * (law.logits + law.entropy()) ** 2).sum())
    assert found.standard_error == pytest.approx(math.sqrt(spread / 1280), rel=1e-3)
    tail = float(law.probs[law.probs < 1e-6].sum())
    assert found.rare_expected == pytest.approx(1280 * tail, rel=1e-3, abs=1e-9)
    assert stats.poisson.sf(found.rare - 1, found.rare_expected) > 1e-3


def test_the_old_sampler_is_caught():
    logits = peaked(REAL) * 2
    tokens = old_draws(logits, 1200)
    found = runs_audit.audit(audited(logits, tokens.view(12, 100), 1.0))
    assert 4 < found.rare < 30, "0.9 % of 1200"
    assert found.rare_expected < 0.1
    with pytest.raises(runs_audit.SamplingError, match=r"below 1e-06 where 0\.0"):
        found.check()
    assert found.z > 5


def test_a_wrong_temperature_is_caught():
    logits = peaked(5000)
    tokens = draws(logits, 6000, 1.0).view(60, 100)
    assert runs_audit.audit(audited(logits, tokens, 1.0)).check()
    for claimed, sign in ((0.85, r"\+"), (1.2, "-")):
        with pytest.raises(runs_audit.SamplingError, match=f"the mean entropy by {sign}"):
            runs_audit.audit(audited(logits, tokens, claimed)).check()


def test_the_standard_error_is_that_of_chains_that_share_their_noise():
    """Eight equal chains a task know no more than one: z has the spread of one chain's."""
    logits = flat(300) * 4
    zs = []
    for seed in range(150):
        once = audited(logits, draws(logits, 100, 1.0, seed).view(5, 20), 1.0)
        alone, found = runs_audit.audit(once), runs_audit.audit(once * 8)
        assert found.z == pytest.approx(alone.z)
        assert found.standard_error == pytest.approx(alone.standard_error)
        assert (found.shared, alone.shared) == (8, 1)
        zs.append(alone.z)
    assert 0.85 < np.std(zs) < 1.15
    assert abs(np.mean(zs)) < 0.3


def test_one_unlikely_token_in_a_short_chain_is_no_alarm():
    """A chain of 30 sure tokens in which one of chance 1/1000 falls is 5 standard errors out:
    3 % of such chains are, and a right sampler must not stop a run for it."""
    logits = torch.tensor([0.999, 0.001]).log()
    beyond = 0
    for seed in range(200):
        found = runs_audit.audit(audited(logits, draws(logits, 30, 1.0, seed).view(1, 30), 1.0))
        beyond += abs(found.z) > runs_audit.LIMIT
        found.check()
    assert beyond > 0


def test_rare_tokens_fail_beyond_their_poisson_tail():
    base = runs_audit.audit([chain("a", runs_audit.entry(10**6, 1.0, [1e6, 1e6, 1e6, 0, 0.5]))])
    most = int(stats.poisson.isf(stats.norm.sf(5), 0.5))
    assert replace(base, rare=most).check()
    with pytest.raises(runs_audit.SamplingError, match=f"{most + 2} sampled tokens"):
        replace(base, rare=most + 2).check()
    assert replace(base, rare=4 * most, rare_expected=2.0, shared=4).check()
    with pytest.raises(runs_audit.SamplingError, match="1 sampled tokens"):
        replace(base, rare=1, rare_expected=0.0).check()


def test_the_audit_of_greedy_chains_counts_what_is_not_the_likeliest():
    logits = torch.randn(900, generator=torch.Generator().manual_seed(0))
    best, second = logits.topk(2).indices.tolist()
    right = runs_audit.audit(audited(logits, torch.tensor([[best] * 5]), 0.0)).check()
    assert right.line == "sampling audit: 5 greedy tokens; 0 are not the likeliest"
    wrong = audited(logits, torch.tensor([[best] * 5, [best, second, best, best, 0]]), 0.0)
    with pytest.raises(runs_audit.SamplingError, match="2 of 10 greedy tokens are not the"):
        runs_audit.audit(wrong).check()


def test_chains_without_entries_are_counted_and_wrong_ones_refused():
    entry = runs_audit.entry(100, 1.0, [210.0, 200.0, 100.0, 1, 0.25])
    found = runs_audit.audit([chain("a", entry), chain("b", None), chain("c", None)])
    assert found.unaudited == 2
    assert found.line == (
        "sampling audit: 100 tokens; mean -log p - entropy = +0.1000 +- 0.1000 nats "
        "(z = +1.0); tokens below 1e-06: 1 (0.25 expected); "
        "2 chains have no entries and were not audited"
    )
    assert runs_audit.audit([]).check().line == "sampling audit: no tokens"
    with pytest.raises(ValueError, match="d: its audit has tokens, expected tokens with surp"):
        runs_audit.audit([chain("d", {"tokens": 3})])


# -- in a run --------------------------------------------------------------------------------


def entries_again(model, one: Response, temperature: float) -> dict[str, float]:
    """The entries of a chain from one forward over the whole of it, in float64."""
    ids = torch.tensor([one.prompt_ids + one.output_ids])
    with torch.no_grad():
        logits = model.hf(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1].double()
    law = torch.distributions.Categorical(logits=logits / temperature)
    surprise = -law.log_prob(torch.tensor(one.output_ids))
    second = (law.probs * law.logits**2).sum(-1)
    return {
        "tokens": len(one.output_ids),
        "surprise": float(surprise.sum()),
        "entropy": float(law.entropy().sum()),
        "variance": float((second - law.entropy() ** 2).sum()),
        "rare": int((surprise > -math.log(1e-6)).sum()),
        "rare_expected": float((law.probs * (law.probs < 1e-6)).sum()),
    }


def test_every_row_carries_the_entries_of_its_own_chain(tiny_llama, monkeypatch):
    """In batches that are refilled, so that rows change places."""
    monkeypatch.setattr(tiny_llama, "eos_ids", (*tiny_llama.eos_ids, *range(40)))
    made = chains.responses(tiny_llama, TASKS, batch_size=3, **OPTIONS)
    for one in made:
        wanted = entries_again(tiny_llama, one, OPTIONS["temperature"])
        assert one.audit == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert len({one.audit["tokens"] for one in made}) > 1, "they end at different times"
    greedy = chains.responses(tiny_llama, TASKS, **(OPTIONS | {"temperature": 0.0}))
    lengths = [len(one.output_ids) for one in greedy]
    assert [one.audit for one in greedy] == [{"tokens": n, "not_argmax": 0} for n in lengths]


def test_a_resumed_run_audits_all_its_tokens(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(chains, "CHUNK", 3)
    whole = Rows(tmp_path / "whole.jsonl")
    made = chains.responses(tiny_llama, TASKS, store=whole, **OPTIONS)
    wanted = runs_audit.audit(made)
    assert wanted.tokens == sum(len(one.output_ids) for one in made)
    assert runs_audit.audit(chains.read(whole)) == wanted
    lines = whole.path.read_bytes().splitlines(keepends=True)
    cut = tiny.killed(whole, "cut.jsonl", b"".join(lines[:4]))
    again = chains.responses(tiny_llama, TASKS, store=cut, **OPTIONS)
    assert runs_audit.audit(again) == wanted
    first = json.loads(lines[0])
    del first["audit"]  # a row of before there was an audit
    old = tiny.killed(whole, "old.jsonl", json.dumps(first).encode() + b"\n")
    found = chains.responses(tiny_llama, TASKS, store=old, **OPTIONS)
    assert found == made
    assert runs_audit.audit(found).unaudited == 1


def uniform(logits, key, step, temperature):
    """A sampler that does not look at the logits."""
    generator = torch.Generator().manual_seed(int(key[0] ^ step[0]) % 2**31)
    return torch.randint(4, logits.shape[-1], (len(logits),), generator=generator)


@pytest.mark.parametrize("temperature", [0.05, 0.0])
def test_generation_and_steering_stop_where_the_audit_fails(
    tiny_llama, monkeypatch, temperature
):
    options = OPTIONS | {"temperature": temperature}
    stages = (
        lambda: chains.responses(tiny_llama, TASKS, **options),
        lambda: conditions.generate(tiny_llama, TASKS, [None] * 7, **options),
    )
    assert [len(write()) for write in stages] == [7, 7]
    monkeypatch.setattr(sampling, "choose", uniform)
    for write in stages:
        with pytest.raises(runs_audit.SamplingError, match="not drawn from the model's dist"):
            write()


def test_logits_that_are_not_finite_are_refused_with_the_row(tiny_llama):
    vector = torch.full((tiny_llama.d_model,), 1e38)
    rows = [
        decode.Row((50, 60, 70), "fine"),
        decode.Row((50, 60, 70), "pushed", (Intervention(vector, 1, 100.0),)),
    ]
    for temperature in (0.0, 0.8):
        with pytest.raises(runs_audit.SamplingError, match="pushed: the logits after 0 new"):
            decode.run(tiny_llama, rows, max_new_tokens=4, temperature=temperature)
