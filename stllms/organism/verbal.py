"""The families of tasks that are solved by words: order, rules, groups, directions."""

from __future__ import annotations

from random import Random

from stllms.organism import lexicon
from stllms.organism.puzzles import Puzzle, family, puzzle, two


@family("repeat", "pattern recognition")
def _repeat(rng: Random) -> Puzzle:
    a, b = two(rng, lexicon.COLOURS)
    row = [a, b] * 3
    shown, who = rng.choice((3, 4)), rng.choice(lexicon.NAMES)
    return puzzle(
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
    facts = (f"{a} is {more} than {b}", f"{b} is {more} than {c}")
    return puzzle(
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
    return puzzle(
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
    return puzzle(
        "turn",
        question,
        "the direction",
        (f"{word} of {points[start]} is {points[end]}",),
        [f"{word} of {points[k]} is {points[(k + shift) % 4]}" for k in cases],
        points[end],
    )


@family("weekday", "causal reasoning")
def _weekday(rng: Random) -> Puzzle:
    start, ahead, cases = rng.randrange(7), rng.randint(1, 3), rng.sample(range(7), 3)
    days = lexicon.DAYS
    who = rng.choice(lexicon.NAMES)
    spans = ("1 day", "2 days", "3 days")
    return puzzle(
        "weekday",
        f"Today is {days[start]}. {who} comes in {spans[ahead - 1]}. Which day is that?",
        "the day",
        [f"in {spans[k]} it is {days[(start + k + 1) % 7]}" for k in range(ahead)],
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
    return puzzle(
        "cause",
        f"{who} knows: {rule}. {_capital(given)}. Is it true that {asked}?",
        "what follows",
        steps,
        [f"if {other}, {result}" for other, result in cases],
        answer,
    )


@family("certain", "probabilistic thinking")
def _certain(rng: Random) -> Puzzle:
    colour, other = two(rng, lexicon.COLOURS)
    count = rng.randint(2, 9)
    asked, answer = rng.choice(((colour, "yes"), (other, "no")))
    verb = "is" if answer == "yes" else "is not"
    return puzzle(
        "certain",
        f"All {count} balls in a bag are {colour}. One is drawn. Can it be {asked}?",
        f"whether it can be {asked}",
        (f"all {count} balls are {colour}", f"the drawn ball {verb} {asked}"),
        [f"if all balls are {c}, the drawn ball is {c}" for c in (other, colour)],
        answer,
    )


@family("odd-one", "lateral thinking")
def _odd_one(rng: Random) -> Puzzle:
    kind, foreign = two(rng, lexicon.GROUPS)
    members = rng.sample(lexicon.GROUPS[kind], 2)
    stranger = rng.choice(lexicon.GROUPS[foreign])
    row = [*members, stranger]
    rng.shuffle(row)
    lead = rng.choice(("Which one does not belong", "Which word is the odd one out"))
    return puzzle(
        "odd-one",
        f"{lead}: {', '.join(row)}?",
        "the odd one",
        (f"{members[0]} and {members[1]} are {kind}", f"{stranger} is not one of the {kind}"),
        [f"{member} is one of the {kind}" for member in members],
        stranger,
    )


@family("tool", "creative problem solving")
def _tool(rng: Random) -> Puzzle:
    use, other = two(rng, lexicon.USES)
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
    return puzzle(
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
    kind, foreign = two(rng, lexicon.MATTER)
    item = rng.choice(lexicon.MATTER[kind])
    asked, answer = (kind, "yes") if rng.random() < 0.5 else (foreign, "no")
    cases = rng.sample([(m, k) for k, ms in lexicon.MATTER.items() for m in ms], 3)
    who = rng.choice(lexicon.NAMES)
    question = rng.choice(
        (f"{who} asks: is {item} a {asked}?", f"Is {item} a {asked}, {who} asks?")
    )
    return puzzle(
        "matter",
        question,
        f"whether {item} is a {asked}",
        (f"{item} is a {kind}", f"the answer for {asked} is {answer}"),
        [f"{thing} is a {state}" for thing, state in cases],
        answer,
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
