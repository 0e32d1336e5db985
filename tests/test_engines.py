"""Engines: what is refused, whether it was steered, and whether they write what ours writes.

The engines here are our own loop, broken in one way each; vLLM itself where it is installed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import nnsight
import pytest
import tiny
import torch
from click.testing import CliRunner

import stllms
from stllms import registry, tasks
from stllms.app import cli, preflight
from stllms.config import RunConfig
from stllms.models import loading
from stllms.models.engines import conformance, engine, probes
from stllms.models.engines.engine import Can, Row
from stllms.models.engines.interventions import Intervention
from stllms.models.engines.probes import Probed, SteeringError
from stllms.models.engines.transformers import Transformers
from stllms.models.model import ModelError
from stllms.runs.audit import SamplingError
from stllms.steering import conditions


class Other(Probed):
    """Our own loop as another engine; ``breaks`` changes the rows that reach it."""

    name = "other"
    can = Can(operators=("add",), where=("all",), watch=False)

    def __init__(self, model, breaks=lambda rows: rows):
        super().__init__(model)
        self.breaks, self.closed, self.batches = breaks, 0, []

    def write(self, rows, **options):
        rows = self.breaks(list(rows))
        self.batches.append(rows)
        ours = Transformers(self.model)
        written = {}
        for probe in (True, False):
            places = [i for i, row in enumerate(rows) if row.probe == probe]
            limits = {"max_new_tokens": 1} if probe else {}
            made = ours.generate([rows[i] for i in places], **options | limits)
            written |= dict(zip(places, made, strict=True))
        return [
            replace(written[i], logits=next_logits(self.model, row))
            if row.probe
            else written[i]
            for i, row in enumerate(rows)
        ]

    def close(self):
        self.closed += 1


@torch.no_grad()
def next_logits(model, row: Row) -> torch.Tensor:
    """Behind the prompt, with bare hooks of torch that add to every position."""
    hooks = [
        model.layers[one.layer].register_forward_hook(
            lambda _m, _i, hidden, one=one: hidden + one.coefficient * one.direction
        )
        for one in row.interventions
    ]
    try:
        return model.hf(torch.tensor([row.prompt_ids])).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()


def direction(model, seed: int, length: float = 2.0) -> torch.Tensor:
    made = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    return length * made / made.norm()


def rows_of(model) -> list[Row]:
    """Plain rows, and rows of two directions at two layers with two signs."""
    rows = []
    for i, task in enumerate(tiny.TASKS[:4]):
        ids = model.prompt_ids(task.content)[1]
        rows.append(Row(ids, task.id))
        for c in (1.0, -1.0):
            item = Intervention(direction(model, i % 2), 1 + i % 2, c)
            rows.append(Row(ids, task.id, (item,)))
    return rows


def changed(row: Row, **changes) -> Row:
    return replace(row, interventions=tuple(replace(x, **changes) for x in row.interventions))


def wrong_layer(rows):
    return [changed(row, layer=row.interventions[0].layer + 1) if row.interventions else row
            for row in rows]  # fmt: skip


def unsteered(rows):
    return [replace(row, interventions=()) for row in rows]


def neighbours(rows):
    """Every steered row has the vector of the next steered one."""
    steered = [i for i, row in enumerate(rows) if row.interventions]
    moved = dict(zip(steered, steered[1:] + steered[:1], strict=True))
    return [
        replace(row, interventions=rows[moved[i]].interventions) if i in moved else row
        for i, row in enumerate(rows)
    ]


def weaker(rows):
    return [
        changed(row, coefficient=0.9 * row.interventions[0].coefficient)
        if row.interventions
        else row
        for row in rows
    ]


def one_unsteered(rows):
    """Of all rows only those of one layer and sign are left alone."""
    return [
        replace(row, interventions=())
        if row.interventions
        and (row.interventions[0].layer, row.interventions[0].coefficient) == (2, -1.0)
        else row
        for row in rows
    ]


def everyone_steered(rows):
    """Plain rows get the vector of a neighbour."""
    some = next((row.interventions for row in rows if row.interventions), ())
    return [row if row.interventions or row.probe else replace(row, interventions=some)
            for row in rows]  # fmt: skip


BROKEN = [wrong_layer, unsteered, neighbours, weaker, one_unsteered]


# -- was it steered? -----------------------------------------------------------------------


def test_what_an_engine_cannot_do_with_its_rows_is_refused(tiny_llama):
    class Alike(Other):
        can = Can(per_row_vectors=False)

    class Chance(Other):
        can = Can(same_noise=False)

    rows = rows_of(tiny_llama)
    try:
        tiny_llama.engine = Alike(tiny_llama)
        with pytest.raises(ValueError, match="engine other steers all rows of a batch alike"):
            engine.generate(tiny_llama, rows, max_new_tokens=1)
        tiny_llama.engine = Chance(tiny_llama)
        with pytest.raises(ValueError, match="noise of its own"):
            engine.generate(tiny_llama, rows, max_new_tokens=1, temperature=0.5)
        assert len(engine.generate(tiny_llama, rows, max_new_tokens=1)) == len(rows)
    finally:
        tiny_llama.engine = None


def test_a_batch_that_was_steered_is_the_same_with_probes_as_without(tiny_llama):
    other = Other(tiny_llama)
    rows = rows_of(tiny_llama)
    written = other.generate(rows, max_new_tokens=6, temperature=0.7, seed=3)
    ours = Transformers(tiny_llama).generate(rows, max_new_tokens=6, temperature=0.7, seed=3)
    assert written == ours
    plain, *steered = other.report
    assert plain["interventions"] == "none"
    assert plain["engine from plain"] < 1e-8
    assert [one["batches"] for one in steered] == [1] * 4  # two directions, two signs
    assert all(one["engine from steered"] < 1e-8 for one in steered)
    assert all(one["steered from plain"] > 1e-5 for one in steered)


@pytest.mark.parametrize("breaks", BROKEN)
def test_broken_steering_stops_the_batch(tiny_llama, breaks):
    other = Other(tiny_llama, breaks)
    with pytest.raises(SteeringError, match=r"engine other did not steer .* at layer \d"):
        other.generate(rows_of(tiny_llama), max_new_tokens=4)


def test_a_batch_without_steering_has_a_plain_probe_alone(tiny_llama):
    other = Other(tiny_llama)
    rows = [replace(row, interventions=()) for row in rows_of(tiny_llama)]
    zero = changed(rows_of(tiny_llama)[1], coefficient=0.0)
    assert len(other.generate([*rows, zero], max_new_tokens=2)) == len(rows) + 1
    (asked,) = [row for batch in other.batches for row in batch if row.probe]
    assert asked.interventions == ()
    assert other.generate([], max_new_tokens=2) == []


def test_a_plain_request_that_a_neighbour_steers_stops_the_batch(tiny_llama):
    def leaks(rows):
        some = next(row.interventions for row in rows if row.interventions)
        return [row if row.interventions else replace(row, interventions=some) for row in rows]

    with pytest.raises(SteeringError, match="does not compute what the plain model computes"):
        Other(tiny_llama, leaks).generate(rows_of(tiny_llama), max_new_tokens=2)


def test_other_weights_stop_a_batch_without_steering(tiny_llama):
    other = Other(tiny_llama)
    rows = [replace(row, interventions=()) for row in rows_of(tiny_llama)]
    other.generate(rows, max_new_tokens=2)
    other.model = tiny.model(seed=1)
    with pytest.raises(SteeringError, match="Its weights are others"):
        other.generate(rows, max_new_tokens=2)


def test_probes_are_computed_once_and_asked_in_every_batch(tiny_llama):
    other, rows = Other(tiny_llama), rows_of(tiny_llama)
    other.generate(rows, max_new_tokens=2)
    other.generate(rows, max_new_tokens=2)
    assert other.closed == 1  # the weights were needed once
    assert [sum(row.probe for row in batch) for batch in other.batches] == [5, 5]
    assert {one["batches"] for one in other.report} == {2}


def test_a_weak_intervention_is_scaled_until_its_probe_can_tell(tiny_llama):
    ids = tiny_llama.prompt_ids("What is good?")[1]
    weak = Row(ids, "t", (Intervention(direction(tiny_llama, 0, 1e-3), 1, 1.0),))
    other = Other(tiny_llama)
    other.generate([weak], max_new_tokens=2)
    _, told = other.report
    assert told["scaled by"] > 1
    assert told["steered from plain"] >= 1e-5
    with pytest.raises(SteeringError, match="did not steer"):
        Other(tiny_llama, unsteered).generate([weak], max_new_tokens=2)


def test_an_intervention_that_changes_nothing_to_be_seen_is_refused(tiny_llama):
    ids = tiny_llama.prompt_ids("What is good?")[1]
    nothing = Row(ids, "t", (Intervention(direction(tiny_llama, 0, 1e-9), 1, 1.0),))
    with pytest.raises(SteeringError, match="too little to see"):
        Other(tiny_llama).generate([nothing], max_new_tokens=2)


def test_probes_are_what_hooks_of_torch_give(tiny_llama):
    rows = rows_of(tiny_llama)
    sets = probes.different(row.interventions for row in rows)
    made = probes.made(tiny_llama, sets, [row.prompt_ids for row in rows])
    assert len(made) == 4
    for probe in made.values():
        row = Row(probe.prompt_ids, "", probe.interventions, probe=True)
        torch.testing.assert_close(probe.steered, next_logits(tiny_llama, row))
        plain = next_logits(tiny_llama, replace(row, interventions=()))
        torch.testing.assert_close(probe.plain, plain)
        p, q = probe.steered.softmax(-1), probe.plain.softmax(-1)
        assert probe.apart == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)


def test_an_engine_that_gives_no_logits_does_not_pass(tiny_llama):
    class Silent(Other):
        def write(self, rows, **options):
            return [replace(one, logits=None) for one in super().write(rows, **options)]

    with pytest.raises(SteeringError, match="no logits"):
        Silent(tiny_llama).generate(rows_of(tiny_llama), max_new_tokens=2)


# -- the seam ------------------------------------------------------------------------------


@pytest.fixture
def with_other():
    model = tiny.model()
    model.engine = Other(model)
    return model


def test_what_an_engine_cannot_do_is_refused_by_name_before_anything_is_written(with_other):
    ids = with_other.prompt_ids("What?")[1]
    v = direction(with_other, 0)
    for item, said in (
        (Intervention(v, 0, 1.0, "ablate"), "engine other cannot do 'ablate'"),
        (Intervention(v, 0, 1.0, where="generated"), "cannot steer where='generated'"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.generate(with_other, [Row(ids, "t", (item,))], max_new_tokens=2)
    with pytest.raises(ValueError, match="cannot be followed"):
        engine.generate(with_other, [Row(ids, "t")], max_new_tokens=2, watch=print)
    assert with_other.engine.batches == []


def test_stages_close_the_engine_when_they_are_done_and_when_they_fail(with_other):
    other = with_other.engine
    chains = stllms.generation.responses(with_other, tiny.TASKS[:2], **tiny.OPTIONS)
    assert other.closed == 2  # for the plain probe, and at the end
    one = conditions.Condition("a", 1, 1.0, Intervention(direction(with_other, 0), 1, 1.0))
    steered = conditions.grid(
        with_other, tiny.TASKS[:2], [conditions.plain(), one], **tiny.OPTIONS
    )
    assert other.closed == 4  # for the other probe, and at the end
    assert [one.response for one in steered[::2]] == chains
    other.breaks = unsteered
    with pytest.raises(SteeringError):
        conditions.grid(with_other, tiny.TASKS[:2], [one], **tiny.OPTIONS)
    assert other.closed == 5


def test_what_the_probes_found_goes_into_the_record(with_other):
    assert with_other.probed is None
    one = Intervention(direction(with_other, 0), 1, 1.0)
    stllms.steering.generate(with_other, tiny.TASKS[:1], [one], **tiny.OPTIONS)
    _, told = with_other.probed
    assert told["interventions"].startswith("add +1 times direction")
    assert tiny.model().probed is None


def test_vllm_that_is_not_installed_is_named_with_its_document(monkeypatch):
    found = importlib.util.find_spec
    absent = lambda name, *more: None if name == "vllm" else found(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(ModelError, match=r"vllm.* not installed \(docs/engines.md\)"):
        loading.load("tiny-thinker", engine="vllm")
    with pytest.raises(ModelError, match="engine 'vlm' is not one of transformers, vllm"):
        loading.load("tiny-thinker", engine="vlm")
    assert "not installed" in CliRunner().invoke(cli.cli, ["models"]).output


@pytest.mark.parametrize(
    ("here", "options", "said"),
    [
        ("missing", {}, "engine: vllm: what is here"),
        ("fits", {"device_map": "auto"}, "device_map: 'auto', expected none with engine vllm"),
    ],
)
def test_a_run_with_vllm_that_could_not_end_well_is_refused(
    tmp_path, monkeypatch, here, options, said
):
    monkeypatch.setattr(registry, "vllm_here", lambda: (here, "what is here"))
    config = RunConfig(engine="vllm", profile="smoke", results=str(tmp_path), **options)
    with pytest.raises(preflight.Refused, match=said):
        preflight.check(config, ["01_generate"])


# -- conformance ---------------------------------------------------------------------------


def prompts_of(model):
    return [model.prompt_ids(task.content)[1] for task in tiny.TASKS]


def checked(model, breaks=lambda rows: rows):
    found = conformance.check(model, Other(model, breaks), prompts_of(model), tokens=6)
    return {one.name.partition(",")[0]: one for one in found}


@pytest.fixture(scope="module")
def conforming():
    return checked(tiny.model())


def test_our_own_loop_conforms(conforming):
    assert len(conforming) == 9
    assert all(one.passed for one in conforming.values()), list(map(str, conforming.values()))


def test_the_requests_are_mixed(tiny_llama):
    rows = conformance.mixed(tiny_llama, prompts_of(tiny_llama))
    signs = [row.interventions[0].coefficient if row.interventions else 0 for row in rows]
    assert (signs.count(0), signs.count(1), signs.count(-1)) == (11, 11, 10)
    layers = {row.interventions[0].layer for row in rows if row.interventions}
    assert layers == {0, 2, 3}
    different = {tuple(x.direction.tolist()) for row in rows for x in row.interventions}
    assert len(different) == 11


@pytest.mark.parametrize(
    ("breaks", "seen_by"),
    [
        (wrong_layer, "probes"),
        (unsteered, "32 mixed requests"),
        (unsteered, "steered positions of a prompt of 96"),
        (neighbours, "32 mixed requests"),
        (weaker, "probes"),
        (everyone_steered, "32 mixed requests"),
        (everyone_steered, "sampled at 0.65"),
    ],
)
def test_broken_engines_do_not_conform(tiny_llama, breaks, seen_by):
    if breaks is wrong_layer:
        broken = lambda rows: [  # noqa: E731
            changed(row, layer=max(0, row.interventions[0].layer - 1))
            if row.interventions
            else row
            for row in rows
        ]
    else:
        broken = breaks
    found = checked(tiny_llama, broken)
    key = next(name for name in found if name.startswith(seen_by[:16]))
    assert not found[key].passed, str(found[key])


def test_an_engine_whose_rows_depend_on_their_order_does_not_conform(tiny_llama):
    """It steers the first steered row of a batch only."""

    def first_only(rows):
        places = [i for i, row in enumerate(rows) if row.interventions and not row.probe][1:]
        return [replace(r, interventions=()) if i in places else r for i, r in enumerate(rows)]

    found = checked(tiny_llama, first_only)
    assert not found["in another order"].passed
    assert not found["one by one"].passed


def test_an_engine_that_ignores_the_noise_of_a_row_is_seen(tiny_llama):
    """Every draw of one prompt is the same: neither the test of first tokens nor that of the
    chains passes."""
    found = checked(tiny_llama, lambda rows: [replace(row, key="one") for row in rows])
    assert not found["first tokens of 512 keys"].passed
    assert not found["sampled at 0.65"].passed


def test_the_check_refuses_what_it_would_compare_with_itself():
    made = CliRunner().invoke(
        cli.cli, ["engines", "check", "tiny-thinker", "--engine", "transformers"]
    )
    assert isinstance(made.exception, ValueError)
    assert "what the others are compared with" in str(made.exception)


def test_the_check_prints_a_line_a_check_and_fails_with_one(monkeypatch, capsys):
    def load(_name, **options):
        assert options["engine"] == "vllm"
        model = tiny.model()
        model.engine = Other(model, unsteered)
        return model

    monkeypatch.setattr(loading, "load", load)
    assert cli.main(["engines", "check", "tiny-thinker", "--tokens", "4"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("FAILED  32 mixed requests, greedy: ")
    assert lines[0].count("equal") == 1


# -- vLLM ----------------------------------------------------------------------------------


def _vllm_or_skip():
    """Not ``importorskip``: the engine sets vLLM up before it imports it."""
    if registry.vllm_here()[0] == "missing":
        pytest.skip(registry.vllm_here()[1])


@pytest.fixture(scope="module")
def vllm_thinker():
    """``tiny-thinker`` with the engine vLLM, in float32."""
    _vllm_or_skip()
    model = loading.load("tiny-thinker", engine="vllm", dtype="float32")
    yield model
    model.engine.close()


def asked(model, n: int = 6) -> list[Row]:
    """Plain, + and - requests of tasks of the grammar."""
    prompts = [
        model.prompt_ids(task.content)[1]
        for task in tasks.select("evaluate", source="grammar", n=n, skip=0, seed=0)
    ]
    return conformance.mixed(model, prompts)[: 3 * n]


@pytest.fixture(scope="module")
def expected(vllm_thinker):
    """What our own loop writes for :func:`asked`."""
    vllm_thinker.engine.close()
    return Transformers(vllm_thinker).generate(
        asked(vllm_thinker), max_new_tokens=24, temperature=0.65, seed=5
    )


@pytest.mark.slow
def test_vllm_writes_what_our_loop_writes_with_the_same_noise_and_audit(vllm_thinker, expected):
    counted = []
    written = engine.generate(
        vllm_thinker,
        asked(vllm_thinker),
        max_new_tokens=24,
        temperature=0.65,
        seed=5,
        progress=lambda *added: counted.append(added),
    )
    assert written == expected
    for one, its in zip(written, expected, strict=True):
        assert one.audit == pytest.approx(its.audit, rel=1e-3, abs=1e-3)
    tokens, ended = map(sum, zip(*counted, strict=True))
    assert (tokens, ended) == (sum(len(one.ids) for one in expected), len(expected))
    none, *steered = vllm_thinker.probed
    assert none["interventions"] == "none"
    assert len(steered) == 12  # six directions, two signs


@pytest.mark.slow
def test_a_row_that_vllm_preempts_meets_the_same_noise(vllm_thinker, monkeypatch):
    """With room for the keys and values of one long row and a half, of 18 rows."""
    from vllm.v1.core.sched.scheduler import Scheduler

    own = vllm_thinker.engine
    options = {"max_new_tokens": 200, "temperature": 0.65, "seed": 5}
    many = own.write(asked(vllm_thinker), **options)
    own.close()
    memory, preempt, preempted = own._memory, Scheduler._preempt_request, []

    def scarce(rows, context):
        (size, block) = memory(1, context).values()
        return {"kv_cache_memory_bytes": 3 * size // 2, "block_size": block}

    def counted(scheduler, request, *given, **more):
        preempted.append(request.request_id)
        return preempt(scheduler, request, *given, **more)

    monkeypatch.setattr(own, "_memory", scarce)
    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    few = own.write(asked(vllm_thinker), **options)
    own.close()
    assert preempted
    assert few == many


@pytest.mark.slow
def test_weights_are_in_one_place_at_a_time_and_come_back(vllm_thinker):
    vllm_thinker.engine.close()
    before = vllm_thinker.identity
    ids = torch.tensor([asked(vllm_thinker)[0].prompt_ids])
    logits = vllm_thinker.hf(ids).logits
    vllm_thinker.engine.write(asked(vllm_thinker)[:1], max_new_tokens=2)
    assert sum(p.numel() for p in vllm_thinker.hf.parameters()) == 0
    vllm_thinker.engine.close()
    assert vllm_thinker.identity == before
    assert torch.equal(vllm_thinker.hf(ids).logits, logits)
    with (
        torch.no_grad(),
        vllm_thinker.nn.trace(ids),
    ):  # nnsight's model is around the same modules
        traced = nnsight.save(vllm_thinker.nn.output.logits)
    assert torch.equal(traced, logits)


@pytest.mark.slow
def test_weights_that_were_changed_in_place_reach_vllm(vllm_thinker, expected):
    vllm_thinker.engine.close()
    weight = vllm_thinker.layers[0].mlp.down_proj.weight
    kept = weight.data.clone()
    rows = asked(vllm_thinker)[:3]
    vllm_thinker.engine._probes.clear()  # they are of the weights as they were
    weight.data.mul_(-1)
    try:
        ours = Transformers(vllm_thinker).generate(rows, max_new_tokens=12)
        assert vllm_thinker.engine.generate(rows, max_new_tokens=12) == ours
        vllm_thinker.engine.close()
        assert torch.equal(weight.data, -kept)
    finally:
        vllm_thinker.engine.close()
        weight.data.copy_(kept)
        vllm_thinker.engine._probes.clear()


@pytest.mark.slow
@pytest.mark.parametrize("breaks", BROKEN)
def test_broken_steering_of_vllm_is_caught(vllm_thinker, monkeypatch, breaks):
    """What reaches vLLM is changed on its way."""
    write = vllm_thinker.engine.write
    monkeypatch.setattr(
        vllm_thinker.engine,
        "write",
        lambda rows, **options: write(breaks(list(rows)), **options),
    )
    rows = [row for row in asked(vllm_thinker) if not row.interventions
            or row.interventions[0].layer < vllm_thinker.n_layers - 1]  # fmt: skip
    if breaks is one_unsteered:
        rows = [changed(row, layer=2) if row.interventions else row for row in rows]
    with pytest.raises(SteeringError, match="engine vllm did not steer"):
        vllm_thinker.engine.generate(rows, max_new_tokens=2)


@pytest.mark.slow
def test_an_error_inside_the_hooks_of_vllm_lens_stops_the_batch(vllm_thinker, monkeypatch):
    """vllm-lens logs it and leaves the rows of that step unsteered."""
    import vllm_lens._worker_ext as inside

    apply, calls = inside._apply_steering, []

    def sometimes(*given):
        calls.append(given)
        if len(calls) == 200:  # long behind the probes
            raise ZeroDivisionError("once")
        return apply(*given)

    monkeypatch.setattr(inside, "_apply_steering", sometimes)
    with pytest.raises(
        ModelError, match=r"vllm-lens left rows unsteered: .*hook error on layer"
    ):
        vllm_thinker.engine.generate(asked(vllm_thinker), max_new_tokens=24)
    monkeypatch.undo()
    assert not vllm_thinker.engine._llm.llm_engine.has_unfinished_requests()
    assert len(vllm_thinker.engine.write(asked(vllm_thinker)[:2], max_new_tokens=2)) == 2


@pytest.mark.slow
def test_without_a_salt_plain_requests_would_read_steered_keys(vllm_thinker, monkeypatch):
    """The danger is there, and the check of conformance sees it."""
    request = vllm_thinker.engine._request

    def unsalted(*given):
        prompt, params = request(*given)
        prompt.pop("cache_salt", None)
        return prompt, params

    rows = asked(vllm_thinker)
    vllm_thinker.engine.close()
    made = conformance._Conformance(vllm_thinker, vllm_thinker.engine,
                                    [row.prompt_ids for row in rows[::3]], 12)  # fmt: skip
    assert [one.passed for one in made.alone()] == [True, True]
    monkeypatch.setattr(vllm_thinker.engine, "_request", unsalted)
    assert [one.passed for one in made.alone()] == [False, False]


@pytest.mark.slow
def test_logits_that_are_not_finite_stop_vllm_naming_the_row(vllm_thinker):
    ids = asked(vllm_thinker)[0].prompt_ids
    huge = Intervention(torch.full((vllm_thinker.d_model,), 1e38), 1, 1e38)
    with pytest.raises(SamplingError, match="the row: the logits after 0 new tokens are not"):
        vllm_thinker.engine.write([Row(ids, "the row", (huge,))], max_new_tokens=3)


@pytest.mark.slow
def test_what_vllm_cannot_do_is_refused(vllm_thinker):
    ids = asked(vllm_thinker)[0].prompt_ids
    v = torch.ones(vllm_thinker.d_model)
    for item in (Intervention(v, 0, 1.0, "ablate"), Intervention(v, 0, 1.0, where="thinking")):
        with pytest.raises(
            ValueError, match=r"engine vllm cannot .*: take engine transformers"
        ):
            engine.generate(vllm_thinker, [Row(ids, "t", (item,))], max_new_tokens=2)
    two = (Intervention(v, 0, 1.0), Intervention(v, 2, -0.5))
    (written,) = engine.generate(vllm_thinker, [Row(ids, "t", two)], max_new_tokens=12)
    vllm_thinker.engine.close()
    (ours,) = Transformers(vllm_thinker).generate([Row(ids, "t", two)], max_new_tokens=12)
    assert written == ours


@pytest.mark.long
def test_vllm_conforms_on_a_real_vocabulary():
    _vllm_or_skip()
    if registry.missing_packages("smollm2"):
        pytest.skip("smollm2 is not installed")
    assert cli.main(["engines", "check", "smollm2", "--tokens", "12"]) == 0
