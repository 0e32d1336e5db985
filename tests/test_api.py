"""The API client against a real server on localhost: nothing lost, nothing paid twice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote

import pytest
from server import KEY, Server

from stllms import api, pipeline, providers, sending
from stllms.replies import FILE, Reply, Request, Store

HERE = Path(__file__).parent
KEYS = ("OPENAI_BASE_URL", providers.KEY, providers.PRICES)


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*KEYS, *(provider.key for provider in providers.PROVIDERS)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def requests(*texts: str, expected: int = 10) -> list[Request]:
    """One request a text, named after it."""
    return [
        Request(
            name=text,
            messages=({"role": "user", "content": text},),
            identity={"protocol": "plain"},
            max_tokens=100,
            expected_tokens=expected,
        )
        for text in texts
    ]


def client(server: Server, model: str, folder: Path, **options) -> api.Client:
    quick = {"backoff": 0.01, "retries": 2, "timeout": 5.0, "progress": False}
    return api.Client(model, folder=folder, base_url=server.url, **{**quick, **options})


NAMES = [f"text {i}" for i in range(12)]


# --- answers, order, storage --------------------------------------------------------------


def test_every_reply_belongs_to_its_request_whatever_order_they_come_in(server, tmp_path):
    replies = client(server, "shuffled", tmp_path).replies(requests(*NAMES))
    stored = [row["name"] for rows in Store(tmp_path).load().rows.values() for row in rows]
    assert stored != NAMES  # they did come in another order
    assert [reply.row["name"] for reply in replies] == NAMES
    assert all(reply.failed is None for reply in replies)


def test_a_text_is_answered_about_itself(server, tmp_path):
    replies = client(server, "instruct", tmp_path).replies(requests(*NAMES))
    assert [reply.content for reply in replies] == [f"My answer to: {name}" for name in NAMES]


def test_a_second_run_sends_nothing_and_needs_no_server(server, tmp_path):
    first = client(server, "instruct", tmp_path).replies(requests(*NAMES))
    nowhere = api.Client("instruct", folder=tmp_path, base_url="https://nowhere.invalid")
    again = nowhere.replies(requests(*reversed(NAMES)))
    assert [reply.row for reply in again] == [reply.row for reply in reversed(first)]
    assert server.total == len(NAMES)


def test_equal_requests_are_sent_once(server, tmp_path):
    replies = client(server, "instruct", tmp_path).replies(requests("a", "b", "a", "a"))
    assert server.total == 2
    assert [r.content[-1] for r in replies] == ["a", "b", "a", "a"]


def test_a_row_holds_what_is_needed_to_know_where_a_reply_came_from(server, tmp_path):
    (reply,) = client(server, "instruct", tmp_path).replies(requests("a"))
    assert reply.row["model"] == "instruct"
    assert reply.row["identity"] == {"protocol": "plain"}
    assert reply.row["body"]["choices"][0]["message"]["content"] == "My answer to: a"
    assert reply.row["usage"]["completion_tokens"] == 3
    assert reply.row["time"].endswith("+00:00")
    assert reply.row["key"] == requests("a")[0].key("instruct")


def test_another_model_or_identity_is_another_request(server, tmp_path):
    (one,) = requests("a")
    other = Request("a", one.messages, {"protocol": "plain", "version": 2}, 100, 10)
    assert len({one.key("m"), one.key("n"), other.key("m"), other.key("n")}) == 4


def test_it_works_inside_a_running_event_loop(server, tmp_path):
    async def cell() -> list[Reply]:
        return client(server, "instruct", tmp_path).replies(requests("a", "b"))

    assert [reply.failed for reply in asyncio.run(cell())] == [None, None]


def test_no_more_than_the_allowed_requests_are_under_way(server, tmp_path):
    client(server, "slow", tmp_path, concurrency=3).replies(requests(*NAMES[:9]))
    assert 1 < server.peak <= 3


def test_any_language_and_half_surrogates_are_sent_and_stored(server, tmp_path):
    from stllms.replies import clean

    texts = ["数学の問題です。", "Ελληνικά", "naïve 🙂", clean("half \ud83d pair")]
    client(server, "instruct", tmp_path).replies(requests(*texts))
    assert sorted(server.texts) == sorted(texts)
    assert len(clean("half \ud83d pair")) == len("half \ud83d pair")


def test_a_field_that_the_server_refuses_is_left_out_and_not_offered_again(server, tmp_path):
    asked = [
        Request(r.name, r.messages, {}, 100, 10, optional={"response_format": {}, "top_p": 1})
        for r in requests("a", "b", "c")
    ]
    replies = client(server, "no-schema", tmp_path, concurrency=1).replies(asked)
    assert [reply.failed for reply in replies] == [None] * 3
    assert server.total == 4  # one refusal
    assert replies[2].row["dropped"] == ["response_format"]
    assert server.fields["top_p"] == 1


# --- failures -----------------------------------------------------------------------------


def test_a_failure_is_recorded_with_its_reason_and_asked_again_on_the_next_run(
    server, tmp_path
):
    impatient = client(server, "flaky", tmp_path, retries=0)
    assert {reply.failed for reply in impatient.replies(requests("a", "b"))} == {
        "HTTP 500: the server had an error"
    }
    assert [reply.failed for reply in impatient.replies(requests("a", "b"))] == [None, None]
    assert server.total == 4
    impatient.replies(requests("a", "b"))
    assert server.total == 4


def test_one_bad_request_leaves_the_others_alone(server, tmp_path):
    replies = client(server, "picky", tmp_path).replies(requests("a", "unlucky", "b"))
    assert [reply.failed is None for reply in replies] == [True, False, True]
    assert replies[1].failed == "HTTP 500: I do not like this one (3 attempts)"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("broken", "HTTP 500: the server had an error (3 attempts)"),
        ("hangs", "no answer within 0.2 s (3 attempts)"),
        ("drops", "peer closed connection"),
        ("wrapped", "no chat completion in the answer: upstream is down (3 attempts)"),
        ("html", "no chat completion in the answer: <html>login please</html> (3 attempts)"),
        ("patient", "the server asks to wait 9999 s, max_wait=120"),
    ],
)
def test_a_server_that_misbehaves_gives_a_recorded_failure(server, tmp_path, model, reason):
    limit = 0.2 if model == "hangs" else 5.0
    replies = client(server, model, tmp_path, timeout=limit).replies(requests("a", "b"))
    assert all(reason in reply.failed for reply in replies)
    attempts = 1 if model == "patient" else 3
    assert [reply.row["attempts"] for reply in replies] == [attempts, attempts]
    assert len(Store(tmp_path).load().rows) == 2


def test_nobody_listening_gives_a_recorded_failure(tmp_path):
    with Server() as gone:
        pass
    (reply,) = client(gone, "test", tmp_path).replies(requests("a"))
    assert reply.failed.startswith(f"no answer from {gone.url}/v1")


def test_a_server_that_only_fails_is_not_asked_for_ever(server, tmp_path):
    stubborn = client(server, "broken", tmp_path, retries=0, stop_after=4, concurrency=2)
    with pytest.raises(api.ApiError, match="4 requests failed in a row"):
        stubborn.replies(requests(*NAMES))
    assert server.total <= 6


def test_retry_after_is_honoured(server, tmp_path):
    replies = client(server, "limited", tmp_path, concurrency=2).replies(requests(*"abc"))
    assert [reply.failed for reply in replies] == [None] * 3
    assert [reply.row["attempts"] for reply in replies] == [2, 2, 2]
    for text in "abc":
        sent = zip(server.times, server.texts, strict=True)
        first, second = (moment for moment, asked in sent if asked == text)
        assert second - first >= 0.28


def test_retry_after_is_read_as_seconds_milliseconds_or_a_date():
    assert sending.retry_after({"retry-after": "2.5"}) == 2.5
    assert sending.retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert sending.retry_after({"retry-after": "0"}) == 0
    date = formatdate(time.time() + 60, usegmt=True)
    assert 55 < sending.retry_after({"retry-after": date}) <= 60
    assert sending.retry_after({"retry-after": formatdate(0, usegmt=True)}) == 0
    for nothing in ({}, {"retry-after": "soon"}, {"retry-after": "nan"}, {"retry-after": "-1"}):
        assert sending.retry_after(nothing) is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gone", r"no model 'gone' at http://127.0.0.1:\d+/v1, or a wrong URL"),
        ("quota", "no quota left"),
        ("forbidden", r"\(STLLMS_API_KEY\) is missing or wrong"),
    ],
)
def test_what_no_retry_can_mend_stops_the_run_with_one_line(server, tmp_path, model, message):
    with pytest.raises(api.ApiError, match=message) as caught:
        client(server, model, tmp_path, concurrency=2).replies(requests(*NAMES))
    assert server.total <= 2
    assert "\n" not in str(caught.value)


def test_a_wrong_key_is_neither_shown_nor_stored(tmp_path, monkeypatch, capsys):
    wrong = "sk-test-wrong-key-0000000000"
    monkeypatch.setenv(providers.KEY, wrong)
    with Server(key=KEY) as server, pytest.raises(api.ApiError) as caught:
        client(server, "test", tmp_path, progress=True).replies(requests("a"))
    shown = str(caught.value) + "".join(capsys.readouterr())
    assert wrong not in shown + (tmp_path / FILE).read_text()
    assert server.total == 1


# --- as many at a time as the server takes ------------------------------------------------


@pytest.mark.parametrize("most", [1, 5])
def test_the_requests_under_way_settle_at_what_the_server_takes(tmp_path, most):
    """A server that refuses with 429 what it has no room for. All replies arrive. The
    number under way settles below what it takes and does not fall to one. What was refused is
    asked again, and not before the time that the refusal named."""
    texts = [f"text {i}" for i in range(10 + 16 * most)]
    with Server(most=most) as crowded:
        replies = client(crowded, "crowded", tmp_path).replies(requests(*texts))
    assert [reply.failed for reply in replies] == [None] * len(texts)
    assert sorted(reply.row["name"] for reply in replies) == sorted(texts)
    assert crowded.calls["crowded"] == len(texts) + len(crowded.refusals)
    settled = crowded.work[len(texts) // 2 :]
    assert min(most, 2) <= statistics.median(settled) <= most
    assert crowded.refusals
    sent = sorted(zip(crowded.times, crowded.texts, strict=True))
    for refused, text in crowded.refusals:
        again = next(moment for moment, about in sent if about == text and moment > refused)
        assert again - refused >= 0.09


def test_the_window_grows_by_one_an_answer_then_by_one_a_window_and_halves_once():
    window = sending.Window(most=40)
    assert window.allowed == 8

    def answer(times: int) -> None:
        for _ in range(times):
            window.under_way = int(window.allowed) - 1
            window.answered()

    answer(4)
    assert window.allowed == 12
    window.under_way = 11
    sent = time.monotonic()
    window.refused(sent)
    window.refused(sent)  # was on its way before the first refusal came
    assert window.allowed == 6
    answer(6)
    assert 6.9 < window.allowed <= 7.0  # a window of answers later
    window.under_way = 2  # few are under way: they were too many
    window.refused(time.monotonic() + 1)
    assert window.allowed == 1.5
    for _ in range(4):
        window.refused(time.monotonic() + 1)
    assert window.allowed == 1
    answer(20_000)
    assert window.allowed == 40
    window.under_way = 3
    window.answered()
    assert window.allowed == 40
    idle = sending.Window(most=40)
    idle.answered()  # one request at a time needs no larger window
    assert idle.allowed == 8


# --- keys in what a server says -----------------------------------------------------------

STRANGE_KEYS = (
    "sk-0123456789abcdef0123",
    "abc",
    "x",
    'a"b/c\\d',
    "a/b/c/d/e/f/g/h/i/j/k",
    "key+with=signs&and%20percent",
    "{[(.*?)]}|^$",
    "schlüssel-ü",
    "钥匙🔑",
)


def in_forms(key: str) -> list[str]:
    """The key as a server may write it: as it is, as JSON (once, twice, with escaped slashes
    or code points), and in a URL."""
    once = json.dumps(key)[1:-1]
    forms = [key, once, json.dumps(once)[1:-1], json.dumps(key, ensure_ascii=False)[1:-1]]
    return [*forms, once.replace("/", "\\/"), quote(key, safe=""), quote(key)]


@pytest.mark.parametrize("key", STRANGE_KEYS)
def test_a_key_is_struck_out_wherever_it_stands_however_it_is_written(key):
    for form in in_forms(key):
        body = {
            "error": {"message": f"Incorrect key: {form}.", form: [f"{form}", {"a": [form]}]},
            "headers": {"Authorization": f"Bearer {form}"},
            "upstream": json.dumps({"error": f"bad key '{form}'\n{form}"}),
        }
        said, times = providers.redacted(body, key)
        assert times >= 6
        text = json.dumps(said, ensure_ascii=False)
        assert not any(again in text for again in in_forms(key) if len(key) > 1)
        assert said["error"]["message"] == "Incorrect key: ***."
        assert said["headers"]["Authorization"] == "Bearer ***"
        assert said["error"]["***"] == ["***", {"a": ["***"]}]
        assert json.loads(said["upstream"]) == {"error": "bad key '***'\n***"}


def test_a_short_key_is_no_part_of_a_word_and_the_placeholder_no_key():
    said = {"content": "the latest contest is a test.", "n": 1, "none": None}
    found, times = providers.redacted(said, "test")
    assert found == said | {"content": "the latest contest is a ***."}
    assert times == 1
    assert providers.redacted(said, providers.NO_KEY) == (said, 0)
    text = f"key {providers.NO_KEY}"
    assert providers.redacted(text, providers.NO_KEY) == (text, 0)
    assert providers.redacted(text, "") == (text, 0)


@pytest.mark.parametrize("key", ["abc", 'q"/x\\y-0123456789'])
def test_no_key_is_stored_or_shown_whatever_its_length(tmp_path, monkeypatch, capsys, key):
    """A server that repeats the key in its error, through a real connection."""
    monkeypatch.setenv(providers.KEY, key)
    with Server() as server, pytest.raises(api.ApiError) as caught:
        client(server, "forbidden", tmp_path, progress=True).replies(requests("a"))
    stored = (tmp_path / FILE).read_text()
    shown = str(caught.value) + "".join(capsys.readouterr())
    assert "Incorrect API key provided: ***" in shown
    for form in in_forms(key):
        assert f"provided: {form}" not in shown + stored
    (row,) = (row for rows in Store(tmp_path).load().rows.values() for row in rows)
    assert row["redacted"] == 1
    assert row["body"]["error"]["message"] == "Incorrect API key provided: ***"


# --- replies that the caller cannot use ---------------------------------------------------


def test_an_unusable_reply_is_stored_and_asked_again_once(server, tmp_path):
    asked = client(server, "prose", tmp_path)

    def check(reply: Reply) -> str | None:
        return "no labels" if "opinion" not in reply.content else None

    for calls in (1, 2, 2, 2):
        (reply,) = asked.replies(requests("a"), check)
        assert reply.failed == "no labels"
        assert server.total == calls
    statuses = [row["status"] for row in Store(tmp_path).load().rows[reply.row["key"]]]
    assert statuses == ["unusable", "unusable"]


# --- crashes ------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_api import NAMES, requests
from stllms import api
api.Client("slow", folder=Path({folder!r}), base_url={url!r}, concurrency=2,
           progress=False).replies(requests(*NAMES))
"""


