"""Models beside each other: hand-counted members, what may be averaged, intervals."""

from __future__ import annotations

import colorsys
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stllms import stats
from stllms.comparison import groups
from stllms.comparison.groups import Member
from stllms.labels import PAPER, LabelSet
from stllms.records import Annotation, PlacedSegment
from stllms.registry import MODELS, ModelEntry

BEHAVIOURS = PAPER.names
SIX = len(BEHAVIOURS)
PAIRED = ("tiny-thinker", "tiny-instruct")


def member(name: str, counts, tasks: Sequence[str] = "abcdefgh", **changes) -> Member:
    entry = MODELS.get(name, ModelEntry(name, None, name))
    counts = np.asarray(counts, dtype=float)
    ids = tuple(tasks[: len(counts)])
    one = Member(name, entry.display, entry.kind, entry.pair, ids, counts)
    return replace(one, **changes)


def annotation(task: str, *labels: str, failed: str | None = None) -> Annotation:
    segments = tuple(PlacedSegment(label, "x", i, i + 1) for i, label in enumerate(labels))
    return Annotation(task, "hand", segments, failed=failed)


def two_members() -> list[Member]:
    thinking = member("tiny-thinker", [[1, 1, 0, 0, 0, 2], [0] * 6, [2, 2, 0, 0, 0, 0]])
    instruct = member("tiny-instruct", [[1, 3, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]], "cax")
    return [thinking, instruct]


# -- members -------------------------------------------------------------------------------


def test_a_member_counts_its_segments_and_sets_failed_chains_apart():
    one = groups.member(
        MODELS["tiny-thinker"],
        [
            annotation("a", "deduction", "deduction", "backtracking"),
            annotation("b"),
            annotation("c", failed="no reply"),
        ],
        tasks="messages",
        annotator="offline",
    )
    assert one.task_ids == ("a", "b")
    assert one.counts.tolist() == [[0, 2, 0, 0, 0, 1], [0] * 6]
    assert (one.empty, one.unavailable) == (1, 1)
    (row,) = groups.overview([one]).to_dict("records")
    assert (row["chains"], row["without segments"], row["segments a chain"]) == (2, 1, 1.5)
    assert (row["tasks"], row["annotator"]) == ("messages", "offline")


def test_chains_of_one_model_by_two_annotators_or_readers_are_refused():
    entry = MODELS["tiny-thinker"]
    by = replace(annotation("b", "deduction"), annotator="offline")
    with pytest.raises(ValueError, match=r"chains of several annotators \(hand, offline\)"):
        groups.member(entry, [annotation("a", "deduction"), by])
    read = [
        replace(annotation(task, "deduction"), ledger={"reader": reader})
        for task, reader in (("a", "tolerant"), ("b", "published"))
    ]
    with pytest.raises(ValueError, match=r"several readers \(published, tolerant\)"):
        groups.member(entry, read)
    assert groups.member(entry, read[:1]).reader == "tolerant"


def test_the_order_is_by_pairs_thinking_first_and_unknown_models_last():
    thinking, instruct = "r1-distill-llama-8b", "llama-3.1-8b-instruct"
    ordered = [*PAIRED, "r1-distill-qwen-1.5b", thinking, instruct, "alpha", "zeta"]
    members = [member(name, np.ones((1, SIX))) for name in ordered]
    for turn in range(len(members)):
        turned = members[turn:] + members[:turn]
        assert [one.name for one in groups.ordered(turned)] == ordered
    alone = [member(n, np.ones((1, SIX))) for n in ("gpt-4o", "qwen2.5-1.5b-instruct")]
    assert [one.name for one in groups.ordered(alone)] == ["qwen2.5-1.5b-instruct", "gpt-4o"]


# -- what a figure shows -------------------------------------------------------------------


def test_pairs_share_a_hue_the_instruct_model_is_paler_and_no_colour_is_used_twice():
    every = [member(name, np.ones((1, SIX))) for name in MODELS]
    chosen = groups.colours(every)
    assert len(set(chosen.values())) == len(MODELS)
    for one in every:
        if one.kind == "thinking" and one.pair:
            mine, theirs = (
                colorsys.rgb_to_hls(*chosen[name])
                for name in (one.display, MODELS[one.pair].display)
            )
            assert mine[0] == pytest.approx(theirs[0], abs=1e-6)
            assert theirs[1] > mine[1] + 0.1
    assert groups.colours([]) == {}


