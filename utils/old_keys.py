"""Keys of earlier versions: another word for a key of today, or gone, with what to use instead.

A config class names them in class attributes, and keys that older records do not have:

    ALIASES = {"conform": Alias("preset", {True: "published", False: "default"})}
    REMOVED_KEYS = {"sampler": RemovedKey("use preset: published or default", ["ancestral"])}
    LATER_KEYS = {"sig_axis": "columns"}  # what was done before there was this key
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from utils.command import UserError
from utils.words import last_value


class Alias(NamedTuple):
    """The key of today, and {value of the alias: value of that key}."""

    key: str
    meanings: dict[Any, Any]


class RemovedKey(NamedTuple):
    """What to use instead, and what a record may have, since it is done anyway; None = any."""

    advice: str
    harmless: Collection[Any] | None = None


class OldKeys:
    """The earlier keys of config classes and of their bases."""

    def __init__(self, *classes: type):
        self.aliases: dict[str, Alias] = {}
        self.removed: dict[str, RemovedKey] = {}
        self.later: dict[str, Any] = {}
        for base in (base for cls in classes for base in reversed(cls.__mro__)):
            self.aliases |= vars(base).get("ALIASES", {})
            self.removed |= vars(base).get("REMOVED_KEYS", {})
            self.later |= vars(base).get("LATER_KEYS", {})

    def in_file(self, values: dict[str, Any], of_record: bool = False) -> dict[str, Any]:
        """What a YAML file says, in the keys of today.

        Of a record, harmless removed keys are dropped, and later ones say what was done.

        Raises:
            UserError: a removed key, or an alias that contradicts the key that it stands for.
        """
        found = (self.later if of_record else {}) | values
        for key in [key for key in values if key in self.removed]:
            harmless = self.removed[key].harmless
            if not of_record or (harmless is not None and values[key] not in harmless):
                raise self._refusal(key)
            del found[key]
        for key in [key for key in values if key in self.aliases]:
            del found[key]
            self._set(found, key, values[key])
        return found

    def in_words(self, words: Sequence[str]) -> list[str]:
        """A command line in the keys of today, of one in which every alias has a value."""
        found: list[str] = []
        given: dict[str, Any] = {}
        rest = iter(words)
        for word in rest:
            key, equals, value = word.removeprefix("--").partition("=")
            if word.startswith("--") and key in self.removed:
                raise self._refusal(key)
            if word.startswith("--") and key in self.aliases:
                value = value if equals else next(rest, "")
                given[key] = {"true": True, "false": False}.get(value.lower(), value)
            else:
                found.append(word)
        for key, value in given.items():
            name = self.aliases[key].key
            meant = {name: last} if (last := last_value(found, name)) else {}
            self._set(meant, key, value)
            found.append(f"--{name}={meant[name]}")
        return found

    def _set(self, found: dict[str, Any], alias: str, value: Any) -> None:
        """Put what an alias means into `found`, where nothing else may stand."""
        name, meanings = self.aliases[alias]
        if not isinstance(value, (bool, str)) or value not in meanings:
            raise UserError(f"{alias}: {_word(value)} is none of {', '.join(map(_word, meanings))}")
        if found.setdefault(name, meanings[value]) != meanings[value]:
            said = f"{alias} {_word(value)} stands for {name} {meanings[value]}"
            other = f"{name} is {_word(found[name])}; give one of the two"
            raise UserError(f"{alias}, {name}: {said}, but {other}")

    def _refusal(self, key: str) -> UserError:
        return UserError(f"{key}: this key is gone; {self.removed[key].advice}")


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)[:80]