def test_a_killed_run_goes_on_where_it_was(server, tmp_path):
    code = CHILD.format(here=str(HERE), folder=str(tmp_path), url=server.url)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 20
    while server.total < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    stored = {row["name"] for rows in Store(tmp_path).load().rows.values() for row in rows}
    assert 4 <= len(stored) < len(NAMES)
    replies = client(server, "slow", tmp_path).replies(requests(*NAMES))
    assert [reply.row["name"] for reply in replies] == NAMES
    assert [server.texts.count(name) for name in stored] == [1] * len(stored)
    assert server.total - len(NAMES) <= 2  # only what was under way when the kill came


def test_a_torn_last_line_is_dropped_and_only_that_request_sent_again(server, tmp_path):
    asked = client(server, "instruct", tmp_path, concurrency=1)
    asked.replies(requests("a", "b"))
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-25])
    assert [reply.failed for reply in asked.replies(requests("a", "b"))] == [None, None]
    assert server.total == 3
    assert [json.loads(line)["name"] for line in file.read_text().splitlines()] == ["a", "b"]


def test_a_last_line_without_its_newline_counts(server, tmp_path):
    asked = client(server, "instruct", tmp_path, concurrency=1)
    asked.replies(requests("a", "b"))
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-1])
    asked.replies(requests("a", "b", "c"))
    assert server.total == 3
    assert len(file.read_text().splitlines()) == 3


