"""The families of tasks that are solved by counting and calculating."""

from __future__ import annotations

from random import Random

from stllms.organism import lexicon
from stllms.organism.puzzles import Puzzle, family, puzzle, two


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
    return puzzle(
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
    return puzzle(
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
    return puzzle(
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
    return puzzle(
        "flow",
        question,
        "what is added",
        (f"{inflow} minus {loss} is {gain}", f"twice {gain} is {2 * gain}"),
        [f"twice {x} is {2 * x}" for x in cases],
        2 * gain,
    )


@family("extreme", "mathematical logic")
def _extreme(rng: Random) -> Puzzle:
    a, b, c = rng.sample(range(1, 10), 3)
    word, best = rng.choice((("largest", max), ("smallest", min)))
    cases = [two(rng, range(1, 8)) for _ in range(3)]
    first = best(a, b)
    return puzzle(
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
    return puzzle(
        "parity",
        question,
        "whether it is even or odd",
        (f"the last digit of {number} is {number % 10}", f"{number} is {kind[number % 2]}"),
        [f"{x} is {kind[x % 2]}" for x in cases],
        kind[number % 2],
    )


@family("sequence", "pattern recognition")
def _sequence(rng: Random) -> Puzzle:
    start, step = rng.randint(1, 9), rng.randint(1, 4)
    row = [start + step * k for k in range(4)]
    cases = rng.sample(range(1, 6), 2)
    lead = rng.choice(("What comes next", "Which number follows", "How does it go on"))
    return puzzle(
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


@family("walk", "spatial reasoning")
def _walk(rng: Random) -> Puzzle:
    who, back, net = rng.choice(lexicon.NAMES), rng.randint(1, 6), rng.randint(1, 8)
    there = back + net
    go, come = rng.choice((("north", "south"), ("east", "west"), ("up", "down")))
    cases = [(rng.randint(4, 6), rng.randint(1, 3)) for _ in range(3)]
    return puzzle(
        "walk",
        f"{who} walks {there} steps {go} and {back} steps {come}. How far from the start?",
        "the distance",
        (f"{go} and {come} undo each other", f"{there} minus {back} is {net}"),
        [f"{x} minus {y} is {x - y}" for x, y in cases],
        net,
    )


@family("chance", "probabilistic thinking")
def _chance(rng: Random) -> Puzzle:
    a, b = rng.randint(1, 5), rng.randint(1, 5)
    first, second = two(rng, lexicon.COLOURS)
    cases = [(rng.randint(1, 3), rng.randint(1, 3)) for _ in range(3)]
    question = rng.choice(
        (
            f"A bag holds {a} {first} and {b} {second} balls. What is the chance of {first}?",
            f"There are {a} {first} and {b} {second} cards. How likely is a {first} one?",
        )
    )
    return puzzle(
        "chance",
        question,
        "the chance",
        (f"{a} plus {b} is {a + b}", f"{a} of {a + b} are {first}"),
        [f"{x} plus {y} is {x + y}" for x, y in cases],
        f"{a}/{a + b}",
    )
