"""Configuration: frozen dataclasses, read in the order defaults < YAML files < command line.

`parse_config` turns several of them into one command line whose flags are the field names.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from jsonargparse.typing import ClosedUnitInterval as Fraction
from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)
from jsonargparse.typing import OpenUnitInterval as OpenFraction

from utils.command import UserError, command_line  # noqa: F401  for the commands
from utils.old_keys import OldKeys, RemovedKey
from utils.words import every_value, last_value, switched, without_tries, yaml_first
from utils.yaml_files import mapping, nearest, read_yaml

ROOT = Path(__file__).resolve().parent.parent
# where results and caches lie
RECORDS = Path(os.environ.get("DATAELIXIR_RECORD") or ROOT / "record").absolute()
SCRIPTS = ROOT / "attack"
# what a tensor can hold
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])
NOT_IN_YAML = ("help", "yaml_path", "print_config")
log = logging.getLogger("dataelixir")


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How a folder of images is read.

    Args:
        on_bad_image: stop or skip at image files that cannot be read or lead out of the data
            folder; both list them.
        follow_links: read files and folders that links lead to outside of the data folder.
        classes: which folders of an image folder are its classes, where that can be doubted: top
            (the first level) or leaf (each folder that holds images, named by its path).
    """

    on_bad_image: Literal["stop", "skip"] = "stop"
    follow_links: bool = False
    classes: Literal["auto", "top", "leaf"] = "auto"


@dataclass(frozen=True)
class DataConfig(ReadConfig):
    """Which images.

    Args:
        dataset: cifar10, cifar100, gtsrb, digits (embedded, no download) or imagefolder.
        dataset_path: folder of the data sets, tried as given, then relative to attack/; missing
            ones are downloaded there.
        image_size: side in pixels to which images are resized (PIL bilinear).
        test_fraction: share of each class kept as test set when an image folder has no test/.
    """

    dataset: str = "digits"
    dataset_path: str = "../data"
    image_size: PositiveInt = 32
    test_fraction: OpenFraction = 0.2


@dataclass(frozen=True)
class TrainConfig:
    """How classifiers are trained, and on what.

    Args:
        model: preactresnet18, preactresnet_small, or any timm model by name.
        epochs: passes over the training set.
        batch_size: images per optimizer step.
        client_optimizer: sgd or adam.
        lr: learning rate at the start.
        lr_scheduler: CosineAnnealingLR (to 0 over all epochs) or constant; stepped once an epoch.
        sgd_momentum: momentum of SGD.
        wd: weight decay.
        frequency_save: a checkpoint, from which a training continues, is written after every epoch
            (0 or 1) or every k-th.
        amp: mixed precision (float16 with loss scaling on CUDA, bfloat16 on a CPU).
        device: auto, cpu, cuda, cuda:1, ...; falls back to the CPU with a warning.
        random_seed: seed of every random choice.
    """

    REMOVED_KEYS: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("steplr_stepsize", "steplr_gamma"),
        RemovedKey("use lr_scheduler: CosineAnnealingLR or constant"),
    )

    model: str = "preactresnet18"
    epochs: PositiveInt = 100
    batch_size: PositiveInt = 128
    client_optimizer: Literal["sgd", "adam"] = "sgd"
    lr: PositiveFloat = 0.01
    lr_scheduler: Literal["CosineAnnealingLR", "constant"] = "CosineAnnealingLR"
    sgd_momentum: Fraction = 0.9
    wd: NonNegativeFloat = 5e-4
    frequency_save: NonNegativeInt = 0
    amp: bool = True
    device: str = "auto"
    random_seed: Seed = 2022  # type: ignore[valid-type]  # mypy takes no type that a call makes


def resolve_path(text: str, key: str) -> Path:
    """The existing path that `text` means: as given, else relative to attack/, as published.

    Raises:
        UserError: nothing is there (the message lists every place tried), or a device or a pipe.
    """
    places = candidate_paths(text)
    for place in places:
        with contextlib.suppress(ValueError, OSError):  # a zero byte, a name that is too long
            if place.is_file() or place.is_dir():
                return place
            if place.exists():
                raise UserError(f"{key}: {place} is no regular file")
    raise UserError(f"{key}: nothing found at " + " or ".join(map(str, places)))


def candidate_paths(text: str) -> list[Path]:
    """Where a path from the user may lie, in the order tried, without repetition."""
    given = Path(os.path.expanduser(text))  # of a user that there is not, it stays as it is
    return list(dict.fromkeys([given.absolute(), Path(os.path.normpath(SCRIPTS / given))]))


def choose_by_name(name: str, known: dict[str, Any], key: str) -> Any:
    """`known[name]`; raises UserError that names the key, the nearest name and all of them."""
    if name in known:
        return known[name]
    guess = nearest(name, list(known))
    raise UserError(f"{key}: '{name}' is unknown.{guess} Known: {', '.join(known)}")