def test_a_foreign_line_is_an_error_that_names_file_and_line(server, tmp_path):
    asked = client(server, "instruct", tmp_path)
    asked.replies(requests("a"))
    file = tmp_path / FILE
    file.write_text("not a reply\n" + file.read_text())
    with pytest.raises(ValueError, match=r"replies\.jsonl, line 1: not a stored reply"):
        asked.replies(requests("a"))


def test_two_runs_at_once_in_one_folder_pay_once(server, tmp_path):
    def work() -> None:
        client(server, "slow", tmp_path).replies(requests(*NAMES[:4]))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.total == 4


# --- cost ---------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A price table: one unit a token out for the model ``instruct``."""
    path = tmp_path / "mine.json"
    prices = {"instruct": {"input": 0, "output": 1e6}}
    path.write_text(json.dumps({"currency": "EUR", "models": prices}))
    return path


def test_the_estimate_is_shown_before_the_first_call(server, tmp_path, table, capsys):
    asked = client(server, "instruct", tmp_path / "r", prices=table, progress=True)
    estimate = asked.estimate(requests("a", "b"))
    assert (estimate.calls, estimate.tokens_out, estimate.cost) == (2, 20, 20.0)
    assert server.total == 0
    asked.replies(requests("a", "b"))
    expected = "0 replies stored; about 10 tokens in and 20 out, about 20.0000 EUR"
    shown = f"instruct: 2 calls to send, {expected}"
    assert shown in capsys.readouterr().out.splitlines()
    assert pipeline.ESTIMATE.match(shown)  # so that the runner shows it in the terminal


