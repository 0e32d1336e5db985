"""Steering: conditions on a tiny model, and measures of hand-made responses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from stllms import steering
from stllms.generation.chains import responses
from stllms.labels import PAPER
from stllms.models.engines import transformers as decode
from stllms.plotting.text import shown
from stllms.records import STEERED_KEY, Annotation, PlacedSegment, Response, Span, Steered, Task
from stllms.runs.store import Rows
from stllms.steering import conditions, dose, measures
from stllms.vectors.directions import SteeringVectors
from stllms.vectors.nulls import Controls

NAN = float("nan")
PLAIN = ("none", -1, 0.0)
TASKS = [Task(f"t{i}", "c", "?", str(i)) for i in range(6)]


def chain(
    task: str,
    condition: tuple[str, int, float] = PLAIN,
    tokens: tuple[int, int] = (5, 5),
    *,
    answer: str = "The answer is 0.",
    thinking: str = "So 1 plus 1 is 2.",
    operation: str = "add",
    finished: bool = True,
    closed: bool = True,
    annotator: str = "hand",
    failed: str | None = None,
    labels: tuple[str, str] = ("backtracking", "adding-knowledge"),
) -> Steered:
    """A chain with ``tokens`` of the two ``labels``."""
    first, second = tokens
    spans = [Span(labels[0], 10, 10 + first), Span(labels[1], 60, 60 + second)]
    made = Annotation(
        task,
        annotator,
        spans=tuple(s for s in spans if s.end > s.start),
        ledger={"coverage": 0.75},
        failed=failed,
    )
    response = Response(
        task_id=task,
        category="c",
        prompt_text="",
        prompt_ids=(),
        output_ids=tuple(range(first + second)),
        text=f"{thinking}\n</think>\n\n{answer}" if closed else thinking,
        thinking=thinking,
        thinking_start=0,
        answer=answer if closed else "",
        closed=closed,
        finished=finished,
    )
    return Steered(task, *condition, operation, response, made)


def grid() -> list[Steered]:
    """Plain: 1/2 backtracking. Positive at layer 3: more, by task. Controls: less."""
    up, down = ("backtracking", 3, 1.0), ("backtracking", 3, -1.0)
    chains = []
    for i, task in enumerate(TASKS):
        chains += [
            chain(task.id, PLAIN, (5, 5), answer=f"The answer is {i}."),
            chain(task.id, up, (6 + i % 3, 2), answer="The answer is 1."),
            chain(task.id, down, (1, 9), answer=f"The answer is {i}."),
            chain(task.id, ("shuffled:0", 3, 1.0), (4, 6)),
            chain(task.id, ("shuffled:1", 3, 1.0), (7, 3)),
            chain(task.id, ("shuffled:0", 3, -1.0), (5, 5)),
            chain(task.id, ("shuffled:0", 4, 1.0), (1, 99)),
        ]
    return chains


def tabled(chains: list[Steered]) -> pd.DataFrame:
    return measures.table(measures.measure(chains, TASKS))


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    return measures.measure(grid(), TASKS)


@pytest.fixture(scope="module")
def rows(measured) -> pd.DataFrame:
    return measures.table(measured)


def cell(rows: pd.DataFrame, coefficient: float = 1.0, behaviour: str = "backtracking"):
    """The token fraction of a behaviour under the direction of backtracking."""
    fraction = rows[rows["metric"] == "token fraction"]
    found = fraction.set_index(["direction", "layer", "coefficient", "behaviour"])
    return found.loc["backtracking", 3, coefficient, behaviour]


def annotation(*spans: tuple[str, int, int], task: str = "t", failed: str | None = None):
    """Token spans, and a segment of the same label for each."""
    return Annotation(
        task,
        "hand",
        segments=tuple(PlacedSegment(label, "x", s, e) for label, s, e in spans),
        spans=tuple(Span(*span) for span in spans),
        failed=failed,
    )


# --- conditions -----------------------------------------------------------------------------

OPTIONS = {"max_new_tokens": 12, "temperature": 0.8, "seed": 1, "progress": False}


@pytest.fixture
def asked():
    return [Task(f"t{i}", "own", "What is " + "so " * i + "good?") for i in range(7)]


def test_steered_rows_equal_the_same_rows_alone(tiny_llama, asked):
    """Coefficient 0 is plain, and a mixed batch changes no row of it."""
    vector = torch.randn(tiny_llama.d_model, generator=torch.Generator().manual_seed(0))
    plain = responses(tiny_llama, asked, **OPTIONS)
    zero = [steering.Intervention(vector, 1, 0.0)] * len(asked)
    assert steering.generate(tiny_llama, asked, zero, **OPTIONS) == plain
    strong = steering.Intervention(vector, 1, 3.0)
    edits = [None, strong, strong, None, None, strong, None]
    mixed = steering.generate(tiny_llama, asked, edits, **OPTIONS)
    alone = steering.generate(tiny_llama, asked[1:2], [strong], **OPTIONS)
    assert mixed[0] == plain[0]
    assert mixed[1] == alone[0] != plain[1]
    with pytest.raises(ValueError, match="7 tasks but 1 interventions"):
        steering.generate(tiny_llama, asked, [None], **OPTIONS)


@pytest.fixture
def steering_vectors(tiny_llama):
    shape = (2, tiny_llama.n_layers, tiny_llama.d_model)
    directions = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return SteeringVectors(
        ("deduction", "backtracking"),
        directions,
        directions,
        directions[0],
        torch.tensor([20, 30]),
        unavailable={"example-testing": 2},
    )


def test_every_name_what_exists(tiny_llama, steering_vectors):
    layers = {"backtracking": 2, "example-testing": 1}
    every = conditions.conditions(steering_vectors, layers, (-1, 0, 1))
    assert [(a.direction, a.coefficient) for a in every] == [
        ("none", 0.0),
        ("backtracking", -1.0),
        ("backtracking", 1.0),
    ]
    with pytest.raises(ValueError, match="'dreaming' is none of the labels 'paper'"):
        conditions.conditions(steering_vectors, {"dreaming": 1}, (1,))
    with pytest.raises(ValueError, match=r"layer 9 is not in 0 \.\. 3"):
        conditions.conditions(steering_vectors, {"backtracking": 9}, (1,))
    conditions.check(steering_vectors, tiny_llama)
    parts = {"directions": np.s_[:, :3], "means": np.s_[:, :3], "overall": np.s_[:3]}
    cut = {name: getattr(steering_vectors, name)[part] for name, part in parts.items()}
    with pytest.raises(ValueError, match=r"\[3, 32\] are of another model .* \[4, 32\]"):
        conditions.check(replace(steering_vectors, **cut), tiny_llama)


def test_a_sweep_has_its_controls_at_every_layer(steering_vectors):
    controls = Controls(("shuffled:0", "covariance:0"), 2 * steering_vectors.directions)
    every = conditions.sweep_conditions(steering_vectors, (-2, -1, 0, 1), controls)
    bare = conditions.sweep_conditions(steering_vectors, (-2, -1, 0, 1))
    added = [one for one in every if one.direction in controls.names]
    others = [one.key("t") for one in every if one.direction not in controls.names]
    assert others == [one.key("t") for one in bare]
    layers = range(steering_vectors.n_layers)
    for names, found in ((controls.names, added), (["backtracking"], bare[1:])):
        places = sorted((one.direction, one.layer, one.coefficient) for one in found)
        assert places == sorted(itertools.product(names, layers, (-2.0, 1.0)))
    last = added[-1]
    row = controls.names.index(last.direction)
    assert torch.equal(last.intervention.direction, controls.directions[row, last.layer])


def test_a_grid_resumes_to_the_same_bytes(
    tiny_llama, asked, steering_vectors, tmp_path, monkeypatch
):
    monkeypatch.setattr(conditions, "CHUNK", 2)
    every = conditions.conditions(steering_vectors, {"backtracking": 2}, (-1, 0, 1))
    controls = Controls(("shuffled:0",), steering_vectors.directions[:1])
    every += conditions.control_conditions(controls, {"backtracking": 2}, (1,))
    whole = Rows(tmp_path / "whole.jsonl", STEERED_KEY)
    grid = conditions.grid(tiny_llama, asked[:4], every, store=whole, **OPTIONS)
    names = ["none", "backtracking", "backtracking", "shuffled:0"]
    assert [one.key[:2] for one in grid[:4]] == [("t0", name) for name in names]
    content = whole.path.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 16
    for kept in (0, 3, 8, 13):
        cut = tiny.killed(whole, f"cut-{kept}.jsonl", b"".join(lines[:kept]))
        assert conditions.grid(tiny_llama, asked[:4], every, store=cut, **OPTIONS) == grid
        assert cut.path.read_bytes() == content
    monkeypatch.setattr(decode, "run", None)
    assert conditions.grid(tiny_llama, asked[:4], every, store=whole, **OPTIONS) == grid


def test_a_store_takes_no_chains_that_are_steered_somewhere_only(
    tiny_llama, asked, steering_vectors, tmp_path
):
    edit = steering.Intervention(steering_vectors.directions[1, 2], 2, 1.0, where="generated")
    every = [conditions.plain(), conditions.Condition("backtracking", 2, 1.0, edit)]
    store = Rows(tmp_path / "rows.jsonl", STEERED_KEY)
    with pytest.raises(ValueError, match="a store keeps responses steered at all positions"):
        conditions.grid(tiny_llama, asked[:1], every, store=store, **OPTIONS)
    assert len(conditions.grid(tiny_llama, asked[:1], every, **OPTIONS)) == len(every)


# --- fractions ---------------------------------------------------------------------------


def test_each_treatment_of_empty_chains():
    chains = [
        annotation(("backtracking", 5, 9)),
        annotation(),
        annotation(("deduction", 5, 9)),
        annotation(("humming", 1, 50), ("backtracking", 50, 52)),
        annotation(failed="no reply"),
    ]
    found = {empty: measures.token_fractions(chains, empty=empty) for empty in measures.EMPTY}
    apart, published = (values[:, 0].tolist() for values in found.values())
    assert apart == pytest.approx([1, NAN, 0, 1, NAN], nan_ok=True)
    assert published == pytest.approx([1, 0, 0, 1, NAN], nan_ok=True)
    assert measures.segment_counts(chains)[3].sum() == 1, "humming is no label"
    with pytest.raises(ValueError, match=r"'zero'.*apart, published"):
        measures.token_fractions([annotation()], empty="zero")


def test_fractions_are_of_tokens_of_four_behaviours_and_of_segments_of_six():
    one = annotation(
        ("initializing", 3, 40),
        ("backtracking", 40, 46),
        ("deduction", 46, 90),
        ("adding-knowledge", 90, 92),
        ("backtracking", 95, 99),
    )
    # 10 tokens of backtracking, 2 of adding-knowledge: those of the two others do not count.
    found = measures.token_fractions([one])
    assert found.tolist() == [
        [{"backtracking": 10, "adding-knowledge": 2}.get(b, 0) / 12 for b in PAPER.targets]
    ]
    counts = measures.segment_counts([one, annotation()])
    assert counts.tolist() == [[1, 1, 1, 0, 0, 2], [0] * 6]
    shares = measures.segment_fractions(counts)
    assert shares[0].tolist() == [0.2, 0.2, 0.2, 0, 0, 0.4]
    assert np.isnan(shares[1]).all()
    assert measures.segment_fractions(counts, empty="published")[1].tolist() == [0.0] * 6


# --- coherence ---------------------------------------------------------------------------


def test_coherence_is_low_where_a_text_repeats_itself():
    # "a b c d" three times: 9 four-grams, the first 4 are new.
    assert measures.coherence("a b c d " * 3)["loops"] == pytest.approx(1 - 4 / 9)
    assert measures.coherence("one two three four five six")["loops"] == 0.0
    prose = "The tank gains six cups and loses two an hour, so four are added; twice four is 8."
    assert measures.coherence("wait, no. " * 60)["compression"] < 0.1
    assert measures.coherence(prose)["compression"] > 0.7
    for text in ("", "yes", "so it is"):
        assert measures.coherence(text) == {"loops": 0.0, "compression": 1.0}


# --- measure -----------------------------------------------------------------------------


def test_a_chain_is_measured_by_its_tokens_its_answer_and_its_end():
    chains = [
        chain("t2", tokens=(2, 6), answer="The answer is 2.", finished=False),
        chain("t1", tokens=(3, 1), labels=("deduction", "backtracking")),
        chain("t1", tokens=(0, 0), failed="no reply"),
        chain("t3", thinking="The answer is 3.", closed=False, finished=False),
        chain("t0", labels=("uncertainty-estimation", "deduction")),
    ]
    found = measures.measure(chains, TASKS)
    one = found.iloc[0]
    assert one["token fraction/backtracking"] == 2 / 8
    assert one["token fraction/uncertainty-estimation"] == 0, "another chain has some"
    assert found["token fraction/example-testing"].isna().all(), "it never occurs"
    assert one["token share/adding-knowledge"] == 6 / 8
    assert (one["accuracy"], one["tokens"], one["labelled"]) == (1.0, 8.0, 0.75)
    assert (one["closed"], one["truncated"]) == (1.0, 1.0)
    assert "well-formed" not in found, "only the grammar knows what is well-formed"
    assert found.loc[1, "token fraction/backtracking"] == 1.0, "of four behaviours"
    assert found.loc[1, "token share/backtracking"] == 0.25, "of six"
    assert found.loc[2, ["token share/backtracking", "labelled"]].isna().all()
    assert found.loc[3, "accuracy"] == 0.0, "it never answered, whatever it was thinking"
    open_task = measures.measure(chains[:1], [Task("t2", "c", "?")])
    assert open_task["accuracy"].isna().all()


def test_well_formed_is_what_the_grammar_could_have_written():
    changes = (
        {},
        {"thinking": ""},
        {"thinking": "So 1 plus 1 is"},
        {"answer": "Maybe 4."},
        {"finished": False},
        {"closed": False},
    )
    chains = [chain("t0", annotator="grammar", **change) for change in changes]
    found = measures.measure(chains, TASKS)["well-formed"]
    assert found.tolist() == [1.0] + [0.0] * 5


def test_chains_that_cannot_be_measured_are_refused_by_name():
    condition = ("backtracking", 3, 1.0)
    bare = Steered("t0", *PLAIN, "add", chain("t0").response)
    twice = [chain("t0"), chain("t0", condition), chain("t0", condition, operation="ablate")]
    for chains, message in (
        ([bare, chain("t1")], "1 of 2 chains have no annotation"),
        ([chain("t9")], "not asked: t9"),
        ([chain("t0", condition)], "no plain chains"),
        (twice, "each operation apart"),
    ):
        with pytest.raises(ValueError, match=message):
            tabled(chains)


def test_scores_belong_to_their_chains_and_none_may_lack():
    pair = [chain("t0", annotator="grammar"), chain("t1", annotator="grammar")]
    scores = [
        dict(zip(STEERED_KEY, one.key, strict=True)) | {"kl": kl, "perplexity": np.e}
        for one, kl in zip(pair, (0.25, None), strict=True)
    ]
    measured = measures.measure(pair, TASKS, scores[::-1])
    assert measured["kl"].tolist() == pytest.approx([0.25, NAN], nan_ok=True)
    assert measured["log perplexity"].tolist() == pytest.approx([1.0, 1.0])
    own = {name for name in measured.columns if "/" not in name}
    assert own - set(STEERED_KEY) == set(measures.SIDE_EFFECTS), "each has its name"
    with pytest.raises(ValueError, match="1 of 2 chains have no score"):
        measures.measure(pair, TASKS, scores[:1])


# --- table -------------------------------------------------------------------------------


def test_p_values_are_paired_by_task_and_not_by_row():
    # Every task rises by one, whatever its level: paired p = 2/64. By row the levels mix.
    plain = {task.id: k for task, k in zip(TASKS, (1, 8, 2, 7, 3, 5), strict=True)}
    chains = [chain(t, PLAIN, (k, 10 - k)) for t, k in plain.items()]
    for t, k in reversed(plain.items()):
        chains.append(chain(t, ("backtracking", 3, 1.0), (k + 1, 9 - k)))
    assert cell(tabled(chains))["p"] == 2 / 64


def test_a_row_has_the_mean_over_tasks_its_test_and_its_null(rows):
    own, down = cell(rows), cell(rows, -1.0)
    values = np.array([6 / 8, 7 / 9, 8 / 10] * 2)
    assert own["value"] == pytest.approx(values.mean())
    assert own["n"] == 6
    assert own["ci_low"] < own["value"] < own["ci_high"]
    # All six tasks rose: only this sign pattern and its mirror image are as extreme.
    assert own["p"] == 2 / 2**6
    knowledge = cell(rows, behaviour="adding-knowledge")
    assert knowledge["value"] == pytest.approx(1 - values.mean())
    corrected = rows[rows["p_holm"].notna()]
    assert set(corrected["metric"]) == {"token fraction"}
    assert corrected["behaviour"].tolist() == corrected["direction"].tolist()
    assert sorted(corrected["coefficient"]) == [-1.0, 1.0]
    # Two tests at 2/64 each: Holm doubles the smaller, the other follows.
    assert corrected["p_holm"].tolist() == pytest.approx([4 / 64] * 2)
    # The control of layer 4 (0.01) is in neither.
    assert (own["null_low"], own["null_high"]) == pytest.approx((0.4, 0.7))
    assert (down["null_low"], down["null_high"]) == pytest.approx((0.5, 0.5))
    assert rows.loc[rows["direction"] == "none", ["p", "null_low"]].isna().all(axis=None)


@pytest.mark.parametrize(("broken", "left"), [("shuffled:0", 0.7), ("shuffled:1", 0.4)])
def test_a_control_whose_chains_are_all_empty_does_not_decide_the_null(broken, left):
    chains = [
        chain(one.task_id, one.key[1:4], (0, 0)) if one.direction == broken else one
        for one in grid()
    ]
    up = cell(tabled(chains))
    assert (up["null_low"], up["null_high"]) == pytest.approx((left, left))


def test_a_null_of_some_tasks_is_compared_on_these_tasks():
    """Controls on the two hardest tasks alone, where plain chains have 0.1: a control that adds
    0.2 there would end 0.2 above the mean of all plain chains, not at its own 0.3."""
    hard = [task.id for task in TASKS[:2]]
    plain = {task.id: 1 if task.id in hard else 7 for task in TASKS}
    condition = ("backtracking", 3, 1.0)
    chains = [chain(t, PLAIN, (k, 10 - k)) for t, k in plain.items()]
    chains += [chain(t, condition, (k + 1, 9 - k)) for t, k in plain.items()]
    for i, more in enumerate((0, 2)):
        name = (f"shuffled:{i}", 3, 1.0)
        chains += [chain(t, name, (plain[t] + more, 10 - plain[t] - more)) for t in hard]
    found = cell(tabled(chains))
    middle = (2 * 0.1 + 4 * 0.7) / 6
    assert (found["null_low"], found["null_high"]) == pytest.approx((middle, middle + 0.2))
    assert found["value"] == pytest.approx(middle + 0.1), "inside"
    assert (found["n"], found["null_n"]) == (6, 2)


# --- views of the table ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("added", "controlled", "expected"),
    [
        ((-2.0, -1.0, 1.0, 2.0), (2.0,), 1.0),  # the paper's, wherever it was added
        ((-0.5, 0.15, 0.25, 0.5), (0.25, 0.5), 0.25),
        ((-0.5, 0.15, 0.5), (), 0.15),
    ],
)
def test_the_figures_of_one_coefficient_take_the_papers_or_the_smallest_with_controls(
    added, controlled, expected
):
    chains = [chain("t0", ("none", -1, 0.0), (5, 5))]
    chains += [chain("t0", ("backtracking", 3, c), (6, 4)) for c in added]
    chains += [chain("t0", ("shuffled:0", 3, c), (5, 5)) for c in controlled]
    table = tabled(chains)
    assert measures.shown_coefficient(table) == expected
    bars = measures.bars(table).set_index(["behaviour", "mode"])
    assert bars.loc[("backtracking", "positive"), "value"] == 0.6
    assert measures.changes(table).index.tolist() == ["backtracking"]


def test_annotators_see_the_same_chains_and_each_its_own_effect():
    """One calls everything backtracking, the other only what was steered; controls are out."""

    class Calls:
        def __init__(self, name, label):
            self.name, self.label = name, label

        def annotate(self, responses):
            made = [
                chain("t0", labels=(self.label(one), "uncertainty-estimation"))
                for one in responses
            ]
            return [
                replace(own.annotation, task_id=one.task_id, annotator=self.name)
                for own, one in zip(made, responses, strict=True)
            ]

    steered = ("backtracking", 3, 1.0)
    chains = [chain(t.id, thinking="So 1 plus 1 is 2.") for t in TASKS]
    chains += [chain(t.id, steered, thinking="Wait, 1 plus 1 is 2.") for t in TASKS]
    chains += [chain(t.id, ("shuffled:0", 3, 1.0)) for t in TASKS]
    always = Calls("always", lambda one: "backtracking")
    hears = Calls(
        "hears",
        lambda one: ("adding-knowledge", "backtracking")[one.thinking.startswith("Wait")],
    )
    found = measures.by_annotator([always, hears], chains, TASKS, model=None)
    assert found["annotator"].tolist() == ["always", "hears"]
    assert found["difference"].tolist() == [0.0, 0.5]
    assert set(found["behaviour"]) == {"backtracking"}


def test_bars_differences_and_changes_are_views_of_the_table(measured, rows):
    up = np.mean([6 / 8, 7 / 9, 8 / 10])
    bars = measures.bars(rows).set_index(["behaviour", "mode"])
    assert bars.index.tolist() == list(itertools.product(PAPER.targets, measures.MODES))
    own = bars.loc["backtracking"]
    assert own["value"].tolist() == pytest.approx([0.5, up, 0.1])
    assert own["null_n"].tolist() == [0, 6, 6]
    others = bars.loc["adding-knowledge", "value"].tolist()
    assert others == pytest.approx([0.5, NAN, NAN], nan_ok=True), "nothing was steered"
    never = bars.loc["example-testing"]
    assert never["value"].isna().all(), "what never occurs has no share, not even of 0"
    assert shown(bars)["n"].tolist()[:4] == ["6", "6", "6", "0"]
    found = measures.differences(measured, rows).set_index("coefficient")
    assert found.loc[-1.0, ["difference", "low", "high"]].tolist() == pytest.approx([-0.4] * 3)
    assert found.loc[1.0, ["p", "n"]].tolist() == [2 / 64, 6]
    changes = measures.changes(rows)
    assert changes.index.tolist() == ["backtracking"]
    assert changes.columns.tolist() == list(PAPER.names)
    assert changes.loc["backtracking"].tolist() == pytest.approx(
        [NAN, NAN, 0.5 - up, NAN, NAN, up - 0.5], nan_ok=True
    )


def test_the_showcase_is_the_finished_chain_that_rose_most():
    def showcase(chains, behaviours=PAPER.targets):
        return measures.showcase(chains, measures.measure(chains, TASKS), behaviours)

    condition = ("backtracking", 3, 1.0)
    chains = [chain(t.id) for t in TASKS[:3]]
    chains += [
        chain("t0", condition, (9, 1), finished=False),
        chain("t1", condition, (8, 2)),
        chain("t2", condition, (6, 4)),
    ]
    plain, positive = showcase(chains)
    assert (plain.key[:4], positive.key[:4]) == (("t1", *PLAIN), ("t1", *condition))
    assert showcase([*chains[:4], chain("t1", condition, (0, 10))]) is None, "none rose"
    chains.append(chain("t0", ("adding-knowledge", 3, 1.0), (0, 10)))
    _, positive = showcase(chains)
    assert positive.key[:2] == ("t0", "adding-knowledge"), "it rose more than backtracking did"
    assert showcase(chains, ["deduction"]) is None, "nothing was steered"


# --- dose ----------------------------------------------------------------------------------

OWN = "token fraction"


def side(direction: str, coefficient: float, **values: float) -> list[dict]:
    return [
        {"metric": m, "direction": direction, "coefficient": coefficient, "value": v}
        for m, v in values.items()
    ]


def own(direction: str, coefficient: float, value: float, low=NAN, high=NAN) -> dict:
    (row,) = side(direction, coefficient, **{OWN: value})
    edges = {
        "ci_low": value - 0.05,
        "ci_high": value + 0.05,
        "null_low": low,
        "null_high": high,
    }
    return {**row, **edges, "behaviour": "backtracking"}


WHOLE = {"accuracy": 0.8, "closed": 1.0, "loops": 0.0}
EFFECTS = pd.DataFrame(
    side("none", 0.0, **WHOLE)
    + side("backtracking", 0.5, **WHOLE)
    + side("backtracking", 1.0, accuracy=0.7, closed=0.95, loops=0.1)
    + side("backtracking", 2.0, accuracy=0.7, closed=0.95, loops=0.3)
    + side("backtracking", 3.0, **WHOLE)
    + side("backtracking", -1.0, accuracy=0.1, closed=1.0, loops=0.0)
    + side("backtracking", -0.5, accuracy=NAN, closed=1.0, loops=0.0)
    + side("shuffled:0", 1.0, accuracy=0.0, closed=0.0, loops=1.0)
    + side("shuffled:0", 1.0, **WHOLE)  # at another layer
)


def test_doses_and_side_effects_are_over_coefficients_with_plain_at_zero(rows):
    found = dose.side_effects(rows).set_index(["direction", "coefficient"])
    assert found.loc[("none", 0.0), "accuracy"] == 1.0
    assert found.loc[("backtracking", 1.0), "accuracy"] == pytest.approx(1 / 6)
    # Output tokens of the controls at +1: 10, 10 and 100.
    assert found.loc[("shuffled", 1.0), "tokens"] == pytest.approx(40)
    assert "well-formed" not in found.columns
    found = dose.table(rows)
    assert set(found["steered"]) == {"backtracking"}
    own = found[found["metric"] == OWN]
    assert own["coefficient"].tolist() == [-1.0, 0.0, 1.0]
    assert own["value"].tolist() == pytest.approx([0.1, 0.5, np.mean([6 / 8, 7 / 9, 0.8])])
    assert dose.table(rows[rows["direction"] == "none"]).empty, "nothing was steered"


def test_coefficients_that_break_the_text_are_named_and_those_below_are_suggested():
    assert dose.broken(EFFECTS) == {
        ("backtracking", 2.0): {"loops": (0.0, 0.3)},
        ("backtracking", -1.0): {"accuracy": (0.8, 0.1)},
    }
    assert dose.warning(EFFECTS).splitlines() == [
        "backtracking +2 breaks the text: loops 0.30 (plain 0.00)",
        "backtracking -1 breaks the text: loops 0.00 (plain 0.00), accuracy 0.10 (plain 0.80)",
    ]
    assert dose.warning(EFFECTS, {"loops": 0.9}) == "no coefficient breaks the text"
    tokens = EFFECTS[EFFECTS["metric"] == "accuracy"].assign(metric="tokens")
    assert {c for _, c in dose.broken(tokens, {"tokens": 0.05})} == {1, 2, -1}, "either way"
    assert {c for _, c in dose.broken(EFFECTS, {"accuracy": 0})} == {1, 2, -1}, "not a gain"
    with pytest.raises(ValueError, match="no side effect 'loop'; there are: accuracy"):
        dose.broken(EFFECTS, {"loop": 0.1})
    with pytest.raises(ValueError, match=r"limit of accuracy is -0\.1: say how much worse"):
        dose.broken(EFFECTS, {"accuracy": -0.1})
    for sign, limits, coefficient in (
        (1, dose.LIMITS, 1.0),  # 2 repeats itself too much
        (-1, dose.LIMITS, -0.5),  # -1 answers wrongly
        (1, {"accuracy": 0.05}, 0.5),
        (1, {"closed": 0.001}, 0.5),
        (1, {"loops": 0.4}, 3.0),
    ):
        assert dose.suggested(EFFECTS, "backtracking", sign, limits) == coefficient
    assert dose.suggested(EFFECTS, "deduction", 1) is None


def test_a_claim_needs_to_be_outside_plain_and_outside_every_control():
    fractions = [
        own("none", 0.0, 0.20),
        own("backtracking", 1.0, 0.40, 0.10, 0.45),
        own("backtracking", -0.5, 0.10, 0.12, 0.30),
    ]
    effects = EFFECTS[EFFECTS["coefficient"].isin([0.0, 1.0, -0.5])]
    found = dose.summary(pd.concat([pd.DataFrame(fractions), effects]))
    up, down = (found[found["sign"] == sign].iloc[0] for sign in "+-")
    assert (up["coefficient"], up["value"]) == (1.0, 0.40)
    assert (up["outside plain"], up["outside controls"]) == ("yes", "no"), "0.40 < 0.45"
    assert (down["outside plain"], down["outside controls"]) == ("yes", "yes")
    assert up["accuracy"] == 0.7
    bare = pd.DataFrame([own("none", 0.0, 0.20), own("backtracking", 1.0, 0.22)])
    found = dose.summary(pd.concat([bare, effects[effects["coefficient"] >= 0]]))
    assert found["outside plain"].iloc[0] == "no", "0.22 is inside 0.15 to 0.25"
    assert found["outside controls"].iloc[0] == "", "there were none"
    assert np.isnan(found["coefficient"].iloc[1]), "no negative coefficient was tried"
    nothing = dose.summary(bare[bare["direction"] == "none"])
    assert nothing.empty
    assert nothing.columns.tolist() == found.columns.tolist()


def test_a_sweep_has_a_row_a_layer_and_coefficient(measured):
    other = measured[measured["direction"] == "backtracking"].assign(layer=1)
    both = pd.concat([measured, other])
    found = dose.sweep(both[~both["direction"].str.startswith("shuffled")])
    places = found[["layer", "coefficient"]].to_numpy().tolist()
    assert places == [[1, -1.0], [3, -1.0], [1, 1.0], [3, 1.0]]
    assert set(found["plain"]) == {0.5}
    assert found["null_low"].isna().all(), "none was swept"
    beside = dose.sweep(both).set_index(["layer", "coefficient"])
    assert beside.loc[(3, 1.0), ["null_low", "null_high"]].notna().all()
    assert beside.loc[(1, 1.0), ["null_low", "null_high"]].isna().all(), "of the same layer"
    assert dose.sweep(pd.DataFrame()).empty, "none was run"
