"""The API client against a real server on localhost: nothing lost, nothing paid twice."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import openai._base_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server import KEY, Server

from stllms.models import api
from stllms.models.api import FILE, Reply, Request, Store
from stllms.runs.files import BadFile

HERE = Path(__file__).parent
OPENAI = "https://api.openai.com/v1"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = (name for _, name in api.PROVIDERS.values())
    for name in (api.KEY, api.PRICES, api.STARTED, "OPENAI_BASE_URL", *keys):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def requests(*texts: str, expected: int = 10, **more) -> list[Request]:
    """One request a text, named after it."""
    identity = {"protocol": "plain"}
    return [
        Request(text, ({"role": "user", "content": text},), identity, 100, expected, **more)
        for text in texts
    ]


def client(server: Server, model: str, folder: Path, **options) -> api.Client:
    quick = {"retries": 2, "timeout": 5.0, "progress": False}
    return api.Client(model, folder=folder, base_url=server.url, **{**quick, **options})


NAMES = [f"text {i}" for i in range(12)]


# -- answers, order, storage ---------------------------------------------------------------


def test_every_reply_belongs_to_its_request_whatever_order_they_come_in(server, tmp_path):
    replies = client(server, "shuffled", tmp_path).replies(requests(*NAMES))
    assert [row["name"] for row in Store(tmp_path).load().lines] != NAMES, "another order"
    assert [reply.row["name"] for reply in replies] == NAMES
    assert all(reply.failed is None for reply in replies)
    replies = client(server, "instruct", tmp_path).replies(requests(*NAMES))
    assert [reply.content for reply in replies] == [f"My answer to: {name}" for name in NAMES]


def test_a_second_run_sends_nothing_and_needs_no_server_and_no_key(server, tmp_path):
    first = client(server, "instruct", tmp_path).replies(requests(*NAMES))
    nowhere = api.Client("instruct", folder=tmp_path, base_url="https://nowhere.invalid")
    again = nowhere.replies(requests(*reversed(NAMES)))
    assert [reply.row for reply in again] == [reply.row for reply in reversed(first)]
    assert server.total == len(NAMES)


def test_equal_requests_are_sent_once_and_others_are_other_requests(server, tmp_path):
    replies = client(server, "instruct", tmp_path).replies(requests("a", "b", "a", "a"))
    assert server.total == 2
    assert [r.content[-1] for r in replies] == ["a", "b", "a", "a"]
    (one,) = requests("a")
    other = Request("a", one.messages, {"protocol": "plain", "version": 2}, 100, 10)
    assert len({one.key("m"), one.key("n"), other.key("m"), other.key("n")}) == 4


def test_the_key_of_a_request_is_the_one_of_replies_that_are_already_stored():
    """Any other value would have every stored reply paid for again."""
    text = b'["m",[{"content":"a","role":"user"}],{"protocol":"plain"}]'
    assert requests("a")[0].key("m") == hashlib.sha256(text).hexdigest()


def test_a_row_holds_what_is_needed_to_know_where_a_reply_came_from(server, tmp_path):
    (reply,) = client(server, "instruct", tmp_path).replies(requests("a", about={"n": 1}))
    (row,) = map(json.loads, (tmp_path / FILE).read_text().splitlines())
    assert reply.row == row
    expected = {"model": "instruct", "identity": {"protocol": "plain"}, "about": {"n": 1},
                "base_url": f"{server.url}/v1", "key": requests("a")[0].key("instruct"),
                "status": "answered", "reason": None, "attempts": 1}  # fmt: skip
    assert expected.items() <= row.items()
    assert row["body"]["choices"][0]["message"]["content"] == "My answer to: a"
    assert row["usage"]["completion_tokens"] == 3
    assert row["time"].endswith("+00:00")


def test_it_works_inside_a_running_event_loop(server, tmp_path):
    async def cell() -> list[Reply]:
        return client(server, "instruct", tmp_path).replies(requests("a", "b"))

    assert [reply.failed for reply in asyncio.run(cell())] == [None, None]


def test_no_more_than_the_allowed_requests_are_under_way(server, tmp_path):
    client(server, "slow", tmp_path, concurrency=3).replies(requests(*NAMES[:9]))
    assert 1 < server.peak <= 3
    with pytest.raises(ValueError, match="concurrency of at least 1"):
        client(server, "slow", tmp_path, concurrency=0)


def test_any_language_and_half_surrogates_are_sent_and_stored(server, tmp_path):
    texts = ["数学の問題です。", "Ελληνικά", "naïve 🙂", api.clean("half \ud83d pair")]
    client(server, "instruct", tmp_path).replies(requests(*texts))
    assert sorted(server.texts) == sorted(texts)
    assert len(texts[-1]) == len("half \ud83d pair")


def test_a_field_that_the_server_refuses_is_left_out_and_not_offered_again(server, tmp_path):
    asked = requests("a", "b", "c", optional={"response_format": {}, "top_p": 1})
    replies = client(server, "no-schema", tmp_path, concurrency=1).replies(asked)
    assert [reply.failed for reply in replies] == [None] * 3
    assert server.total == 4, "one refusal"
    assert replies[2].row["dropped"] == ["response_format"]
    assert server.fields["top_p"] == 1


# -- failures ------------------------------------------------------------------------------


def test_a_failure_is_recorded_with_its_reason_and_asked_again_on_the_next_run(
    server, tmp_path
):
    impatient = client(server, "flaky", tmp_path, retries=0)
    reasons = {reply.failed for reply in impatient.replies(requests("a", "b"))}
    assert reasons == {"HTTP 500: the server had an error"}
    for calls in (4, 4):
        assert [r.failed for r in impatient.replies(requests("a", "b"))] == [None, None]
        assert server.total == calls


@pytest.mark.parametrize(
    ("model", "reason", "attempts"),
    [
        ("broken", "HTTP 500: the server had an error (3 attempts)", 3),
        ("hangs", "ReadTimeout", 3),
        ("drops", "peer closed connection", 3),
        ("wrapped", "no chat completion in the answer: upstream is down", 1),
        ("html", "no chat completion in the answer: <html>login please</html>", 1),
        ("patient", "HTTP 429: come back later", 1),
        ("picky", "HTTP 500: I do not like this one (3 attempts)", 3),
    ],
)
def test_a_server_that_misbehaves_gives_a_recorded_failure(
    server, tmp_path, model, reason, attempts
):
    limit = 0.2 if model == "hangs" else 5.0
    asked = requests("unlucky a", "unlucky b")
    replies = client(server, model, tmp_path, timeout=limit).replies(asked)
    assert all(reason in reply.failed for reply in replies)
    assert [reply.row["attempts"] for reply in replies] == [attempts, attempts]
    assert server.total == 2 * attempts
    assert len(Store(tmp_path).load().rows) == 2


def test_a_server_that_only_fails_is_not_asked_for_ever(server, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "STOP_AFTER", 4)
    with pytest.raises(api.ApiError, match="4 requests failed in a row"):
        client(server, "broken", tmp_path, retries=0, concurrency=2).replies(requests(*NAMES))
    assert server.total <= 6


def test_retry_after_is_honoured(server, tmp_path):
    replies = client(server, "limited", tmp_path, concurrency=2).replies(requests(*"abc"))
    assert [reply.row["attempts"] for reply in replies] == [2, 2, 2]
    for text in "abc":
        sent = zip(server.times, server.texts, strict=True)
        first, second = (moment for moment, asked in sent if asked == text)
        assert second - first >= 0.28


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gone", r"http://127.0.0.1:\d+/v1: no model 'gone', or a wrong URL"),
        ("quota", "no quota left"),
        ("forbidden", r"\(STLLMS_API_KEY\) is missing or wrong"),
    ],
)
def test_what_no_retry_can_mend_stops_the_run_with_one_line(server, tmp_path, model, message):
    with pytest.raises(api.ApiError, match=message) as caught:
        client(server, model, tmp_path, concurrency=2, retries=0).replies(requests(*NAMES))
    assert server.total <= 2
    assert "\n" not in str(caught.value)


def test_an_unusable_reply_is_stored_and_asked_again_once(server, tmp_path):
    asked = client(server, "prose", tmp_path)

    def check(reply: Reply) -> str | None:
        return None if "I agree" in reply.content else "no labels"

    for calls in (1, 2, 2, 2):
        (reply,) = asked.replies(requests("a"), check)
        assert reply.failed == "no labels"
        assert server.total == calls
    assert [row["status"] for row in Store(tmp_path).load().lines] == ["unusable"] * 2


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    ),
    st.sampled_from([200, 400, 429, 500]),
)
def test_whatever_a_server_answers_has_a_reason_in_one_line(body, status):
    reason = api._no_completion(status, body)
    assert reason
    assert "\n" not in reason


# -- crashes -------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_api import NAMES, requests
from stllms.models import api
api.Client("slow", folder=Path({folder!r}), base_url={url!r}, concurrency=2,
           progress=False).replies(requests(*NAMES))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_or_interrupted_run_goes_on_where_it_was(server, tmp_path, end):
    code = CHILD.format(here=str(HERE), folder=str(tmp_path), url=server.url)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=-3)
    deadline = time.monotonic() + 30
    while server.total < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(end)
    child.wait(timeout=30)
    stored = {row["name"] for row in Store(tmp_path).load().lines}
    assert 4 <= len(stored) < len(NAMES)
    replies = client(server, "slow", tmp_path).replies(requests(*NAMES))
    assert [reply.row["name"] for reply in replies] == NAMES
    assert [server.texts.count(name) for name in stored] == [1] * len(stored)
    assert server.total - len(NAMES) <= 2, "only what was under way when the kill came"


@pytest.mark.parametrize(("cut", "sent"), [(25, 1), (1, 0)])
def test_a_torn_last_line_is_dropped_and_a_whole_one_is_not(server, tmp_path, cut, sent):
    asked = client(server, "instruct", tmp_path, concurrency=1)
    asked.replies(requests("a", "b"))
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-cut])
    assert [reply.failed for reply in asked.replies(requests("a", "b", "c"))] == [None] * 3
    assert server.total == 3 + sent
    assert [json.loads(line)["name"] for line in file.read_text().splitlines()] == list("abc")


def test_two_runs_at_once_in_one_folder_pay_once(server, tmp_path):
    def work() -> None:
        client(server, "slow", tmp_path).replies(requests(*NAMES[:4]))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.total == 4


# -- files that others wrote ---------------------------------------------------------------

ROW = {"key": "k", "name": "t", "model": "m", "identity": {"protocol": "rewrite"},
       "about": {"shown": "s"}, "status": "answered", "reason": None, "cost": 0.5,
       "body": {"choices": [{"message": {"content": "so"}}]}}  # fmt: skip
DEEP = "[" * 2_500 + "]" * 2_500
STRANGE = ("null", "true", "7", "NaN", '"\\ud83d"', "[]", "{}", "9" * 5_000, DEEP, "{", "\x00")


def stored(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text("".join(f"{line}\n" for line in lines))
    return folder / FILE


@pytest.mark.parametrize("line", STRANGE)
def test_a_line_that_is_no_reply_is_named_and_never_cut_off(tmp_path, line):
    file = stored(tmp_path, json.dumps(ROW), line)
    before = file.read_bytes()
    with pytest.raises(BadFile, match="line 2: not a stored reply") as caught:
        Store(tmp_path).load()
    with pytest.raises(BadFile), Store(tmp_path).writing():
        pass
    assert str(file) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        *(({"cost": cost}, "cost") for cost in (-1, True, math.nan, math.inf, "0.5", 10**400)),
        ({"key": 7}, "key"),
        ({"name": None}, "name"),
        ({"model": ["m"]}, "model"),
        ({"identity": "rewrite"}, "identity"),
        ({"identity": {"protocol": ["rewrite"]}}, r"identity\.protocol"),
        ({"about": []}, "about"),
        ({"status": "good"}, "status"),
        ({"reason": 7}, "reason"),
    ],
)
def test_a_field_of_a_stored_reply_that_is_wrong_or_missing_is_named(tmp_path, change, field):
    stored(tmp_path, json.dumps(ROW), json.dumps(ROW | change))
    with pytest.raises(BadFile, match=rf"line 2: not a stored reply \({field}"):
        Store(tmp_path).load()
    if (name := next(iter(change))) not in ("cost", "about", "reason"):
        stored(tmp_path, json.dumps({k: v for k, v in ROW.items() if k != name}))
        with pytest.raises(BadFile, match=rf"line 1: not a stored reply \({name}: Field req"):
            Store(tmp_path).load()


# -- cost ----------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A price table: one unit a token out for the model ``instruct``."""
    path = tmp_path / "mine.json"
    prices = {"instruct": {"input": 0, "output": 1e6}}
    path.write_text(json.dumps({"currency": "EUR", "models": prices}))
    monkeypatch.setenv(api.PRICES, str(path))
    return path


