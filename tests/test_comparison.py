"""Models side by side: hand-made members, the released files, tables for display."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from stllms import compare, comparison, plots, tables, tasks
from stllms.comparison import Member
from stllms.config import MODELS, RunConfig
from stllms.records import BEHAVIOURS, Annotation, PlacedSegment, Task
from stllms.vectors import Stability

SIX = len(BEHAVIOURS)


def member(name: str, counts, tasks: Sequence[str] = "abcdefgh", **changes) -> Member:
    entry = MODELS.get(name, comparison.NOWHERE)
    counts = np.asarray(counts, dtype=float)
    one = Member(
        name, entry.display or name, entry.kind, entry.pair, tuple(tasks[: len(counts)]), counts
    )
    return replace(one, **changes)


def annotation(task: str, *labels: str, failed: str | None = None) -> Annotation:
    segments = tuple(PlacedSegment(label, "x", i, i + 1) for i, label in enumerate(labels))
    return Annotation(task, "hand", segments, failed=failed)


# --- members -----------------------------------------------------------------------------


def test_a_member_counts_its_segments_and_sets_failed_chains_apart():
    one = comparison.member(
        MODELS["tiny-thinker"],
        [
            annotation("a", "deduction", "deduction", "backtracking"),
            annotation("b"),
            annotation("c", failed="no reply"),
        ],
    )
    assert one.task_ids == ("a", "b")
    assert one.counts.tolist() == [[0, 2, 0, 0, 0, 1], [0] * 6]
    assert (one.empty, one.unavailable) == (1, 1)
    row = comparison.ledger([one]).iloc[0]
    assert row["chains"] == 2
    assert row["segments a chain"] == 1.5


def test_counts_of_another_shape_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(2, 6\).*\(2, 5\)"):
        member("x", np.zeros((2, 5)))


def test_the_order_is_by_pairs_thinking_first_and_unknown_models_last():
    names = list(MODELS)
    pair = ("r1-distill-llama-8b", "llama-3.1-8b-instruct")
    shuffled = [
        member("zeta", np.ones((1, SIX))),
        member(pair[1], np.ones((1, SIX))),
        member("tiny-instruct", np.ones((1, SIX))),
        member("alpha", np.ones((1, SIX))),
        member(pair[0], np.ones((1, SIX))),
        member("tiny-thinker", np.ones((1, SIX))),
        member("r1-distill-qwen-1.5b", np.ones((1, SIX))),
    ]
    expected = [
        "tiny-thinker",
        "tiny-instruct",
        "r1-distill-qwen-1.5b",
        *pair,
        "alpha",
        "zeta",
    ]
    for turn in range(len(shuffled)):
        turned = shuffled[turn:] + shuffled[:turn]
        assert [one.name for one in comparison.ordered(turned)] == expected
    assert names.index("r1-distill-qwen-1.5b") < names.index(pair[0])


def test_an_instruct_model_alone_stands_where_its_pair_would():
    alone = [member(n, np.ones((1, SIX))) for n in ("gpt-4o", "qwen2.5-1.5b-instruct")]
    found = [one.name for one in comparison.ordered(alone)]
    assert found == ["qwen2.5-1.5b-instruct", "gpt-4o"]


def test_pairs_share_a_hue_the_instruct_model_is_paler_and_no_colour_is_used_twice():
    import colorsys

    every = [member(name, np.ones((1, SIX))) for name in MODELS]
    chosen = comparison.colours(every)
    assert len(set(chosen.values())) == len(MODELS)
    for one in every:
        assert all(0 <= part <= 1 for part in chosen[one.display])
        if one.kind == "thinking" and one.pair:
            other = MODELS[one.pair].display
            hues = [colorsys.rgb_to_hls(*chosen[d])[0] for d in (one.display, other)]
            light = [colorsys.rgb_to_hls(*chosen[d])[1] for d in (one.display, other)]
            assert hues[0] == pytest.approx(hues[1], abs=1e-6)
            assert light[1] > light[0] + 0.1
    assert comparison.colours([]) == {}


# --- tables ------------------------------------------------------------------------------


def two_members() -> list[Member]:
    thinking = member("tiny-thinker", [[1, 1, 0, 0, 0, 2], [0] * 6, [2, 2, 0, 0, 0, 0]])
    instruct = member("tiny-instruct", [[1, 3, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]], "cax")
    return [thinking, instruct]


def test_the_table_has_mean_counts_and_fractions_by_hand():
    rows = comparison.table(two_members()).set_index(["model", "metric", "behaviour"])
    value = rows["value"]
    assert value["tiny-thinker", "segment count", "backtracking"] == pytest.approx(2 / 3)
    assert value["tiny-thinker", "segment count", "all"] == pytest.approx(8 / 3)
    # Chain b has no segment: apart, the mean is over a (1/2) and c (0).
    at = "tiny-thinker", "segment fraction", "backtracking"
    assert value[at] == pytest.approx(1 / 4)
    assert rows.loc[at, "n"] == 2
    published = comparison.table(two_members(), empty="published")
    again = published.set_index(["model", "metric", "behaviour"])
    assert again.loc[at, "value"] == pytest.approx(1 / 6)
    assert again.loc[at, "n"] == 3


def test_group_averages_weigh_models_equally():
    models = [*two_members(), member("gpt-4o", [[4, 0, 0, 0, 0, 0]] * 5)]
    found = comparison.group_intervals(models, empty="apart", draws=50)
    found = found.set_index(["kind", "metric", "behaviour"])
    both = found.loc[("instruct", "segment fraction", "initializing")]
    assert both["models"] == 2
    assert both["value"] == pytest.approx(((1 / 4 + 1 / 2) / 2 + 1) / 2)


def test_a_group_without_any_segment_has_no_fractions_and_says_so_silently():
    none = member("m", np.zeros((4, 6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = comparison.group_intervals([none], empty="apart", draws=20)
    fractions = found[found["metric"] == "segment fraction"]
    assert fractions[["value", "low", "high"]].isna().to_numpy().all()


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
    found = comparison.group_intervals([own, real], empty="apart", draws=50)
    assert found[found["behaviour"] == "all"]["value"].tolist() == [3]  # of 1 and 5
    found = comparison.group_intervals([own, replace(real, **way)], empty="apart", draws=50)
    totals = found[found["behaviour"] == "all"]
    assert totals["value"].tolist() == [1, 5]
    assert totals["models"].tolist() == [1, 1]
    # Each row is told apart by what is shown: no mean of the two can be made of the table.
    assert not totals.duplicated(["kind", "tasks", "annotator", "reader"]).any()


@pytest.mark.parametrize("way", [one for one in WAYS if "kind" not in one])
def test_a_pair_measured_in_two_ways_is_named_and_not_subtracted(way):
    pair = [replace(one, asked=tuple("abc")) for one in two_members()]
    assert comparison.unpaired(pair).empty
    assert len(comparison.pairs(pair)) == SIX
    apart = [pair[0], replace(pair[1], **way)]
    assert comparison.pairs(apart).empty
    (row,) = comparison.unpaired(apart).itertuples(index=False)
    assert (row[0], row[2]) == ("tiny-thinker", "tiny-instruct")
    assert row[1] != row[3]


def test_one_name_for_two_samples_of_tasks_is_told_apart_by_number_and_hash():
    members = [
        member("tiny-instruct", np.ones((2, SIX)), tasks="ab", asked=("a", "b")),
        member("smollm2", np.ones((2, SIX)), tasks="ac", asked=("a", "c")),
    ]
    members = [replace(one, tasks="messages") for one in members]
    names = [setup.tasks for setup in comparison.setups(members)]
    assert names[0] != names[1]
    assert all(name.startswith("messages (2 tasks, ") for name in names)
    assert comparison.setups(members[:1])[0].tasks == "messages"


def test_an_unavailable_chain_leaves_the_task_set_what_it_was():
    lacking = [annotation("a", "deduction"), annotation("b", failed="no reply")]
    whole = [annotation("b", "deduction"), annotation("a", "deduction")]
    members = [
        comparison.member(MODELS["tiny-instruct"], lacking, tasks="messages"),
        comparison.member(MODELS["smollm2"], whole, tasks="messages"),
    ]
    assert len(comparison.groups(members)) == 1


def test_chains_of_one_model_by_two_annotators_or_readers_are_refused():
    by = replace(annotation("b", "deduction"), annotator="offline")
    with pytest.raises(
        ValueError, match=r"tiny-thinker: chains of several annotators \(hand, of"
    ):
        comparison.member(MODELS["tiny-thinker"], [annotation("a", "deduction"), by])
    read = [
        replace(annotation(task, "deduction"), ledger={"reader": reader})
        for task, reader in (("a", "tolerant"), ("b", "published"))
    ]
    with pytest.raises(ValueError, match=r"several readers \(published, tolerant\)"):
        comparison.member(MODELS["tiny-thinker"], read)
    assert comparison.member(MODELS["tiny-thinker"], read[:1]).reader == "tolerant"


def test_a_task_that_occurs_twice_is_refused():
    with pytest.raises(ValueError, match="tiny-thinker: task 'a' occurs twice"):
        member("tiny-thinker", np.ones((2, SIX)), tasks="aa")


def test_no_notebook_makes_a_mean_by_the_way():
    """``pivot_table`` and ``groupby(...).mean()`` average whatever a table tells apart by a
    column that the call does not name: this is how notebook 05 averaged two annotators."""
    root = Path(__file__).resolve().parents[1] / "notebooks"
    books = sorted(root.glob("0*.ipynb"))
    assert len(books) == 6
    for book in books:
        for cell in json.loads(book.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                for word in ("pivot_table", "groupby"):
                    assert word not in "".join(cell["source"]), f"{book.name} {cell['id']}"


def test_figures_hatch_what_was_measured_otherwise_and_the_legend_says_how():
    from matplotlib.figure import Figure

    alike = two_members()
    apart = [*alike, member("smollm2", np.ones((2, SIX)), annotator="offline")]
    looks = []
    for compared in (alike, apart):
        rows, figure = comparison.table(compared), Figure()
        axes, palette = figure.subplots(1, 2), comparison.colours(compared)
        plots.compare(axes[0], rows, metric="segment count", palette=palette)
        plots.totals(axes[1], rows, palette=palette)
        plots.models_legend(figure, palette, rows)
        bars = [{bar.get_hatch() or "" for bar in group} for group in axes[0].containers[::2]]
        sideways = [{bar.get_hatch() or ""} for bar in axes[1].containers[0]]
        assert bars == sideways
        looks.append((bars, [text.get_text() for text in figure.legends[0].texts]))
    (plain, names), (hatched, told) = looks
    assert plain == [{""}, {""}]
    assert names == ["tiny-thinker", "tiny-instruct"]
    assert hatched == [{""}, {""}, {"///"}]
    assert told[2] == "SmolLM2-135M-Instruct\n(annotator offline)"


# --- the samples of tasks ----------------------------------------------------------------


def sampled(name: str, n: int = 30, seed: int = 0, **changes) -> Member:
    """A model with random counts, some chains without segments."""
    rng = np.random.default_rng([seed, *name.encode()])
    counts = rng.poisson(0.5, size=(n, SIX))
    counts[::7] = 0
    ids = [f"task-{i}" for i in range(n)]
    return member(name, counts, tasks=ids, **changes)


PAIRED = ("tiny-thinker", "tiny-instruct")


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


def by_model(members, names) -> list[pd.DataFrame]:
    rows = comparison.table(members)
    return [rows[rows["model"] == n].reset_index(drop=True) for n in names]


def test_a_models_interval_is_the_same_whoever_else_is_compared():
    thinker, instruct, other = (sampled(name) for name in (*PAIRED, "smollm2"))
    alone = by_model([thinker], PAIRED[:1])[0]
    for beside in (
        [thinker, instruct, other],
        [other, instruct, thinker],
        [without(instruct, "task-3"), thinker],
        [turned(thinker), without(other, "task-0")],
    ):
        pd.testing.assert_frame_equal(by_model(beside, PAIRED[:1])[0], alone, check_exact=True)


def test_a_groups_interval_changes_with_its_members_only():
    thinker, instruct, other = (sampled(name) for name in (*PAIRED, "smollm2"))

    def of(members, kind="instruct"):
        found = comparison.treatments(members)
        return found[found["kind"] == kind].reset_index(drop=True)

    base = of([thinker, instruct, other])
    assert (base["models"] == 2).all()
    for beside in (
        [other, instruct],
        [turned(other), without(thinker, "task-4"), turned(instruct)],
    ):
        pd.testing.assert_frame_equal(of(beside), base, check_exact=True)
    changed = of([thinker, without(instruct, "task-4"), other])
    assert not changed["low"].equals(base["low"])


def test_a_group_of_one_has_the_interval_of_its_model():
    one = sampled("tiny-thinker")
    own = comparison.table([one]).set_index(["metric", "behaviour"])[["value", "low", "high"]]
    group = comparison.group_intervals([one], empty="apart").set_index(["metric", "behaviour"])
    pd.testing.assert_frame_equal(group[own.columns].loc[own.index], own, check_exact=True)


def test_models_of_a_group_share_their_samples_although_one_lacks_a_chain():
    """Two models with the same numbers, one chain of one missing: the mean of the two varies
    like one of them. With samples of their own it would be narrower by a root of two."""
    one = sampled("tiny-instruct", n=60)
    two = without(sampled("tiny-instruct", n=60), "task-3")
    two = replace(two, name="smollm2", display="two")

    def width(members):
        found = comparison.group_intervals(members, empty="published")
        row = found[(found["behaviour"] == "all")].iloc[0]
        return row["high"] - row["low"]

    assert width([one, two]) / width([one]) == pytest.approx(1, abs=0.06)


def test_a_pairs_interval_changes_with_its_two_models_only():
    thinker, instruct, other = (sampled(name) for name in (*PAIRED, "smollm2"))
    base = comparison.pairs([thinker, instruct])
    again = comparison.pairs([without(other, "task-2"), turned(instruct), turned(thinker)])
    pd.testing.assert_frame_equal(again, base, check_exact=True)
    assert not comparison.pairs([thinker, without(instruct, "task-2")])["low"].equals(
        base["low"]
    )


def test_intervals_equal_scipys_within_the_error_of_sampling():
    """SciPy's percentile bootstrap of the same chains. The end of an interval is a quantile
    of N means, whose standard error is sqrt(p (1 - p) / N) over their density there."""
    from scipy import stats

    one = sampled("tiny-thinker", n=50)
    rows = comparison.table([one]).set_index(["metric", "behaviour"])
    totals = one.counts.sum(1)
    shares = np.where(totals > 0, one.counts[:, 1] / np.clip(totals, 1, None), np.nan)
    for at, values in (
        (("segment count", "all"), totals),
        (("segment fraction", BEHAVIOURS[1]), shares),
    ):
        found = stats.bootstrap(
            (values,), np.nanmean, n_resamples=40_000, method="percentile", rng=1
        )
        spread = found.bootstrap_distribution.std()
        p, normal = 0.025, stats.norm
        density = normal.pdf(normal.ppf(p)) / spread
        error = np.sqrt(p * (1 - p) * (1 / comparison.DRAWS + 1 / 40_000)) / density
        expected = (found.confidence_interval.low, found.confidence_interval.high)
        assert rows.loc[at, ["low", "high"]].tolist() == pytest.approx(expected, abs=4 * error)


def test_both_treatments_of_empty_chains_stand_beside_each_other():
    found = comparison.treatments(two_members()).set_index(
        ["empty chains", "kind", "metric", "behaviour"]
    )["value"]
    at = "thinking", "segment fraction", "backtracking"
    assert found[("apart", *at)] == pytest.approx(1 / 4)
    assert found[("published", *at)] == pytest.approx(1 / 6)


def test_a_model_without_chains_is_missing_and_not_zero():
    nothing = member("gpt-4o", np.zeros((0, SIX)))
    rows = comparison.table([nothing])
    assert rows["value"].isna().all()
    assert np.isnan(comparison.ledger([nothing])["segments a chain"].item())


def test_pairs_are_differences_by_common_task():
    found = comparison.pairs(two_members()).set_index("behaviour")
    # Common tasks: a (1/4, 1/4, .. 1/2 against 1/2, 1/2) and c (1/2, 1/2 against 1/4, 3/4).
    assert found.loc["initializing", "difference"] == pytest.approx((-1 / 4 + 1 / 4) / 2)
    assert found.loc["deduction", "difference"] == pytest.approx((-1 / 4 - 1 / 4) / 2)
    assert found.loc["backtracking", "difference"] == pytest.approx(1 / 4)
    assert (found["n"] == 2).all()
    # Two equal differences: two of the four sign patterns are as extreme.
    assert found.loc["deduction", "p"] == 2 / 4
    assert (found["p_holm"] >= found["p"]).all()
    assert found["p_holm"].max() <= 1


def test_models_without_their_pair_give_an_empty_table_of_pairs():
    found = comparison.pairs([two_members()[0], member("gpt-4o", np.ones((3, SIX)))])
    assert found.empty
    assert found.columns.tolist()[-2:] == ["p", "p_holm"]


def test_a_released_model_is_paired_with_a_released_one():
    run, instruct = two_members()
    other = replace(instruct, source="released", display="other", task_ids=("0", "1"))
    found = comparison.pairs([run, instruct, other])
    assert found["instruct"].unique().tolist() == ["tiny-instruct"]
    assert (found["n"] == 2).all()


def test_the_caption_says_who_was_asked_or_labelled_otherwise():
    alike = [annotation("a", "deduction")]
    own = [
        comparison.member(MODELS[name], alike, tasks="grammar", annotator="grammar")
        for name in ("tiny-thinker", "tiny-instruct")
    ]
    assert "differently" not in comparison.caption(own)
    real = comparison.member(MODELS["smollm2"], alike, tasks="messages", annotator="offline")
    text = comparison.caption([*own, real])
    assert "tiny-thinker and tiny-instruct: tasks grammar, annotator grammar" in text
    assert "SmolLM2-135M-Instruct: tasks messages, annotator offline" in text
    row = comparison.ledger([real]).iloc[0]
    assert (row["tasks"], row["annotator"]) == ("messages", "offline")


def test_the_caption_names_chains_and_warns_of_fixtures():
    text = comparison.caption([*two_members(), member("gpt-4o", np.ones((1, SIX)))])
    assert "tiny-thinker (3 chains)" in text
    assert "tiny-thinker and tiny-instruct: fixtures" in text
    assert "fixture" not in comparison.caption([member("gpt-4o", np.ones((1, SIX)))])


# --- the loop over stages, its pure parts ------------------------------------------------


def test_a_released_file_has_the_counts_that_are_stored_in_it(published):
    for path in sorted(published.glob("reasoning_comparison_*.json"))[:2]:
        one = compare.of_released(path, "published-counts")
        stored = [row["label_counts"] for row in json.loads(path.read_text())]
        expected = [[counts.get(b, 0) for b in BEHAVIOURS] for counts in stored]
        assert one.counts.tolist() == expected
        assert len(one.task_ids) == 100
        entry = MODELS[one.name]
        assert entry.hub_id.split("/")[1].lower() in path.name
        assert (one.kind, one.pair) == (entry.kind, entry.pair)


def released_file(folder, name: str):
    row = {
        "response": "",
        "thinking_process": "a b",
        "label_counts": {},
        "annotated_response": '["deduction"] a ["end-section"] [backtracking] b',
    }
    path = folder / f"reasoning_comparison_{name}.json"
    path.write_text(json.dumps([row]))
    return path


def test_a_released_model_that_nobody_knows_keeps_its_name(tmp_path):
    one = compare.of_released(released_file(tmp_path, "foo-7b-instruct"), "tolerant")
    assert (one.name, one.display, one.kind) == (
        "foo-7b-instruct",
        "foo-7b-instruct",
        "instruct",
    )
    assert one.counts.tolist() == [[0, 1, 0, 0, 0, 1]]
    assert compare.of_released(released_file(tmp_path, "bar"), "tolerant").kind == "unknown"


def test_a_model_of_the_run_and_its_released_chains_are_two_members(tmp_path, monkeypatch):
    entry = MODELS["r1-distill-qwen-1.5b"]
    released_file(tmp_path, "deepseek-r1-distill-qwen-1.5b")
    released_file(tmp_path, "deepseek-r1-distill-llama-8b")
    own = member(entry.name, np.ones((2, SIX)))
    monkeypatch.setattr(compare, "of_model", lambda *_: own)

    class AnyFolder:
        def member(self, _name):
            return None

    config = RunConfig(model=entry.name, published=str(tmp_path))
    found = compare.members(config, AnyFolder())
    assert [one.display for one in found] == [
        entry.display,
        f"{entry.display} (released)",
        "R1-Distill-Llama-8B",
    ]
    assert len(set(comparison.colours(found).values())) == 3


# --- the tasks of a run ------------------------------------------------------------------


def test_the_embedded_model_takes_its_held_out_questions():
    config = RunConfig(model="tiny-thinker", profile="smoke")
    build, evaluate, again = (
        tasks.for_run(config, p) for p in ("build", "evaluate", "compare")
    )
    assert (len(build), len(evaluate)) == (16, 8)
    assert again == evaluate
    assert not {t.content for t in build} & {t.content for t in evaluate}
    other = tasks.for_run(RunConfig(model="tiny-thinker", profile="smoke", seed=1), "build")
    assert {t.content for t in other} != {t.content for t in build}


def test_a_real_model_takes_the_tasks_of_messages_and_compares_on_a_balanced_sample():
    config = RunConfig(model="r1-distill-qwen-1.5b", profile="paper")
    assert tasks.for_run(config, "build") == tasks.load("train")
    assert tasks.for_run(config, "evaluate") == tasks.load("evaluate")
    compared = tasks.for_run(config, "compare")
    assert set(tasks.overview(compared).values()) == {10}
    assert len(tasks.overview(compared)) == 10
    assert set(compared) <= set(tasks.load("train"))
    many = RunConfig(model="r1-distill-qwen-1.5b", n_evaluate=51)
    with pytest.raises(ValueError, match="51 tasks asked for, between 1 and 50"):
        tasks.for_run(many, "evaluate")


def test_a_persons_own_tasks_are_cut_into_building_and_evaluation(tmp_path, monkeypatch):
    lines = [json.dumps({"id": f"q{i}", "content": f"What is {i}?"}) for i in range(6)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("HOME", str(tmp_path))
    config = RunConfig(tasks="~/mine.jsonl", n_samples=4, n_evaluate=2, n_compare=3)
    ids = {
        p: [t.id for t in tasks.for_run(config, p)] for p in ("build", "evaluate", "compare")
    }
    assert ids == {
        "build": ["q0", "q1", "q2", "q3"],
        "evaluate": ["q4", "q5"],
        "compare": ["q0", "q1", "q2"],
    }
    with pytest.raises(ValueError, match=r"mine\.jsonl, evaluate: 7 tasks asked for"):
        tasks.for_run(replace(config, n_evaluate=3), "evaluate")
    with pytest.raises(ValueError, match=r"unknown part 'train' of a run: .*build"):
        tasks.for_run(config, "train")


def test_the_overview_counts_categories_in_their_order():
    chosen = [Task("1", "b", "?"), Task("2", "a", "?"), Task("3", "b", "?")]
    assert list(tasks.overview(chosen).items()) == [("b", 2), ("a", 1)]
    assert tasks.overview([]) == {}


# --- tables ------------------------------------------------------------------------------


def test_tensors_become_one_row_a_behaviour_and_one_column_a_layer():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = tables.layers(tables.by_name(values, ["x", "y"]), matrix="embedding", model="m")
    assert found.columns.tolist() == [
        "matrix", "model", "behaviour", "layer 0", "layer 1", "layer 2",
    ]  # fmt: skip
    assert found.iloc[1].tolist() == ["embedding", "m", "y", 4.0, 5.0, 6.0]


def test_growth_has_the_spans_and_the_cosine_of_each_share():
    stability = Stability(
        ("x",),
        (0.5, 1.0),
        torch.tensor([[7], [14]]),
        torch.tensor([[[0.1, 0.2]], [[0.3, 0.4]]]),
    )
    found = tables.growth(stability, 1)
    assert found["spans"].tolist() == [7, 14]
    assert found["cosine"].tolist() == pytest.approx([0.2, 0.4])


def test_tables_are_shown_rounded_with_missing_numbers_named():
    table = pd.DataFrame(
        {
            "name": ["a", None],
            "value": [0.12345, np.nan],
            "whole": [60.0, np.nan],
            "count": [3, 4],
        }
    )
    found = tables.shown(table, 2)
    assert found["value"].tolist() == ["0.12", "n/a"]
    assert found["whole"].tolist() == ["60", "n/a"]
    assert [str(value) for value in found["count"]] == ["3", "4"]
    assert table["value"].iloc[0] == 0.12345, "the table itself stays"
    assert tables.shown(table.iloc[:0]).empty
    assert (
        tables.layer_text({"backtracking": 17, "deduction": 3})
        == "backtracking 17, deduction 3"
    )
