"""Writes docs/config.md from the docstrings of the config classes: python docs/generate_config.py

A config class is a frozen dataclass of the program whose fields are flags of a command: one called
...Config, or an attack or a defence. tests/test_docs.py fails where the page is not what this
program would write.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import NamedTuple

from utils.old_keys import OldKeys

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path(__file__).with_name("config.md")
GROUPS = {  # heading -> folder; a class belongs to the last one that its file lies below
    "Every command": "utils/",
    "Attack scripts": "attack/poisoning/",
    "The attacks": "attack/",
    "DataElixir": "defense/elixir/",
    "What defences share": "defense/harness/",
    "The other defences, and cleaning a set of your own": "defense/",
    "Training a denoiser": "diffusion/",
}
INTRODUCTION = """\
# Every key

Written by `python docs/generate_config.py` from the docstrings of the config classes; edit those,
not this page.

Every key is a flag of the command line (`--pratio 0.05`) and a key of the YAML file that
`--yaml_path` names. Flags win over the file, which wins over the defaults. Given several times,
`--yaml_path` lays each file over those before it. `--help` lists the keys of a command,
`--print_config` prints the values that it would use. An unknown key ends the command in one line
that names the nearest known one.

* An attack script takes the keys of the run, of the images, of the poisoning, of its attack and
  of the defence that `--defense` names; every defence has the keys of training.
* A defence script takes the keys of the record that is defended, of the images and of the
  defence.
* `defense/purify.py` takes its own keys and DataElixir's, `diffusion/train.py` its own and those
  of the images.
"""


class Key(NamedTuple):
    """A field of a config class, as the page shows it."""

    name: str
    default: str
    meaning: str


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written")


def page() -> str:
    """The page as Markdown."""
    kinds, parts = list(config_classes()), [INTRODUCTION]
    for heading in GROUPS:
        mine = [section(kind, kinds) for kind in kinds if group(kind) == heading and keys(kind)]
        parts += [f"## {heading}\n", *mine] if mine else []
    return "\n".join(parts + former(kinds))


def config_classes() -> Iterator[type]:
    """Every config class of the program, by file and line."""
    for room in ("attack", "defense", "diffusion", "utils"):
        for file in sorted((ROOT / room).rglob("*.py")):
            if "@dataclass" not in file.read_text(encoding="utf-8"):
                continue
            module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
            for kind in vars(module).values():
                if inspect.isclass(kind) and kind.__module__ == module.__name__ and is_config(kind):
                    yield kind


def is_config(kind: type) -> bool:
    """Whether the fields of a class are flags of a command."""
    return is_dataclass(kind) and (kind.__name__.endswith("Config") or is_attack_or_defence(kind))


def is_attack_or_defence(kind: type) -> bool:
    """Whether a class stamps a trigger or has the keys of training, as bases of them do too."""
    return hasattr(kind, "stamp") or hasattr(kind, "random_seed")


def is_plugin(kind: type) -> bool:
    """Whether a class is the attack or the defence that a file at the top of a room holds."""
    at_top = re.fullmatch(r"(attack|defense)\.\w+", kind.__module__)
    return bool(at_top) and is_attack_or_defence(kind)


def title(kind: type) -> str:
    """The name of an attack or of a defence; of other classes their own."""
    return kind.__module__.rpartition(".")[2] if is_plugin(kind) else kind.__name__


def file_of(kind: type) -> str:
    """The file of a class, relative to the root."""
    return kind.__module__.replace(".", "/") + ".py"


def group(kind: type) -> str:
    """The heading below which a class stands."""
    return max(
        (heading for heading, folder in GROUPS.items() if file_of(kind).startswith(folder)),
        key=lambda heading: len(GROUPS[heading]),
    )


def section(kind: type, kinds: list[type]) -> str:
    """What a class is for, which others have its keys or lend it theirs, and its table."""
    first_line = (kind.__doc__ or "").strip().splitlines()[0]
    lent = [title(base) for base in kind.__mro__[1:] if base in kinds and keys(base)]
    heirs = [title(other) for other in kinds if kind in other.__mro__[1:] and is_plugin(other)]
    lines = [f"### {title(kind)}", "", f"{first_line} [{file_of(kind)}](../{file_of(kind)})"]
    if lent:
        lines += ["", f"With the keys of {' and '.join(lent)}."]
    if heirs and len(heirs) < 5:
        lines += ["", f"Keys of {', '.join(heirs)}."]
    rows = [f"| `{key.name}` | {key.default} | {key.meaning} |" for key in keys(kind)]
    return "\n".join([*lines, "", "| key | default | meaning |", "|---|---|---|", *rows, ""])


def keys(kind: type) -> list[Key]:
    """The keys that a class itself adds, in its order.

    Raises:
        LookupError: its docstring does not explain one.
    """
    explained, own = meanings(kind), inspect.get_annotations(kind)
    flags = [field for field in fields(kind) if field.name in own and field.init]
    if missing := [field.name for field in flags if field.name not in explained]:
        raise LookupError(f"{file_of(kind)}: {kind.__name__} does not explain {', '.join(missing)}")
    cell = lambda text: text.replace("|", r"\|")  # a bar would end the cell
    return [Key(field.name, default(field), cell(explained[field.name])) for field in flags]


def meanings(kind: type) -> dict[str, str]:
    """{key: meaning} of the Args of a docstring; a line indented further continues the last one."""
    arguments = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")[2]
    joined = re.sub(r"\n {5,}", " ", arguments)
    return dict(re.findall(r"^    (\w+): (.*)$", joined, re.MULTILINE))


def default(field: Field) -> str:
    """The default of a field as YAML has it."""
    if field.default_factory is not MISSING:
        return json.dumps(field.default_factory(), separators=(",", ":"))
    if field.default is MISSING:
        return "(required)"
    if isinstance(field.default, str):
        return field.default or "(empty)"
    return json.dumps(field.default)


def former(kinds: list[type]) -> list[str]:
    """The keys of former versions: other words for keys of today, and what replaces the others."""
    old = OldKeys(*kinds)
    told = {key: removed.advice for key, removed in old.removed.items()}
    for key, alias in old.aliases.items():
        pairs = (f"{json.dumps(word)} is {value}" for word, value in alias.meanings.items())
        told[key] = f"another word for `{alias.key}`: {', '.join(pairs)}"
    if not told:
        return []
    rows = [f"| `{key}` | {instead} |" for key, instead in sorted(told.items())]
    head = ["## Keys of former versions", "", "| key | instead |", "|---|---|"]
    return ["\n".join([*head, *rows, ""])]


if __name__ == "__main__":
    main()
