"""Judges and replays against a real server: every character and every call accounted for."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server import MODELS, Server

from stllms import annotate, spans
from stllms.annotate import judge, protocols, replay
from stllms.records import BEHAVIOURS, Response
from stllms.replies import FILE, Store, digest

CHAINS = (
    "So I need the area of the field. I recall that an area is side squared. Wait, it is a "
    "circle! For example, take radius 3. Maybe that gives 28.",
    "The question asks for a prime; let me see. Suppose it is 7, because 7 is small. So: 7.",
    "Hmm, perhaps there is no such number at all.\n\nTherefore the answer is none.",
)
LONG = " ".join(
    f"Sentence number {i} says that {i} plus {i} is {2 * i}, because I recall how sums go."
    for i in range(1300)
)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def response(thinking: str, name: str = "t") -> Response:
    return Response(name, "c", "", (), (), thinking, thinking, 0, "", True, True)


def responses(*chains: str) -> list[Response]:
    return [response(chain, f"task {i}") for i, chain in enumerate(chains)]


def ask(server: Server, model: str, folder: Path, **options) -> judge.Judge:
    quick = {"backoff": 0.01, "retries": 1, "timeout": 5.0, "progress": False}
    return judge.Judge(model, base_url=server.url, folder=folder, **{**quick, **options})


# --- good judges --------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["rewrite", "indexed"])
def test_a_good_judge_labels_every_character_of_its_own_chain(server, tmp_path, protocol):
    asked = responses(*CHAINS)
    made = ask(server, "test", tmp_path, protocol=protocol).annotate(asked)
    assert [one.task_id for one in made] == [one.task_id for one in asked]
    for one, chain in zip(made, asked, strict=True):
        assert one.failed is None
        assert one.spans == ()
        assert one.ledger["coverage"] == 1.0
        for segment in one.segments:
            assert chain.thinking[segment.start : segment.end] == segment.text
            assert segment.label in BEHAVIOURS
    summary = spans.summarise(made)  # raises where a ledger does not add up
    assert summary.characters == {"labelled": summary.total}


@pytest.mark.parametrize("protocol", ["rewrite", "indexed"])
def test_labels_are_those_the_judge_gave(server, tmp_path, protocol):
    (one,) = ask(server, "test", tmp_path, protocol=protocol).annotate(responses(CHAINS[0]))
    assert [segment.label for segment in one.segments] == [
        "initializing",
        "adding-knowledge",
        "backtracking",
        "example-testing",
        "uncertainty-estimation",
    ]


@pytest.mark.parametrize("protocol", ["rewrite", "indexed"])
def test_running_again_makes_no_call_and_gives_the_same(server, tmp_path, protocol):
    first = ask(server, "test", tmp_path, protocol=protocol).annotate(responses(*CHAINS))
    calls = server.total
    again = ask(server, "test", tmp_path, protocol=protocol).annotate(responses(*CHAINS))
    assert again == first
    assert server.total == calls == len(CHAINS)


def test_replies_that_come_in_another_order_stay_with_their_chain(server, tmp_path):
    chains = [f"Chain number {i} begins. So it is {i}." for i in range(12)]
    made = ask(server, "shuffled", tmp_path).annotate(responses(*chains))
    assert [one.segments[1].text for one in made] == [f"So it is {i}." for i in range(12)]


def test_another_judge_or_protocol_is_asked_anew(server, tmp_path):
    for model, protocol in (("test", "rewrite"), ("test", "indexed"), ("other", "rewrite")):
        ask(server, model, tmp_path, protocol=protocol).annotate(responses(CHAINS[0]))
    assert server.total == 3


def test_the_name_tells_model_and_protocol(tmp_path):
    options = {"base_url": "http://localhost:1", "folder": tmp_path}
    assert annotate.annotator("openai:gpt-4.1", **options).name == "openai:gpt-4.1"
    indexed = annotate.annotator("openai:qwen2.5:14b#indexed", **options)
    assert indexed.name == "openai:qwen2.5:14b#indexed"
    assert indexed.protocol.name == "indexed"
    assert isinstance(indexed, annotate.Annotator)
    with pytest.raises(ValueError, match="no judge protocol 'guess': choose one of rewrite"):
        judge.Judge("m", protocol="guess", **options)


def test_a_row_names_prompt_and_chain(server, tmp_path):
    ask(server, "test", tmp_path).annotate(responses(CHAINS[0]))
    ((row,),) = Store(tmp_path).load().rows.values()
    assert row["identity"]["protocol"] == "rewrite"
    assert row["identity"]["prompt_version"] == "1"
    assert len(row["identity"]["prompt"]) == 12
    assert row["about"] == {"shown": digest(CHAINS[0])[:16]}
    assert row["body"]["choices"][0]["message"]["content"].startswith('["initializing"]So I')


def test_the_indexed_judge_is_asked_for_structured_output(server, tmp_path):
    ask(server, "test", tmp_path, protocol="indexed").annotate(responses(CHAINS[1]))
    schema = server.fields["response_format"]["json_schema"]
    assert schema["strict"] is True
    assert server.fields["messages"][-1]["content"].startswith("<pieces>\n1| The question asks")
    assert server.fields["temperature"] == 0


def test_an_estimate_costs_nothing(server, tmp_path):
    estimate = ask(server, "test", tmp_path).estimate(responses(*CHAINS, ""))
    assert estimate.calls == 3
    assert server.total == 0


# --- chains that are not easy -------------------------------------------------------------


@pytest.mark.parametrize("chain", ["", " \n\t "])
def test_an_empty_thinking_is_a_failed_annotation_without_a_call(server, tmp_path, chain):
    made = ask(server, "test", tmp_path).annotate(responses(chain, CHAINS[0]))
    assert [one.failed for one in made] == ["empty thinking", None]
    assert server.total == 1


@pytest.mark.parametrize("protocol", ["rewrite", "indexed"])
def test_a_chain_of_20000_tokens_is_judged_in_parts(server, tmp_path, protocol):
    assert len(LONG) > 80_000
    (one,) = ask(server, "test", tmp_path, protocol=protocol).annotate(responses(LONG))
    assert one.failed is None
    assert one.ledger["parts"] == server.total == 5
    assert one.ledger["coverage"] == 1.0
    assert all(LONG[s.start : s.end] == s.text for s in one.segments)
    assert max(len(text.encode()) for text in server.texts) < 2 * protocols.LONGEST


def test_a_part_that_fails_fails_the_chain_by_name_and_only_it_is_asked_again(server, tmp_path):
    chain = LONG[:30_000] + " This sentence is unlucky. " + LONG[30_000:40_000]
    (one,) = ask(server, "picky", tmp_path).annotate(responses(chain))
    assert one.failed.startswith("part 2 of 2: HTTP 500")
    calls = server.total
    ask(server, "picky", tmp_path).annotate(responses(chain))
    assert server.total - calls == 2  # the bad part, with its one retry


@pytest.mark.parametrize("protocol", ["rewrite", "indexed"])
def test_a_chain_in_another_language_is_labelled(server, tmp_path, protocol):
    chain = "まず問題を読みます。面積は辺の二乗です。\nАльтернативно, проверим это. 🙂 Ясно."
    (one,) = ask(server, "test", tmp_path, protocol=protocol).annotate(responses(chain))
    assert one.failed is None
    assert one.ledger["coverage"] == 1.0


def test_half_a_surrogate_pair_does_not_break_a_run(server, tmp_path):
    chain = "It begins \ud83d here. So it is 7."
    (one,) = ask(server, "test", tmp_path).annotate(responses(chain))
    assert one.failed is None
    assert chain[one.segments[1].start : one.segments[1].end] == "So it is 7."


# --- judges that are not good -------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["rewrite", "indexed"])
@pytest.mark.parametrize(("model", "why"), [("prose", "labelled nothing"), ("silent", "empty")])
def test_an_unusable_reply_fails_by_name_and_is_asked_again_once(
    server, tmp_path, protocol, model, why
):
    for calls in (1, 2, 2):
        bad = ask(server, model, tmp_path, protocol=protocol)
        (one,) = bad.annotate(responses(CHAINS[0]))
        assert why in one.failed
        assert one.segments == ()
        assert server.total == calls
    assert one.ledger["characters"]["failed"] == one.ledger["total"]


@pytest.mark.parametrize("protocol", ["rewrite", "indexed"])
def test_half_an_answer_keeps_its_half_and_says_so(server, tmp_path, protocol):
    half = ask(server, "half", tmp_path, protocol=protocol)
    (one,) = half.annotate(responses(CHAINS[0]))
    assert one.failed is None
    assert one.ledger["truncated"] == 1
    assert 0.2 < one.ledger["coverage"] < 0.8
    spans.summarise([one])


def test_wrong_numbers_and_labels_are_rejected_and_counted(server, tmp_path):
    wrong = ask(server, "wrong-numbers", tmp_path, protocol="indexed")
    (one,) = wrong.annotate(responses(CHAINS[0]))
    assert [segment.label for segment in one.segments] == ["initializing"]
    assert one.ledger["rejected"] == 6
    assert one.ledger["reasons"] == {
        protocols.UNKNOWN_LABEL: 1,
        protocols.WRONG_NUMBER: 3,
        protocols.TWICE: 1,
        protocols.NO_ITEM: 1,
    }
    assert one.ledger["unlabelled"] == 4


@pytest.mark.parametrize("model", ["lines", "no-schema"])
def test_a_server_without_structured_output_is_understood(server, tmp_path, model):
    loose = ask(server, model, tmp_path, protocol="indexed")
    (one,) = loose.annotate(responses(CHAINS[0]))
    assert one.ledger["coverage"] == 1.0


def test_one_chain_that_the_server_fails_on_leaves_the_others_alone(server, tmp_path):
    chains = responses(CHAINS[0], "An unlucky chain.", CHAINS[1])
    made = ask(server, "picky", tmp_path).annotate(chains)
    assert [one.failed for one in made] == [
        None,
        "HTTP 500: I do not like this one (2 attempts)",
        None,
    ]
    assert spans.summarise(made).failed == 1


# --- replay -------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["rewrite", "indexed"])
def test_a_replay_gives_the_same_without_key_and_network(
    server, tmp_path, monkeypatch, protocol
):
    chains = responses(*CHAINS, LONG[:50_000])
    made = ask(server, "test", tmp_path, protocol=protocol).annotate(chains)
    monkeypatch.setattr(socket.socket, "connect", None)
    again = replay.Replay(tmp_path).annotate(chains)
    assert [one.segments for one in again] == [one.segments for one in made]
    assert [one.ledger for one in again] == [one.ledger for one in made]
    assert {one.annotator for one in again} == {f"replay:{tmp_path}"}


@pytest.mark.parametrize("protocol", ["rewrite", "indexed"])
def test_chains_that_share_a_reply_keep_their_own_places(server, tmp_path, protocol):
    chains = ["It is 7. So I stop.", "It  is 7.\n\n\nSo I stop.", LONG[:40_000], LONG[:45_000]]
    made = ask(server, "test", tmp_path, protocol=protocol).annotate(responses(*chains))
    again = replay.Replay(tmp_path).annotate(responses(*chains))
    for chain, one, other in zip(chains, made, again, strict=True):
        assert one.ledger["coverage"] == 1.0
        assert all(chain[s.start : s.end] == s.text for s in one.segments)
        assert other.segments == one.segments
    assert server.total < sum(one.ledger["parts"] for one in made)


def test_a_replay_fails_unknown_and_failed_chains_by_name(server, tmp_path):
    known = responses(CHAINS[0], "An unlucky chain.")
    ask(server, "picky", tmp_path).annotate(known)
    again = annotate.annotator(f"replay:{tmp_path}")
    made = again.annotate([*known, response("Never judged.", "new"), response("", "empty")])
    assert [one.failed for one in made] == [
        None,
        "HTTP 500: I do not like this one (2 attempts)",
        "no stored reply",
        "empty thinking",
    ]
    assert made[2].task_id == "new"


def test_a_replay_outlives_another_prompt_and_other_task_names(server, tmp_path):
    (one,) = ask(server, "test", tmp_path).annotate(responses(CHAINS[0]))
    file = tmp_path / FILE
    row = json.loads(file.read_text())
    row["identity"]["prompt_version"] = "0"
    file.write_text(json.dumps(row | {"key": "old"}) + "\n")
    (again,) = replay.Replay(tmp_path).annotate([response(CHAINS[0], "renamed")])
    assert again.segments == one.segments


def test_a_folder_of_several_judges_asks_which(server, tmp_path):
    for model in ("test", "other"):
        ask(server, model, tmp_path).annotate(responses(CHAINS[0]))
    with pytest.raises(ValueError, match="several judges: choose one of model='other'"):
        replay.Replay(tmp_path)
    assert replay.Replay(tmp_path, model="other").annotate(responses(CHAINS[0]))[0].segments


def test_a_folder_without_replies_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no stored replies: there is no replies\.jsonl"):
        replay.Replay(tmp_path / "nowhere")
    (tmp_path / FILE).write_text("")
    with pytest.raises(ValueError, match="holds no reply of a judge"):
        replay.Replay(tmp_path)


# --- the parts ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.text(st.sampled_from("ab. ,;!\n界é🙂"), max_size=200), st.integers(8, 60))
def test_parts_fill_the_text_and_keep_the_limit(text, longest):
    parts = list(protocols.cut(text, longest))
    assert "".join(text[start:end] for start, end in parts) == text
    assert all(0 < len(text[start:end].encode()) <= longest for start, end in parts)


@settings(deadline=None, max_examples=60)
@given(st.text(st.sampled_from("abc. ,;:-—!\nbut maybe"), max_size=300))
def test_pieces_hold_every_character_and_do_not_overlap(text):
    pieces = protocols.pieces(text, least=4)
    assert all(a[1] <= b[0] for a, b in pairwise(pieces))
    assert all(text[i:j].strip() == text[i:j] != "" for i, j in pieces)
    solid = sum(not c.isspace() for c in text)
    assert sum(not c.isspace() for i, j in pieces for c in text[i:j]) == solid


def test_clauses_are_pieces_of_their_own():
    text = "I take the first of these numbers, but maybe the second one is right; then it is 7."
    assert [text[i:j] for i, j in protocols.pieces(text)] == [
        "I take the first of these numbers,",
        "but maybe the second one is right; then it is 7.",
    ]


@settings(deadline=None, max_examples=60)
@given(st.text() | st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.sampled_from(BEHAVIOURS),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=8), inner),
).map(json.dumps))  # fmt: skip
def test_no_reply_breaks_the_reader_of_numbers(content):
    found, rejected = protocols.place(content, 5)
    assert all(1 <= first <= last <= 5 for first, last, _ in found)
    assert all(count > 0 for count in rejected.values())


@pytest.mark.parametrize(
    "content",
    [
        '{"labels": ["1-2 deduction", "3 Adding Knowledge"]}',
        '```json\n{"labels": ["1-2 deduction", "3: adding_knowledge"]}\n```',
        '{"labels": [{"first": 1, "last": 2, "label": "deduction"}, '
        '{"n": 3, "label": "adding-knowledge"}]}',
        '{"1": "deduction", "2": "deduction", "3": "adding-knowledge"}',
        "1-2: deduction\n3. adding-knowledge\n",
        'Sure! [{"number": 1, "label": "deduction"}, {"number": 2, "label": "deduction"}, '
        '{"number": 3, "label": "adding-knowledge"}]',
        '{"labels": ["1-2 deduction", "3 adding-knowledge", "4 uncert',
    ],
)
def test_labels_by_number_are_read_in_every_shape(content):
    found, rejected = protocols.place(content, 9)
    by_number = {n: label for first, last, label in found for n in range(first, last + 1)}
    assert by_number == {1: "deduction", 2: "deduction", 3: "adding-knowledge"}
    assert not rejected


def test_the_prompts_name_every_behaviour_and_no_reply_can_be_too_long():
    for one in protocols.PROTOCOLS.values():
        assert all(f"- {name}:" in one.system for name in BEHAVIOURS)
        assert all(request.max_tokens <= 16_000 for request in one.requests(response(LONG)))


def test_the_server_documents_itself():
    assert {"test", "hangs", "prose", "half", "wrong-numbers"} <= MODELS.keys()
