"""Judges and replays against a real server: every character and every call accounted for."""

from __future__ import annotations

import json
import re
import socket
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server import Server
from tiny import response

from stllms.annotation import judge, markup
from stllms.annotation.annotators import Annotator, annotator
from stllms.labels import PAPER
from stllms.models.api import FILE, Reply, digest
from stllms.records import Response, to_row

CHAINS = (
    "So I need the area of the field. I recall that an area is side squared. Wait, it is a "
    "circle! For example, take radius 3. Maybe that gives 28.",
    "The question asks for a prime; let me see. Suppose it is 7, because 7 is small. So: 7.",
    "Hmm, perhaps there is no such number at all.\n\nTherefore the answer is none.",
    "まず問題を読みます。面積は辺の二乗です。\nАльтернативно, проверим это. 🙂 Ясно.",
    "It begins \ud83d here, with half a surrogate pair. So it is 7.",
)
LONG = " ".join(
    f"Sentence number {i} says that {i} plus {i} is {2 * i}, because I recall how sums go."
    for i in range(1300)
)
both = pytest.mark.parametrize("protocol", ["rewrite", "indexed"])


def responses(*chains: str) -> list[Response]:
    return [response(chain, f"task {i}") for i, chain in enumerate(chains)]


def ask(server: Server, model: str, folder: Path, protocol: str = "rewrite") -> judge.Judge:
    quick = {"retries": 1, "timeout": 5.0, "progress": False}
    return judge.Judge(f"{model}#{protocol}", base_url=server.url, folder=folder, **quick)


# -- good judges ---------------------------------------------------------------------------


@both
def test_a_good_judge_labels_every_character_of_its_own_chain(server, tmp_path, protocol):
    asked = responses(*CHAINS)
    good = ask(server, "test", tmp_path, protocol=protocol)
    assert good.estimate([*asked, response("")]).calls == len(CHAINS)
    assert server.total == 0
    made = good.annotate(asked)
    assert [one.task_id for one in made] == [one.task_id for one in asked]
    for one, chain in zip(made, asked, strict=True):
        assert (one.failed, one.spans, one.ledger["coverage"]) == (None, (), 1.0)
        for segment in one.segments:
            assert chain.thinking[segment.start : segment.end] == segment.text
    assert [segment.label for segment in made[0].segments] == [
        "initializing",
        "adding-knowledge",
        "backtracking",
        "example-testing",
        "uncertainty-estimation",
    ]
    assert ask(server, "test", tmp_path, protocol=protocol).annotate(asked) == made
    assert server.total == len(CHAINS), "the second time nothing is sent"


def test_replies_that_come_in_another_order_stay_with_their_chain(server, tmp_path):
    chains = [f"Chain number {i} begins. So it is {i}." for i in range(12)]
    made = ask(server, "shuffled", tmp_path).annotate(responses(*chains))
    assert [one.segments[1].text for one in made] == [f"So it is {i}." for i in range(12)]


def test_another_judge_or_protocol_is_asked_anew_and_has_another_name(server, tmp_path):
    for model, protocol in (("test", "rewrite"), ("test", "indexed"), ("other", "rewrite")):
        ask(server, model, tmp_path, protocol=protocol).annotate(responses(CHAINS[0]))
    assert server.total == 3
    options = {"base_url": server.url, "folder": tmp_path}
    assert annotator("openai:gpt-4.1", **options).name == "openai:gpt-4.1"
    indexed = annotator("openai:qwen2.5:14b#indexed", **options)
    assert (indexed.name, indexed.protocol.name) == ("openai:qwen2.5:14b#indexed", "indexed")
    assert isinstance(indexed, Annotator)
    with pytest.raises(ValueError, match="no judge protocol 'guess': choose one of rewrite"):
        judge.Judge("m#guess", **options)


#: Prompt hashes and keys of the first release. With others, no stored reply is found again.
PROMPTS = {"rewrite": "55cedb0f36e0", "indexed": "6b965f26fece"}
KEYS = {"rewrite": "994f3183b2dc58dd", "indexed": "10408ebaffb43e58"}


@both
def test_what_is_asked_is_what_stored_replies_were_asked(protocol):
    one = judge.protocol_of(protocol)
    (request,) = one.requests(response(CHAINS[0]))
    assert request.identity == {
        "protocol": protocol,
        "prompt_version": "1",
        "prompt": PROMPTS[protocol],
    }
    assert request.key("gpt-4.1")[:16] == KEYS[protocol]
    assert all(f"- {name}:" in one.system for name in PAPER.names)
    assert all(part.max_tokens <= 16_000 for part in one.requests(response(LONG)))


