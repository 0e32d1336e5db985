"""The answers of the checkable tasks, computed a second time.

``FROM_NUMBERS`` takes the numbers of the text in their order, ``FROM_WORDS`` the text itself;
``FROM_PREMISES`` searches all possibilities under premises that were put into code by hand.
Formula or search, none of them sees the stored answer.
"""

from __future__ import annotations

import calendar
import itertools as it
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import date, timedelta
from fractions import Fraction

import pytest

from stllms import tasks
from stllms.records import Task

TASKS = {task.id.removeprefix("check-"): task for task in tasks.load("checkable")}

_WORDS = (
    *("two", "three", "four", "five", "six", "seven"),
    *("eight", "nine", "ten", "eleven", "twelve"),
)
_NUMBER = re.compile(rf"\d+(?:\.\d+)?|\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)


def numbers(text: str) -> list[int | Fraction]:
    """The numbers of a text in digits or words ("one" apart); whole ones as ``int``."""
    found = (match[0].lower() for match in _NUMBER.finditer(text))
    values = (Fraction(_WORDS.index(w) + 2 if w in _WORDS else w) for w in found)
    return [int(value) if value.denominator == 1 else value for value in values]


def count(cases: Iterable[object]) -> int:
    """How many of the cases hold."""
    return sum(map(bool, cases))


def only(cases: Iterable[object]) -> object:
    """The one value that all cases have; ``ValueError`` where they differ."""
    (value,) = set(cases)
    return value


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def clock(minutes: int) -> str:
    return f"{minutes // 60 % 24:02}:{minutes % 60:02}"


def hands(hour: int, minute: int) -> Fraction:
    """The smaller angle between the hands of a clock, in degrees."""
    apart = abs(30 * (hour + Fraction(minute, 60)) - 6 * minute) % 360
    return min(apart, 360 - apart)


def climbs(steps: int, longest: int) -> int:
    """The ways up a staircase, counted one by one."""
    ways = (it.product(range(1, longest + 1), repeat=n) for n in range(1, steps + 1))
    return sum(sum(way) == steps for way in it.chain(*ways))


def days_in_well(depth: int, up: int, down: int) -> int:
    height = 0
    for day in it.count(1):
        height += up
        if height >= depth:
            return day
        height -= down
    raise AssertionError


def smallest(value: int, add: int) -> int:
    """The smallest number on the way until a number comes again."""
    seen: set[int] = set()
    while value not in seen:
        seen.add(value)
        value = value + add if value % 2 else value // 2
    return min(seen)


def quadratic(known: dict[int, int], wanted: int) -> Fraction:
    """The value at ``wanted`` of the parabola through all the known points."""

    def through(points: Sequence[int], x: int) -> Fraction:
        return sum(
            known[p] * math.prod(Fraction(x - q, p - q) for q in points if q != p)
            for p in points
        )

    values = (through(points, wanted) for points in it.combinations(known, 3))
    return only(values)


def affine(a: int, b: int, c: int, *rest: int) -> Fraction:
    """The next term under x -> p x + q, which all the given terms have to obey."""
    p = Fraction(c - b, b - a)
    terms = [a, b, c, *rest]
    assert all(p * (x - a) + b == y for x, y in it.pairwise(terms))
    return p * (terms[-1] - a) + b


def fibonacci(a: int, b: int, limit: int) -> int:
    while b <= limit:
        a, b = b, a + b
    return b


def outline(side: int) -> int:
    """The dots on the outline of a square with ``side`` dots on each side."""
    edge = (0, side - 1)
    return count(x in edge or y in edge for x, y in it.product(range(side), repeat=2))


FROM_NUMBERS: dict[str, Callable[..., object]] = {
    "arithmetic-01": lambda a, b, c, d: a * b - c * d,
    "arithmetic-02": lambda rate, of: Fraction(rate * of, 100) * Fraction(4, 3),
    "arithmetic-03": lambda less, over, result: Fraction(result * over + less, 2),
    "arithmetic-04": lambda a, b, _, last: sum(range(a, last + 1, b - a)),
    "arithmetic-05": lambda a, b, c, d, e, f: Fraction(a, b) + Fraction(c, d) - Fraction(e, f),
    "arithmetic-06": lambda a, b: a % b,
    "arithmetic-07": lambda _, p, __: only(k for k in range(1, p) if k * (k + 1) == p),
    "arithmetic-08": lambda people, grams, adults, children: (
        Fraction(grams, people) * (adults + Fraction(children, 2))
    ),
    "arithmetic-09": lambda a, b, c, d, e: a - b * (c - d) + e**2,
    "arithmetic-10": lambda n, pages, time, m, less: Fraction(pages, n * time) * m * less,
    "counting-01": lambda n: count(k % 10 > k // 10 for k in range(10 ** (n - 1), 10**n)),
    "counting-02": lambda n: count(it.combinations(range(n), 2)),
    "counting-04": lambda a, b, p, q: count(
        (k % p == 0) != (k % q == 0) for k in range(a, b + 1)
    ),
    "counting-05": lambda length, step: count(True for _ in range(0, length + 1, step)),
    "counting-06": climbs,
    "counting-07": lambda a, b: count(
        it.product(it.combinations(range(a + 1), 2), it.combinations(range(b + 1), 2))
    ),
    "counting-08": lambda soups, mains, desserts: count(
        (soup > 0) != (dessert > 0)
        for soup, _, dessert in it.product(range(soups + 1), range(mains), range(desserts + 1))
    ),
    "counting-09": lambda digit, a, b: "".join(map(str, range(a, b + 1))).count(str(digit)),
    "counting-10": lambda w, m, women, men: count(
        it.product(it.combinations(range(women), w), it.combinations(range(men), m))
    ),
    "dates-02": lambda a, b, _: (date(2024, 3, b) - date(2024, 2, a)).days - 1,
    "dates-04": lambda day, year, n: f"{date(year, 11, day) + timedelta(n - 1):%B}",
    "dates-05": lambda first, _, day: (date(2023, 7, day) - date(2023, 1, first)).days + 1,
    "dates-06": lambda *n: count(map(calendar.isleap, range(n[2], n[3] + 1))),
    "dates-09": lambda _, n: count(calendar.monthrange(2023, m)[1] == n for m in range(1, 13)),
    "units-01": lambda litres: 1000 * litres,
    "units-02": lambda speed, seconds: Fraction(speed * 1000 * seconds, 3600),
    "units-03": lambda metres, centimetres: metres * Fraction(centimetres, 100),
    "units-04": lambda inch, feet, inches: feet * inches * inch,
    "units-05": lambda hours: (hours + Fraction(1, 2)) * 60 * 60,
    "units-06": lambda every, drops, hours: Fraction(hours * 60 * 60, every * drops),
    "units-07": lambda high, low: Fraction(5, 9) * (high - low),
    "units-08": lambda edge: Fraction(edge, 10) ** 3,
    "units-09": lambda volume, weeks: Fraction(volume * weeks * 7, 1000),
    "units-10": lambda grams, a, b, sheets: grams * Fraction(a * b, 100**2) * sheets,
    "sequences-01": affine,
    "sequences-02": lambda first, step, n: first + sum(step for _ in range(n - 1)),
    "sequences-03": lambda a, b, *rest: fibonacci(a, b, rest[-1]),
    "sequences-04": days_in_well,
    "sequences-05": lambda *n: quadratic(dict(zip((1, 2, 3, 5, 6), n, strict=True)), 4),
    "sequences-07": smallest,
    "sequences-08": lambda *n: n[-1] * only(Fraction(b, a) for a, b in it.pairwise(n)),
    "sequences-09": lambda n, a, b, *_: a * only([Fraction(b, a)]) ** (n - 1) % 10,
    "sequences-10": lambda *n: outline(n[-1] + 1),
    "sets-01": lambda everyone, a, b, neither: a + b - (everyone - neither),
    "sets-02": lambda size, n: count(it.combinations(range(n), size)),
    "sets-03": lambda a, top, b, _: count(k % a == k % b == 0 for k in range(1, top + 1)),
    "sets-05": lambda n, a, b, c, ab, _, ac, bc, __, abc, *___: (
        n - (a + b + c - ab - ac - bc + abc)
    ),
    "sets-06": lambda p, q: len(set(range(q)) - set(range(p))),
    "sets-07": lambda n: count(
        {0, 1} <= set(team) for k in range(n + 1) for team in it.combinations(range(n), k)
    ),
    "sets-08": lambda a, b, p: count(k % 2 and k % p for k in range(a, b + 1)),
    "sets-09": lambda _, a, b, union: union - (a + b - union),
    "sets-10": lambda a, b: count(it.product(range(a), range(b))),
    "clocks-01": lambda hour, minute, lasts, *_: clock(60 * hour + minute + lasts),
    "clocks-02": lambda hour: hands(hour, 0),
    "clocks-03": lambda loses, hour, minute, _: clock(60 * hour + minute - loses * (hour - 12)),
    "clocks-04": lambda h, m, hour, minute: 60 * (24 + hour) + minute - 60 * h - m,
    "clocks-05": lambda hour: hands(hour, 30),
    "clocks-06": lambda top, _, hours: sum((h - 1) % top + 1 for h in range(1, hours + 1)),
    "clocks-07": lambda ah, am, bh, bm, h, m, flies, _: clock(
        60 * (h + flies + ah - bh) + m + am - bm
    ),
    "clocks-08": lambda every, h, m, hour, minute, _: clock(
        next(t for t in it.count(60 * h + m, every) if t > 60 * hour + minute)
    ),
    "clocks-09": lambda _, h, m, a, b: next(k for k in it.count(1) if k % a == k % b == 0),
    "clocks-10": lambda _, h, m, hour, minute: count(
        t % 60 == 0 for t in range(60 * h + m, 60 * hour + minute + 1)
    ),
    "money-01": lambda pens, books, cost, book: (cost - books * book) / pens,
    "money-02": lambda price, a, b: price * Fraction(100 - a, 100) * Fraction(100 - b, 100),
    "money-03": lambda cost, note: note - cost,
    "money-04": lambda a, b, coins, worth, _: only(
        k for k in range(coins + 1) if 100 * a * k + b * (coins - k) == 100 * worth
    ),
    "money-05": lambda friends, bill, _: Fraction(bill, friends - 1),
    "money-06": lambda sum_, rate, years: sum_ * (1 + Fraction(rate, 100)) ** years,
    "money-07": lambda start, each, total: (total - start) / each,
    "money-08": lambda total, a, b: count(
        a * x + b * y == total for x, y in it.product(range(total + 1), repeat=2)
    ),
    "money-09": lambda _, talers, crowns, paid: (
        Fraction(paid * crowns, talers) * Fraction(9, 10)
    ),
    "money-10": lambda cost, profit: cost + Fraction(cost * profit, 100),
    "logic-08": lambda draughts, without: draughts - without,
}

DAYS = list(calendar.day_name)


def weekdays(text: str) -> list[int]:
    """The weekdays that a text names, Monday is 0."""
    return [DAYS.index(word) for word in re.findall(r"[A-Z]\w+", text) if word in DAYS]


def quoted(text: str) -> list[str]:
    return re.findall(r'"([^"]+)"', text)


def capitals(text: str) -> str:
    """The capital letters that stand alone."""
    return "".join(re.findall(r"\b[A-Z]\b", text))


def next_letter(letters: str) -> str:
    """The next letter where the gaps grow by one each time."""
    gaps = [ord(b) - ord(a) for a, b in it.pairwise(letters)]
    assert all(b - a == 1 for a, b in it.pairwise(gaps))
    return chr(ord(letters[-1]) + gaps[-1] + 1)


def month_later(weekday: int) -> str:
    """The weekday of 1 June in all years of a century in which 1 May is ``weekday``."""
    years = (y for y in range(1990, 2090) if date(y, 5, 1).weekday() == weekday)
    return DAYS[only(date(y, 6, 1).weekday() for y in years)]


def nth(weekday: int, n: int, known: tuple[int, int]) -> int:
    """The ``n``-th ``weekday`` of a month in which ``known`` is (day, its weekday)."""
    day, its = known
    return [d for d in range(1, 32) if (d - day) % 7 == (weekday - its) % 7][n - 1]


FROM_WORDS: dict[str, Callable[[str], object]] = {
    "counting-03": lambda t: len(set(it.permutations(re.search(r"[A-Z]{2,}", t)[0]))),
    "dates-01": lambda t: month_later(*weekdays(t)),
    "dates-03": lambda t: DAYS[(weekdays(t)[0] + numbers(t)[0]) % 7],
    "dates-07": lambda t: DAYS[(weekdays(t)[0] - numbers(t)[0] + 1) % 7],
    "dates-08": lambda t: DAYS[(weekdays(t)[0] + math.lcm(*numbers(t))) % 7],
    "dates-10": lambda t: nth(weekdays(t)[1], 4, (numbers(t)[0], weekdays(t)[0])),
    "letters-01": lambda t: quoted(t)[0].count(re.search(r"letter (\w)\b", t)[1]),
    "letters-02": lambda t: quoted(t)[0][::-1],
    "letters-03": lambda t: quoted(t)[0][len(quoted(t)[0]) // 2],
    "letters-04": lambda t: "".join(word[0] for word in quoted(t)[0].split()),
    "letters-05": lambda t: len(set(quoted(t)[0])),
    "letters-06": lambda t: "".join(chr(ord(c) + numbers(t)[0]) for c in quoted(t)[0]),
    "letters-07": lambda t: chr(sum(map(ord, capitals(t))) // 2),
    "letters-08": lambda t: len(re.sub(r"[aeiou\W]", "", quoted(t)[0].lower())),
    "letters-09": lambda t: max(quoted(t)),
    "letters-10": lambda t: quoted(t)[0].rindex("m") - quoted(t)[0].index("m") - 1,
    "sequences-06": lambda t: next_letter(capitals(t)),
    "sets-04": lambda t: len(set(quoted(t)[0]) ^ set(quoted(t)[1])),
}


def switched(cups: int, turned: int) -> set[tuple[bool, ...]]:
    """Every position of cups that can be reached by turning ``turned`` of them at a time."""
    found: set[tuple[bool, ...]] = set()
    todo = [(False,) * cups]
    while todo:
        position = todo.pop()
        if position not in found:
            found.add(position)
            for chosen in it.combinations(range(cups), turned):
                todo.append(tuple(up != (i in chosen) for i, up in enumerate(position)))
    return found


BOOLS = (False, True)
SUE_TOM_UMA = list(it.permutations(range(3)))

FROM_PREMISES: dict[str, Callable[[], object]] = {
    "logic-01": lambda: yes(
        any(
            florin and in_box and paper
            for florin, coin, in_box, paper in it.product(BOOLS, repeat=4)
            if (coin or not florin) and not (coin and in_box and paper)
        )
    ),
    "logic-02": lambda: only(
        who
        for who in ("Abe", "Ben", "Cal")
        if [who == "Ben", who != "Ben", who != "Cal"].count(True) == 1
    ),
    "logic-03": lambda: only(
        ("Marta", "Nico", "Oli", "Pia")[(m, n, o, p).index(0)]
        for m, n, o, p in it.permutations(range(4))
        if m > n and o < p and n > p
    ),
    "logic-04": lambda: yes(
        any(s for s, closed in it.product(BOOLS, repeat=2) if s <= closed and not closed)
    ),
    "logic-05": lambda: only(
        row[-2]
        for row in it.permutations(("red", "blue", "green", "white"))
        if row.index("green") == row.index("white") + 1
        and row[0] == "red"
        and abs(row.index("blue") - row.index("red")) > 1
    ),
    "logic-06": lambda: only(
        "truth-teller" if b else "liar" for a, b in it.product(BOOLS, repeat=2) if a == (a != b)
    ),
    "logic-07": lambda: yes((True,) * 5 in switched(5, 2)),
    "logic-09": lambda: count(a or (b and c) for a, b, c in it.product(BOOLS, repeat=3)),
    "logic-10": lambda: yes(all(s > u for s, t, u in SUE_TOM_UMA if s > t and not t > u)),
}


def computed(task: Task) -> str:
    """The second answer, in the form in which a model would write it."""
    key = task.id.removeprefix("check-")
    if key in FROM_NUMBERS:
        return str(FROM_NUMBERS[key](*numbers(task.content)))
    return str(FROM_WORDS[key](task.content) if key in FROM_WORDS else FROM_PREMISES[key]())


def test_every_task_is_computed_in_exactly_one_way():
    assert sorted([*FROM_NUMBERS, *FROM_WORDS, *FROM_PREMISES]) == sorted(TASKS)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_stored_answer_is_the_computed_one(task):
    said = f"Some steps.\n\nThe answer is {computed(task)}."
    assert tasks.score(task, said) == 1, (task.answer, computed(task))
    answers = {other.answer for other in TASKS.values()}
    others = {other for other in answers if not tasks.same(other, task.answer)}
    assert all(tasks.score(replace(task, answer=other), said) == 0 for other in others)


@pytest.mark.parametrize("key", FROM_NUMBERS)
def test_other_numbers_in_the_text_give_another_answer(key):
    given = numbers(TASKS[key].content)

    def result(values: list[int | Fraction]) -> object:
        try:
            return FROM_NUMBERS[key](*values)
        except (ValueError, AssertionError, ZeroDivisionError):
            return None

    changed = [[*given[:i], 2 * given[i] + 1, *given[i + 1 :]] for i in range(len(given))]
    assert any(result(values) != result(given) for values in changed)