def test_the_estimate_is_shown_before_the_first_call(server, tmp_path, table, capsys):
    asked = client(server, "instruct", tmp_path / "r", progress=True)
    estimate = asked.estimate(requests("a", "b", "b"))
    assert (estimate.calls, estimate.tokens_out, estimate.cost) == (2, 20, 20.0)
    assert server.total == 0
    asked.replies(requests("a", "b"))
    expected = "0 replies stored; about 10 tokens in and 20 out, about 20.0000 EUR"
    shown = f"instruct: 2 calls to send, {expected}"
    assert shown in capsys.readouterr().out.splitlines()
    plain = api.estimate(requests("a", "b"), api.Price(input=1e6, output=0))
    assert (plain.calls, plain.tokens_in, plain.cost) == (2, 10, 10.0)
    assert api.estimate(requests("a"), None).cost is None


def test_nothing_is_sent_where_the_estimate_is_above_the_bound(server, tmp_path, table):
    asked = client(server, "instruct", tmp_path / "r", max_cost=19.9)
    with pytest.raises(api.CostLimit, match=r"nothing sent .*max_cost=19\.9"):
        asked.replies(requests("a", "b"))
    assert server.total == 0


def test_a_run_that_costs_more_than_estimated_stops_at_the_bound(server, tmp_path, table):
    asked = client(server, "instruct", tmp_path / "r", max_cost=10.0, concurrency=1)
    cheap = requests(*NAMES[:8], expected=1)  # each costs 5, the length of the answer over 4
    with pytest.raises(api.CostLimit, match="max_cost=10"):
        asked.replies(cheap)
    assert server.total == 2
    assert Store(tmp_path / "r").load().spent == 10.0
    with pytest.raises(api.CostLimit, match=r"10\.0000 already spent"):
        asked.replies(cheap)
    more = client(server, "instruct", tmp_path / "r", max_cost=40.0)
    assert all(reply.failed is None for reply in more.replies(cheap))
    assert server.total == 8