def test_the_indexed_judge_is_asked_for_structured_output(server, tmp_path):
    ask(server, "test", tmp_path, protocol="indexed").annotate(responses(CHAINS[1]))
    schema = server.fields["response_format"]["json_schema"]
    assert schema["strict"] is True
    pattern = schema["schema"]["properties"]["labels"]["items"]["pattern"]
    assert re.fullmatch(pattern, "3-14 adding-knowledge")
    assert not re.fullmatch(pattern, "3-14 dreaming")
    assert server.fields["messages"][-1]["content"].startswith("<pieces>\n1| The question asks")
    assert server.fields["temperature"] == 0


# -- chains that are not easy --------------------------------------------------------------


def test_a_part_that_fails_fails_the_chain_by_name_and_only_it_is_asked_again(server, tmp_path):
    chain = LONG[:30_000] + " This sentence is unlucky. " + LONG[30_000:40_000]
    (one,) = ask(server, "picky", tmp_path).annotate(responses(chain))
    assert one.failed.startswith("part 2 of 2: HTTP 500")
    calls = server.total
    ask(server, "picky", tmp_path).annotate(responses(chain))
    assert server.total - calls == 2, "the bad part, with its one retry"


# -- judges that are not good --------------------------------------------------------------


@both
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


@both
def test_half_an_answer_keeps_its_half_and_says_so(server, tmp_path, protocol):
    half = ask(server, "half", tmp_path, protocol=protocol)
    (one,) = half.annotate(responses(CHAINS[0]))
    assert (one.failed, one.ledger["truncated"]) == (None, 1)
    assert 0.2 < one.ledger["coverage"] < 0.8


def test_wrong_numbers_and_labels_are_rejected_and_counted(server, tmp_path):
    wrong = ask(server, "wrong-numbers", tmp_path, protocol="indexed")
    (one,) = wrong.annotate(responses(CHAINS[0]))
    assert [segment.label for segment in one.segments] == ["initializing"]
    assert (one.ledger["rejected"], one.ledger["unlabelled"]) == (5, 4)
    reasons = {markup.UNKNOWN: 1, judge.WRONG_NUMBER: 3, judge.TWICE: 1}
    assert one.ledger["reasons"] == reasons


@pytest.mark.parametrize("model", ["lines", "no-schema"])
def test_a_server_without_structured_output_is_understood(server, tmp_path, model):
    loose = ask(server, model, tmp_path, protocol="indexed")
    (one,) = loose.annotate(responses(CHAINS[0]))
    assert one.ledger["coverage"] == 1.0


# -- replay --------------------------------------------------------------------------------


@both
def test_a_replay_gives_the_same_without_key_and_network(
    server, tmp_path, monkeypatch, protocol
):
    """Long chains are judged in parts; chains that share a reply keep their own places."""
    shared = ["It is 7. So I stop.", "It  is 7.\n\n\nSo I stop.", LONG[:45_000], LONG]
    chains = responses(*CHAINS, *shared)
    made = ask(server, "test", tmp_path, protocol=protocol).annotate(chains)
    assert made[-1].ledger["parts"] == 5
    assert server.total < sum(one.ledger["parts"] for one in made)
    assert max(len(text.encode()) for text in server.texts) < 2 * judge.LONGEST
    monkeypatch.setattr(socket.socket, "connect", None)
    again = judge.Replay(tmp_path).annotate(chains)
    for chain, one, other in zip(chains, made, again, strict=True):
        assert (other.segments, other.ledger) == (one.segments, one.ledger)
        assert one.ledger["coverage"] == 1.0
        assert all(chain.thinking[s.start : s.end] == s.text for s in one.segments)
    assert {one.annotator for one in again} == {f"replay:{tmp_path}"}


def test_one_failure_leaves_the_others_alone_and_a_replay_fails_by_name(server, tmp_path):
    known = responses(CHAINS[0], "An unlucky chain.", "", " \n\t ")
    why = [None, "HTTP 500: I do not like this one (2 attempts)", judge.EMPTY, judge.EMPTY]
    made = ask(server, "picky", tmp_path).annotate(known)
    assert [one.failed for one in made] == why
    assert server.total == 3, "nothing is sent about chains without text"
    made = annotator(f"replay:{tmp_path}").annotate([*known, response("Never judged.", "new")])
    assert [one.failed for one in made] == [*why, judge.NO_REPLY]
    assert made[4].task_id == "new"


