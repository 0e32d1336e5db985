"""Models behind an OpenAI-compatible API: requests -> stored replies. Needs no torch.

Every reply is stored raw before it is used, in one append-only JSONL file that is read without
key and network. A request that was answered is never sent again, whoever asks and whenever a
run was killed; one that failed is stored with its reason and asked again on the next run. The
``openai`` package does retries, back-off, ``Retry-After`` and time-outs. No call is sent that
would bring the cost of a folder above ``max_cost``. Keys are neither stored nor printed.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from anyio.from_thread import start_blocking_portal
from dotenv import dotenv_values
from pydantic import BaseModel, Field, ValidationError

from stllms.records import amount, loads
from stllms.runs.files import BadFile, locked
from stllms.terminal import plain, token_bar

#: The file of a folder of replies.
FILE = "replies.jsonl"
#: Replies at most to one request, where the caller cannot use them.
ASKS = 2
#: Failures in a row that stop a run.
STOP_AFTER = 20
#: The placeholder that a local server without a key is sent; a shorter key is no secret.
NO_KEY, SHORTEST_KEY = "no-key-needed", 8
#: Settings: the key of a server that is none of :data:`PROVIDERS`; the folder that the runner
#: was started in, for its kernels, which work elsewhere; a file in the shape of
#: ``prices.json`` whose entries go before ours.
KEY, STARTED, PRICES = "STLLMS_API_KEY", "STLLMS_STARTED", "STLLMS_PRICES"
#: The variable of the ``openai`` package for another server than its own.
OWN_SERVER = "OPENAI_BASE_URL"
#: The package's prices.
SHIPPED = Path(__file__).with_name("prices.json")


class ApiError(RuntimeError):
    """There is no key, too high a cost, or no use in going on; what was answered is stored."""


# -- requests and replies ------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What is asked of a model.

    ``name`` is the caller's (a task id). ``identity`` (protocol, prompt version, sampling)
    and ``messages`` make the key. ``max_tokens`` is the limit sent, ``expected_tokens`` the
    guess for the estimate. ``extra`` fields are sent as they are; ``optional`` ones are left
    out for a server that refuses them. ``about`` is stored beside the reply.
    """

    name: str
    messages: tuple[Mapping[str, str], ...]
    identity: Mapping[str, Any]
    max_tokens: int
    expected_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def key(self, model: str) -> str:
        """The name under which the reply of ``model`` is stored (64 hex digits)."""
        return digest(model, [dict(message) for message in self.messages], dict(self.identity))

    @property
    def size(self) -> tuple[int, int]:
        """Tokens in (four more a message, for its frame) and tokens out, both guessed."""
        return sum(tokens(m["content"]) + 4 for m in self.messages), self.expected_tokens


@dataclass(frozen=True)
class Reply:
    """One stored row. ``failed`` says why there is no usable reply, ``None`` for a good one."""

    row: Mapping[str, Any]
    failed: str | None = None

    @property
    def content(self) -> str:
        """The text of the reply; ``""`` where the server sent none."""
        return self._text("content")

    @property
    def reasoning(self) -> str:
        """Reasoning in a field of its own (``reasoning_content`` or ``reasoning``)."""
        return self._text("reasoning_content") or self._text("reasoning")

    @property
    def finish(self) -> str | None:
        """Why the server says the reply ended: ``stop``, ``length``, ..."""
        return _choice(self.row.get("body")).get("finish_reason")

    def _text(self, name: str) -> str:
        """A field of the message, a string or a list of text parts, as it can be stored."""
        value = _choice(self.row.get("body")).get("message", {}).get(name)
        if isinstance(value, list):
            parts = (part.get("text") for part in value if isinstance(part, dict))
            value = "".join(part for part in parts if isinstance(part, str))
        return clean(value) if isinstance(value, str) else ""


#: Says why a reply cannot be used, ``None`` if it can.
Check = Callable[[Reply], str | None]


