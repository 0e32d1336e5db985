"""A chat-completions server on 127.0.0.1 for tests: a deterministic judge, and its bad days.

A model labels by cue words; those that :class:`Handler` and :func:`reply` name misbehave in
their own ways. Standard library only: it knows nothing of the package but the wire format.
"""

from __future__ import annotations

import json
import re
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LABELS = (
    "deduction",
    "initializing",
    "adding-knowledge",
    "example-testing",
    "uncertainty-estimation",
    "backtracking",
)
CUES = {
    "backtracking": ("wait", "actually", "instead", "go back"),
    "uncertainty-estimation": ("not sure", "maybe", "perhaps", "hmm"),
    "example-testing": ("for example", "let me test", "suppose"),
    "adding-knowledge": ("recall", "know that", "by definition"),
}
#: Models that always refuse: status, message.
FAILING = {
    "patient": (429, "come back later"),
    "quota": (429, "You exceeded your current quota"),
    "broken": (500, "the server had an error"),
    "gone": (404, "The model gone does not exist"),
}


def label(sentence: str, first: bool) -> str:
    """The behaviour of a sentence: by cue word, else by a checksum, the same everywhere."""
    if first:
        return "initializing"
    for name, cues in CUES.items():
        if any(cue in sentence.lower() for cue in cues):
            return name
    return LABELS[max(0, zlib.crc32(sentence.encode()) % 12 - 6)]


def judge(text: str) -> str:
    """What a good judge answers to the user's message, in the protocol of the message."""
    if "<pieces>\n" in text:
        lines = text.partition("<pieces>\n")[2].rpartition("\n</pieces>")[0].split("\n")
        pieces = [line.partition("| ") for line in lines]
        items = [f"{n} {label(words, n == '1')}" for n, _, words in pieces]
        return json.dumps({"labels": items})
    chain = text.partition("<reasoning>\n")[2].rpartition("\n</reasoning>")[0]
    parts = [p for p in re.split(r"(?<=[.!?。])\s+|(?<=。)|\n+", chain) if p.strip()]
    tagged = (f'["{label(part, i == 0)}"]{part}["end-section"]' for i, part in enumerate(parts))
    return "\n".join(tagged)


