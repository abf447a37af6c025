"""The README's config reference says what the code does."""

import importlib
import json
import re
from dataclasses import MISSING, fields

import pytest

from attack.poisoning.poison import PoisonConfig
from attack.poisoning.trigger import Trigger
from defense.elixir.config import DataElixirConfig, PurifyConfig
from defense.harness.command import AgainConfig
from defense.purify import CleanConfig
from diffusion.network import DenoiserConfig
from tests.test_imports import ROOT
from utils.config import DataConfig, TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
ATTACKS = [
    file.stem
    for file in sorted((ROOT / "attack").glob("*.py"))
    if "main(" in file.read_text() and file.stem != "run"
]


def documented(config):
    """{key: (default as YAML has it, meaning)} of the fields that a class's docstring explains."""
    meaning = dict(re.findall(r"^        (\w+): (.*)$", config.__doc__, re.MULTILINE))
    shown = lambda value: (
        (value or "(empty)") if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    )

    def default(field):
        if field.default_factory is not MISSING:
            return shown(field.default_factory())
        return "" if field.default is MISSING else shown(field.default)

    return {
        field.name: (default(field), meaning[field.name])
        for field in fields(config)
        if field.name in meaning
    }


@pytest.mark.parametrize(
    "config",
    [
        DataConfig,
        PoisonConfig,
        TrainConfig,
        PurifyConfig,
        DataElixirConfig,
        CleanConfig,
        AgainConfig,
        DenoiserConfig,
    ],
)
def test_every_key_stands_with_its_default_and_meaning(config):
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| (.*) \|$", README, re.MULTILINE)
    assert [
        (key, *told) for key, told in documented(config).items() if (key, *told) not in rows
    ] == []


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_key_of_an_attack_stands_with_its_default_and_meaning(attack):
    trigger = next(
        kind
        for kind in vars(importlib.import_module(f"attack.{attack}")).values()
        if isinstance(kind, type) and issubclass(kind, Trigger) and kind is not Trigger
    )
    named = "" if attack == "badnet" else rf"{attack} \| "
    rows = re.findall(rf"^\| {named}`(\w+)` \| ([^|]*) \| (.*) \|$", README, re.MULTILINE)
    assert documented(trigger)
    assert [
        (key, *told) for key, told in documented(trigger).items() if (key, *told) not in rows
    ] == []