def test_a_replay_outlives_another_prompt_other_task_names_and_a_later_failure(
    server, tmp_path
):
    (one,) = ask(server, "test", tmp_path).annotate(responses(CHAINS[0]))
    file = tmp_path / FILE
    row = json.loads(file.read_text())
    row["identity"]["prompt_version"] = "0"
    rows = row | {"key": "old"}, row | {"status": "failed", "reason": "no answer"}
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert row["identity"]["prompt"] == PROMPTS["rewrite"]
    assert row["about"] == {"shown": digest(CHAINS[0])[:16]}
    (again,) = judge.Replay(tmp_path).annotate([response(CHAINS[0], "renamed")])
    assert again.segments == one.segments


def test_a_folder_of_several_judges_asks_which_and_one_without_replies_is_named(
    server, tmp_path
):
    with pytest.raises(ValueError, match=r"no stored replies: no replies\.jsonl"):
        judge.Replay(tmp_path)
    (tmp_path / FILE).write_text("")
    with pytest.raises(ValueError, match="holds replies of no judge"):
        judge.Replay(tmp_path)
    for model in ("test", "other"):
        ask(server, model, tmp_path).annotate(responses(CHAINS[0]))
    for options in ({}, {"judge": "third"}):
        with pytest.raises(ValueError, match="replies of other and test: expected one judge"):
            judge.Replay(tmp_path, **options)
    one = judge.Replay(tmp_path, judge="other")
    assert one.annotate(responses(CHAINS[0]))[0].segments
    assert len(one.fingerprint) == 16


# -- the parts -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.text(st.sampled_from("ab. ,;!\n界é🙂"), max_size=200), st.integers(8, 60))
def test_parts_fill_the_text_and_keep_the_limit(text, longest):
    parts = list(judge.cut(text, longest))
    assert "".join(text[start:end] for start, end in parts) == text
    assert all(0 < len(text[start:end].encode()) <= longest for start, end in parts)


@settings(deadline=None, max_examples=60)
@given(st.text(st.sampled_from("abc. ,;:-—!\nbut maybe"), max_size=300))
def test_pieces_hold_every_character_and_do_not_overlap(text):
    pieces = judge.pieces(text, least=4)
    assert all(a[1] <= b[0] for a, b in pairwise(pieces))
    assert all(text[i:j].strip() == text[i:j] != "" for i, j in pieces)
    solid = sum(not c.isspace() for c in text)
    assert sum(not c.isspace() for i, j in pieces for c in text[i:j]) == solid


def test_clauses_are_pieces_of_their_own():
    text = "I take the first of these numbers, but maybe the second one is right; then it is 7."
    assert [text[i:j] for i, j in judge.pieces(text)] == [
        "I take the first of these numbers,",
        "but maybe the second one is right; then it is 7.",
    ]


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
    found, rejected = judge.place(content, 9)
    by_number = {n: label for first, last, label in found for n in range(first, last + 1)}
    assert by_number == {1: "deduction", 2: "deduction", 3: "adding-knowledge"}
    assert rejected.total() == content.count("uncert"), "half a label is none"


MARKUP = st.lists(
    st.sampled_from(
        ["[", "]", '["deduction"]', '["end-section"]', "{", "}", '"', "1-2 deduction", ",", ":",
         "\ud83d", "\x00", "9" * 300, "[" * 2_500, " a ", "0. ", "\\", "labels"]
    ),
    max_size=12,
).map("".join)  # fmt: skip
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.sampled_from(PAPER.names),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=8), inner),
).map(json.dumps)


def reply_of(content: str) -> Reply:
    body = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
    return Reply({"about": {"pieces": 2}, "body": body})


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=MARKUP | JSON | st.text())
@both
def test_whatever_a_judge_answers_its_chain_is_annotated_or_failed(content, protocol):
    made = judge.protocol_of(protocol).annotation(response("a b."), [reply_of(content)], "j")
    assert bool(made.failed) != bool(made.segments)
    json.dumps(to_row(made), ensure_ascii=False, allow_nan=False).encode()
    found, rejected = judge.place(content, 5)
    assert all(1 <= first <= last <= 5 for first, last, _ in found)
    assert all(count > 0 for count in rejected.values())
