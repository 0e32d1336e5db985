"""Progress bars with tokens per second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


class TokenBar:
    """Counts rows on a bar and shows the tokens per second behind it."""

    def __init__(self, bar: tqdm) -> None:
        self.bar, self.tokens, self.began = bar, 0, time.perf_counter()

    def tick(self, tokens: int, ended: int) -> None:
        """``tokens`` were written and ``ended`` rows are complete."""
        self.tokens += tokens
        if ended:
            rate = self.tokens / max(1e-9, time.perf_counter() - self.began)
            self.bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            self.bar.update(ended)

    def skip(self, rows: int) -> None:
        """``rows`` were there already."""
        self.bar.update(rows)


@contextmanager
def token_bar(total: int, what: str, *, enabled: bool = True) -> Iterator[TokenBar]:
    """A bar over ``total`` rows."""
    with tqdm(total=total, desc=what, unit="row", disable=not enabled, leave=False) as bar:
        yield TokenBar(bar)