def test_a_bound_needs_a_price(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENROUTER_API_KEY", "a-key")
    asked = api.Client("mystery/model", folder=tmp_path, max_cost=1.0, progress=False)
    with pytest.raises(api.CostLimit, match="max_cost needs the price of mystery/model"):
        asked.replies(requests("a"))


def test_prices_are_found_with_and_without_owner_variant_and_date(monkeypatch, table):
    plain = api.price("gpt-4.1", OPENAI)
    assert plain == api.Price(input=2, output=8)
    for name in ("openai/gpt-4.1", "gpt-4.1-2025-04-14", "openai/gpt-4.1:nitro"):
        assert api.price(name, OPENAI) == plain
    assert api.price("mystery", OPENAI) is None
    assert api.price("mystery", "http://localhost:11434/v1").of(1e6, 1e6) == 0
    assert api.price("deepseek/deepseek-r1:free", OPENAI).of(1e6, 1e6) == 0
    assert api.price("instruct", OPENAI).currency == "EUR"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"models": {"m": {"input": 1}}}',
                '{"models": {"m": {"input": -1, "output": 1}}}']
)  # fmt: skip
def test_a_bad_price_table_is_an_error_that_names_it(table, content):
    table.write_text(content)
    with pytest.raises(ValueError, match=r"price table .*mine\.json: [^\n]*$"):
        api.price("m", OPENAI)


