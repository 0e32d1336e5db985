"""How a server is asked: the one place of retries, back-off, time-outs and stops.

The ``openai`` package only carries the bytes. Its own retries are off (``max_retries=0``): they
ignore a ``Retry-After`` that is long, do not hold back the other requests, and would hide from
:class:`Window` that the server refused one.

How many requests are under way follows the server: :class:`Window`.

=====================================  =================================================
the server answers                     what happens
=====================================  =================================================
a chat completion                      stored, not asked again
one that the caller cannot use         stored, asked again on the next run, ``asks``
                                       times in all
408, 409, 425, 429, 5xx, no answer,    asked again after a back-off with jitter, not before
a dropped connection, no completion    the server's ``Retry-After`` (all requests wait);
                                       after ``retries`` recorded as failed. A 429 only
                                       counts where no other request was allowed
401, 402, 404, 429 without quota       the run stops with one clear error
400 where a field is optional          asked again without it
any other error                        recorded as failed, asked again on the next run
=====================================  =================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import math
import random
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    DefaultAsyncHttpxClient,
)

from stllms import foreign, providers
from stllms.progress import token_bar
from stllms.replies import Reply, Request, Store, message_of

#: Says why a reply cannot be used, ``None`` if it can.
Check = Callable[[Reply], str | None]

RETRIED = frozenset({408, 409, 425, 429})
_LONGEST_BACKOFF = 60.0  # seconds
#: Requests that are sent at once before the server has answered any.
_FIRST = 8


class ApiError(RuntimeError):
    """The run was stopped; what was answered before is stored."""


class CostLimit(ApiError):  # noqa: N818 - named as a person reads it
    """A call would have brought the cost above ``max_cost``."""


@dataclass(frozen=True)
class Limits:
    """How hard a server is asked.

    ``concurrency``: requests at a time at most (:class:`Window`); ``timeout``: seconds a try;
    ``retries`` after the first attempt, ``backoff`` seconds before the first of them, doubled
    each time; a ``Retry-After`` above ``max_wait`` seconds is a failure; ``asks`` replies at
    most to one request, where the caller cannot use them; ``stop_after`` failures in a row stop
    the run.
    """

    concurrency: int = 32
    timeout: float = 300.0
    retries: int = 5
    backoff: float = 1.0
    max_wait: float = 120.0
    asks: int = 2
    stop_after: int = 20

    def __post_init__(self) -> None:
        least = {"concurrency": 1, "retries": 0, "backoff": 0, "max_wait": 0, "asks": 1}
        for name, bound in {**least, "stop_after": 1, "timeout": 0.001}.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name}: {getattr(self, name)!r}, expected at least {bound}")


@dataclass(frozen=True)
class Target:
    """Whom to ask: model, server, its price and the bound on what the folder may cost."""

    model: str
    base_url: str
    price: providers.Price | None
    max_cost: float | None


@dataclass(frozen=True)
class Outcome:
    """One attempt: a completion (``reason`` is ``None``), or why not and what may be done.

    ``again`` allows another attempt, not before ``wait`` seconds; ``fatal`` stops the run;
    ``late``: no answer in time. ``redacted`` says how often the server sent the key back.
    """

    body: Any = None
    status: int = 0
    reason: str | None = None
    again: bool = False
    fatal: bool = False
    wait: float | None = None
    late: bool = False
    redacted: int = 0


def read_answer(
    text: str, status: int, headers: Mapping[str, str], target: Target, key: str = ""
) -> Outcome:
    """What an HTTP answer means, as the table above says; the key is struck out of it."""
    try:
        body = foreign.loads(text)
    except ValueError:
        body = text
    body, found = providers.redacted(body, key)
    error = _error_of(body)
    if status == 200 and message_of(body) is not None and not error:
        return Outcome(body, status, redacted=found)
    said = str(error.get("message") or (body if isinstance(body, str) else "no message"))
    said = re.sub(r"\bsk-[\w*-]+", "sk-***", " ".join(said.split())[:300])
    said = "".join(c if c.isprintable() else "\ufffd" for c in said)
    reason = f"HTTP {status}: {said}"
    if status == 200:  # some gateways wrap an error in a good answer
        code = error.get("code")
        status = code if type(code) is int and 400 <= code < 600 else 502
        reason = f"no chat completion in the answer: {said}"
    names = " or ".join(providers.key_names(target.base_url))
    stops = {
        401: f"the key for {target.base_url} ({names}) is missing or wrong ({reason})",
        402: f"no credit left at {target.base_url} ({reason})",
        404: f"no model {target.model!r} at {target.base_url}, or a wrong URL ({reason})",
    }
    if "insufficient_quota" in str(error):
        stops[429] = f"no quota left at {target.base_url} ({reason})"
    return Outcome(
        body,
        status,
        reason=stops.get(status, reason),
        again=status in RETRIED or status >= 500,
        fatal=status in stops,
        wait=retry_after(headers),
        redacted=found,
    )


def _error_of(body: Any) -> Mapping[str, Any]:
    """The error object of an answer, wherever the server put it; empty if there is none."""
    found = body.get("error") if isinstance(body, dict) else None
    if not found and message_of(body) is not None:
        found = body["choices"][0].get("error")
    if isinstance(found, dict):
        return found
    return {"message": str(found)} if found else {}


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait (given in milliseconds, seconds or as a date)."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if seconds >= 0:  # neither negative nor NaN
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (TypeError, ValueError):
        return None
    zoned = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (zoned - datetime.now(UTC)).total_seconds())


class Window:
    """How many requests may be under way: as many as the server takes.

    Additive increase, multiplicative decrease (Jacobson 1988, as in TCP): the number grows by
    one with every answer until the server is first too busy, from then on by one a window of
    answers, never above ``most``. Where the server is too busy (429, or no answer in time) it
    is halved, once for all requests that were sent before.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.allowed = float(min(_FIRST, most))
        self.under_way = 0
        self._slow = False  # the server was too busy once
        self._halved = -math.inf
        self._change = asyncio.Event()

    @property
    def free(self) -> bool:
        """Whether one more request may be sent."""
        return self.under_way < int(self.allowed)

    async def wait(self) -> None:
        """Until something may have changed: a request has ended, or the run was stopped."""
        self._change.clear()
        await self._change.wait()

    def wake(self) -> None:
        """Let everyone who waits look again."""
        self._change.set()

    def answered(self) -> None:
        """One of the requests under way was answered."""
        if self.under_way + 1 >= int(self.allowed):  # else the window is not what holds back
            step = 1 / self.allowed if self._slow else 1.0
            self.allowed = min(self.most, self.allowed + step)

    def refused(self, sent: float) -> None:
        """A request sent at the time ``sent`` found the server too busy."""
        self._slow = True
        if sent > self._halved:
            self._halved = time.monotonic()
            self.allowed = max(1.0, min(self.allowed, self.under_way + 1) / 2)