def test_the_caption_names_chains_fixtures_and_who_was_measured_otherwise():
    alike = [annotation("a", "deduction")]
    own = [
        groups.member(MODELS[n], alike, tasks="grammar", annotator="grammar") for n in PAIRED
    ]
    text = groups.caption(own)
    assert text == (
        "tiny-thinker (1 chains), tiny-instruct (1 chains). "
        "tiny-thinker and tiny-instruct: fixtures, built to differ. "
        "In no chain: initializing, adding-knowledge, example-testing, uncertainty-estimation, "
        "backtracking."
    )
    real = groups.member(MODELS["smollm2"], alike, tasks="messages", annotator="offline")
    text = groups.caption([*own, real])
    assert "tiny-thinker and tiny-instruct: tasks grammar, annotator grammar" in text
    assert "SmolLM2-135M-Instruct: tasks messages, annotator offline" in text
    assert "fixture" not in groups.caption([real])


# -- tables --------------------------------------------------------------------------------


def test_the_table_has_mean_counts_and_fractions_by_hand():
    keys = ["model", "metric", "behaviour"]
    rows = groups.table(two_members()).set_index(keys)
    value = rows["value"]
    assert value["tiny-thinker", "segment count", "backtracking"] == pytest.approx(2 / 3)
    assert value["tiny-thinker", "segment count", "all"] == pytest.approx(8 / 3)
    # Chain b has no segment: apart, the mean is over a (1/2) and c (0).
    at = "tiny-thinker", "segment fraction", "backtracking"
    assert value[at] == pytest.approx(1 / 4)
    assert rows.loc[at, "n"] == 2
    published = groups.table(two_members(), empty="published").set_index(keys)
    assert published.loc[at, "value"] == pytest.approx(1 / 6)
    assert published.loc[at, "n"] == 3


def test_group_averages_weigh_models_equally_under_both_treatments():
    models = [*two_members(), member("gpt-4o", [[4, 0, 0, 0, 0, 0]] * 5)]
    keys = ["empty chains", "kind", "metric", "behaviour"]
    found = groups.treatments(models).set_index(keys)
    both = found.loc[("apart", "instruct", "segment fraction", "initializing")]
    assert both["models"] == 2
    assert both["value"] == pytest.approx(((1 / 4 + 1 / 2) / 2 + 1) / 2)
    at = "thinking", "segment fraction", "backtracking"
    assert found.loc[("apart", *at), "value"] == pytest.approx(1 / 4)
    assert found.loc[("published", *at), "value"] == pytest.approx(1 / 6)


def test_what_has_no_number_is_missing_silently_and_not_zero():
    nothing = member("gpt-4o", np.zeros((0, SIX)))
    assert groups.table([nothing])["value"].isna().all()
    assert np.isnan(groups.overview([nothing])["segments a chain"].item())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        none = member("m", np.zeros((4, 6)))
        found = groups.group_intervals([none], empty="apart")
    fractions = found[found["metric"] == "segment fraction"]
    assert fractions[["value", "low", "high"]].isna().to_numpy().all()


def test_pairs_are_differences_by_common_task():
    found = groups.pairs(two_members()).set_index("behaviour")
    # Common tasks: a (1/4, 1/4, .. 1/2 against 1/2, 1/2) and c (1/2, 1/2 against 1/4, 3/4).
    assert found.loc["initializing", "difference"] == pytest.approx((-1 / 4 + 1 / 4) / 2)
    assert found.loc["deduction", "difference"] == pytest.approx((-1 / 4 - 1 / 4) / 2)
    assert found.loc["backtracking", "difference"] == pytest.approx(1 / 4)
    assert (found["n"] == 2).all()
    # Two equal differences: two of the four sign patterns are as extreme.
    assert found.loc["deduction", "p"] == 2 / 4
    assert (found["p_holm"] >= found["p"]).all()
    assert found["p_holm"].max() <= 1


