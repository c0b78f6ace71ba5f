"""English articles and plurals for captions."""

from __future__ import annotations

import re

# What follows a noun phrase's head: "slice | of pizza", "face | blowing a kiss".
_TAIL = re.compile(r" (?:of|with|without|in|on|at|over|behind|pointing|blowing|holding|getting) .*")
_IRREGULAR = {
    "mouse": "mice",
    "loaf": "loaves",
    "die": "dice",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "ox": "oxen",
    "knife": "knives",
    "chef": "chefs",
    "clef": "clefs",
    "person": "people",
    "child": "children",
    "fleur-de-lis": "fleurs-de-lis",
}
_UNCHANGED = ("dice", "sheep", "deer", "moose", "bison", "fish")
# After a consonant most words take "oes": tomatoes, volcanoes, tornadoes.
_PLAIN_O = tuple("banjo burrito dodo gecko hippo kimono memo metro piano rhino yo io oo".split())


def plural(name: str) -> str:
    """``cherry tomato`` -> ``cherry tomatoes``: the plural of a concept's name."""
    tail = _TAIL.search(name)
    head, rest = (name[: tail.start()], tail.group()) if tail else (name, "")
    return " and ".join(map(_plural_phrase, head.split(" and "))) + rest


def _plural_phrase(words: str) -> str:
    """``woman astronaut`` -> ``women astronauts``: the last word, and a leading man or woman."""
    *others, last = words.split(" ")
    if others and others[0] in ("man", "woman"):
        others[0] = _plural_word(others[0])
    return " ".join((*others, _plural_word(last)))


def _plural_word(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(_UNCHANGED):
        return word
    if word.endswith("man"):
        return f"{word[:-3]}men"
    if word.endswith(("s", "x", "z", "ch", "sh", "o")) and not word.endswith(_PLAIN_O):
        return f"{word}es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    if word.endswith("f") and not word.endswith("ff"):
        return f"{word[:-1]}ves"
    return f"{word}s"


def article(words: str) -> str:
    """Prefix ``a`` or ``an`` by sound."""
    lower = words.lower()
    vowel = lower.startswith(("hour", "honest", "x-ray", "suv")) or (
        lower[0] in "aeiou" and not lower.startswith(("uni", "ufo", "one", "uk", "eu", "ewe"))
    )
    return f"an {words}" if vowel else f"a {words}"