def _choice(body: Any) -> Mapping[str, Any]:
    """The first choice of a chat completion that has a message; empty if there is none."""
    choices = body.get("choices") if isinstance(body, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(first, dict) and isinstance(first.get("message"), dict):
        return first
    return {}


def clean(text: str) -> str:
    """``text`` as it can be sent: half surrogate pairs become U+FFFD, the length stays."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def digest(*parts: Any) -> str:
    """The SHA-256 of plain values, the same in every process."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def tokens(text: str) -> int:
    """A guess of the tokens of a text: four UTF-8 bytes each, in any language."""
    return math.ceil(len(text.encode("utf-8", "replace")) / 4)


# -- stored replies ------------------------------------------------------------------------

_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Identity(BaseModel):
    protocol: str = ""


class _Row(BaseModel):
    """What a stored row is read by; it holds more."""

    key: str
    name: str
    model: str
    identity: _Identity
    about: dict[str, Any] = {}
    status: Literal["answered", "unusable", "failed"]
    reason: str | None = None
    cost: _Amount | None = None


def default_folder() -> Path:
    """Where replies go that no run claims: the user's data folder."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "stllms" / "replies"


class Store:
    """The replies of one folder: ``lines`` as they were written, ``rows`` the same by key.

    A row is one request that was sent: its key, who asked what, when, what it cost, and the
    body that came back. ``spent`` is what all of them cost together.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / FILE
        self.lines: list[dict[str, Any]] = []
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.spent = 0.0

    def load(self) -> Store:
        """Read the file again. A last line without its newline was torn and is dropped.

        Raises :class:`BadFile`, one line that names file, line and field, for any other line
        that is not a stored reply.
        """
        self.lines, self.rows, self.spent = [], {}, 0.0
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                row = loads(line)
                _Row.model_validate(row, strict=True)
            except ValueError as error:
                raise BadFile(
                    f"{self.path}, line {number}: not a stored reply ({_said(error)}); mend or "
                    "delete this line, the others are kept"
                ) from None
            self._add(row)
        return self

    def _add(self, row: dict[str, Any]) -> None:
        self.lines.append(row)
        self.rows.setdefault(row["key"], []).append(row)
        self.spent += row.get("cost") or 0.0

    def answers(self, key: str) -> list[dict[str, Any]]:
        """The rows of a request that hold a chat completion, oldest first."""
        return [row for row in self.rows.get(key, ()) if row["status"] != "failed"]

    @contextmanager
    def writing(self) -> Iterator[Store]:
        """Open for appending, alone: raises :class:`~stllms.runs.files.LockedFolder` where
        another run is. Reads the file again and cuts a torn line off."""
        with locked(self.path.with_name(".replies.lock")), self.path.open("ab") as self._file:
            self.load()
            self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
            yield self

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and sync it to the disk. Only inside :meth:`writing`."""
        self._file.write(clean(json.dumps(row, ensure_ascii=False)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._add(row)


def _said(error: Exception) -> str:
    """What is wrong, in one line: the first field that pydantic names, or a message."""
    if not isinstance(error, ValidationError):
        return plain(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return plain(f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}")


# -- servers and keys ----------------------------------------------------------------------

#: What the name of a model begins with -> URL and variable of the key. The first that fits is
#: taken for a model without a base URL; ``owner/name`` goes to ``/``, the last takes the rest.
PROVIDERS = {
    "claude-": ("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
    "gemini-": (
        "https://generativelanguage.googleapis.com/v1beta/openai",
        "GEMINI_API_KEY",
    ),
    "deepseek-": ("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "/": ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
}


def base_url(model: str, given: str | None = None) -> str:
    """The URL that ``/chat/completions`` is added to: ``given``, else ``OPENAI_BASE_URL``, else
    that of the model's provider. One without a path gets ``/v1``. Raises ``ValueError`` for
    what is no http(s) URL, or holds a key."""
    name = "/" if "/" in model else model
    own = next(url for prefix, (url, _) in PROVIDERS.items() if name.startswith(prefix))
    url = (given or setting(OWN_SERVER) or own).strip()
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("base URL: a key does not belong there (nor a query); see api_key()")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base URL {url!r}: expected http://HOST[:PORT][/v1] or https://...")
    return url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def is_local(url: str) -> bool:
    """Whether a server runs on this machine or a private network (no key, no price needed)."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local"))


def key_name(url: str) -> str:
    """The variable that holds the key for a server: its provider's, ``OPENAI_API_KEY`` for that
    of ``OPENAI_BASE_URL``, else ``STLLMS_API_KEY``, so that a provider's key is never sent to
    another host."""
    host = urlsplit(url).hostname
    if host == urlsplit(setting(OWN_SERVER) or "").hostname:
        return "OPENAI_API_KEY"
    names = (name for own, name in PROVIDERS.values() if urlsplit(own).hostname == host)
    return next(names, KEY)


