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
import time
from collections.abc import Iterator
from pathlib import Path

import openai._base_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server import Server

from stllms.models import api
from stllms.models.api import FILE, Reply, Request, Store
from stllms.runs.files import BadFile, LockedFolder

HERE = Path(__file__).parent
OPENAI = "https://api.openai.com/v1"
NAMES = [f"text {i}" for i in range(12)]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = (key for _, key in api.PROVIDERS.values())
    for name in (api.KEY, api.PRICES, api.STARTED, api.OWN_SERVER, *keys):
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


# -- answers, order, storage ---------------------------------------------------------------


def test_every_reply_belongs_to_its_request_and_is_asked_for_once(server, tmp_path):
    replies = client(server, "shuffled", tmp_path).replies(requests(*NAMES, NAMES[3]))
    assert [row["name"] for row in Store(tmp_path).load().lines] != NAMES, "another order"
    assert [reply.row["name"] for reply in replies] == [*NAMES, NAMES[3]]
    assert all(reply.failed is None for reply in replies)
    nowhere = api.Client("shuffled", folder=tmp_path, base_url="https://nowhere.invalid")
    again = nowhere.replies(requests(*reversed(NAMES)))
    assert [reply.row for reply in again] == [reply.row for reply in replies[-2::-1]]
    assert server.total == len(NAMES), "the second time without server and key"


def test_the_key_of_a_request_is_the_one_of_replies_that_are_already_stored():
    """Any other value would have every stored reply paid for again."""
    (one,) = requests("a")
    text = b'["m",[{"content":"a","role":"user"}],{"protocol":"plain"}]'
    assert one.key("m") == hashlib.sha256(text).hexdigest()
    other = Request("a", one.messages, {"protocol": "plain", "version": 2}, 100, 10)
    assert len({one.key("m"), one.key("n"), other.key("m"), other.key("n")}) == 4


def test_a_row_holds_what_is_needed_to_know_where_a_reply_came_from(server, tmp_path):
    async def cell() -> list[Reply]:
        """As in Jupyter, inside a running event loop."""
        return client(server, "instruct", tmp_path).replies(requests("a", about={"n": 1}))

    (reply,) = asyncio.run(cell())
    (row,) = map(json.loads, (tmp_path / FILE).read_text().splitlines())
    assert reply.row == row
    expected = {"model": "instruct", "identity": {"protocol": "plain"}, "about": {"n": 1},
                "base_url": f"{server.url}/v1", "key": requests("a")[0].key("instruct"),
                "status": "answered", "reason": None, "attempts": 1}  # fmt: skip
    assert expected.items() <= row.items()
    assert reply.content == row["body"]["choices"][0]["message"]["content"]
    assert reply.content == "My answer to: a"
    assert row["usage"]["completion_tokens"] == 3
    assert row["time"].endswith("+00:00")


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
    body = {"choices": [{"message": {"content": "half \ud83d"}}]}
    with Store(tmp_path).writing() as store:
        store.append(ROW | {"body": body})
    assert Reply(Store(tmp_path).load().lines[-1]).content == Reply({"body": body}).content


def test_a_server_that_refuses_optional_fields_is_not_offered_them_again(server, tmp_path):
    asked = requests("a", "b", "c", optional={"response_format": {}, "top_p": 1})
    replies = client(server, "no-schema", tmp_path, concurrency=1).replies(asked)
    assert [reply.failed for reply in replies] == [None] * 3
    assert server.total == 4, "one refusal"
    assert replies[2].row["dropped"] == ["response_format", "top_p"]
    client(server, "instruct", tmp_path).replies(asked[:1])
    assert server.fields["top_p"] == 1


