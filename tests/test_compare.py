"""The loop of notebook 05 over models: behind an API (the localhost server), of a run's
folder, of released files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from released_files import chain, write_comparison
from server import Server

from stllms import registry
from stllms.app import compare
from stllms.comparison import groups
from stllms.comparison.groups import Member
from stllms.config import RunConfig
from stllms.generation import prompts, remote
from stllms.records import Annotation, PlacedSegment, to_row
from stllms.registry import MODELS
from stllms.runs.artifacts import Folder

REFERENCE = Path(__file__).parents[1] / "results" / "reference"
QUESTIONS = (
    "How many legs do three spiders have?",
    "Is an unlucky number prime?",
    "Which weighs more, a litre of water or a litre of oil?",
    "Why does ice float?",
)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(autouse=True)
def _patient_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No back-off: the server's bad days are over at once."""
    real = remote.api.Client

    def quick(*given, **options):
        return real(*given, **{"retries": 0, "progress": False, **options})

    monkeypatch.setattr(remote.api, "Client", quick)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a thinking model behind an API into the registry."""

    def put(name: str, api_id: str) -> None:
        entry = registry.ModelEntry(
            name, None, name, kind="thinking", api_id=api_id, source="api"
        )
        monkeypatch.setattr(registry, "_ENTRIES", (entry, *registry._ENTRIES))
        monkeypatch.setitem(registry.MODELS, name, entry)

    return put


@pytest.fixture
def members(server: Server, tmp_path: Path) -> Callable[..., list[Member]]:
    """The members of a comparison on four tasks, labelled by the lexical annotator."""
    rows = [
        f'{{"id": "q{i}", "category": "verbal logic", "content": "{text}"}}'
        for i, text in enumerate(("Is two more than one?", *QUESTIONS))
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(rows) + "\n")

    def of(model: str, **options) -> list[Member]:
        given = {"n_samples": 1, "n_evaluate": 4, "n_compare": 4, "judge": "lexical"}
        place = {"tasks": str(path), "base_url": server.url, "results": str(tmp_path / "r")}
        config = RunConfig(model=model, **{**place, **given, **options})
        return compare.members(config, Folder.comparison(config))

    return of


def test_a_model_of_any_server_is_compared_and_stored_in_a_folder_of_its_own(
    server, members, tmp_path
):
    (one,) = members("api:thinker")
    assert (one.display, one.kind, len(one.task_ids)) == ("thinker", "unknown", 4)
    assert server.calls == {"thinker": 4}
    names = sorted(p.name for p in (tmp_path / "r" / "comparison").iterdir())
    assert names == ["api--thinker"]
    members("api:thinker")
    assert server.total == 4  # all stored


@pytest.mark.parametrize("style", ["sound", "published"])
def test_the_prompts_of_the_run_are_sent(server, members, style, registered):
    registered("thinks", "thinker")
    (one,) = members("thinks", prompts=style)
    assert sorted(one.asked) == ["q0", "q1", "q2", "q3"]
    texts = ("Is two more than one?", *QUESTIONS[:3])
    assert sorted(server.texts) == sorted(prompts.prompt(q, "thinking", style) for q in texts)


def test_a_model_that_thinks_when_told_to_is_told(server, members):
    (one,) = members("claude-3.7-sonnet", max_tokens_compare=2000)
    assert (one.kind, len(one.task_ids), one.unavailable) == ("thinking", 4, 0)
    assert server.fields["reasoning"] == {"effort": "high"}
    assert server.fields["temperature"] == 1, "not the profile's"


def test_a_task_that_failed_at_the_api_is_unavailable(members, capsys):
    (one,) = members("api:picky")
    row = groups.overview([one]).iloc[0]
    assert (row["chains"], row["unavailable"]) == (3, 1)
    assert "1 of 4 tasks failed" in capsys.readouterr().out
    (one,) = members("api:silent")
    assert (len(one.task_ids), one.unavailable) == (0, 4)


def test_a_chain_whose_reasoning_is_withheld_is_unavailable_and_not_empty(
    members, registered, capsys
):
    registered("shy", "instruct")
    (one,) = members("shy")
    assert (len(one.task_ids), one.empty, one.unavailable) == (0, 0, 4)
    lines = capsys.readouterr().out.splitlines()
    (warned,) = [line for line in lines if "without reasoning" in line]
    assert warned.startswith("instruct: 4 of 4 chains of a thinking model")


def test_a_limit_that_a_provider_refuses_is_named_before_any_call(server, members):
    with pytest.raises(ValueError, match=r"max_tokens_compare: 96.*claude-3\.7-sonnet.*1025"):
        members("api:thinker", compare=("claude-3.7-sonnet",), max_tokens=96)
    assert server.total == 0


def test_embedded_models_write_their_chains_and_labels_and_share_their_tasks(members, tmp_path):
    given = {
        "tasks": "grammar",
        "judge": "auto",
        "max_tokens": 24,
        "compare": ("tiny-thinker",),
    }
    thinking, instruct = members("tiny-instruct", **given)
    assert (thinking.name, instruct.name) == ("tiny-thinker", "tiny-instruct")
    assert thinking.tasks == instruct.tasks == thinking.annotator == "grammar"
    assert len(thinking.task_ids) == 4
    assert thinking.task_ids == instruct.task_ids
    folder = tmp_path / "r" / "comparison" / "tiny-instruct"
    for name in ("responses.jsonl", "annotations.jsonl"):
        assert len((folder / name).read_text().splitlines()) == 4
    before = (folder / "responses.jsonl").stat().st_mtime_ns
    again = members("tiny-instruct", **given)[1]
    assert np.array_equal(again.counts, instruct.counts)
    assert (folder / "responses.jsonl").stat().st_mtime_ns == before


def test_two_models_of_one_display_name_go_by_their_owners():
    counts = np.zeros((0, 6))
    same = [
        Member(f"api:{owner}/m", "m", "unknown", None, (), counts) for owner in ("ann", "bob")
    ]
    other = Member("api:n", "n", "unknown", None, (), counts)
    found = compare.distinct([*same, other])
    assert [one.display for one in found] == ["api:ann/m", "api:bob/m", "n"]


def test_a_model_of_the_run_its_folder_and_its_released_chains_are_members_of_their_own(
    tmp_path, monkeypatch
):
    name = "deepseek-r1-distill-qwen-1.5b"
    write_comparison(tmp_path, name, [chain(deduction=2, backtracking=1)])
    write_comparison(tmp_path, "foo-7b-instruct", [chain('["0. {}"]', deduction=1)])
    entry = MODELS["r1-distill-qwen-1.5b"]
    own = Member(entry.name, entry.display, entry.kind, entry.pair, ("a",), np.ones((1, 6)))
    monkeypatch.setattr(compare, "of_model", lambda *_: own)
    config = RunConfig(model=entry.name, published=str(tmp_path), results=str(tmp_path))
    found = compare.members(config, Folder.comparison(config))
    assert [one.display for one in found] == [
        entry.display,
        f"{entry.display} (released)",
        "foo-7b-instruct",
    ]
    assert [one.kind for one in found[1:]] == ["thinking", "instruct"]
    assert [one.counts.tolist() for one in found[1:]] == [
        [[0, 2, 0, 0, 0, 1]],
        [[0, 1, 0, 0, 0, 0]],
    ]
    assert len(set(groups.colours(found).values())) == 3


def test_a_finished_run_joins_with_the_chains_it_has(tmp_path):
    path = REFERENCE / "tiny-thinker"
    one = compare.of_run(path)
    assert (one.name, one.source, one.tasks) == ("tiny-thinker", "folder", "grammar")
    assert len(one.task_ids) + one.unavailable == 200, "the default profile"
    assert one.counts.sum() > 600
    for name in ("run.json", "annotations.jsonl"):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    content = (tmp_path / "run.json").read_text()
    content = content.replace('"judge": "auto"', '"judge": "lexical"')
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="no annotations by lexical, the run's annotator"):
        compare.of_run(tmp_path)


def test_a_finished_run_joins_with_the_labels_that_it_has(tmp_path):
    labels = tmp_path / "mine.yaml"
    labels.write_text("labels:\n  up: {cues: [so]}\n  down: {cues: [but]}\n")
    configuration = {"model": "tiny-thinker", "judge": "lexical", "labels": str(labels)}
    (tmp_path / "run.json").write_text(json.dumps({"configuration": configuration}))
    segments = tuple(
        PlacedSegment(name, "x", i, i + 1) for i, name in enumerate(["down", "up", "down"])
    )
    row = to_row(Annotation("t1", "lexical", segments))
    (tmp_path / "annotations.jsonl").write_text(json.dumps(row) + "\n")
    one = compare.of_run(tmp_path)
    assert one.labels.names == ("up", "down")
    assert one.counts.tolist() == [[1, 2]]
    assert groups.setups([one])[0].labels == "mine"
