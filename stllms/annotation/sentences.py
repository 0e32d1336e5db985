"""Sentences: where a reader would cut a text, and what each of them sounds like.

:func:`split` keeps decimals, abbreviations, list numbers and blocks of LaTeX whole; the end of
a line always cuts, since chains put list items and equations on lines of their own.
:func:`label` names a behaviour from cue words and a few plain rules. The rules are ours,
written from the definitions of method, section 4; they are the floor that a trained annotator
has to beat, and an instrument whose mistakes do not come from any judge. They know the
paper's labels; others bring cue words of their own (:func:`heard`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from stllms.annotation.placing import CJK
from stllms.labels import PAPER, LabelSet
from stllms.records import PlacedSegment

_ABBREVIATIONS = frozenset(
    """e.g i.e etc vs cf al mr mrs ms dr prof st jr sr fig figs eq eqs no nos vol ch sec ca viz
    resp approx est min max avg dept inc ltd""".split()  # noqa: SIM905
)
_LATEX = re.compile(
    r"\\\[.{0,2000}?\\\]|\$\$.{0,2000}?\$\$|\\begin\{(\w+\*?)\}.{0,2000}?\\end\{\1\}", re.DOTALL
)
# Repetitions are bounded, possessive or kept from starting twice: splitting is linear.
_BREAK = re.compile(
    r"""(?P<line>\n\s*+)                          # the end of a line
    |(?P<wide>[。！？])                           # full stops that need no space
    |(?<![.!?…])(?P<stop>[.!?…]++)(?P<tail>["'”’)\]*_]*+)(?P<gap>[^\S\n]++)(?=\S)""",
    re.VERBOSE,
)
_LIST_NUMBER = re.compile(r"(?:^|\n)\s*(?:[#>*-]+\s*)?(?:\*\*)?(?:\d{1,3}|[A-Za-z]|[ivx]+)$")
_LAST_WORD = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]+$")


def split(text: str) -> list[tuple[int, int]]:
    """Characters ``[start, end)`` of every sentence, in order.

    No sentence begins or ends with white space, none is empty, they do not overlap, and
    together they hold every character that is not white space.
    """
    shielded = [m.span() for m in _LATEX.finditer(text)]
    ends, begin = [], 0
    for match in _BREAK.finditer(text):
        cut = match.start("gap") if match["stop"] else match.end()
        while shielded and shielded[0][1] <= match.start():
            shielded.pop(0)
        if shielded and shielded[0][0] <= match.start() < shielded[0][1]:
            continue
        if match["stop"] and not _ends_sentence(text, begin, match):
            continue
        ends.append(cut)
        begin = cut
    found = []
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        part = text[start:end]
        lead = len(part) - len(part.lstrip())
        if part.strip():
            found.append((start + lead, start + lead + len(part.strip())))
    return found


def _ends_sentence(text: str, begin: int, match: re.Match[str]) -> bool:
    """Whether the stop sign of ``match`` ends the sentence that began at ``begin``."""
    following = text[match.end()]
    if following.islower():
        return False
    if match["stop"] != "." or match["tail"]:
        return True
    before = text[max(begin, match.start() - 40) : match.start()]
    if _LIST_NUMBER.search(before):
        return False
    word = _LAST_WORD.search(before)
    if word is None:
        return True
    name = word[0].lower()
    if name in ("no", "min", "max", "st", "al"):  # words of their own before anything else
        return not following.isdigit() and name != "st"
    if "." in name:
        return name not in _ABBREVIATIONS and following.isupper() and len(name) > 3
    return name not in _ABBREVIATIONS or (name == "etc" and following.isupper())


# --- cue words ------------------------------------------------------------------------


