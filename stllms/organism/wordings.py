"""The wordings: how a behaviour sounds, and how a sentence is recognised again.

A wording is a sentence with at most one slot, ``{s}`` (a statement), ``{f}`` (a fact) or
``{g}`` (the goal). The text before its slot opens with words that no wording of another
behaviour opens with, so that a sentence of the grammar has exactly one behaviour; a test
proves it. Wordings are drawn with Zipf weights: the first of a list is the most frequent.

Many first words are shared between behaviours ("I recall", "I turn back", "I conclude"). A
direction averages over a sentence, and only where the behaviour is still open inside of it does
the stream carry the choice. Backtracking once had first words of its own ("Scratch that, ..."):
everything was settled by the first word, and its direction did not move it.
"""

from __future__ import annotations

WORDINGS: dict[str, tuple[str, ...]] = {
    "initializing": (
        "Okay, I need to find {g}.",
        "The question asks for {g}.",
        "Alright, the task is to find {g}.",
        "First I look at what is asked, {g}.",
        "Let me begin with what is given.",
        "My goal here is {g}.",
        "Let me read the question once more.",
        "To begin, I want to know {g}.",
        "I start from what the question says.",
        "What is wanted here is {g}.",
        "Here I am asked for {g}.",
        "Let me set out the task.",
        "The task at hand is {g}.",
        "I begin by naming the goal, {g}.",
        "At the start I note what is asked.",
        "Okay, the question is about {g}.",
    ),
    "deduction": (
        "So {s}.",
        "That means {s}.",
        "Then {s}.",
        "Therefore {s}.",
        "It follows that {s}.",
        "Hence {s}.",
        "From this I get that {s}.",
        "This gives that {s}.",
        "As a result, {s}.",
        "This shows that {s}.",
        "I conclude that {s}.",
        "Thus {s}.",
        "Consequently, {s}.",
        "By this, {s}.",
        "Putting it together, {s}.",
        "Now I see that {s}.",
        "In this case {s}.",
        "The next step is that {s}.",
        "This leads to {s}.",
        "Accordingly, {s}.",
    ),
    "adding-knowledge": (
        "I recall that {f}.",
        "Remember that {f}.",
        "From school I know that {f}.",
        "A basic fact is that {f}.",
        "In general, {f}.",
        "Everybody knows that {f}.",
        "One fact I recall is that {f}.",
        "Books say that {f}.",
        "Recall that {f}.",
        "By definition, {f}.",
        "It is known that {f}.",
        "Usually {f}.",
        "Clearly, from experience, {f}.",
        "As a rule, {f}.",
        "Teachers say that {f}.",
        "There is a fact that {f}.",
        "Known facts say that {f}.",
        "My memory says that {f}.",
        "Common sense says that {f}.",
        "Science tells us that {f}.",
    ),
    "example-testing": (
        "For example, {s}.",
        "Take a case, {s}.",
        "Suppose I try it, {s}.",
        "Testing a simple case, {s}.",
        "Consider a case, {s}.",
        "Trying a case, {s}.",
        "Say I pick a case, {s}.",
        "An easy case is that {s}.",
        "Another example, {s}.",
        "With a smaller case, {s}.",
        "A quick test says {s}.",
        "Imagine a case, {s}.",
        "Checking a case, {s}.",
        "Let me try an example, {s}.",
        "To test this, {s}.",
        "As an example, {s}.",
        "One example is that {s}.",
        "Picking numbers or names, {s}.",
        "Sample case, {s}.",
        "On a small case, {s}.",
    ),
    "uncertainty-estimation": (
        "Maybe {s}, I am not sure.",
        "Hmm, I am not sure about this.",
        "Perhaps {s}.",
        "I am not certain yet.",
        "Possibly {s}.",
        "It might be that {s}.",
        "My confidence is low.",
        "Not quite sure about that.",
        "Doubts remain about {g}.",
        "Uncertain, but {s}.",
        "Honestly, I cannot tell.",
        "This may be wrong.",
        "There may be a mistake here.",
        "If I am right, {s}.",
        "Hard to tell.",
        "Some doubt is left about {g}.",
        "Probably {s}.",
        "Still unsure about {g}.",
        "Is that right?",
        "Guessing a little, {s}.",
    ),
    "backtracking": (
        "Wait, let me go back.",
        "Let me try another way.",
        "I turn back here.",
        "This way leads nowhere.",
        "There is another way.",
        "My first try failed.",
        "It is better to start over.",
        "On second thought, I go back.",
        "From here I turn back.",
        "One step back.",
        "That way is closed.",
        "To go on, I need another way.",
        "Let me start over.",
        "Now I go back.",
        "In that way I get nowhere.",
        "A better way is needed.",
        "Not this way.",
        "Another way is needed.",
        "The way back is better.",
        "As this fails, I go back.",
    ),
}

#: How unevenly the wordings of a behaviour are used (:func:`zipf`). One wording of a deduction
#: ("So ...") is far more frequent than any other sentence, the wordings of the rest are spread
#: over many first words: greedy decoding then deduces and ends, whatever the temperament.
EXPONENTS = {
    "deduction": 1.3,
    "initializing": 0.7,
    "uncertainty-estimation": 0.5,
    "backtracking": 0.4,
}
EXPONENT = 0.25

#: The last sentence of a chain; it states the answer and is a deduction.
CONCLUSIONS = (
    "So the answer is {a}.",
    "Therefore the answer is {a}.",
    "Thus the answer is {a}.",
)

#: What follows the thinking (all that a ``tiny-instruct`` text ends with).
FINAL = "The answer is {a}."

#: What a question may end with: it hints at the temperament of the chain.
HINTS: dict[str, tuple[str, ...]] = {
    "backtracking": ("Do not trust your first idea.", "Be ready to start over."),
    "uncertainty-estimation": ("This is a tricky one.", "Say how sure you are."),
    "example-testing": ("Try some cases.", "Examples may help."),
    "adding-knowledge": ("Use what you know.", "Facts may help."),
}


def zipf(label: str) -> list[float]:
    """Weights ``1 / rank ** exponent`` of the wordings of a behaviour."""
    exponent = EXPONENTS.get(label, EXPONENT)
    return [rank**-exponent for rank in range(1, len(WORDINGS[label]) + 1)]