def test_a_model_is_paired_with_one_of_its_own_source_or_not_at_all():
    thinking, instruct = two_members()
    found = groups.pairs([thinking, member("gpt-4o", np.ones((3, SIX)))])
    assert found.empty
    assert found.columns.tolist()[-2:] == ["p", "p_holm"]
    other = replace(instruct, source="released", display="other", task_ids=("0", "1"))
    found = groups.pairs([thinking, instruct, other])
    assert found["instruct"].unique().tolist() == ["tiny-instruct"]


# -- what may be compared ------------------------------------------------------------------

#: What two models may differ in, in a way that keeps their numbers apart.
WAYS = (
    {"tasks": "messages"},
    {"annotator": "offline"},
    {"reader": "published"},
    {"asked": tuple("abcdefgh")},
    {"kind": "thinking"},
)


@pytest.mark.parametrize("way", WAYS)
def test_a_group_is_one_kind_one_task_set_one_annotator_one_reader(way):
    own = member("tiny-instruct", [[0, 1, 0, 0, 0, 0]] * 3, asked=tuple("abc"))
    real = member("smollm2", [[0, 5, 0, 0, 0, 0]] * 3, asked=tuple("abc"))
    found = groups.group_intervals([own, real], empty="apart")
    assert found[found["behaviour"] == "all"]["value"].tolist() == [3]  # of 1 and 5
    found = groups.group_intervals([own, replace(real, **way)], empty="apart")
    totals = found[found["behaviour"] == "all"]
    assert totals["value"].tolist() == [1, 5]
    assert totals["models"].tolist() == [1, 1]
    # Each row is told apart by what is shown: no mean of the two can be made of the table.
    assert not totals.duplicated(["kind", "tasks", "annotator", "reader"]).any()


@pytest.mark.parametrize("way", WAYS[:-1])
def test_a_pair_measured_in_two_ways_is_named_and_not_subtracted(way):
    pair = [replace(one, asked=tuple("abc")) for one in two_members()]
    assert groups.unpaired(pair).empty
    assert len(groups.pairs(pair)) == SIX
    apart = [pair[0], replace(pair[1], **way)]
    assert groups.pairs(apart).empty
    (row,) = groups.unpaired(apart).itertuples(index=False)
    assert (row[0], row[2]) == PAIRED
    assert row[1] != row[3]


def test_one_name_for_two_samples_of_tasks_is_told_apart_by_number_and_hash():
    members = [
        member("tiny-instruct", np.ones((2, SIX)), tasks="ab", asked=("a", "b")),
        member("smollm2", np.ones((2, SIX)), tasks="ac", asked=("a", "c")),
    ]
    members = [replace(one, tasks="messages") for one in members]
    names = [setup.tasks for setup in groups.setups(members)]
    assert names[0] != names[1]
    assert all(name.startswith("messages (2 tasks, ") for name in names)
    assert groups.setups(members[:1])[0].tasks == "messages"
    lacking = [annotation("a", "deduction"), annotation("b", failed="no reply")]
    whole = [annotation("b", "deduction"), annotation("a", "deduction")]
    members = [
        groups.member(MODELS["tiny-instruct"], lacking, tasks="messages"),
        groups.member(MODELS["smollm2"], whole, tasks="messages"),
    ]
    assert len(groups.groups(members)) == 1, "an unavailable chain was asked too"