# -- failures ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "reason", "attempts"),
    [
        ("broken", "HTTP 500: the server had an error (3 attempts)", 3),
        ("hangs", "ReadTimeout", 3),
        ("drops", "peer closed connection", 3),
        ("wrapped", "no chat completion in the answer: upstream is down", 1),
        ("html", "no chat completion in the answer: <html>login please</html>", 1),
        ("patient", "HTTP 429: come back later", 1),
    ],
)
def test_a_server_that_misbehaves_gives_a_recorded_failure(
    server, tmp_path, model, reason, attempts
):
    limit = 0.2 if model == "hangs" else 5.0
    replies = client(server, model, tmp_path, timeout=limit).replies(requests("a", "b"))
    assert all(reason in reply.failed for reply in replies)
    assert [reply.row["attempts"] for reply in replies] == [attempts, attempts]
    assert server.total == 2 * attempts
    assert len(Store(tmp_path).load().rows) == 2


def test_a_failure_is_asked_again_on_the_next_run(server, tmp_path):
    impatient = client(server, "flaky", tmp_path, retries=0)
    reasons = [reply.failed for reply in impatient.replies(requests("a", "b"))]
    assert reasons == ["HTTP 500: the server had an error"] * 2
    for calls in (4, 4):
        assert [r.failed for r in impatient.replies(requests("a", "b"))] == [None, None]
        assert server.total == calls


def test_retry_after_is_honoured(server, tmp_path):
    replies = client(server, "limited", tmp_path, concurrency=2).replies(requests(*"abc"))
    assert [reply.row["attempts"] for reply in replies] == [2, 2, 2]
    for text in "abc":
        sent = zip(server.times, server.texts, strict=True)
        first, second = (moment for moment, asked in sent if asked == text)
        assert second - first >= 0.28


@pytest.mark.parametrize(
    ("model", "message", "most"),
    [
        ("gone", r"http://127.0.0.1:\d+/v1 .*: HTTP 404: The model gone does not exist", 2),
        ("quota", "HTTP 429: You exceeded your current quota", 2),
        ("forbidden", r"\(key: STLLMS_API_KEY\): HTTP 401: Incorrect API key", 2),
        ("broken", "4 requests failed in a row", 6),
    ],
)
def test_what_asking_on_cannot_mend_stops_the_run_with_one_line(
    server, tmp_path, monkeypatch, model, message, most
):
    monkeypatch.setattr(api, "STOP_AFTER", 4)
    with pytest.raises(api.ApiError, match=message) as caught:
        client(server, model, tmp_path, concurrency=2, retries=0).replies(requests(*NAMES))
    assert server.total <= most
    assert "\n" not in str(caught.value)


def test_an_unusable_reply_is_stored_and_asked_again_once(server, tmp_path):
    asked = client(server, "prose", tmp_path)
    for calls in (1, 2, 2, 2):
        (reply,) = asked.replies(requests("a"), lambda reply: "no labels")
        assert reply.failed == "no labels"
        assert server.total == calls
    assert [row["status"] for row in Store(tmp_path).load().lines] == ["unusable"] * 2
    assert asked.replies(requests("a"), lambda reply: None)[0].failed is None


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    ),
    st.sampled_from([200, 400, 429, 500]),
)
def test_whatever_a_server_answers_has_a_reason_in_one_line(body, status):
    reason = api._no_completion(status, api.redacted(body, "sk-12345678"))
    assert reason
    assert "\n" not in reason


# -- crashes -------------------------------------------------------------------------------

CHILD = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
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


@pytest.mark.parametrize("cut", [25, 1])
def test_a_torn_last_line_is_dropped(server, tmp_path, cut):
    asked = client(server, "instruct", tmp_path, concurrency=1)
    asked.replies(requests("a", "b"))
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-cut])
    assert [reply.failed for reply in asked.replies(requests("a", "b", "c"))] == [None] * 3
    assert server.total == 4
    assert [json.loads(line)["name"] for line in file.read_text().splitlines()] == list("abc")


def test_two_runs_at_once_in_one_folder_do_not_pay_twice(server, tmp_path):
    first = client(server, "instruct", tmp_path)
    with Store(tmp_path).writing(), pytest.raises(LockedFolder, match=f"process {os.getpid()}"):
        first.replies(requests("a"))
    assert server.total == 0
    assert first.replies(requests("a"))[0].failed is None


# -- files that others wrote ---------------------------------------------------------------