def _rule(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


#: What a sentence of each behaviour sounds like. The offline annotator counts them too.
CUES: dict[str, re.Pattern[str]] = {
    "restarts": _rule(
        r"^(?:but |oh,? |hmm,? |no,? |so )*(?:wait|hold on|hang on)\b",
        r"^(?:oh,? |hmm,? )?(?:no|nope)[,.]",
        r"^(?:but |hmm,? |oh,? )?actually\b",
        r"^(?:or )?(?:alternatively|on second thought|scratch that|instead,)",
        r"\b(?:let me|let's|i should|i'll) (?:re-?(?:think|consider|do)|start over|go back)",
        r"\b(?:try|think of|consider|take) (?:another|a different) (?:approach|way|method)",
        r"\bthat(?:'s| is) not (?:right|correct|it)\b|\bthat can(?:'t|not) be\b",
        r"\bi (?:made|must have made|think i made) (?:a|an) (?:mistake|error)",
    ),
    "doubts": _rule(
        r"\bi(?:'m| am) (?:not (?:\w+ )?(?:sure|certain)|unsure|confused|a bit|wondering)",
        r"\bi (?:wonder|guess|doubt|don't know|might be|may be|could be|am not)\b",
        r"\bi (?:don't|do not) (?:really |quite )?(?:remember|recall|think|see)\b",
        r"\b(?:not sure|uncertain|unclear|hard to (?:say|tell)|is that (?:right|correct))\b",
        r"\b(?:double[- ]check|make sure|does that make sense|am i (?:missing|right))\b",
        r"^(?:hmm|maybe|perhaps|possibly)\b",
    ),
    "hedges": _rule(r"\b(?:maybe|perhaps|probably|possibly|might|i think|seems?|hmm)\b"),
    "examples": _rule(
        r"\bfor (?:example|instance)\b|\be\.g\.|\bsuppose\b|\bimagine\b|\bsay,",
        r"\b(?:let me|let's|i(?:'ll| can)) (?:test|try|check|verify|plug|see if|take)\b",
        r"\b(?:as|take) an example\b|\bexample\b|\bplug(?:ging)? in\b|^if [a-z] ?= ?-?\d",
        r"\b(?:test|check)(?:ing)? (?:this|that|it|with)\b",
    ),
    "recalls": _rule(
        r"\bi (?:remember|recall|know|learned|read|heard|believe)\b|\bi've (?:heard|read)",
        r"\b(?:formula|theorem|definition|known as|is called|is defined|refers to|law of)\b",
        r"\b(?:typically|usually|generally|commonly|in general|often|stands for)\b",
    ),
    "concludes": _rule(
        r"^(?:so|therefore|thus|hence|then|that means|this means|which means|since|because)\b",
        r"\b(?:therefore|must be|it follows|which gives|this gives|we get|implies|conclude)\b",
    ),
    "opens": _rule(
        r"^(?:okay|ok|alright|so,? i|first)\b",
        r"^to (?:solve|find|determine|figure|answer|address)\b",
        r"\b(?:need|have|want|trying|asked) to (?:figure|find|determine|solve|think)",
        r"\bthe (?:question|problem|task) (?:is|asks|says)",
        r"\bi have (?:this|a) (?:question|problem)",
        r"\bstep by step|\b(?:let me|let's) (?:start|break|think|begin)",
    ),
}


def label(sentence: str, index: int) -> str:
    """The behaviour of sentence number ``index`` (from 0) of a chain, by rule."""
    heard = {cue for cue, pattern in CUES.items() if pattern.search(sentence)}
    if index == 0 or (index < 4 and "opens" in heard and "restarts" not in heard):
        return "initializing"
    for cue, behaviour in (
        ("restarts", "backtracking"),
        ("doubts", "uncertainty-estimation"),
        ("examples", "example-testing"),
        ("recalls", "adding-knowledge"),
    ):
        if cue in heard:
            return behaviour
    return "deduction"


def heard(labels: LabelSet) -> Callable[[str, int], str | None]:
    """The rule by which cue words name sentence number ``index`` of a chain.

    For the paper's labels that is :func:`label`, unless they bring cues of their own. Else it
    is the first label in the order of the set of which the sentence has a cue: as whole words,
    in any case. Without any cue it is the first label that has none, or ``None``.

    Raises:
        ValueError: no label of the set has a cue.

    """
    cues = {one.name: [cue for cue in one.cues if cue.strip()] for one in labels.labels}
    if not any(cues.values()):
        if set(labels.names) == set(PAPER.names):
            return label
        raise ValueError(
            f"lexical: no label of {labels.name!r} has cues: add them to the file of labels "
            f"(labels: {{{labels.names[0]}: {{cues: [word, two words]}}}})"
        )
    patterns = {name: _cue(words) for name, words in cues.items() if words}
    rest = next((name for name, words in cues.items() if not words), None)

    def rule(sentence: str, _index: int) -> str | None:
        plain = sentence.replace("’", "'")
        return next((name for name, cue in patterns.items() if cue.search(plain)), rest)

    return rule


def _cue(words: Sequence[str]) -> re.Pattern[str]:
    """Any of the cues, each as whole words; scripts without spaces have none."""
    letter, patterns = re.compile(rf"[^\W{CJK}]"), []
    for cue in (" ".join(word.replace("’", "'").split()) for word in words):
        before = f"(?<!{letter.pattern})" if letter.match(cue[0]) else ""
        after = f"(?!{letter.pattern})" if letter.match(cue[-1]) else ""
        patterns.append(before + r"\s+".join(map(re.escape, cue.split())) + after)
    return _rule(*patterns)


def segments(
    text: str, places: Sequence[tuple[int, int]], labels: Sequence[str | None]
) -> list[PlacedSegment]:
    """Sentences as segments: neighbours of one label on one line become one; those whose label
    is ``None`` are left out.

    So cut, the sentences of the released chains, with the judge's own labels, give 94 % to
    110 % as many segments as the judge wrote (88 % for one model of five), single sentences
    up to 173 %: segment counts stay comparable.
    """
    placed: list[PlacedSegment] = []
    before = None
    for (start, end), name in zip(places, labels, strict=True):
        if name is not None:
            if name == before and "\n" not in text[placed[-1].end : start]:
                start = placed.pop().start
            placed.append(PlacedSegment(name, text[start:end], start, end))
        before = name
    return placed