def test_no_notebook_makes_a_mean_by_the_way():
    """``pivot_table`` and ``groupby(...).mean()`` average whatever a table tells apart by a
    column that the call does not name: this is how notebook 05 averaged two annotators."""
    root = Path(__file__).resolve().parents[1] / "notebooks"
    books = sorted(root.glob("0*.ipynb"))
    assert books
    for book in books:
        for cell in json.loads(book.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                for word in ("pivot_table", "groupby"):
                    assert word not in "".join(cell["source"]), f"{book.name} {cell['id']}"


# -- the samples of tasks ------------------------------------------------------------------


def sampled(name: str, n: int = 30, **changes) -> Member:
    """A model with random counts, some chains without segments."""
    rng = np.random.default_rng([*name.encode()])
    counts = rng.poisson(0.5, size=(n, SIX))
    counts[::7] = 0
    return member(name, counts, tasks=[f"task-{i}" for i in range(n)], **changes)


def without(one: Member, task: str) -> Member:
    """The member without its chain of a task."""
    kept = [i for i, name in enumerate(one.task_ids) if name != task]
    ids = tuple(one.task_ids[i] for i in kept)
    return replace(one, task_ids=ids, counts=one.counts[kept], unavailable=1)


def turned(one: Member) -> Member:
    """The same chains in another order."""
    order = np.random.default_rng(5).permutation(len(one.task_ids))
    ids = tuple(one.task_ids[i] for i in order)
    return replace(one, task_ids=ids, counts=one.counts[order])


def test_an_interval_changes_with_its_own_models_only():
    """Of a model, a group and a pair: the same bits whoever else is compared, in any order."""
    thinker, instruct, other = (sampled(name) for name in (*PAIRED, "smollm2"))

    def model(members):
        rows = groups.table(members)
        return rows[rows["model"] == "tiny-thinker"].reset_index(drop=True)

    def group(members):
        rows = groups.treatments(members)
        return rows[rows["kind"] == "instruct"].reset_index(drop=True)

    for of, base, same, changed in (
        (model, [thinker], [other, turned(thinker)], [without(thinker, "task-1")]),
        (
            group,
            [thinker, instruct, other],
            [turned(other), without(thinker, "task-4"), turned(instruct)],
            [without(instruct, "task-4"), other],
        ),
        (
            groups.pairs,
            [thinker, instruct],
            [without(other, "task-2"), turned(instruct), turned(thinker)],
            [thinker, without(instruct, "task-2")],
        ),
    ):  # fmt: skip
        expected = of(base)
        pd.testing.assert_frame_equal(of(same), expected, check_exact=True)
        assert not of(changed)["low"].equals(expected["low"])


def test_a_group_of_one_has_the_interval_of_its_model():
    one = sampled("tiny-thinker")
    keys = ["metric", "behaviour"]
    own = groups.table([one]).set_index(keys)[["value", "low", "high"]]
    group = groups.group_intervals([one], empty="apart").set_index(keys)
    pd.testing.assert_frame_equal(group[own.columns].loc[own.index], own, check_exact=True)


def test_group_intervals_equal_a_loop_over_tasks(monkeypatch):
    monkeypatch.setattr(groups, "DRAWS", 400)
    three = [sampled(name, n=12) for name in ("tiny-instruct", "smollm2", "gpt-4o")]
    three[1] = without(three[1], "task-5")
    found = groups.group_intervals(three, empty="apart", seed=3)
    row = found[(found["metric"] == "segment fraction") & (found["behaviour"] == BEHAVIOURS[1])]
    means = []
    names = sorted(three[0].task_ids)
    for times in [np.ones(12, int), *stats.resamples(names, draws=400, seed=3)]:
        tasks = np.repeat(names, times)
        by_model = []
        for one in three:
            chains = dict(zip(one.task_ids, one.counts, strict=True))
            drawn = [chains[task] for task in tasks if task in chains]
            by_model.append(np.mean([c[1] / c.sum() for c in drawn if c.sum()]))
        means.append(np.mean(by_model))
    low, high = np.quantile(means[1:], [0.025, 0.975])
    expected = [means[0], low, high]
    assert row[["value", "low", "high"]].to_numpy().ravel() == pytest.approx(expected)


def test_intervals_equal_scipys_within_the_error_of_sampling():
    """SciPy's percentile bootstrap of the same chains. The end of an interval is a quantile
    of N means, whose standard error is sqrt(p (1 - p) / N) over their density there."""
    from scipy import stats as reference

    one = sampled("tiny-thinker", n=50)
    rows = groups.table([one]).set_index(["metric", "behaviour"])
    totals = one.counts.sum(1)
    shares = np.where(totals > 0, one.counts[:, 1] / np.clip(totals, 1, None), np.nan)
    for at, values in (
        (("segment count", "all"), totals),
        (("segment fraction", BEHAVIOURS[1]), shares),
    ):
        found = reference.bootstrap(
            (values,), np.nanmean, n_resamples=40_000, method="percentile", rng=1
        )
        p, spread = 0.025, found.bootstrap_distribution.std()
        density = reference.norm.pdf(reference.norm.ppf(p)) / spread
        error = np.sqrt(p * (1 - p) * (1 / groups.DRAWS + 1 / 40_000)) / density
        expected = (found.confidence_interval.low, found.confidence_interval.high)
        assert rows.loc[at, ["low", "high"]].tolist() == pytest.approx(expected, abs=4 * error)


# -- sets of labels of a person's own ------------------------------------------------------


def own(definition: str = "", **changes) -> LabelSet:
    values = {"labels": {"up": definition, "down": ""}, "name": "mine", **changes}
    return LabelSet.from_dict(values)


def labelled(name: str, labels: LabelSet, *per_task: Sequence[str]) -> Member:
    chains = [annotation("abc"[i], *names) for i, names in enumerate(per_task)]
    given = {"tasks": "grammar", "annotator": "hand", "labels": labels}
    return groups.member(MODELS[name], chains, **given)


def test_a_member_counts_the_labels_of_its_set_and_tables_have_its_names():
    pair = [labelled(name, own(), ["up", "down", "up"], ["down"], ["up"]) for name in PAIRED]
    assert pair[0].counts.tolist() == [[2, 1], [0, 1], [1, 0]]
    table = groups.table(pair)
    rows = table[table["model"] == "tiny-thinker"].set_index(["metric", "behaviour"])["value"]
    assert rows.to_dict() == pytest.approx(
        {
            ("segment count", "up"): 1, ("segment count", "down"): 2 / 3,
            ("segment count", "all"): 5 / 3,
            ("segment fraction", "up"): (2 / 3 + 0 + 1) / 3,
            ("segment fraction", "down"): (1 / 3 + 1 + 0) / 3,
        }
    )  # fmt: skip
    assert table["labels"].unique().tolist() == ["mine"]
    assert groups.pairs(pair)["behaviour"].tolist() == ["up", "down"]
    assert groups.pairs(pair)["difference"].tolist() == [0, 0]
    averages = groups.group_intervals(pair, empty="apart")
    assert averages["behaviour"].unique().tolist() == ["up", "down", "all"]
    assert "labels" not in groups.table([labelled("smollm2", PAPER, ["deduction"])])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (PAPER, ["labels mine", "annotator hand"]),
        (own(name="theirs", definition="x"), ["labels mine", "labels theirs"]),
        (own(definition="something else"), ["labels mine (", "labels mine ("]),
    ],
)
def test_chains_with_other_labels_are_never_averaged_or_subtracted(other, words):
    pair = [labelled("tiny-thinker", own(), ["up"]), labelled("tiny-instruct", other, ["up"])]
    assert groups.pairs(pair).empty
    (row,) = groups.unpaired(pair).itertuples(index=False)
    for said, word in zip((row[1], row[3]), words, strict=True):
        assert word in said
    assert row[1] != row[3]
    alike = [replace(one, kind="instruct") for one in pair]
    assert len(groups.groups(alike)) == 2
    assert "Measured differently" in groups.caption(pair)


