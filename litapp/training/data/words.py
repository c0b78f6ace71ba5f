"""English articles and plurals for captions."""

from __future__ import annotations

_IRREGULAR = {"mouse": "mice", "loaf of bread": "loaves of bread", "die": "dice", "dice": "dice"}


def plural(name: str) -> str:
    """``cherry tomato`` -> ``cherry tomatoes``: the plural of a concept's name."""
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    head, of, rest = name.partition(" of ")
    if head.endswith(("s", "x", "z", "ch", "sh", "o")):
        head += "es"
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    elif head.endswith("f") and not head.endswith("ff"):
        head = head[:-1] + "ves"
    else:
        head += "s"
    return head + of + rest


def article(words: str) -> str:
    """Prefix ``a`` or ``an`` by sound."""
    lower = words.lower()
    vowel = lower.startswith(("hour", "honest")) or (
        lower[0] in "aeiou" and not lower.startswith(("uni", "ufo", "one", "uk"))
    )
    return f"an {words}" if vowel else f"a {words}"