ROW = {"key": "k", "name": "t", "model": "m", "identity": {"protocol": "rewrite"},
       "about": {"shown": "s"}, "status": "answered", "reason": None, "cost": 0.5,
       "body": {"choices": [{"message": {"content": "so"}}]}}  # fmt: skip
DEEP = "[" * 2_500 + "]" * 2_500
STRANGE = ("null", "7", "NaN", '"\\ud83d"', "[]", "{}", "9" * 5_000, DEEP, "{", "\x00", "")


@pytest.mark.parametrize("line", STRANGE)
def test_a_line_that_is_no_reply_is_named_and_never_cut_off(tmp_path, line):
    file = tmp_path / FILE
    file.write_text(f"{json.dumps(ROW)}\n{line}\n")
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
        *(({"cost": cost}, "cost") for cost in (-1, True, math.nan, 10**400)),
        ({"key": 7}, "key"),
        ({"identity": {"protocol": ["rewrite"]}}, r"identity\.protocol"),
        ({"about": []}, "about"),
        ({"status": "good"}, "status"),
    ],
)
def test_a_field_of_a_stored_reply_that_is_wrong_is_named(tmp_path, change, field):
    file = tmp_path / FILE
    file.write_text(json.dumps(ROW | change) + "\n")
    with pytest.raises(BadFile, match=rf"line 1: not a stored reply \({field}"):
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


def test_nothing_is_sent_where_the_estimate_is_above_the_bound(server, tmp_path, table):
    asked = client(server, "instruct", tmp_path / "r", max_cost=19.9)
    with pytest.raises(api.ApiError, match=r"nothing sent .*max_cost=19\.9"):
        asked.replies(requests("a", "b"))
    mystery = client(server, "mystery", tmp_path / "r", max_cost=1.0)
    mystery.price = None
    with pytest.raises(api.ApiError, match="max_cost needs the price of mystery"):
        mystery.replies(requests("a"))
    assert server.total == 0


def test_a_run_that_costs_more_than_estimated_stops_at_the_bound(server, tmp_path, table):
    asked = client(server, "instruct", tmp_path / "r", max_cost=10.0, concurrency=1)
    cheap = requests(*NAMES[:8], expected=1)  # each costs 5, the length of the answer over 4
    with pytest.raises(api.ApiError, match="max_cost=10"):
        asked.replies(cheap)
    assert server.total == 2
    assert Store(tmp_path / "r").load().spent == 10.0
    with pytest.raises(api.ApiError, match=r"10\.0000 already spent"):
        asked.replies(cheap)
    more = client(server, "instruct", tmp_path / "r", max_cost=40.0)
    assert all(reply.failed is None for reply in more.replies(cheap))
    assert server.total == 8


def test_what_calls_under_way_may_cost_counts_too(server, tmp_path, table):
    asked = client(server, "slow", tmp_path / "r", max_cost=10.0)
    asked.price = api.Price(input=0, output=5e6)  # each is expected to cost 5, and costs more
    with Store(tmp_path / "r").writing() as store:
        sending = api._Sending(asked, "some-key", store, None)
        with pytest.raises(api.ApiError, match="the next call would cost more"):
            sending.run({one.name: one for one in requests(*NAMES[:8], expected=1)})
    assert server.total == 2


def test_prices_are_found_with_and_without_owner(table):
    assert api.price("gpt-4.1", OPENAI) == api.Price(input=2, output=8)
    assert api.price("openai/gpt-4.1", OPENAI) == api.Price(input=2, output=8)
    assert api.price("mystery", OPENAI) is None
    for name, url in (("m", "http://localhost:11434/v1"), ("deepseek-r1:free", OPENAI)):
        assert api.price(name, url).of(1e6, 1e6) == 0
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


