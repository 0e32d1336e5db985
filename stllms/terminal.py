"""Text of others made safe for a terminal, and how far long work has come.

A terminal obeys what it prints: a model, a judge, a server or a stranger's file may write an
escape sequence (a colour, a link with another address, the clipboard), a carriage return that
hides what stands before it, or a mark that reverses the order of letters. Every line that can
hold such text goes through :func:`plain`, in notebooks too.

Long loops count on a :class:`Bar`: tqdm's bar in a script or a notebook opened by hand, and in
a kernel of the runner one line of JSON in a file that the runner reads (:data:`CHANNEL`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

#: Controls other than line feed and tab (C0, DEL and C1, U+0085 among them), line separators
#: that only some viewers break at, direction marks and overrides, annotation marks, invisible
#: tags, and halves of surrogate pairs.
OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def plain(text: object) -> str:
    r"""``str(text)`` with every character of :data:`OBEYED` written out, like ``\u001b``.

    JSON writes it the same way, so the text of a JSON value stays that of the same value.
    Windows line endings become line feeds; other carriage returns are written out.
    """
    return OBEYED.sub(_written, str(text).replace("\r\n", "\n"))


def _written(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


# -- progress ------------------------------------------------------------------------------

#: The environment variable that names the runner's file; progress is then written there, and
#: no bar is drawn.
CHANNEL = "STLLMS_PROGRESS"

#: Seconds that a rate looks back, and the number of changes that it looks back at least.
WINDOW, FEW = 60.0, 10
#: Seconds between two remembered changes, and between two that are shown.
STEP, SHOWN_EVERY = 0.1, 0.3

#: Said before the name of every bar (:func:`about`).
_ABOUT: list[str] = []


@dataclass(frozen=True)
class State:
    """How far something is: ``done`` of ``total`` rows, with ``tokens`` written here and now.

    ``rate`` is in tokens per second, or in rows where there are no ``tokens``; ``left`` in
    seconds; both ``None`` while unknown. ``note`` is said after the numbers.
    """

    what: str
    done: int
    total: int
    unit: str = "rows"
    tokens: int = 0
    rate: float | None = None
    left: float | None = None
    note: str = ""
    ended: bool = False

    def text(self) -> str:
        """One line for people."""
        parts = [f"{self.what} {self.done:,}/{self.total:,} {self.unit}"]
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens")
        if self.tokens and self.rate is not None:
            parts.append(f"{self.rate:,.0f} tokens/s")
        if self.note:
            parts.append(self.note)
        if self.left is not None and not self.ended:
            parts.append(f"{clock(self.left)} left")
        return ", ".join(parts)


def clock(seconds: float) -> str:
    """``0:07``, ``12:30``, ``3:05:00``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Bar:
    """Counts rows and tokens, estimates the time left, and shows it; see :func:`token_bar`.

    With ``n`` rows to write, ``f`` of them finished, ``t`` tokens written (unfinished rows
    included) at ``r`` tokens per second of late, a row is expected to have
    ``m = min(t / f, most)`` tokens and the rest takes ``(n m - t) / r`` seconds. ``t / f`` is
    the usual estimate of a mean lifetime from censored lives; the mean of the finished rows
    alone would be too small, as short rows finish first. Without tokens, rows are counted.
    """

    #: Said after the numbers: what it has cost so far.
    note = ""

    def __init__(
        self,
        total: int,
        what: str = "",
        unit: str = "rows",
        *,
        most: int | None = None,
        show: Callable[[State], None] = lambda state: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what = " ".join([*_ABOUT, what])
        self.total, self.unit, self.most = total, unit, most
        self.done = self.made = self.tokens = 0
        self._show, self._shown, self._now = show, -SHOWN_EVERY, now
        self._past = deque([(now(), 0, 0)])
        self.show()

    def skip(self, rows: int) -> None:
        """``rows`` were there already: they are done, and say nothing about the speed."""
        self.done += rows
        if not self.made and not self.tokens:
            self._past = deque([(self._now(), 0, 0)])
        self.show()

    def tick(self, tokens: int, rows: int) -> None:
        """``tokens`` more are written and ``rows`` more are complete; negative where what was
        counted is made again."""
        self.tokens += tokens
        self.made += rows
        self.done += rows
        now, past = self._now(), self._past
        if len(past) > 1 and now - past[-2][0] < STEP:
            past.pop()
        past.append((now, self.tokens, self.made))
        while len(past) > FEW and now - past[1][0] >= WINDOW:
            past.popleft()
        self.show()

    @property
    def rate(self) -> float | None:
        """Recent tokens per second, or rows where there are no tokens; ``None`` at first."""
        (then, tokens, rows), (now, *_) = self._past[0], self._past[-1]
        more = self.tokens - tokens if self.tokens else self.made - rows
        return more / (now - then) if now > then and more > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds to go; ``None`` before a tenth of the rows, or ten of them, are finished."""
        rows, rate = self.total - self.done, self.rate
        if rows <= 0:
            return 0.0
        if rate is None or self.made < max(1, min(10, (self.made + rows) // 10)):
            return None
        if not self.tokens:
            return rows / rate
        mean = min(self.tokens / self.made, self.most or math.inf)
        return max(0.0, (self.made + rows) * mean - self.tokens) / rate

    def show(self, *, ended: bool = False) -> None:
        """Shows the numbers, unless that was done a moment ago."""
        now = time.monotonic()
        if ended or now - self._shown >= SHOWN_EVERY:
            self._shown = now
            numbers = {one.name: getattr(self, one.name) for one in fields(State)[:-1]}
            self._show(State(**numbers, ended=ended))


@contextlib.contextmanager
def token_bar(
    total: int, what: str, *, unit: str = "rows", most: int | None = None, enabled: bool = True
) -> Iterator[Bar]:
    """A bar over ``total`` rows of at most ``most`` tokens, called ``what``.

    ``enabled=False`` counts and shows nothing.
    """
    channel = os.environ.get(CHANNEL)
    if not enabled:
        yield Bar(total, what, unit, most=most)
    elif channel:
        bar = Bar(total, what, unit, most=most, show=partial(report, Path(channel)))
        try:
            yield bar
        finally:
            bar.show(ended=True)
    else:
        with _drawn(total) as draw:
            yield Bar(total, what, unit, most=most, show=draw)


@contextlib.contextmanager
def _drawn(total: int) -> Iterator[Callable[[State], None]]:
    """Tqdm's bar, of a notebook or of a terminal, and the function that draws a state on it."""
    from tqdm.auto import tqdm  # it imports IPython in a kernel

    form = "{percentage:3.0f}%|{bar}| {desc}"
    with tqdm(total=total, bar_format=form, leave=False, dynamic_ncols=True) as bar:

        def draw(state: State) -> None:
            bar.n, bar.total = state.done, state.total
            bar.set_description_str(state.text())

        yield draw


@contextlib.contextmanager
def about(words: str) -> Iterator[None]:
    """Puts ``words`` before the name of every bar inside the block (which model it is)."""
    _ABOUT.append(words)
    try:
        yield
    finally:
        _ABOUT.pop()


# -- from a kernel to its runner -----------------------------------------------------------


def report(path: Path, state: State) -> None:
    """Writes a state to the file of the runner, over the one before."""
    path.write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")


def read(path: Path) -> State | None:
    """The state in the file; ``None`` if there is none, or it is just being written."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return State(**json.loads(text)) if text.endswith("\n") else None