def test_a_cost_that_is_none_is_not_counted():
    price = api.Price(input=1, output=2)
    assert api.cost_of({"prompt_tokens": 3e6, "completion_tokens": 1e6}, price) == 5
    assert api.cost_of({"cost": 0.5, "prompt_tokens": 9}, None) == 0.5
    costs = ({"cost": cost} for cost in (-1, True, 1e999, math.nan, "1"))
    counts = (
        {"prompt_tokens": n, "completion_tokens": 1} for n in (True, -5, 10**400, "7", None)
    )
    for usage in (*costs, *counts, [], 7, None):
        assert api.cost_of(usage, price) is None


# -- servers and keys ----------------------------------------------------------------------


def test_a_model_without_a_base_url_goes_to_its_provider(monkeypatch):
    for model, host in {
        "gpt-4.1": "api.openai.com",
        "deepseek-reasoner": "api.deepseek.com",
        "claude-3-opus-20240229": "api.anthropic.com",
        "gemini-2.0-flash": "generativelanguage.googleapis.com",
        "deepseek/deepseek-r1": "openrouter.ai",
    }.items():
        assert f"//{host}/" in api.base_url(model)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://here:1")
    assert api.base_url("gpt-4.1") == "http://here:1/v1"
    assert api.base_url("gpt-4.1", "http://there:2/api/") == "http://there:2/api"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://k:ey@host/v1"])
