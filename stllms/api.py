"""One OpenAI-compatible client, for judges and API models: requests -> stored replies.

Every reply is stored raw before it is used (:mod:`stllms.replies`); a request that was
answered is never sent again, whoever asks and whenever a run was killed. Failures are stored
with their reason and asked again on the next run. :mod:`stllms.sending` holds the policy of
retries, back-off and stops, :mod:`stllms.providers` finds server, key and price. Before the
first call the cost is estimated; no call is sent that would bring what the folder has cost
above ``max_cost``.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from stllms import providers
from stllms.providers import MissingKey
from stllms.replies import Reply, Request, Store, tokens
from stllms.sending import ApiError, Check, CostLimit, Limits, Sending, Target

__all__ = [
    "ApiError", "Client", "CostLimit", "Estimate", "Limits", "MissingKey", "Reply", "Request",
    "run", "tokens",
]  # fmt: skip

T = TypeVar("T")


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


class Client:
    """Asks one model through one server and stores every reply in ``folder``.

    ``base_url`` and the key are found by :mod:`stllms.providers`; ``prices`` is a price
    table to be used before the package's; ``max_cost`` bounds what all replies stored in the
    folder cost together. ``limits`` are the fields of :class:`~stllms.sending.Limits`.
    """

    def __init__(
        self,
        model: str,
        *,
        folder: str | os.PathLike[str],
        base_url: str | None = None,
        max_cost: float | None = None,
        prices: str | os.PathLike[str] | None = None,
        progress: bool = True,
        **limits: Any,
    ) -> None:
        if not model.strip():
            raise ValueError("the name of the API model is empty")
        url = providers.base_url(model, base_url)
        self.target = Target(model, url, providers.price(model, url, prices), max_cost)
        self.limits = Limits(**limits)
        self.folder = folder
        self.progress = progress

    def estimate(self, requests: Sequence[Request], check: Check | None = None) -> Estimate:
        """What :meth:`replies` would send now. Sends nothing, needs no key."""
        pending = self._pending(Store(self.folder).load(), requests, check)
        return self._estimate(pending, len(requests))

    def replies(self, requests: Sequence[Request], check: Check | None = None) -> list[Reply]:
        """The reply to every request, in the order of the requests; sends only what is missing.

        ``check`` says why a reply cannot be used (``None``: it can). Equal requests are sent
        once. Works inside a running event loop too. Raises
        :class:`~stllms.providers.MissingKey` and :class:`~stllms.sending.CostLimit` before the
        first call, :class:`~stllms.sending.ApiError` where going on is useless; what was
        answered until then is stored.
        """
        store = Store(self.folder).load()
        if self._pending(store, requests, check):
            with store.writing():  # alone here; another run may just have asked for us
                if pending := self._pending(store, requests, check):
                    self._send(store, pending, len(requests), check)
        return [self._reply(store, request, check) for request in requests]

    def _send(
        self, store: Store, pending: Mapping[str, Request], asked: int, check: Check | None
    ) -> None:
        key = providers.api_key(self.target.base_url)
        estimate = self._estimate(pending, asked)
        if self.progress:
            print(estimate)
        self._check_cost(estimate, store.spent)
        sending = Sending(self.target, self.limits, key, store, check)
        run(sending.all(pending, progress=self.progress))
        if sending.stopped is not None:
            raise sending.stopped

    def _check_cost(self, estimate: Estimate, spent: float) -> None:
        """Nothing is sent where the estimate is above ``max_cost``, or cannot be made."""
        bound = self.target.max_cost
        if bound is None:
            return
        if estimate.cost is None:
            raise CostLimit(
                f"nothing sent: max_cost needs the price of {self.target.model}. Add it to a "
                f"file like stllms/prices.json, named by {providers.PRICES}, or drop max_cost"
            )
        if spent + estimate.cost > bound:
            raise CostLimit(
                f"nothing sent ({estimate}): with {spent:.4f} already spent in {self.folder} "
                f"that is more than max_cost={bound:g}. Raise it, or ask for less"
            )

    def _pending(
        self, store: Store, requests: Sequence[Request], check: Check | None
    ) -> dict[str, Request]:
        """The requests without a usable reply, by key."""
        by_key = {request.key(self.target.model): request for request in requests}
        return {key: r for key, r in by_key.items() if not self._done(store, key, check)}

    def _done(self, store: Store, key: str, check: Check | None) -> bool:
        answers = store.answers(key)
        if not answers or len(answers) >= self.limits.asks:
            return bool(answers)
        return check is None or check(Reply(answers[-1])) is None

    def _reply(self, store: Store, request: Request, check: Check | None) -> Reply:
        key = request.key(self.target.model)
        if answers := store.answers(key):
            why = None if check is None else check(Reply(answers[-1]))
            return Reply(answers[-1], why)
        row = store.last(key) or {"key": key, "reason": "not sent"}
        return Reply(row, row["reason"])

    def _estimate(self, pending: Mapping[str, Request], asked: int) -> Estimate:
        sizes = [request.size for request in pending.values()]
        tokens_in, tokens_out = (sum(size[i] for size in sizes) for i in range(2))
        price = self.target.price
        return Estimate(
            model=self.target.model,
            calls=len(pending),
            stored=asked - len(pending),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            cost=price.of(tokens_in, tokens_out) if price else None,
            currency=price.currency if price else "USD",
        )


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run to the end, from a script or from inside a running event loop (Jupyter).

    Inside a loop the work has a thread of its own; an interrupt there cancels it.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = []

    async def main() -> T:
        started.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(contextvars.copy_context().run, asyncio.run, main())
        try:
            return future.result()
        except KeyboardInterrupt:
            for loop, task in started:
                loop.call_soon_threadsafe(task.cancel)  # type: ignore[union-attr]
            raise
