"""YAML files from users: known keys with short values, or a line that says what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from utils.command import UserError

MAX_YAML, MAX_VALUES = 1_000_000, 1000  # bytes in a file, values of a key


def nearest(word: str, known: Sequence[str]) -> str:
    """' Did you mean X?' for the known word closest to `word`, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, whatever its keys; raises UserError where there is none."""
    try:
        if path.stat().st_size > MAX_YAML:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many for a config")
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read as YAML: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found a {type(content).__name__}")
    return content


def read_yaml(path: Path, known: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML file; UserError where it has none, or a key that is not in `known`."""
    content = mapping(path)
    for key in content:
        if key not in known:
            name, guess = shorten(str(key), 80), nearest(str(key), known)
            raise UserError(f"{path}: unknown key '{name}'.{guess}")
        if not is_short(content[key]):
            raise UserError(f"{path}: {key}: holds more than {MAX_VALUES} values")
    return content


def is_short(value: Any) -> bool:
    """Whether a value unfolds to at most MAX_VALUES; a few aliases can stand for too many."""
    left, stack = MAX_VALUES, [value]
    while stack and left >= 0:
        top, left = stack.pop(), left - 1
        inner = top.values() if isinstance(top, dict) else top
        if isinstance(top, (list, tuple, set, dict)):
            stack.extend(list(inner)[: MAX_VALUES + 1])
    return left >= 0