def test_nothing_is_sent_where_the_estimate_is_above_the_bound(server, tmp_path, table):
    asked = client(server, "instruct", tmp_path / "r", prices=table, max_cost=19.9)
    with pytest.raises(api.CostLimit, match=r"nothing sent .*max_cost=19\.9"):
        asked.replies(requests("a", "b"))
    assert server.total == 0


def test_a_run_that_costs_more_than_estimated_stops_at_the_bound(server, tmp_path, table):
    options = {"prices": table, "concurrency": 1}
    asked = client(server, "instruct", tmp_path / "r", max_cost=10.0, **options)
    cheap = requests(*NAMES[:8], expected=1)  # each costs 5, the length of the answer over 4
    with pytest.raises(api.CostLimit, match="max_cost=10"):
        asked.replies(cheap)
    assert server.total == 2
    assert Store(tmp_path / "r").load().spent == 10.0
    with pytest.raises(api.CostLimit, match=r"10\.0000 already spent"):
        asked.replies(cheap)
    more = client(server, "instruct", tmp_path / "r", max_cost=40.0, **options)
    assert all(reply.failed is None for reply in more.replies(cheap))
    assert server.total == 8


def test_a_bound_needs_a_price(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENROUTER_API_KEY", "a-key")
    asked = api.Client("mystery/model", folder=tmp_path, max_cost=1.0, progress=False)
    with pytest.raises(api.CostLimit, match="max_cost needs the price of mystery/model"):
        asked.replies(requests("a"))


def test_prices_are_found_with_and_without_owner_variant_and_date(monkeypatch, table):
    url = "https://api.openai.com/v1"
    plain = providers.price("gpt-4.1", url)
    assert plain == providers.Price(2.0, 8.0, "USD")
    for name in ("openai/gpt-4.1", "gpt-4.1-2025-04-14", "openai/gpt-4.1:nitro"):
        assert providers.price(name, url) == plain
    assert providers.price("mystery", url) is None
    assert providers.price("mystery", "http://localhost:11434/v1").of(1e6, 1e6) == 0
    assert providers.price("deepseek/deepseek-r1:free", url).of(1e6, 1e6) == 0
    monkeypatch.setenv(providers.PRICES, str(table))
    assert providers.price("instruct", url).currency == "EUR"
    assert providers.price("gpt-4.1", url) == plain


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"models": {"m": {"input": 1}}}',
        '{"models": {"m": {"input": -1, "output": 1}}}',
    ],
)
def test_a_bad_price_table_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=r"price table .*bad\.json"):
        providers.price("m", "https://api.openai.com/v1", tmp_path / "bad.json")