def test_a_bad_base_url_is_refused_and_a_key_in_it_not_shown(tmp_path, url):
    with pytest.raises(ValueError, match="base URL") as caught:
        api.Client("m", folder=tmp_path, base_url=url)
    assert "k:ey" not in str(caught.value)


def test_no_key_is_an_error_that_names_the_variable_and_sends_nothing(tmp_path, monkeypatch):
    with pytest.raises(api.MissingKey, match=r"api\.openai\.com: set OPENAI_API_KEY"):
        api.Client("gpt-4.1", folder=tmp_path, progress=False).replies(requests("a"))
    assert not Store(tmp_path).load().rows
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with pytest.raises(api.MissingKey, match="OPENAI_API_KEY holds characters") as caught:
        api.api_key(OPENAI)
    assert "two words" not in str(caught.value)


def test_a_provider_s_key_is_not_sent_to_another_host(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "openai-secret")
    with pytest.raises(api.MissingKey, match="set STLLMS_API_KEY"):
        api.api_key("https://elsewhere.example/v1")
    assert api.api_key("http://localhost:8000/v1") == "no-key-needed"
    monkeypatch.setenv("OPENAI_BASE_URL", "https://elsewhere.example/v1")
    assert api.api_key("https://elsewhere.example/v1") == "openai-secret"
    monkeypatch.setenv(api.KEY, "mine")
    assert api.api_key("https://elsewhere.example/v1") == "mine"