def api_key(url: str) -> str:
    """The key for a server, from the variable :func:`key_name`; a placeholder for a local
    server without one. Raises :class:`ApiError` that names the variable."""
    name, local = key_name(url), is_local(url)
    key = (setting(name) or "").strip()
    if not key and local:
        return NO_KEY
    if not key:
        raise ApiError(
            f"no API key for {urlsplit(url).hostname}: set {name} in the environment or in a "
            f".env file (a line {name}=...) of the working folder or of a parent; keys are "
            "never stored"
        )
    printable = re.fullmatch(r"[!#-\[\]-~]+", key)  # and neither blank, quote nor backslash
    if not printable or (len(key) < SHORTEST_KEY and not local):
        raise ApiError(f"{name} is too short, or holds characters that no key has")
    return key


def setting(name: str) -> str | None:
    """A variable of the environment, else of the nearest ``.env`` file.

    That is the one of the folder that the runner was started in (:data:`STARTED`), else of the
    working folder, or of the nearest parent. What it holds is never put into the environment,
    where every child and every notebook would have it.
    """
    here = Path(os.environ.get(STARTED) or Path.cwd())
    places = (folder / ".env" for folder in (here, *here.parents))
    file = next((place for place in places if place.is_file()), "")
    return os.environ.get(name) or dotenv_values(file, interpolate=False).get(name) or None


def redacted(body: Any, key: str) -> Any:
    """A value of JSON with ``***`` for the key, wherever it stands; one that is shorter than
    :data:`SHORTEST_KEY` is no secret."""
    if len(key) < SHORTEST_KEY:
        return body
    return json.loads(json.dumps(body).replace(key, "***"))


# -- prices --------------------------------------------------------------------------------


class Price(BaseModel):
    """Price of one million tokens in and out, in ``currency``."""

    input: _Amount
    output: _Amount
    currency: str = "USD"

    def of(self, tokens_in: float, tokens_out: float) -> float:
        """The cost of so many tokens."""
        return (self.input * tokens_in + self.output * tokens_out) / 1e6


class _Prices(BaseModel):
    currency: str = "USD"
    models: dict[str, Price]


def price(model: str, url: str) -> Price | None:
    """The price of a model; ``None`` where nobody knows it.

    The file that ``STLLMS_PRICES`` names goes before the package's ``prices.json``. Looked up
    by the full name, then without ``provider/``. A local server without an entry, and
    ``:free``, cost nothing.
    """
    for path in (Path(setting(PRICES) or SHIPPED).expanduser(), SHIPPED):
        try:
            prices = _Prices.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"price table {path}: {_said(error)}") from None
        for name in (model, model.rpartition("/")[2]):
            if found := prices.models.get(name):
                return found.model_copy(update={"currency": prices.currency})
    return Price(input=0, output=0) if is_local(url) or model.endswith(":free") else None


def cost_of(usage: Any, price: Price | None) -> float | None:
    """What the provider says a call cost, else its tokens times the price; ``None`` where
    neither is a finite number from 0 on."""
    usage = usage if isinstance(usage, dict) else {}
    if (said := amount(usage.get("cost"))) is not None:
        return said
    used_in, used_out = (amount(usage.get(f"{n}_tokens")) for n in ("prompt", "completion"))
    if price is None or used_in is None or used_out is None:
        return None
    return amount(price.of(used_in, used_out))


@dataclass(frozen=True)
class Estimate:
    """What a run would send. ``cost`` is ``None`` where the price is not known."""

    model: str
    calls: int
    stored: int
    tokens_in: int
    tokens_out: int
    cost: float | None
    currency: str = "USD"

    def __str__(self) -> str:
        known = self.cost is not None
        cost = f"about {self.cost:.4f} {self.currency}" if known else "price unknown"
        return (
            f"{self.model}: {self.calls} calls to send, {self.stored} replies stored; about "
            f"{self.tokens_in:,} tokens in and {self.tokens_out:,} out, {cost}"
        )


def estimate(
    requests: Iterable[Request], price: Price | None, *, model: str = "", stored: int = 0
) -> Estimate:
    """Calls, guessed tokens and cost of requests. Sends nothing and needs no key; ``model`` and
    ``stored`` (how many others have a reply) are only shown."""
    sizes = [request.size for request in requests]
    tokens_in, tokens_out = (sum(size[i] for size in sizes) for i in range(2))
    cost = price.of(tokens_in, tokens_out) if price else None
    currency = price.currency if price else "USD"
    return Estimate(model, len(sizes), stored, tokens_in, tokens_out, cost, currency)


# -- sending -------------------------------------------------------------------------------