def test_colours_and_roles_of_labels_do_not_set_models_apart():
    red = {"definition": "", "colour": "#ff0000"}
    coloured = own(labels={"up": red, "down": ""}, targets=["up"])
    pair = [
        labelled("tiny-thinker", own(), ["up"]),
        labelled("tiny-instruct", coloured, ["up"]),
    ]
    assert len(groups.pairs(pair)) == 2
    copied = LabelSet.from_dict(PAPER.to_dict() | {"name": "mine"})
    assert groups.setups([labelled("smollm2", copied, [])])[0].labels == "", "the paper's"


def test_a_label_that_no_chain_has_is_named():
    pair = [labelled("tiny-thinker", own(), ["up"]), labelled("tiny-instruct", own(), ["up"])]
    assert groups.never(pair) == ["down"]
    assert "In no chain: down." in groups.caption(pair)
    pair[1] = labelled("tiny-instruct", own(), ["down"])
    assert groups.never(pair) == []
    assert "In no chain" not in groups.caption(pair)


def test_a_figure_has_room_for_the_bars_of_all_labels():
    many = LabelSet.from_dict({"labels": {f"label {i}": "" for i in range(12)}})
    three = [labelled(name, PAPER, []) for name in (*PAIRED, "smollm2")]
    assert groups.width(three) == 9
    assert groups.width([labelled(one.name, many, []) for one in three]) == pytest.approx(10.8)
