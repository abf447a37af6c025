"""The words of a command line, before a parser reads them, and what the parser says of them.

And names in a sentence.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence


def last_value(words: Sequence[str], key: str) -> str | None:
    """The value of the last --KEY VALUE or --KEY=VALUE of a command line, if there is one."""
    return next(reversed(every_value(words, key)), None)


def every_value(words: Sequence[str], key: str) -> list[str]:
    """The values of each --KEY VALUE and --KEY=VALUE of a command line, in order."""
    found = []
    for word, following in zip(words, [*words[1:], ""]):
        flag, equals, value = word.partition("=")
        if flag == f"--{key}":
            found.append(value if equals else following)
    return found


def yaml_first(argv: Sequence[str] | None) -> list[str]:
    """The words with every --yaml_path in front, so that the flags win."""
    words = list(sys.argv[1:] if argv is None else argv)
    first: list[str] = []
    rest: list[str] = []
    while words:
        taken = 2 if words[0] == "--yaml_path" else 1
        (first if words[0].partition("=")[0] == "--yaml_path" else rest).extend(words[:taken])
        del words[:taken]
    return first + rest


def switched(words: Sequence[str], switches: Collection[str]) -> list[str]:
    """The words with `true` behind each of `switches` that stands alone."""
    found = []
    for word, following in zip(words, [*words[1:], "--"]):
        found += [word, "true"] if word in switches and following.startswith("--") else [word]
    return found


def without_tries(message: str) -> str:
    """What the parser says of a value of none of a key's kinds, without its tries at each."""
    kinds = re.search(r'key "(\w+)".*?Subtypes: \[(.*?)\]\s+Errors:', message, re.DOTALL)
    given = re.search(r"Given value: (.*)", message)
    if not kinds or not given:
        return message
    named = re.sub(r"<class '(.*?)'>", r"\1", kinds[2])
    named = re.sub(r"\b\w+\.|Literal\[|(?<=')\](?!\])", "", named).replace("NoneType", "null")
    return f"{kinds[1]}: {given[1]} is none of {named}"


def listed(names: Collection[str], most: int = 10) -> str:
    """Names in a row, `most` of them and how many more there are; "none" without any."""
    more = f" and {len(names) - most} more" * (len(names) > most)
    return ", ".join(list(names)[:most]) + more if names else "none"