@pytest.mark.parametrize(
    ("model", "host", "name"),
    [
        ("gpt-4.1", "api.openai.com", "OPENAI_API_KEY"),
        ("deepseek-reasoner", "api.deepseek.com", "DEEPSEEK_API_KEY"),
        ("claude-3-opus-20240229", "api.anthropic.com", "ANTHROPIC_API_KEY"),
        ("gemini-2.0-flash", "generativelanguage.googleapis.com", "GEMINI_API_KEY"),
        ("deepseek/deepseek-r1", "openrouter.ai", "OPENROUTER_API_KEY"),
    ],
)
def test_a_model_without_a_base_url_goes_to_its_provider_with_its_key(
    tmp_path, monkeypatch, model, host, name
):
    url = api.base_url(model)
    assert f"//{host}/" in url
    with pytest.raises(api.ApiError, match=rf"{host}: set {name}"):
        api.Client(model, folder=tmp_path, progress=False).replies(requests("a"))
    assert not Store(tmp_path).load().rows
    monkeypatch.setenv(name, "a-secret-key")
    assert api.api_key(url) == "a-secret-key"
    with pytest.raises(api.ApiError, match="set STLLMS_API_KEY"):
        api.api_key("https://elsewhere.example/v1")
    assert api.api_key("http://localhost:8000/v1") == "no-key-needed"
    assert api.base_url(model, "http://there:2/api/") == "http://there:2/api"


def test_the_server_of_the_openai_variable_may_have_its_key(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://here.example/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret-key")
    assert api.base_url("gpt-4.1") == "https://here.example/v1"
    assert api.api_key("https://here.example/v1") == "a-secret-key"
    with pytest.raises(api.ApiError, match="set STLLMS_API_KEY"):
        api.api_key("https://elsewhere.example/v1")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://k:ey@host/v1"])
def test_a_bad_base_url_is_refused_and_a_key_in_it_not_shown(tmp_path, url):
    with pytest.raises(ValueError, match="base URL") as caught:
        api.Client("m", folder=tmp_path, base_url=url)
    assert "k:ey" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["two words of it", 'quo"ted-key', "back\\slash", "ключ-ключ", "tiny"]
)
def test_what_is_no_key_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(api.ApiError, match="OPENAI_API_KEY is too short, or") as caught:
        api.api_key(OPENAI)
    assert key not in str(caught.value)


def test_the_nearest_env_file_counts_and_stays_out_of_the_environment(
    tmp_path, monkeypatch, caplog
):
    for place in ("started", "here"):
        (tmp_path / place / "below").mkdir(parents=True)
        text = f'# mine\n\nexport MINE = "{place}" # yes\nsecret words\nEMPTY=\nOTHER=$HOME\n'
        (tmp_path / place / ".env").write_text(text)
    monkeypatch.chdir(tmp_path / "here" / "below")
    found = [api.setting(name) for name in ("MINE", "EMPTY", "OTHER", "ABSENT")]
    assert found == ["here", None, "$HOME", None]
    assert "statement starting at line 4" in caplog.text
    assert "secret" not in caplog.text
    monkeypatch.setenv(api.STARTED, str(tmp_path / "started" / "below"))
    assert api.setting("MINE") == "started", "kernels of the runner work elsewhere"
    assert "started" not in os.environ.values()
    monkeypatch.setenv("MINE", "environment")
    assert api.setting("MINE") == "environment"


@pytest.mark.parametrize("model", ["forbidden", "echo"])
@pytest.mark.parametrize("key", ["sk-0123456789abcdef0123", "a/b+c=d&e%20f", "{[(.*?)]}|^$"])
def test_no_key_is_stored_or_shown(server, tmp_path, capsys, caplog, model, key):
    """A server that repeats the key, in its error or in a good answer, through a real
    connection; the key comes from a .env file."""
    (tmp_path / ".env").write_text(f"STLLMS_API_KEY='{key}'\n")
    asked = client(server, model, tmp_path / "r", progress=True)
    try:
        (reply,) = asked.replies(requests("a"))
        shown = reply.content
    except api.ApiError as error:
        shown = str(error)
    assert server.keys == [key]
    assert "API key provided: ***" in shown
    shown += "".join(capsys.readouterr()) + caplog.text + (tmp_path / "r" / FILE).read_text()
    assert key not in shown + json.dumps(shown)
    assert key not in os.environ.values()
