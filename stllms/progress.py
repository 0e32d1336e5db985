"""How far long work has come: rows and tokens done, tokens a second, time left.

Every loop that takes long counts on a :class:`Bar`. In a script and in a notebook opened by
hand that is tqdm's bar; in a kernel of the runner it is one line of JSON in the file that the
runner names (:data:`CHANNEL`), which the runner reads and shows in the terminal.

Of ``n`` rows to write, ``f`` have ended, ``t`` tokens are written (those of rows under way,
too), and of late ``r`` tokens a second. A row is then expected to have
``m = min(t / f, most)`` tokens, and the rest takes ``(n m - t) / r`` seconds. ``t / f`` is the
usual estimate of a mean lifetime from lives of which some have not ended; the mean of the ended
rows alone would be too small, as short rows end first. ``most`` is the limit of a row. Without
tokens the rows themselves are what is counted.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm

#: The variable that names the file of a runner; what is counted is then written there, and no
#: bar is drawn. A runner that shows nothing names the null device.
CHANNEL = "STLLMS_PROGRESS"

#: Seconds that a rate looks back, and the changes that it looks back at the least.
WINDOW, FEW = 60.0, 10
#: Seconds between two changes that are remembered, and between two that are shown.
STEP, SHOWN_EVERY = 0.1, 0.3


@dataclass(frozen=True)
class State:
    """How far something is: ``done`` of ``total``, of which ``made`` here and now.

    ``rate`` is in tokens a second, or in rows where there are no ``tokens``; ``left`` in
    seconds; both ``None`` as long as nobody can know. ``most`` is the limit of tokens a row.
    """

    what: str
    done: int
    total: int
    unit: str = "rows"
    made: int = 0
    tokens: int = 0
    most: int | None = None
    rate: float | None = None
    left: float | None = None
    note: str = ""
    ended: bool = False

    def text(self, width: int | None = None) -> str:
        """One line for people; what matters least is left out where ``width`` is too small."""
        parts = {"done": f"{self.what} {self.done:,}/{self.total:,} {self.unit}"}
        if self.tokens:
            parts["tokens"] = f"{_short(self.tokens)} tokens"
        if self.rate is not None and self.tokens:
            parts["rate"] = f"{self.rate:,.0f} tokens/s"
        if self.note:
            parts["note"] = self.note
        if self.left is not None and not self.ended:
            parts["left"] = f"{clock(self.left)} left"
        for drop in ("", "tokens", "note", "rate"):
            parts.pop(drop, None)
            line = ", ".join(parts.values())
            if width is None or len(line) <= width:
                return line
        return line[:width]


def _short(n: int) -> str:
    """``950``, ``81k``, ``1.2M``."""
    if n < 10_000:
        return f"{n:,}"
    return f"{n / 1000:.0f}k" if n < 999_500 else f"{n / 1e6:.1f}M"


def clock(seconds: float) -> str:
    """``0:07``, ``12:30``, ``3:05:00``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def words(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``, ``2.1 days``: for estimates."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"


class Meter:
    """Counts rows and tokens, and tells their rate of late and the time left."""

    def __init__(
        self,
        total: int,
        *,
        most: int | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.most = total, most
        self.done = self.made = self.tokens = 0
        self._now = now
        self._past = deque([(now(), 0, 0)])

    def skip(self, rows: int) -> None:
        """``rows`` were there already: they are done, and say nothing about the speed."""
        self.done += rows
        if not self.made and not self.tokens:
            self._past = deque([(self._now(), 0, 0)])

    def tick(self, tokens: int, rows: int) -> None:
        """``tokens`` more are written and ``rows`` more are complete; below 0 where what was
        counted is made again."""
        self.tokens, self.made, self.done = (
            self.tokens + tokens,
            self.made + rows,
            self.done + rows,
        )
        now, past = self._now(), self._past
        if len(past) > 1 and now - past[-2][0] < STEP:
            past.pop()
        past.append((now, self.tokens, self.made))
        while len(past) > FEW and now - past[1][0] >= WINDOW:
            past.popleft()

    @property
    def rate(self) -> float | None:
        """Tokens a second of late, or rows where there are no tokens; ``None`` at the start."""
        (then, tokens, rows), (now, *_) = self._past[0], self._past[-1]
        more = self.tokens - tokens if self.tokens else self.made - rows
        return more / (now - then) if now > then and more > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds to go; ``None`` before a tenth of the rows, or ten of them, have ended."""
        rows = self.total - self.done
        if rows <= 0:
            return 0.0
        rate = self.rate
        if rate is None or self.made < max(1, min(10, (self.made + rows) // 10)):
            return None
        if not self.tokens:
            return rows / rate
        mean = self.tokens / self.made
        mean = mean if self.most is None else min(mean, self.most)
        return max(0.0, (self.made + rows) * mean - self.tokens) / rate


class Bar:
    """A :class:`Meter` that is shown; made by :func:`token_bar`."""

    #: Said after the numbers: what it has cost so far.
    note = ""

    def __init__(self, meter: Meter, what: str, unit: str, show: Callable[[State], None]):
        self.meter, self.what, self.unit, self._show = meter, what, unit, show
        self._shown = -SHOWN_EVERY

    def tick(self, tokens: int, rows: int) -> None:
        """:meth:`Meter.tick`, shown a few times a second at most."""
        self.meter.tick(tokens, rows)
        self.show()

    def skip(self, rows: int) -> None:
        """:meth:`Meter.skip`."""
        self.meter.skip(rows)
        self.show()

    def show(self, *, ended: bool = False) -> None:
        """Shows the numbers, unless that was done a moment ago."""
        now = time.monotonic()
        if ended or now - self._shown >= SHOWN_EVERY:
            self._shown = now
            self._show(self.state(ended=ended))

    def state(self, *, ended: bool = False) -> State:
        """What would be shown now."""
        meter = self.meter
        return State(
            " ".join([*_ABOUT, self.what]),
            meter.done,
            meter.total,
            self.unit,
            meter.made,
            meter.tokens,
            meter.most,
            meter.rate,
            meter.left,
            self.note,
            ended,
        )


@contextmanager
def token_bar(
    total: int,
    what: str,
    *,
    unit: str = "rows",
    most: int | None = None,
    enabled: bool = True,
) -> Iterator[Bar]:
    """A bar over ``total`` rows of at most ``most`` tokens, called ``what``.

    ``enabled=False`` counts and shows nothing.
    """
    meter = Meter(total, most=most)
    channel = os.environ.get(CHANNEL)
    if not enabled:
        yield Bar(meter, what, unit, lambda state: None)
    elif channel:
        bar = Bar(meter, what, unit, lambda state: report(Path(channel), state))
        bar.show()
        try:
            yield bar
        finally:
            bar.show(ended=True)
    else:
        with _drawn(total) as draw:
            bar = Bar(meter, what, unit, draw)
            bar.show()
            yield bar


@contextmanager
def _drawn(total: int) -> Iterator[Callable[[State], None]]:
    """tqdm's bar, of a notebook or of a terminal, and what draws a state on it."""
    form = "{percentage:3.0f}%|{bar}| {desc}"
    with tqdm(total=total, bar_format=form, leave=False, dynamic_ncols=True) as bar:

        def draw(state: State) -> None:
            bar.n, bar.total = state.done, state.total
            bar.set_description_str(state.text())

        yield draw


#: What is said before the name of every bar.
_ABOUT: list[str] = []


@contextmanager
def about(words: str) -> Iterator[None]:
    """Puts ``words`` before the name of every bar inside the block (which model it is)."""
    _ABOUT.append(words)
    try:
        yield
    finally:
        _ABOUT.pop()


# -- from a kernel to its runner -----------------------------------------------------------


@contextmanager
def followed() -> Iterator[tuple[dict[str, str], Callable[[], None]]]:
    """For who starts a quiet runner: variables for its environment, and what draws on a bar how
    far its kernels are, to be called now and then."""
    with tempfile.TemporaryDirectory(prefix="stllms-") as folder, _drawn(1) as draw:
        path = Path(folder) / "progress.json"

        def look() -> None:
            if state := read(path):
                draw(state)

        yield {CHANNEL: str(path)}, look


def report(path: Path, state: State) -> None:
    """Writes a state to the file of the runner, over the one before."""
    path.write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")


def read(path: Path) -> State | None:
    """The state in the file; ``None`` where there is none, or it is just being written."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return State(**json.loads(text)) if text.endswith("\n") else None