@dataclass
class Client:
    """Asks one model through one server and stores every reply in ``folder``.

    The server is that of :func:`base_url`, ``url`` after that. ``max_cost`` bounds what all
    replies stored in the folder cost together. ``concurrency``: requests under way at most;
    ``timeout``: seconds without a byte of an answer; ``retries`` after the first attempt (408,
    409, 429, 5xx, no answer).
    """

    model: str
    _: KW_ONLY
    folder: str | os.PathLike[str]
    base_url: str | None = None
    max_cost: float | None = None
    progress: bool = True
    concurrency: int = 32
    timeout: float = 300.0
    retries: int = 6

    def __post_init__(self) -> None:
        if not self.model.strip() or self.concurrency < 1:
            raise ValueError("an API model needs a name, and concurrency of at least 1")
        self.url = base_url(self.model, self.base_url)
        self.price = price(self.model, self.url)

    def estimate(self, requests: Sequence[Request], check: Check | None = None) -> Estimate:
        """What :meth:`replies` would send now. Sends nothing, needs no key."""
        pending = self._pending(Store(self.folder).load(), requests, check).values()
        stored = len(requests) - len(pending)
        return estimate(pending, self.price, model=self.model, stored=stored)

    def replies(self, requests: Sequence[Request], check: Check | None = None) -> list[Reply]:
        """The reply to every request, in the order of the requests; sends only what is missing.

        ``check`` says why a reply cannot be used; such a request is sent :data:`ASKS` times in
        all. Equal requests are sent once. Works inside a running event loop too.

        Raises :class:`ApiError` before the first call where the key is missing or the estimate
        above ``max_cost``, later where going on is useless; what was answered until then is
        stored. Raises :class:`~stllms.runs.files.LockedFolder` where another run sends.
        """
        store = Store(self.folder).load()
        if self._pending(store, requests, check):
            with store.writing():  # another run may just have asked for us
                if pending := self._pending(store, requests, check):
                    self._send(store, pending, len(requests) - len(pending), check)
        return [self._reply(store, request.key(self.model), check) for request in requests]

    def _pending(
        self, store: Store, requests: Sequence[Request], check: Check | None
    ) -> dict[str, Request]:
        """The requests without a usable reply, by key."""
        by_key = {request.key(self.model): request for request in requests}
        return {
            key: request
            for key, request in by_key.items()
            if len(store.answers(key)) < ASKS and self._reply(store, key, check).failed
        }

    def _reply(self, store: Store, key: str, check: Check | None) -> Reply:
        if answers := store.answers(key):
            return Reply(answers[-1], check and check(Reply(answers[-1])))
        rows = store.rows.get(key, [{"reason": "not sent"}])
        return Reply(rows[-1], str(rows[-1].get("reason")))

    def _send(
        self, store: Store, pending: Mapping[str, Request], stored: int, check: Check | None
    ) -> None:
        key = api_key(self.url)
        planned = estimate(pending.values(), self.price, model=self.model, stored=stored)
        if self.progress:
            print(planned)
        if self.max_cost is not None:
            if planned.cost is None:
                raise ApiError(
                    f"nothing sent: max_cost needs the price of {self.model}. Add it to a file "
                    f"like stllms/models/prices.json, named by {PRICES}, or drop max_cost"
                )
            if store.spent + planned.cost > self.max_cost:
                raise ApiError(
                    f"nothing sent ({planned}): with {store.spent:.4f} already spent in "
                    f"{self.folder} that is above max_cost={self.max_cost:g}"
                )
        _Sending(self, key, store, check).run(pending)


