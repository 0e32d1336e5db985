"""The loop of notebook 05 over models behind an API, against the localhost server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server import Server

from stllms import compare, comparison, prompts, registry, remote
from stllms import tasks as questions
from stllms.artifacts import Folder
from stllms.comparison import Member
from stllms.config import RunConfig
from stllms.registry import UnknownModel

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
def tasks(tmp_path: Path) -> str:
    """Own tasks, of which the last four are compared on."""
    rows = [
        f'{{"id": "q{i}", "category": "verbal logic", "content": "{text}"}}'
        for i, text in enumerate(("Is two more than one?", *QUESTIONS))
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def config(server: Server, tasks: str, folder: Path, model: str, **options) -> RunConfig:
    given = {"n_samples": 1, "n_evaluate": 4, "n_compare": 4, "judge": "lexical"}
    return RunConfig(
        model=model,
        tasks=tasks,
        base_url=server.url,
        results=str(folder),
        **{**given, **options},
    )


def members(setup: RunConfig) -> list[Member]:
    return compare.members(setup, Folder.comparison(setup))


def test_a_model_of_any_server_is_compared_and_stored_in_a_folder_of_its_own(
    server, tasks, tmp_path
):
    setup = config(server, tasks, tmp_path / "r", "api:thinker")
    (one,) = members(setup)
    assert (one.display, one.kind, len(one.task_ids)) == ("thinker", "unknown", 4)
    assert server.calls == {"thinker": 4}
    names = sorted(p.name for p in (tmp_path / "r" / "comparison").iterdir())
    assert names == ["api--thinker"]
    members(setup)
    assert server.total == 4  # all stored


@pytest.mark.parametrize("style", ["sound", "published"])
def test_the_prompts_of_the_run_are_sent(server, tasks, tmp_path, style, registered):
    registered("thinks", "thinker")
    setup = config(server, tasks, tmp_path, "thinks", prompts=style)
    members(setup)
    asked = [task.content for task in questions.for_run(setup, "compare")]
    assert sorted(server.texts) == sorted(prompts.prompt(q, "thinking", style) for q in asked)


def test_a_model_that_thinks_when_told_to_is_told(server, tasks, tmp_path):
    setup = config(server, tasks, tmp_path, "claude-3.7-sonnet", max_tokens_compare=2000)
    assert setup.settings.temperature != 1
    (one,) = members(setup)
    assert (one.kind, len(one.task_ids), one.unavailable) == ("thinking", 4, 0)
    assert server.fields["reasoning"] == {"effort": "high"}
    assert server.fields["temperature"] == 1


def test_a_task_that_failed_at_the_api_is_unavailable(server, tasks, tmp_path, capsys):
    setup = config(server, tasks, tmp_path, "api:picky")
    (one,) = members(setup)
    assert len(one.task_ids) == 3
    row = comparison.ledger([one]).iloc[0]
    assert (row["chains"], row["unavailable"]) == (3, 1)
    assert "1 of 4 tasks failed" in capsys.readouterr().out


def test_a_model_that_answers_nothing_is_a_member_without_chains(server, tasks, tmp_path):
    (one,) = members(config(server, tasks, tmp_path, "api:silent"))
    assert (len(one.task_ids), one.unavailable) == (0, 4)


def test_a_chain_whose_reasoning_is_withheld_is_unavailable_and_not_empty(
    server, tasks, tmp_path, registered, capsys
):
    registered("shy", "instruct")
    (one,) = members(config(server, tasks, tmp_path, "shy"))
    assert (len(one.task_ids), one.empty, one.unavailable) == (0, 0, 4)
    warned = [
        line for line in capsys.readouterr().out.splitlines() if "without reasoning" in line
    ]
    assert len(warned) == 1
    assert warned[0].startswith("instruct: 4 of 4 chains of a thinking model")


def test_a_limit_that_a_provider_refuses_is_named_before_any_call(server, tasks, tmp_path):
    setup = config(
        server, tasks, tmp_path, "api:thinker", compare=("claude-3.7-sonnet",), max_tokens=96
    )
    with pytest.raises(ValueError, match=r"max_tokens_compare: 96.*claude-3\.7-sonnet.*1025"):
        members(setup)
    assert server.total == 0


def test_two_models_of_one_display_name_go_by_their_owners(server, tasks, tmp_path):
    counts = comparison.metrics.segment_counts([])
    same = [
        Member(f"api:{owner}/m", "m", "unknown", None, (), counts) for owner in ("ann", "bob")
    ]
    other = Member("api:n", "n", "unknown", None, (), counts)
    found = compare._distinct([*same, other])
    assert [one.display for one in found] == ["api:ann/m", "api:bob/m", "n"]


# --- api:ID ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected", "display", "kind", "folder"),
    [
        ("api:some/New.Model", "api:some/New.Model", "New.Model", "unknown", "some--new.model"),
        ("API:new", "api:new", "new", "unknown", "new"),
        (
            "api:deepseek/deepseek-r1",
            "api:deepseek/deepseek-r1",
            "deepseek-r1",
            "thinking",
            "deepseek--deepseek-r1",
        ),
        ("api:a/b/c", "api:a/b/c", "c", "unknown", "a--b--c"),
        ("api:Qwen/Qwen2.5-14B-Instruct", None, "Qwen2.5-14B-Instruct", "instruct", None),
        (
            "api:anthropic/claude-3.7-sonnet:beta",
            None,
            "claude-3.7-sonnet:beta",
            "unknown",
            None,
        ),
    ],
)
def test_any_id_of_a_server_has_an_entry(name, expected, display, kind, folder):
    entry = compare.resolve(name)
    assert (entry.source, entry.display, entry.kind) == ("api", display, kind)
    assert entry.name == (expected or name)
    assert entry.api_id == entry.name.removeprefix("api:")
    assert compare.resolve(entry.name) == entry
    if folder:
        assert RunConfig(model=name).folder.name == f"api--{folder}"


def test_an_id_of_the_registry_is_the_registrys_model():
    for name, expected in (
        ("api:deepseek-reasoner", "deepseek-r1"),
        ("api:gpt-4o", "gpt-4o"),
        ("api:Anthropic/claude-3.7-sonnet", "claude-3.7-sonnet"),
    ):
        assert RunConfig(model=name).model == expected


def test_folders_of_ids_are_plain_names_and_differ():
    names = ["api:qwen3:8b", "api:qwen3-8b", "api:qwen3@8b", "api:../../x", "api:/", "api:模型"]
    folders = [RunConfig(model=name).folder for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert folder.parent == RunConfig().folder.parent
        assert set(folder.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")


@pytest.mark.parametrize("name", ["api:", "api: ", "api:two words"])
def test_an_id_that_is_none_is_refused_in_one_line(name):
    with pytest.raises(UnknownModel, match=r"unknown model 'api:.*expected api:ID") as caught:
        compare.resolve(name)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_is_told_of_api_ids():
    with pytest.raises(UnknownModel, match=r"or api:ID"):
        compare.resolve("no-such-model")


def test_a_kernel_gets_the_same_model():
    setup = RunConfig(model="api:deepseek/deepseek-r1", compare=("api:x:1",))
    assert RunConfig.from_parameters(**setup.parameters()).models == setup.models
    assert setup.models == ("api:deepseek/deepseek-r1", "api:x:1")


def test_a_finished_run_joins_with_the_chains_it_has():
    path = REFERENCE / "tiny-thinker"
    one = compare.of_run(path)
    assert (one.name, one.source, one.tasks) == ("tiny-thinker", "folder", "grammar")
    assert len(one.task_ids) + one.unavailable == 200, "the default profile"
    assert one.counts.sum() > 600
    again = compare._apart(one, [one])
    assert again.display == "tiny-thinker (folder)"


def test_a_run_without_labels_of_its_annotator_is_refused_by_name(tmp_path):
    for name in ("run.json", "annotations.jsonl"):
        (tmp_path / name).write_bytes((REFERENCE / "tiny-thinker" / name).read_bytes())
    content = (
        (tmp_path / "run.json").read_text().replace('"judge": "auto"', '"judge": "lexical"')
    )
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="no annotations by lexical, the run's annotator"):
        compare.of_run(tmp_path)
