"""Imports go one way, utils <- diffusion <- defense <- attack, and the two doors are where the design has them."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from defense.dataelixir import defend

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("utils", "diffusion", "defense", "attack")  # each may import those before it
ONLY = {
    ("attack", "defense"): "run.py",
    ("diffusion", "utils"): "train.py",
}  # room, import -> the file that may
NEVER = ("tests", "config", "record", "benchmarks")


def imported_modules(source, package):
    """Every module that Python code imports, at any depth, with relative ones resolved against `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*outer, *([node.module] if node.module else [])])
            yield from [base] if base else (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(
            node.func, "attr", getattr(node.func, "id", "")
        ) in ("import_module", "__import__"):
            yield from (
                word.value for word in ast.walk(node.args[0]) if isinstance(word, ast.Constant)
            )


def complaint(room, file, target):
    """What is wrong with a file of `room` importing room `target`; None where nothing is."""
    if target in NEVER:
        return "not part of the program"
    if target not in ROOMS or target == room:
        return None
    if ROOMS.index(target) > ROOMS.index(room):
        return "upward"
    return (
        None
        if ONLY.get((room, target), file.name) == file.name
        else f"only {ONLY[room, target]} may"
    )


def violations(root):
    """'file imports room: reason' for every import that breaks the rule."""
    found = set()
    for room in ROOMS:
        for file in (root / room).rglob("*.py"):
            package = ".".join(file.parent.relative_to(root).parts)
            for module in imported_modules(file.read_text(encoding="utf-8"), package):
                reason = complaint(room, file, module.split(".")[0])
                found |= (
                    {f"{file.relative_to(root)} imports {module.split('.')[0]}: {reason}"}
                    if reason
                    else set()
                )
    return sorted(found)


def test_the_program_keeps_the_rule():
    assert all(any((ROOT / room).glob("*.py")) for room in ROOMS)
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("utils/images/data.py", "import attack", "utils/images/data.py imports attack: upward"),
        (
            "utils/images/data.py",
            "def f():\n    from diffusion.sampler import Sampler",
            "utils/images/data.py imports diffusion: upward",
        ),
        (
            "utils/deep/data.py",
            "from defense import run as utils",
            "utils/deep/data.py imports defense: upward",
        ),
        (
            "diffusion/train.py",
            "import numpy, defense.harness.run",
            "diffusion/train.py imports defense: upward",
        ),
        (
            "diffusion/sampler.py",
            "from utils.config import UserError",
            "diffusion/sampler.py imports utils: only train.py may",
        ),
        (
            "defense/a.py",
            "if 0:\n    import attack.badnet as b",
            "defense/a.py imports attack: upward",
        ),
        (
            "defense/a.py",
            "import importlib\nimportlib.import_module('attack.badnet')",
            "defense/a.py imports attack: upward",
        ),
        (
            "defense/a.py",
            "import importlib\nimportlib.import_module(f'attack.{name}')",
            "defense/a.py imports attack: upward",
        ),
        (
            "attack/badnet.py",
            "from defense.harness.run import Case",
            "attack/badnet.py imports defense: only run.py may",
        ),
        (
            "attack/badnet.py",
            "from tests.toys import toy",
            "attack/badnet.py imports tests: not part of the program",
        ),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, source, expected):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source + "\n")
    assert violations(tmp_path) == [expected]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "attack/poisoning/run.py",
            "from defense.harness.run import Case\nfrom diffusion import sampler\nimport utils.images.data",
        ),
        (
            "attack/badnet.py",
            "from attack.poisoning.run import main\nfrom . import trigger\nfrom .trigger import Trigger",
        ),
        (
            "diffusion/train.py",
            "from utils.config import UserError\nfrom diffusion.sampler import Sampler",
        ),
        (
            "defense/harness/run.py",
            "import utils, diffusion.sampler\nimport importlib\nimportlib.import_module(f'defense.{name}')",
        ),
        (
            "utils/images/data.py",
            "import torch\nfrom torchvision import datasets  # not from defense\nname = 'import attack'",
        ),
    ],
)
def test_allowed_imports_are_not_complained_about(tmp_path, file, source):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source + "\n")
    assert violations(tmp_path) == []


def test_relative_imports_are_resolved():
    assert list(
        imported_modules("from ..a import b\nfrom . import c\nfrom .d import e", "x.y")
    ) == ["x.a", "x.y", "x.y.d"]


def test_the_defence_has_no_way_to_the_truth():
    assert list(inspect.signature(defend).parameters) == [
        "data",
        "victim",
        "config",
        "dataset",
        "record",
        "observer",
    ]
    hidden = {
        "Truth",
        "truth",
        "poison",
        "original_labels",
        "poison_indicator",
        "load_case",
        "Case",
        "attack",
    }
    for file in (ROOT / "defense").glob("*.py"):
        if file.name in ("run.py", "report.py", "knowledge.py") or file.name.startswith(
            "oracle_"
        ):  # these measure, or declare it
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {
            getattr(node, key)
            for node in ast.walk(tree)
            for key in ("id", "attr", "arg", "name", "module")
            if isinstance(getattr(node, key, None), str)
        }
        assert not names & hidden and "utils.classifier.metrics" not in names, file.name


HELP = """
import runpy, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name in {"torch", "torchvision", "diffusers", "timm", "sklearn", "scipy", "matplotlib"}:
            raise SystemExit(f"{name} is imported")

sys.meta_path.insert(0, Refused())
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise SystemExit(f"{script}: {end.code}")
"""


def test_help_needs_no_heavy_library():
    scripts = [
        str(file)
        for room in ROOMS
        for file in sorted((ROOT / room).glob("*.py"))
        if "__main__" in file.read_text(encoding="utf-8")
    ]
    assert len(scripts) > 20
    done = subprocess.run(
        [sys.executable, "-c", HELP, *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage: ") == len(scripts)