class _Sending:
    """One run of a client: everything is asked and stored, until it must be stopped."""

    def __init__(self, client: Client, key: str, store: Store, check: Check | None) -> None:
        self.client, self.key, self.store, self.check = client, key, store, check
        self._stopped: ApiError | None = None
        self._reserved = 0.0  # the expected cost of the calls under way
        self._failures = 0  # in a row
        self._bare = False  # the server takes no optional fields

    def run(self, pending: Mapping[str, Request]) -> None:
        """Ask everything; raises :class:`ApiError` where it had to end early. In a thread of
        its own, for Jupyter has a running event loop; an interrupt cancels the calls under
        way."""
        with start_blocking_portal() as portal:
            portal.call(self._all, pending)
        if self._stopped:
            raise self._stopped

    async def _all(self, pending: Mapping[str, Request]) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient  # slow to import

        client = self.client
        self._room = asyncio.Semaphore(client.concurrency)
        http = AsyncOpenAI(
            api_key=self.key,
            base_url=client.url,
            max_retries=client.retries,
            timeout=client.timeout,
            http_client=DefaultAsyncHttpxClient(trust_env=not is_local(client.url)),
        )
        bar = token_bar(len(pending), client.model, unit="calls", enabled=client.progress)
        async with http as self._http:
            with bar as self._bar:
                await asyncio.gather(*(self._one(*item) for item in pending.items()))

    async def _one(self, key: str, request: Request) -> None:
        """Asks and stores, unless the run was stopped or the call could cost too much."""
        price, bound = self.client.price, self.client.max_cost
        expected = price.of(*request.size) if price else 0.0
        async with self._room:
            if bound is not None and self.store.spent + self._reserved + expected > bound:
                self._stop(f"the next call would cost more than max_cost={bound:g}")
            if self._stopped:
                return
            self._reserved += expected
            row = await self._ask(key, request)
            self._reserved -= expected
            self.store.append(row)
        self._failures = self._failures + 1 if row["status"] == "failed" else 0
        if self._failures >= STOP_AFTER:
            self._stop(f"{self._failures} requests failed in a row ({row['reason']})")
        if price:
            self._bar.note = f"{self.store.spent:.4f} {price.currency}"
        self._bar.tick(0, 1)

    def _stop(self, why: str) -> None:
        """No new request; calls under way still end."""
        self._stopped = self._stopped or ApiError(
            f"{why}. What was answered is stored in {self.store.path}; run again to go on"
        )

    async def _ask(self, key: str, request: Request) -> dict[str, Any]:
        """The row of a request; sent again without its optional fields if it is refused."""
        optional = {} if self._bare else request.optional
        status, body, attempts = await self._attempt(request, optional)
        if status == 400 and optional:
            optional = {}
            status, body, attempts = await self._attempt(request, optional)
        usage = body.get("usage") if isinstance(body, dict) else None
        row = {
            "key": key,
            "name": request.name,
            "model": self.client.model,
            "base_url": self.client.url,
            "identity": dict(request.identity),
            "about": dict(request.about),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempts": attempts,
            "dropped": sorted(request.optional.keys() - optional.keys()),
            "status": "answered",
            "reason": None,
            "usage": usage,
            "cost": cost_of(usage, self.client.price),
            "body": body,
        }
        if why := _no_completion(status, body):
            if status in (401, 402, 403, 404) or "insufficient_quota" in json.dumps(body):
                self._stop(f"{self.client.url} (key: {key_name(self.client.url)}): {why}")
            tries = f" ({attempts} attempts)" if attempts > 1 else ""
            return row | {"status": "failed", "reason": why + tries}
        self._bare = self._bare or bool(row["dropped"])
        unusable = self.check(Reply(row)) if self.check else None
        return row | ({"status": "unusable", "reason": unusable} if unusable else {})

    async def _attempt(
        self, request: Request, optional: Mapping[str, Any]
    ) -> tuple[int, Any, int]:
        """Status (0: no answer), body without the key, and how often a request was sent, with
        the retries of the ``openai`` package, which counts them in a header."""
        import openai

        openais = "//api.openai.com" in self.client.url
        limit = "max_completion_tokens" if openais else "max_tokens"
        try:
            answer = await self._http.chat.completions.with_raw_response.create(
                model=self.client.model,
                messages=[dict(message) for message in request.messages],  # type: ignore[misc]
                extra_body={**request.extra, **optional, limit: request.max_tokens},
            )
            sent, status, text = answer.http_request, answer.status_code, answer.text
        except openai.APIStatusError as error:
            sent, status, text = error.request, error.status_code, error.response.text
        except openai.APIConnectionError as error:
            why = f"no answer from {self.client.url} ({error.__cause__!r})"
            sent, status, text = error.request, 0, json.dumps({"error": why})
        try:
            body = loads(text)
        except ValueError:
            body = text
        retries = int(sent.headers.get("x-stainless-retry-count", 0))
        return status, redacted(body, self.key), retries + 1


def _no_completion(status: int, body: Any) -> str | None:
    """Why an answer is no chat completion, ``None`` if it is one. Some gateways wrap an error
    in a good answer, or in its first choice."""
    error = body.get("error") if isinstance(body, dict) else None
    error = error or _choice(body).get("error")
    if status == 200 and _choice(body) and not error:
        return None
    said = error.get("message", error) if isinstance(error, dict) else error or body
    what = {0: "", 200: "no chat completion in the answer: "}.get(status, f"HTTP {status}: ")
    return what + plain(" ".join(str(said).split())[:300])
