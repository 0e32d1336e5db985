"""The words of the grammar's questions: a small closed world.

The lists are short on purpose: the embedded model has a million parameters, and what it
cannot learn by heart it would get wrong for reasons that have nothing to do with reasoning.
"""

from __future__ import annotations

NAMES = (
    "Ann",
    "Ben",
    "Carl",
    "Dora",
    "Eve",
    "Finn",
    "Gina",
    "Hugo",
    "Ida",
    "Jack",
    "Kim",
    "Leo",
)
THINGS = (
    "apples",
    "books",
    "coins",
    "cups",
    "eggs",
    "keys",
    "nuts",
    "pens",
    "shells",
    "stones",
)
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
POINTS = ("north", "east", "south", "west")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
KINDS = ("cat", "bird", "robot", "baker", "pilot", "lizard", "farmer", "wizard")
TRAITS = ("fast", "brave", "quiet", "green", "tall", "kind", "old", "happy")
COMPARATIVES = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("richer", "richest", "poorest"),
)
CAUSES = (
    ("it rains", "the grass is wet"),
    ("the pump stops", "the tank is empty"),
    ("the lamp is on", "the room is bright"),
    ("the sun shines", "the stone is warm"),
    ("the wind blows", "the mill turns"),
    ("the bell rings", "the dog barks"),
    ("the road is closed", "the bus is late"),
    ("the fire burns", "the kettle is hot"),
)
GROUPS = {
    "animals": ("dog", "cow", "horse", "sheep", "goat"),
    "fruits": ("plum", "pear", "grape", "cherry", "lemon"),
    "metals": ("iron", "gold", "copper", "silver", "zinc"),
    "planets": ("Mars", "Venus", "Saturn", "Jupiter", "Neptune"),
}
USES = {
    "cut paper": ("knife", "razor"),
    "carry water": ("bucket", "bottle"),
    "drive a nail": ("hammer", "mallet"),
    "light a room": ("torch", "lantern"),
    "cross a river": ("boat", "raft"),
}
MATTER = {
    "solid": ("ice", "wood", "glass", "steel", "salt"),
    "liquid": ("water", "milk", "oil", "honey", "juice"),
    "gas": ("steam", "air", "oxygen", "helium", "smoke"),
}

#: What the model may recall, by family: general truths, never a step of the solution.
FACTS: dict[str, tuple[str, ...]] = {
    "sum": (
        "a sum does not depend on the order",
        "adding zero changes nothing",
        "adding means counting on",
        "two odd numbers have an even sum",
    ),
    "difference": (
        "minus undoes plus",
        "taking nothing away changes nothing",
        "a number minus itself is zero",
        "what is left is never more than before",
    ),
    "machine": (
        "twice a number is even",
        "machines keep the order of steps",
        "doubling is adding a number to itself",
        "half undoes doubling",
    ),
    "flow": (
        "what flows in and not out stays",
        "hours add up",
        "equal flows keep a level",
        "a level changes by the difference",
    ),
    "extreme": (
        "more digits mean a larger number",
        "numbers can be put in a row",
        "one number is larger than the other",
        "zero is below every count",
    ),
    "parity": (
        "the last digit decides",
        "even numbers end in 0, 2, 4, 6 or 8",
        "odd numbers do not split in halves",
        "even and odd take turns",
    ),
    "sequence": (
        "such rows grow evenly",
        "the gap stays the same",
        "each number has a next one",
        "a row is fixed by start and gap",
    ),
    "repeat": (
        "patterns come back",
        "two colours can take turns",
        "a rhythm has a fixed length",
        "a pattern shows in its start",
    ),
    "order": (
        "an order can be chained",
        "names say nothing about size",
        "the last one has nobody below",
        "the first one has nobody above",
    ),
    "syllogism": (
        "a rule for all holds for each",
        "no exception follows from all",
        "names say nothing about kinds",
        "a member shares what all share",
    ),
    "turn": (
        "a full turn has four quarters",
        "north is up on a map",
        "east is where the sun rises",
        "two right turns look back",
    ),
    "walk": (
        "steps back cancel steps out",
        "distance is never negative",
        "equal steps cancel out",
        "north is the reverse of south",
    ),
    "weekday": (
        "a week has seven days",
        "the week starts again after Sunday",
        "days come in a fixed order",
        "a day has 24 hours",
    ),
    "cause": (
        "an effect can have more causes",
        "without the effect there was no cause",
        "a rule works in one direction",
        "causes come before effects",
    ),
    "chance": (
        "a chance is a part of the whole",
        "chances add up to one",
        "every ball is equally likely",
        "a chance is at most one",
    ),
    "certain": (
        "a sure event has chance one",
        "drawing does not change colours",
        "an empty bag gives nothing",
        "an impossible event has chance zero",
    ),
    "odd-one": (
        "words can be sorted by kind",
        "gold is a metal",
        "planets move around the sun",
        "fruits grow on plants",
    ),
    "tool": (
        "tools have a shape for their use",
        "a blade is sharp",
        "light is needed to see",
        "wood floats on water",
    ),
    "matter": (
        "matter is solid, liquid or gas",
        "heat can melt a solid",
        "a gas fills its room",
        "a liquid takes the shape of its cup",
    ),
}