# --- servers and keys ---------------------------------------------------------------------


def test_a_model_without_a_base_url_goes_to_its_provider(monkeypatch):
    for model, host in {
        "gpt-4.1": "api.openai.com",
        "deepseek-reasoner": "api.deepseek.com",
        "claude-3-opus-20240229": "api.anthropic.com",
        "gemini-2.0-flash": "generativelanguage.googleapis.com",
        "deepseek/deepseek-r1": "openrouter.ai",
    }.items():
        assert f"//{host}/" in providers.base_url(model)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://here:1")
    assert providers.base_url("gpt-4.1") == "http://here:1/v1"
    assert providers.base_url("gpt-4.1", "http://there:2/api/") == "http://there:2/api"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://k:ey@host/v1"])
def test_a_bad_base_url_is_refused(tmp_path, url):
    with pytest.raises(ValueError, match="base URL"):
        api.Client("m", folder=tmp_path, base_url=url)


def test_no_key_is_an_error_that_names_the_variable_and_sends_nothing(tmp_path):
    with pytest.raises(api.MissingKey, match=r"api\.openai\.com: set OPENAI_API_KEY"):
        api.Client("gpt-4.1", folder=tmp_path, progress=False).replies(requests("a"))
    assert not Store(tmp_path).load().rows


def test_a_key_comes_from_the_environment_or_the_nearest_env_file(tmp_path, monkeypatch):
    url = "https://api.openai.com/v1"
    (tmp_path / ".env").write_text('# mine\n\nexport OPENAI_API_KEY = "from-file" # yes\nA=b\n')
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert providers.api_key(url) == "from-file"
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    assert providers.api_key(url) == "from-environment"