def test_env_files_are_those_of_the_start_of_the_working_folder_and_of_the_project(
    tmp_path, monkeypatch
):
    places = {name: tmp_path / name for name in ("started", "here", "project")}
    for name, place in places.items():
        (place / "below").mkdir(parents=True)
        text = f'# mine\n\nexport {name.upper()} = "1" # yes\nALL={name}\nEMPTY=\nHOME2=$HOME\n'
        (place / ".env").write_text(text)
    monkeypatch.setattr(api, "repository", lambda: places["project"])
    monkeypatch.chdir(places["here"] / "below")
    found = [api.setting(name) for name in ("HERE", "PROJECT", "STARTED", "EMPTY", "HOME2")]
    assert found == ["1", "1", None, None, "$HOME"]
    assert api.setting("ALL") == "here"
    monkeypatch.setenv(api.STARTED, str(places["started"] / "below"))
    assert [api.setting(name) for name in ("HERE", "PROJECT", "STARTED")] == ["1"] * 3
    assert api.setting("ALL") == "started"
    monkeypatch.setenv("ALL", "environment")
    assert api.setting("ALL") == "environment"
    assert "1" not in (os.environ.get("HERE"), os.environ.get("PROJECT")), "only looked up"


def test_a_line_of_an_env_file_that_is_none_is_said_and_not_shown(tmp_path, caplog):
    (tmp_path / ".env").write_text("A=1\nsecret words here\nB=2\n")
    assert (api.setting("A"), api.setting("B")) == ("1", "2")
    assert "statement starting at line 2" in caplog.text
    assert "secret" not in caplog.text


STRANGE_KEYS = ("sk-0123456789abcdef0123", "abc", "x", "a/b/c/d/e/f/g/h/i/j/k",
                "key+with=signs&and%20percent", "{[(.*?)]}|^$")  # fmt: skip


@pytest.mark.parametrize("key", STRANGE_KEYS)
def test_a_key_is_struck_out_wherever_it_stands_however_it_is_written(key):
    for form in (key, json.dumps(key)[1:-1], quote(key, safe=""), quote(key)):
        body = {
            "error": {"message": f"Incorrect key: {form}.", form: [f"{form}", {"a": [form]}]},
            "headers": {"Authorization": f"Bearer {form}"},
            "upstream": json.dumps({"error": f"bad key '{form}'\n{form}"}),
        }
        assert api.redacted(body, key) == {
            "error": {"message": "Incorrect key: ***.", "***": ["***", {"a": ["***"]}]},
            "headers": {"Authorization": "Bearer ***"},
            "upstream": json.dumps({"error": "bad key '***'\n***"}),
        }


def test_a_short_key_is_no_part_of_a_word_and_the_placeholder_no_key():
    said = {"content": "the latest contest is a test.", "n": 1, "none": None}
    assert api.redacted(said, "test") == said | {"content": "the latest contest is a ***."}
    for key in ("", api.NO_KEY):
        assert api.redacted(f"key {key}", key) == f"key {key}"


@pytest.mark.parametrize("key", ["abc", "sk-test-wrong-key-0000000000"])
def test_no_key_is_stored_or_shown(tmp_path, monkeypatch, capsys, key):
    """A server that repeats the wrong key in its error, through a real connection; the key
    comes from a .env file, and nothing of that file gets into the environment."""
    (tmp_path / ".env").write_text(f"STLLMS_API_KEY={key}\n")
    with Server(key=KEY) as server, pytest.raises(api.ApiError) as caught:
        client(server, "test", tmp_path, progress=True).replies(requests("a"))
    shown = str(caught.value) + "".join(capsys.readouterr())
    assert "Incorrect API key provided: ***" in shown
    assert f"provided: {key}" not in shown + (tmp_path / FILE).read_text()
    assert key not in os.environ.values()
    assert server.total == 1
    monkeypatch.setenv(api.KEY, KEY)
    with Server(key=KEY) as server:
        (reply,) = client(server, "test", tmp_path).replies(requests("a"))
    assert reply.failed is None
    assert KEY not in (tmp_path / FILE).read_text()