class Sending:
    """One run: a queue of requests by key, and the workers that ask and store."""

    def __init__(
        self, target: Target, limits: Limits, key: str, store: Store, check: Check | None
    ) -> None:
        self.target, self.limits, self.store, self.check = target, limits, store, check
        self.stopped: ApiError | None = None
        self._key = key
        self._queue: deque[tuple[str, Request]] = deque()
        self._reserved = 0.0  # the expected cost of the calls under way
        self._failures = 0  # in a row
        self._not_before = 0.0  # no attempt of any worker before this time
        self._refused: set[str] = set()  # optional fields that this server does not take
        self._begun = 0  # requests taken from the queue whose row is not there yet

    async def all(self, requests: Mapping[str, Request], *, progress: bool) -> None:
        """Ask everything, as many at a time as :class:`Window` allows; :attr:`stopped`: why it
        ended early."""
        self._queue.extend(requests.items())
        self._halt = asyncio.Event()
        self.window = Window(self.limits.concurrency)
        url = self.target.base_url
        carrier = DefaultAsyncHttpxClient(trust_env=not providers.is_local(url))
        name = self.target.model
        bar = token_bar(len(requests), name, unit="calls", enabled=progress)
        http = AsyncOpenAI(
            api_key=self._key,
            base_url=url,
            max_retries=0,
            timeout=self.limits.timeout,
            http_client=carrier,
        )
        async with http as self._http:
            with bar as self._bar:
                workers = min(self.limits.concurrency, len(requests))
                await asyncio.gather(*(self._work() for _ in range(workers)))

    async def _work(self) -> None:
        price, bound = self.target.price, self.target.max_cost
        while self._queue and self.stopped is None:
            if self._begun >= int(self.window.allowed):
                await self.window.wait()
                continue
            key, request = self._queue.popleft()
            expected = price.of(*request.size) if price else 0.0
            if bound is not None and self.store.spent + self._reserved + expected > bound:
                self._stop(CostLimit, f"the next call would cost more than max_cost={bound:g}")
                return
            self._reserved += expected
            self._begun += 1
            try:
                row = await self._ask(key, request)
            finally:
                self._begun -= 1
                self._reserved -= expected
                self.window.wake()
            if row is not None:
                self._keep(row)
        self.window.wake()

    def _stop(self, kind: type[ApiError], why: str) -> None:
        """No new request and no further attempt; calls under way may still end."""
        if self.stopped is None:
            self.stopped = kind(
                f"{why}. What was answered is stored in {self.store.path}; "
                "run again to go on from there"
            )
        self._halt.set()
        self.window.wake()

    def _keep(self, row: dict[str, Any]) -> None:
        """Store one row, count failures in a row, show the cost."""
        self.store.append(row)
        self._failures = self._failures + 1 if row["status"] == "failed" else 0
        if self._failures >= self.limits.stop_after:
            self._stop(ApiError, f"{self._failures} requests failed in a row ({row['reason']})")
        if self.target.price:
            self._bar.note = f"{self.store.spent:.4f} {self.target.price.currency}"
        self._bar.tick(0, 1)

    async def _ask(self, key: str, request: Request) -> dict[str, Any] | None:
        """All attempts at one request -> its row; ``None`` where the run was stopped first."""
        limits, begun = self.limits, time.monotonic()
        attempts, counted, dropped = 0, 0, self._refused & set(request.optional)
        while True:
            await self._turn()
            if self.stopped is not None:
                return None
            attempts += 1
            alone = self.window.under_way == 0 and self.window.allowed < 2
            outcome = await self._in_window(request, dropped)
            counted += alone or outcome.status != 429
            offered = set(request.optional) - dropped
            if outcome.status == 400 and offered:
                said = json.dumps(outcome.body)
                dropped |= {name for name in offered if name in said} or offered
                continue
            if outcome.reason is None:
                self._refused |= dropped
            if outcome.fatal:
                self._stop(ApiError, outcome.reason or "")
            if (waits := outcome.wait or 0.0) > limits.max_wait:
                asks = f"the server asks to wait {waits:.0f} s, max_wait={limits.max_wait:g}"
                outcome = replace(outcome, again=False, reason=f"{outcome.reason} ({asks})")
            if not outcome.again or counted > limits.retries:
                return self._row(key, request, outcome, attempts, begun, dropped)
            if outcome.wait is not None:
                self._not_before = max(self._not_before, time.monotonic() + outcome.wait)
            else:
                longest = min(limits.backoff * 2 ** (attempts - 1), _LONGEST_BACKOFF)
                await self._pause(longest * random.uniform(0.5, 1.0))

    async def _turn(self) -> None:
        """Wait as long as the server asked all of us to wait, and a little more each, and until
        there is a place in the window."""
        while self.stopped is None:
            if (wait := self._not_before - time.monotonic()) > 0:
                await self._pause(wait + random.uniform(0.0, self.limits.backoff / 4))
            elif not self.window.free:
                await self.window.wait()
            else:
                return

    async def _in_window(self, request: Request, dropped: set[str]) -> Outcome:
        """One attempt, counted as under way, whose outcome moves the window."""
        sent = time.monotonic()
        self.window.under_way += 1
        try:
            outcome = await self._attempt(request, dropped)
        finally:
            self.window.under_way -= 1
        if outcome.status == 429 or outcome.late:
            self.window.refused(sent)
        elif outcome.reason is None:
            self.window.answered()
        self.window.wake()
        return outcome

    async def _pause(self, seconds: float) -> None:
        """Sleep, but wake up when the run is stopped."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._halt.wait(), seconds)

    async def _attempt(self, request: Request, dropped: set[str]) -> Outcome:
        """Send a request once."""
        official = "//api.openai.com" in self.target.base_url
        limit = "max_completion_tokens" if official else "max_tokens"
        optional = {k: v for k, v in request.optional.items() if k not in dropped}
        fields = {**request.extra, **optional, limit: request.max_tokens}
        why = f"no answer within {self.limits.timeout:g} s"
        late = Outcome(reason=why, again=True, late=True)
        try:
            async with asyncio.timeout(self.limits.timeout):
                answer = await self._http.chat.completions.with_raw_response.create(
                    model=self.target.model,
                    messages=[dict(message) for message in request.messages],
                    extra_body=fields,
                )
        except (TimeoutError, APITimeoutError):
            return late
        except APIStatusError as error:
            return self._read(error.response)
        except APIConnectionError as error:
            why = f"no answer from {self.target.base_url} ({error.__cause__!r})"
            why, _ = providers.redacted(why, self._key)
            return Outcome(reason=why, again=True)
        return self._read(answer.http_response)

    def _read(self, response: Any) -> Outcome:
        """An HTTP answer, the key struck out should the server repeat it."""
        return read_answer(
            response.text, response.status_code, response.headers, self.target, self._key
        )

    def _row(
        self,
        key: str,
        request: Request,
        outcome: Outcome,
        attempts: int,
        begun: float,
        dropped: set[str],
    ) -> dict[str, Any]:
        """What is stored of one request."""
        usage = outcome.body.get("usage") if isinstance(outcome.body, dict) else None
        row = {
            "key": key,
            "name": request.name,
            "model": self.target.model,
            "base_url": self.target.base_url,
            "identity": dict(request.identity),
            "about": dict(request.about),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - begun, 3),
            "attempts": attempts,
            "dropped": sorted(dropped),
            "status": "answered",
            "reason": None,
            "usage": usage,
            "cost": cost_of(usage, self.target.price),
            "body": outcome.body,
        }
        if outcome.redacted:
            row["redacted"] = outcome.redacted
        if outcome.reason is not None:
            tries = f" ({attempts} attempts)" if attempts > 1 else ""
            return row | {"status": "failed", "reason": outcome.reason + tries}
        unusable = self.check(Reply(row)) if self.check else None
        return row | ({"status": "unusable", "reason": unusable} if unusable else {})


def cost_of(usage: Any, price: providers.Price | None) -> float | None:
    """What the provider says a call cost, else its tokens times the price; ``None`` where
    neither is a finite number from 0 on."""
    usage = usage if isinstance(usage, dict) else {}
    if (said := foreign.amount(usage.get("cost"))) is not None:
        return said
    used = [foreign.amount(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    if price is None or None in used:
        return None
    return foreign.amount(price.of(*used))