def test_env_files_are_those_of_the_start_of_the_working_folder_and_of_the_project(
    tmp_path, monkeypatch
):
    places = {name: tmp_path / name for name in ("started", "here", "project")}
    for name, place in places.items():
        (place / "below").mkdir(parents=True)
        (place / ".env").write_text(f"{name.upper()}=1\nALL={name}\nEMPTY=\n")
    monkeypatch.setattr(providers, "repository", lambda: places["project"])
    monkeypatch.chdir(places["here"] / "below")
    monkeypatch.delenv(providers.STARTED, raising=False)
    assert [providers.setting(name) for name in ("HERE", "PROJECT", "STARTED", "EMPTY")] == [
        "1", "1", None, None,
    ]  # fmt: skip
    assert providers.setting("ALL") == "here"
    monkeypatch.setenv(providers.STARTED, str(places["started"] / "below"))
    assert [providers.setting(name) for name in ("HERE", "PROJECT", "STARTED")] == ["1"] * 3
    assert providers.setting("ALL") == "started"
    monkeypatch.setenv("ALL", "environment")
    assert providers.setting("ALL") == "environment"


def test_kernels_of_a_run_know_where_it_was_started(tmp_path, monkeypatch):
    from stllms import execute

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(providers.STARTED, raising=False)
    (tmp_path / ".env").write_text("STLLMS_API_KEY=mine\n")
    with execute._own_kernel(quiet=True):
        monkeypatch.chdir("/")  # as a kernel, which works beside its notebook
        assert providers.setting(providers.KEY) == "mine"
    assert providers.setting(providers.KEY) is None


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("K=v", "v"),
        ("  export K = v  # why", "v"),
        ("K='a # b'", "a # b"),
        ('K="a=b"', "a=b"),
        ("K=sk-a/b+c==", "sk-a/b+c=="),
        ("K=$HOME", "$HOME"),
        ("K=${HOME}", "${HOME}"),
        ("\ufeffK=v", "v"),
        ("K=v\r", "v"),
        ("K=", ""),
    ],
)
def test_a_line_of_an_env_file(tmp_path, line, value):
    (tmp_path / ".env").write_bytes(f"{line}\nL=1\n".encode())
    assert providers.read_env(tmp_path / ".env") == {"K": value, "L": "1"}