class _YamlPath(ActionConfigFile):
    """`--yaml_path`: a config file, looked for as given and then relative to attack/."""

    def __call__(self, parser, cfg, value, option_string=None):
        path, old = resolve_path(value, "--yaml_path"), parser.old_keys
        known = [action.dest for action in parser._actions if action.dest not in NOT_IN_YAML]
        content = read_yaml(path, [*known, *parser.passed_over, *old.aliases, *old.removed])
        today = old.in_file(content)
        if kept := {key: today[key] for key in today if key in known}:
            source = str(path) if kept == content else yaml.safe_dump(kept)
            super().__call__(parser, cfg, source, option_string)


class _Parser(ArgumentParser):
    passed_over: frozenset[str] = frozenset()
    old_keys = OldKeys()

    def error(self, message, ex=None):
        """Every complaint becomes one UserError; unknown flags get the nearest known one."""
        lines = [line.strip() for line in without_tries(str(message)).splitlines() if line.strip()]
        flags = [o.lstrip("-") for action in self._actions for o in action.option_strings]
        unknown = re.findall(r"--?([\w]+)", lines[0]) if "nrecognized" in lines[0] else []
        raise UserError(" ".join(lines)[:400] + (nearest(unknown[0], flags) if unknown else ""))


def parse_config(
    argv: Sequence[str] | None,
    *classes: type,
    description: str = "",
    defaults: dict[str, Any] | None = None,
) -> list[Any]:
    """One instance of each of `classes`, from defaults, then every --yaml_path, then flags.

    Args:
        argv: the command line without the program name; None means sys.argv[1:].
        classes: frozen dataclasses whose fields (together without repetition) are the flags; that
            of a bool may stand alone. Keys in a class's PASSED_OVER may stand in the YAML file too:
            they are for others. Earlier keys are in its ALIASES and REMOVED_KEYS (old_keys.py).
        description: first lines of --help.
        defaults: values that replace the classes' own; keys that no class has are passed over.

    Raises:
        UserError: unknown key or flag, a value out of range, an unreadable file.
        SystemExit: after --help and --print_config, with code 0.
    """
    parser = _Parser(description=description, exit_on_error=True, allow_abbrev=False)
    parser.passed_over = frozenset().union(*(getattr(cls, "PASSED_OVER", ()) for cls in classes))
    parser.old_keys = OldKeys(*classes)
    parser.add_argument(
        "--yaml_path",
        action=_YamlPath,
        help="YAML file with any of the keys below; of several files the later wins, flags over all",
    )
    switches = {f"--{alias}" for alias in parser.old_keys.aliases}
    for cls in classes:
        kinds = get_type_hints(cls)
        # else the parser would look for them, by importing whatever type checkers import
        vars(cls)["__init__"].__annotations__.update(kinds)
        parser.add_class_arguments(cls)
        switches |= {f"--{key}" for key, kind in kinds.items() if kind is bool}
    known = {f.name for cls in classes for f in fields(cls) if f.init}
    replaced = parser.old_keys.in_file(defaults, of_record=True) if defaults else {}
    kept = {key: value for key, value in replaced.items() if key in known}
    if kept:
        parser.parse_object(kept)  # a value that a key has no more is refused
        parser.set_defaults(kept)
    given = parser.old_keys.in_words(switched(yaml_first(argv), switches))
    values = parser.parse_args(given).as_dict()
    return [
        cls(**{f.name: _plain(cls, f.name, values[f.name]) for f in fields(cls) if f.init})
        for cls in classes
    ]


def _plain(cls: type, key: str, value: Any) -> Any:
    """A value of a restricted type (PositiveInt, ...) as the plain number or string."""
    if isinstance(value, list):
        return [_plain(cls, key, each) for each in value]
    if value is None and type(None) not in get_args(get_type_hints(cls)[key]):
        words = "null is no value for this key; leave the key out to have its default"
        raise UserError(f"{key}: {words}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}: {value} is no number to compute with; give a finite one")
    plain = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    return plain(value) if plain else value


def peek(argv: Sequence[str] | None, key: str, default: str) -> str:
    """The value that `key` will have, where it decides which keys there are, and so the parser."""
    words = list(sys.argv[1:] if argv is None else argv)
    if (given := last_value(words, key)) is not None:
        return given
    with contextlib.suppress(UserError):  # said when the parser reads the file
        return str(_in_files(words).get(key, default))
    return default


def _in_files(words: Sequence[str]) -> dict[str, Any]:
    """{key: value} of a command line's YAML files, of which the later wins."""
    found: dict[str, Any] = {}
    for file in filter(None, every_value(words, "yaml_path")):
        found |= mapping(resolve_path(file, "--yaml_path"))
    return found


def passed_over(argv: Sequence[str] | None, cls: type) -> dict[str, Any]:
    """{key: value} of a command line's YAML files that are not for `cls` (its PASSED_OVER)."""
    content = _in_files(sys.argv[1:] if argv is None else argv)
    others = set(getattr(cls, "PASSED_OVER", ())) - {f.name for f in fields(cls)}
    return {key: value for key, value in content.items() if key in others}


def as_flat_dict(*configs: Any) -> dict[str, Any]:
    """All fields of several config instances in one dictionary."""
    return {f.name: getattr(config, f.name) for config in configs for f in fields(config) if f.init}
