"""Numbers of things in sentences: `1 clip`, `2 clips`, `0 classes`."""

ENDINGS_WITH_ES = ("s", "x", "z", "ch", "sh")
SOUNDED_AS_K = frozenset({"epoch"})


def plural(noun: str) -> str:
    """Return the plural of a regular noun."""
    with_es = noun.endswith(ENDINGS_WITH_ES) and noun not in SOUNDED_AS_K
    return noun + ("es" if with_es else "s")


def counted(count: int, noun: str, verb: tuple[str, str] | None = None) -> str:
    """Return a number with its noun, e.g. `1 clip`, and, of a (singular, plural) pair, its verb: `2 clips are`."""
    text = f"{count} {noun if count == 1 else plural(noun)}"
    return text if verb is None else f"{text} {verb[count != 1]}"


ARE = ("is", "are")
"""The verb pair used most."""