class Server:
    """The server in a thread: ``with Server() as server: ... server.url``.

    ``calls`` counts requests by model, ``texts``, ``times`` and ``keys`` hold what they were
    about, when they came and with which key, ``fields`` the last one as it came, ``peak`` the
    largest number of requests under way at a time.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.texts: list[str] = []
        self.times: list[float] = []
        self.keys: list[str] = []
        self.fields: dict[str, Any] = {}
        self.active = self.peak = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        handler = type("BoundHandler", (Handler,), {"state": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    @property
    def total(self) -> int:
        """All requests so far."""
        return self.calls.total()


class Handler(BaseHTTPRequestHandler):
    """One request; ``state`` is the :class:`Server`."""

    protocol_version = "HTTP/1.1"
    state: Server

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_POST(self) -> None:
        state = self.state
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model, text = request["model"], request["messages"][-1]["content"]
        with state.lock:
            first = text not in state.texts
            state.calls[model] += 1
            state.texts.append(text)
            state.times.append(time.monotonic())
            state.keys.append(self.headers.get("Authorization", "").removeprefix("Bearer "))
            state.fields = request
            state.active += 1
            state.peak = max(state.peak, state.active)
        try:
            self.answer(model, text, first, request)
        finally:
            with state.lock:
                state.active -= 1

    def answer(self, model: str, text: str, first: bool, request: dict[str, Any]) -> None:
        """Do what the model's name says."""
        if model == "forbidden":
            self.error(401, f"Incorrect API key provided: {self.state.keys[-1]}")
        elif model in FAILING:
            headers = {"Retry-After": "9999"} if model == "patient" else {}
            code = "insufficient_quota" if model == "quota" else "x"
            self.error(*FAILING[model], headers, code)
        elif model == "limited" and first:
            self.error(429, "slow down", {"Retry-After": "0.3"})
        elif model == "flaky" and first:
            self.error(500, "the server had an error")
        elif model == "picky" and "unlucky" in text:
            self.error(500, "I do not like this one")
        elif model == "no-schema" and "response_format" in request:
            self.error(400, "response_format is not supported here")
        elif model == "wrapped":
            self.send(200, json.dumps({"error": {"code": 503, "message": "upstream is down"}}))
        elif model == "html":
            self.send(200, "<html>login please</html>")
        elif model.startswith("anthropic/"):
            self.claude(request, text)
        elif model == "hangs":
            self.state.closing.wait(20)
            self.close_connection = True
        else:
            self.complete(model, text)

    def claude(self, request: dict[str, Any], text: str) -> None:
        """Think only if told to, and then refuse what the provider refuses."""
        thinks = "reasoning" in request
        if thinks and request.get("temperature", 1) != 1:
            self.error(400, "temperature may only be set to 1 when thinking")
        elif thinks and request["max_tokens"] <= 1024:
            self.error(400, "max_tokens must be greater than thinking.budget_tokens")
        else:
            self.complete("router" if thinks else "instruct", text)

    def complete(self, model: str, text: str) -> None:
        """Answer with a chat completion: ``slow`` after 0.15 s, ``shuffled`` in another order,
        ``drops`` with half of it, ``echo`` with the key that was sent."""
        if model == "shuffled":
            time.sleep(0.01 * (20 - min(20, self.state.total)))
        if model == "slow":
            time.sleep(0.15)
        message, finish, usage = reply(model, text)
        if model == "echo":
            message["content"] = f"API key provided: {self.state.keys[-1]}"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        body = json.dumps({"model": model, "choices": [choice], "usage": usage})
        if model == "drops":
            self.send(200, body[: len(body) // 2], length=len(body))
            self.close_connection = True
        else:
            self.send(200, body)

    def error(
        self, status: int, message: str, headers: dict[str, str] | None = None, code: str = "x"
    ) -> None:
        self.send(status, json.dumps({"error": {"message": message, "code": code}}), headers)

    def send(
        self, status: int, body: str, headers: dict[str, str] | None = None, length: int = 0
    ) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()


WRONG = ["1 initializing", "2 dreaming", "1 backtracking", "900 deduction", "0 deduction",
         "3-2 deduction", {"n": "x"}]  # fmt: skip


def reply(model: str, text: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Message, finish reason and usage of the model's answer to a text."""
    thoughts, words = f"I think about: {text}", f"My answer to: {text}"
    judged = judge(text) if "<pieces>\n" in text or "<reasoning>\n" in text else words
    lines = (": ".join(item.split()) for item in re.findall(r"\d+ [a-z-]+", judged))
    messages: dict[str, dict[str, str]] = {
        "prose": {"content": "An interesting chain of 3 deduction steps! I need more."},
        "half": {"content": judged[: len(judged) // 2]},
        "wrong-numbers": {"content": json.dumps({"labels": WRONG})},
        "lines": {"content": "Here you are:\n" + "\n".join(lines)},
        "silent": {"content": ""},
        "thinker": {"content": words, "reasoning_content": thoughts},
        "router": {"content": words, "reasoning": thoughts},
        "cut": {"content": "", "reasoning_content": thoughts},
        "inline": {"content": f"<think>\n{thoughts}\n</think>\n\n{words}"},
        "cut-inline": {"content": f"<think>\n{thoughts}"},
        "instruct": {"content": words},
    }
    message = {"role": "assistant", **messages.get(model, {"content": judged})}
    finish = "length" if model in ("half", "cut", "cut-inline") else "stop"
    usage: dict[str, Any] = {
        "prompt_tokens": len(text) // 4,
        "completion_tokens": len(message["content"]) // 4,
    }
    return message, finish, usage | ({"cost": 0.25} if model == "router" else {})
