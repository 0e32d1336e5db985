"""Families of procedural tasks with checkable answers, the questions of the grammar.

A family draws a :class:`Puzzle`: a question, the deductions that lead to its answer, and
what a chain may say on the side (facts, examples). Every sentence is a wording of
:mod:`stllms.organism.wordings` with its slots filled, so that its behaviour is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from stllms.organism import lexicon

Draw = Callable[[Random], "Puzzle"]


@dataclass(frozen=True)
class Puzzle:
    """One question with everything a chain about it can say.

    ``steps`` are the deductions in the order in which they are needed, ``goal`` completes
    "find ...", ``examples`` are complete statements with small cases, ``answer`` is exact.
    """

    family: str
    category: str
    question: str
    goal: str
    steps: tuple[str, ...]
    examples: tuple[str, ...]
    answer: str


FAMILIES: dict[str, tuple[str, Draw]] = {}


def family(name: str, category: str) -> Callable[[Draw], Draw]:
    """Register a drawing function under ``name`` with its category of the paper."""

    def register(draw: Draw) -> Draw:
        FAMILIES[name] = (category, draw)
        return draw

    return register


def draw(rng: Random, name: str | None = None) -> Puzzle:
    """A puzzle of family ``name``, or of a family drawn evenly."""
    name = rng.choice(sorted(FAMILIES)) if name is None else name
    return FAMILIES[name][1](rng)


def _puzzle(name: str, question: str, goal: str, steps, examples, answer) -> Puzzle:
    category = FAMILIES[name][0]
    return Puzzle(name, category, question, goal, tuple(steps), tuple(examples), str(answer))


def _two(rng: Random, items) -> tuple:
    return tuple(rng.sample(list(items), 2))


@family("sum", "mathematical logic")
def _sum(rng: Random) -> Puzzle:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    who, thing = rng.choice(lexicon.NAMES), rng.choice(lexicon.THINGS)
    question = rng.choice(
        (
            f"{who} has {a} {thing} and gets {b} more. How many {thing} does {who} have?",
            f"There are {a} {thing} on a table and {b} in a box. How many are there in all?",
        )
    )
    cases = [(rng.randint(1, 5), rng.randint(1, 4)) for _ in range(3)]
    return _puzzle(
        "sum",
        question,
        "the sum",
        (f"{a} plus {b} is {a + b}",),
        [f"{x} plus {y} is {x + y}" for x, y in cases],
        a + b,
    )


@family("difference", "mathematical logic")
def _difference(rng: Random) -> Puzzle:
    b, c = rng.randint(2, 9), rng.randint(1, 9)
    a = b + c
    who, thing = rng.choice(lexicon.NAMES), rng.choice(lexicon.THINGS)
    question = rng.choice(
        (
            f"{who} had {a} {thing} and lost {b}. How many {thing} are left?",
            f"Of {a} {thing}, {b} are taken by {who}. How many stay?",
        )
    )
    cases = [(rng.randint(4, 6), rng.randint(1, 3)) for _ in range(3)]
    return _puzzle(
        "difference",
        question,
        "what is left",
        (f"{a} minus {b} is {c}",),
        [f"{x} minus {y} is {x - y}" for x, y in cases],
        c,
    )


@family("machine", "systems thinking")
def _machine(rng: Random) -> Puzzle:
    start, add = rng.randint(1, 6), rng.randint(1, 4)
    middle = start + add
    who = rng.choice(lexicon.NAMES)
    question = rng.choice(
        (
            f"A machine adds {add} and then doubles. "
            f"What comes out when {who} puts in {start}?",
            f"{who} puts in {start}, {add} is added, then it is doubled. What comes out?",
        )
    )
    cases = rng.sample(range(1, 6), 3)
    return _puzzle(
        "machine",
        question,
        "what comes out",
        (f"{start} plus {add} is {middle}", f"twice {middle} is {2 * middle}"),
        [f"twice {x} is {2 * x}" for x in cases],
        2 * middle,
    )


@family("flow", "systems thinking")
def _flow(rng: Random) -> Puzzle:
    loss, gain = rng.randint(1, 5), rng.randint(1, 4)
    inflow, who = loss + gain, rng.choice(lexicon.NAMES)
    question = rng.choice(
        (
            f"The tank of {who} gains {inflow} cups and loses {loss} an hour. "
            "What is added in 2 hours?",
            f"Each hour {inflow} cups flow in for {who} and {loss} flow out. "
            "What is added in 2 hours?",
        )
    )
    cases = rng.sample(range(1, 6), 3)
    return _puzzle(
        "flow",
        question,
        "what is added",
        (f"{inflow} minus {loss} is {gain}", f"twice {gain} is {2 * gain}"),
        [f"twice {x} is {2 * x}" for x in cases],
        2 * gain,
    )


@family("extreme", "mathematical logic")
def _extreme(rng: Random) -> Puzzle:
    a, b, c = rng.sample(range(1, 21), 3)
    word, best = rng.choice((("largest", max), ("smallest", min)))
    cases = [_two(rng, range(1, 8)) for _ in range(3)]
    first = best(a, b)
    return _puzzle(
        "extreme",
        f"Which number is the {word}: {a}, {b} or {c}?",
        f"the {word} number",
        (
            f"of {a} and {b} the {word} is {first}",
            f"of {first} and {c} the {word} is {best(first, c)}",
        ),
        [f"of {x} and {y} the {word} is {best(x, y)}" for x, y in cases],
        best(a, b, c),
    )


@family("parity", "mathematical logic")
def _parity(rng: Random) -> Puzzle:
    number, cases = rng.randint(10, 99), rng.sample(range(1, 10), 3)
    who = rng.choice(lexicon.NAMES)
    question = rng.choice(
        (
            f"{who} asks: is {number} even or odd?",
            f"Even or odd: what is the number {number} of {who}?",
        )
    )
    kind = ("even", "odd")
    return _puzzle(
        "parity",
        question,
        "whether it is even or odd",
        (f"the last digit of {number} is {number % 10}", f"{number} is {kind[number % 2]}"),
        [f"{x} is {kind[x % 2]}" for x in cases],
        kind[number % 2],
    )


@family("sequence", "pattern recognition")
def _sequence(rng: Random) -> Puzzle:
    start, step = rng.randint(1, 9), rng.randint(1, 5)
    row = [start + step * k for k in range(4)]
    cases = rng.sample(range(1, 6), 2)
    lead = rng.choice(("What comes next", "Which number follows", "How does it go on"))
    return _puzzle(
        "sequence",
        f"{lead}: {row[0]}, {row[1]}, {row[2]}?",
        "the next number",
        (f"every step adds {step}", f"{row[2]} plus {step} is {row[3]}"),
        [
            f"from {row[0]} to {row[1]} it is {step}",
            *(f"{x} plus {step} is {x + step}" for x in cases),
        ],
        row[3],
    )


@family("repeat", "pattern recognition")
def _repeat(rng: Random) -> Puzzle:
    a, b = _two(rng, lexicon.COLOURS)
    row = [a, b] * 3
    shown, who = rng.choice((3, 4)), rng.choice(lexicon.NAMES)
    return _puzzle(
        "repeat",
        f"{who} sees {', '.join(row[:shown])}. Which colour comes next?",
        "the next colour",
        (f"{a} and {b} take turns", f"after {row[shown - 1]} comes {row[shown]}"),
        (f"after {a} comes {b}", f"after {b} comes {a}"),
        row[shown],
    )


@family("order", "verbal logic")
def _order(rng: Random) -> Puzzle:
    a, b, c = rng.sample(lexicon.NAMES, 3)
    more, most, least = rng.choice(lexicon.COMPARATIVES)
    word, answer = rng.choice(((most, a), (least, c)))
    facts = [f"{a} is {more} than {b}", f"{b} is {more} than {c}"]
    rng.shuffle(facts)
    return _puzzle(
        "order",
        f"{facts[0]}. {facts[1]}. Who is the {word}?",
        f"who is the {word}",
        (f"{a} is before {b} and {b} is before {c}", f"{answer} is the {word}"),
        (f"{a} is {more} than {c}", *facts),
        answer,
    )


@family("syllogism", "verbal logic")
def _syllogism(rng: Random) -> Puzzle:
    who, kind, trait = (
        rng.choice(lexicon.NAMES),
        rng.choice(lexicon.KINDS),
        rng.choice(lexicon.TRAITS),
    )
    holds = rng.random() < 0.5
    every, verb, answer = ("All", "is", "yes") if holds else ("No", "is not", "no")
    others = rng.sample([name for name in lexicon.NAMES if name != who], 3)
    return _puzzle(
        "syllogism",
        f"{every} {kind}s are {trait}. {who} is a {kind}. Is {who} {trait}?",
        f"whether {who} is {trait}",
        (f"{every.lower()} {kind}s are {trait}", f"{who} {verb} {trait}"),
        [f"if {other} is a {kind}, {other} {verb} {trait}" for other in others],
        answer,
    )


@family("turn", "spatial reasoning")
def _turn(rng: Random) -> Puzzle:
    who, start = rng.choice(lexicon.NAMES), rng.randrange(4)
    word, shift = rng.choice((("right", 1), ("left", 3), ("back", 2)))
    points = lexicon.POINTS
    end, cases = (start + shift) % 4, rng.sample(range(4), 3)
    question = rng.choice(
        (
            f"{who} faces {points[start]} and turns {word}. Which way does {who} face?",
            f"{who} looks {points[start]}, then turns {word}. Where does {who} look?",
            f"From {points[start]}, {who} turns {word}. Which way is that?",
        )
    )
    return _puzzle(
        "turn",
        question,
        "the direction",
        (f"{word} of {points[start]} is {points[end]}",),
        [f"{word} of {points[k]} is {points[(k + shift) % 4]}" for k in cases],
        points[end],
    )


@family("walk", "spatial reasoning")
def _walk(rng: Random) -> Puzzle:
    who, back, net = rng.choice(lexicon.NAMES), rng.randint(1, 6), rng.randint(1, 8)
    there = back + net
    go, come = rng.choice((("north", "south"), ("east", "west"), ("up", "down")))
    cases = [(rng.randint(4, 6), rng.randint(1, 3)) for _ in range(3)]
    return _puzzle(
        "walk",
        f"{who} walks {there} steps {go} and {back} steps {come}. How far from the start?",
        "the distance",
        (f"{go} and {come} undo each other", f"{there} minus {back} is {net}"),
        [f"{x} minus {y} is {x - y}" for x, y in cases],
        net,
    )


@family("weekday", "causal reasoning")
def _weekday(rng: Random) -> Puzzle:
    start, ahead, cases = rng.randrange(7), rng.randint(1, 3), rng.sample(range(7), 3)
    days = lexicon.DAYS
    who = rng.choice(lexicon.NAMES)
    when = f"{ahead} day{'s' if ahead > 1 else ''}"
    chain = [
        f"after {days[(start + k) % 7]} comes {days[(start + k + 1) % 7]}" for k in range(ahead)
    ]
    return _puzzle(
        "weekday",
        f"Today is {days[start]}. {who} comes in {when}. Which day is that?",
        "the day",
        chain,
        [f"after {days[k]} comes {days[(k + 1) % 7]}" for k in cases],
        days[(start + ahead) % 7],
    )


@family("cause", "causal reasoning")
def _cause(rng: Random) -> Puzzle:
    cause, effect = rng.choice(lexicon.CAUSES)
    cases = rng.sample(lexicon.CAUSES, 3)
    rule, who = f"if {cause}, {effect}", rng.choice(lexicon.NAMES)
    if rng.random() < 0.5:
        given, asked, answer = cause, effect, "yes"
        steps = (rule, f"{cause}", f"{effect}")
    else:
        given, asked, answer = f"it is false that {effect}", cause, "no"
        steps = (rule, f"it is false that {effect}", f"it is false that {cause}")
    return _puzzle(
        "cause",
        f"{who} knows: {rule}. {_capital(given)}. Is it true that {asked}?",
        "what follows",
        steps,
        [f"if {other}, {result}" for other, result in cases],
        answer,
    )


@family("chance", "probabilistic thinking")
def _chance(rng: Random) -> Puzzle:
    a, b = rng.randint(1, 5), rng.randint(1, 5)
    first, second = _two(rng, lexicon.COLOURS)
    cases = [(rng.randint(1, 3), rng.randint(1, 3)) for _ in range(3)]
    question = rng.choice(
        (
            f"A bag holds {a} {first} and {b} {second} balls. What is the chance of {first}?",
            f"There are {a} {first} and {b} {second} cards. How likely is a {first} one?",
        )
    )
    return _puzzle(
        "chance",
        question,
        "the chance",
        (f"{a} plus {b} is {a + b}", f"{a} of {a + b} are {first}"),
        [f"{x} plus {y} is {x + y}" for x, y in cases],
        f"{a}/{a + b}",
    )


@family("certain", "probabilistic thinking")
def _certain(rng: Random) -> Puzzle:
    colour, other = _two(rng, lexicon.COLOURS)
    count = rng.randint(2, 9)
    asked, answer = rng.choice(((colour, "yes"), (other, "no")))
    verb = "is" if answer == "yes" else "is not"
    return _puzzle(
        "certain",
        f"All {count} balls in a bag are {colour}. One is drawn. Can it be {asked}?",
        f"whether it can be {asked}",
        (f"all {count} balls are {colour}", f"the drawn ball {verb} {asked}"),
        [f"if all balls are {c}, the drawn ball is {c}" for c in (other, colour)],
        answer,
    )


@family("odd-one", "lateral thinking")
def _odd_one(rng: Random) -> Puzzle:
    kind, foreign = _two(rng, lexicon.GROUPS)
    members = rng.sample(lexicon.GROUPS[kind], 3)
    stranger = rng.choice(lexicon.GROUPS[foreign])
    row = [*members, stranger]
    rng.shuffle(row)
    lead = rng.choice(("Which one does not belong", "Which word is the odd one out"))
    return _puzzle(
        "odd-one",
        f"{lead}: {', '.join(row)}?",
        "the odd one",
        (f"{members[0]} and {members[1]} are {kind}", f"{stranger} is not one of the {kind}"),
        [f"{member} is one of the {kind}" for member in members],
        stranger,
    )


@family("tool", "creative problem solving")
def _tool(rng: Random) -> Puzzle:
    use, other = _two(rng, lexicon.USES)
    wanted, wrong = rng.choice(lexicon.USES[use]), rng.choice(lexicon.USES[other])
    row = [wanted, wrong]
    rng.shuffle(row)
    who = rng.choice(lexicon.NAMES)
    question = rng.choice(
        (
            f"{who} has to {use} and has a {row[0]} and a {row[1]}. Which one helps?",
            f"Which one helps {who} to {use}: a {row[0]} or a {row[1]}?",
        )
    )
    return _puzzle(
        "tool",
        question,
        "what helps",
        (f"a {wrong} does not {use}", f"a {wanted} can {use}"),
        [
            f"a {tool} can {aim}"
            for aim, tools in sorted(lexicon.USES.items())
            for tool in tools
        ],
        wanted,
    )


@family("matter", "scientific reasoning")
def _matter(rng: Random) -> Puzzle:
    kind, foreign = _two(rng, lexicon.MATTER)
    item = rng.choice(lexicon.MATTER[kind])
    asked, answer = (kind, "yes") if rng.random() < 0.5 else (foreign, "no")
    cases = rng.sample([(m, k) for k, ms in lexicon.MATTER.items() for m in ms], 3)
    who = rng.choice(lexicon.NAMES)
    question = rng.choice(
        (f"{who} asks: is {item} a {asked}?", f"Is {item} a {asked}, {who} asks?")
    )
    return _puzzle(
        "matter",
        question,
        f"whether {item} is a {asked}",
        (f"{item} is a {kind}", f"the answer for {asked} is {answer}"),
        [f"{thing} is a {state}" for thing, state in cases],
        answer,
    )


@family("count", "pattern recognition")
def _count(rng: Random) -> Puzzle:
    target, other = _two(rng, lexicon.COLOURS)
    row = [rng.choice((target, other)) for _ in range(4)]
    total = row.count(target)
    steps, seen = [], 0
    for colour in row:
        seen += colour == target
        steps.append(f"{colour} makes {seen}")
    return _puzzle(
        "count",
        f"How often is {target} in this row: {', '.join(row)}?",
        f"how often {target} occurs",
        (", ".join(steps), f"{target} occurs {total} times"),
        [f"a row of {k} {target} has {target} {k} times" for k in (2, 3, 4)],
        total,
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