@pytest.mark.parametrize(
    "line", ["secret", "secret words", "=secret", 'K="secret', "K 'secret'"]
)
def test_a_line_that_is_none_is_named_and_not_shown(tmp_path, line):
    (tmp_path / ".env").write_text(f"A=1\n# comment\n{line}\n")
    with pytest.raises(ValueError, match=r"\.env, line 3: expected NAME=value") as caught:
        providers.read_env(tmp_path / ".env")
    assert "secret" not in str(caught.value)
    (tmp_path / ".env").write_bytes(b"A=secret\xff\n")
    with pytest.raises(ValueError, match=r"\.env: not a text in UTF-8") as caught:
        providers.read_env(tmp_path / ".env")
    assert "secret" not in str(caught.value)


def test_what_an_env_file_holds_is_in_no_file_of_a_run_and_in_no_line(
    server, tmp_path, monkeypatch, capsys
):
    from stllms import report
    from stllms.annotate import stage
    from stllms.artifacts import Folder
    from stllms.config import RunConfig
    from stllms.records import Response

    secret = "never-shown-4711"
    (tmp_path / ".env").write_text(f"STLLMS_API_KEY={secret}\nOTHER={secret}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path / "results"))
    config = RunConfig(judge="openai:test", base_url=server.url)
    folder = Folder(config).open()
    folder.note(device="cpu")
    text = "So it is 4. Wait, it is 5."
    chain = Response("t", "", "", (), (), text, text, 0, "", closed=True, finished=True)
    labels = stage.annotations(
        stage.for_run(config), [chain], store=folder.rows(folder.annotations, stage.KEY)
    )
    assert labels[0].segments, "the judge was asked"
    report.write(folder.path)
    files = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        assert secret.encode() not in path.read_bytes(), path.name
    shown = capsys.readouterr()
    assert secret not in shown.out + shown.err
    assert secret not in os.environ.values(), "no child of ours inherits it"


def test_a_provider_s_key_is_not_sent_to_another_host(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "openai-secret")
    with pytest.raises(api.MissingKey, match="set STLLMS_API_KEY"):
        providers.api_key("https://elsewhere.example/v1")
    assert providers.api_key("http://localhost:8000/v1") == "no-key-needed"
    monkeypatch.setenv("OPENAI_BASE_URL", "https://elsewhere.example/v1")
    assert providers.api_key("https://elsewhere.example/v1") == "openai-secret"
    monkeypatch.setenv(providers.KEY, "mine")
    assert providers.api_key("https://elsewhere.example/v1") == "mine"


def test_a_bad_env_line_or_key_is_named_but_never_shown(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("A=1\nsecret words here\n")
    with pytest.raises(ValueError, match=r"\.env, line 2: expected NAME=value") as caught:
        providers.setting("OPENAI_API_KEY")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with pytest.raises(api.MissingKey, match="OPENAI_API_KEY holds characters") as caught:
        providers.api_key("https://api.openai.com/v1")
    assert "two words" not in str(caught.value)


def test_bad_limits_are_refused(tmp_path):
    for bad in ({"concurrency": 0}, {"timeout": 0}, {"retries": -1}, {"asks": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: .* expected at least"):
            api.Client("m", folder=tmp_path, base_url="http://localhost:1", **bad)
