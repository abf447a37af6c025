"""Imports go one way, from room to room and without circles; commands are where the design has them and begin quickly."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from utils.config import ROOT

# From low to high; a room imports only itself and those before it. "defense" are the files at its top, and so on.
ROOMS = (
    "utils",
    "utils.storage",
    "utils.images",
    "utils.classifier",
    "utils.page",
    "diffusion",
    "defense.elixir",
    "defense.harness",
    "defense.own_data",
    "defense",
    "attack.poisoning",
    "attack",
)
FOLDERS = ("utils", "diffusion", "defense", "attack")
ABOVE_THEIR_ROOM = ("utils.report",)  # a command, which may import every room of its folder
# room that imports, folder that is imported -> the modules that may
ONLY = {
    ("diffusion", "utils"): ("diffusion.train",),
    ("attack.poisoning", "defense"): ("attack.poisoning.run", "attack.poisoning.command"),
    ("attack", "defense"): (),
}
PLUG_IN = ("defense.harness.defense", "defense")  # finds a defence by the name of its module
NEVER = ("tests", "config", "record", "benchmarks")


def module_name(file, root):
    """a/b/c.py -> a.b.c; a/b/__init__.py -> a.b."""
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def modules_of(root, *folders):
    """{name: its tree} of every module in these folders and whatever is below them."""
    files = [file for folder in folders for file in sorted((root / folder).rglob("*.py"))]
    return {module_name(file, root): ast.parse(file.read_text("utf-8")) for file in files}


def imported_names(tree, package):
    """Every name that Python code imports, at any depth of it: modules, and what is taken from them as `module.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = [*outer, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def names_put_together(tree):
    """The constant parts of what is given to import_module or __import__."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and node.args:
                words = (w for w in ast.walk(node.args[0]) if isinstance(w, ast.Constant))
                yield from (word.value.rstrip(".") for word in words if isinstance(word.value, str))


def room_of(name):
    """The room of a module, or of a name in it; None for other people's."""
    longest = ".".join(name.split(".")[:2])
    return next((room for room in (longest, name.split(".")[0]) if room in ROOMS), None)


def complaint(module, name):
    """What is wrong with `module` importing `name`; None where nothing is."""
    folder, room, target = name.split(".")[0], room_of(module), room_of(name)
    if folder in NEVER:
        return "not part of the program"
    if target is None or target == room:
        return None
    allowed = ONLY.get((room, folder))
    if allowed is not None and module not in allowed:
        return f"only {' and '.join(allowed) or 'other rooms'} may"
    if module in ABOVE_THEIR_ROOM and folder == module.split(".")[0]:
        return None
    return "upward" if ROOMS.index(target) > ROOMS.index(room) else None


def violations(root):
    """'module imports name: reason' for every import that breaks the rule."""
    found = set()
    for module, tree in modules_of(root, *FOLDERS).items():
        package = (
            module if (root / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]
        )
        for name in imported_names(tree, package):
            found.add((module, name, complaint(module, name)))
        for name in names_put_together(tree):
            if (module, name) != PLUG_IN:
                found.add((module, name, complaint(module, name)))
    return sorted(f"{module} imports {name}: {reason}" for module, name, reason in found if reason)


def edges(root):
    """{module: the modules of the program that it imports, in functions too}."""
    trees = modules_of(root, *FOLDERS)
    graph = {}
    for module, tree in trees.items():
        names = set(imported_names(tree, module.rpartition(".")[0])) | set(names_put_together(tree))
        owners = {name if name in trees else name.rpartition(".")[0] for name in names}
        graph[module] = sorted(owner for owner in owners if owner in trees)
    return graph


def circles(graph):
    """The groups of modules that import each other, each sorted (Tarjan's strongly connected components)."""
    order, lowest, stack, found = {}, {}, [], []

    def visit(node):
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
            if other in stack:
                lowest[node] = min(lowest[node], lowest[other])
        if lowest[node] == order[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1 or node in graph[node]:
                found.append(sorted(group))

    for node in graph:
        if node not in order:
            visit(node)
    return sorted(found)


def is_command(tree):
    """Whether a module does something when it is run as a script."""
    return any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body
    )


def commands():
    """The names of the modules that are commands."""
    trees = modules_of(ROOT, *FOLDERS)
    at_the_top = {name for name in trees if room_of(name) in ("attack", "defense") and "." in name}
    return at_the_top | {"diffusion.train", "utils.report"}


def plant(root, file, source):
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(source + "\n")


def test_the_program_keeps_the_rule():
    assert {room_of(module) for module in modules_of(ROOT, *FOLDERS)} == set(ROOMS)
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "name", "reason"),
    [
        ("utils/config.py", "from utils.storage import files", "utils.storage.files", "upward"),
        ("utils/images/data.py", "import attack", "attack", "upward"),
        ("utils/images/data.py", "import utils.page.charts", "utils.page.charts", "upward"),
        (
            "utils/storage/deep/a.py",
            "def f():\n    from diffusion.sampler import Sampler",
            "diffusion.sampler.Sampler",
            "upward",
        ),
        ("utils/images/a.py", "from defense import a as utils", "defense.a", "upward"),
        ("utils/images/a.py", "from ..page import charts", "utils.page.charts", "upward"),
        ("diffusion/train.py", "import os, defense.harness.run", "defense.harness.run", "upward"),
        (
            "diffusion/sampler.py",
            "from utils.config import UserError",
            "utils.config.UserError",
            "only diffusion.train may",
        ),
        ("defense/a.py", "if 0:\n    import attack.badnet as b", "attack.badnet", "upward"),
        ("defense/elixir/a.py", "from defense import purify", "defense.purify", "upward"),
        ("defense/elixir/a.py", "import defense.harness.run", "defense.harness.run", "upward"),
        ("defense/harness/a.py", "import defense.own_data.given", "defense.own_data.given", "upward"),
        (
            "defense/harness/run.py",
            "import importlib\nimportlib.import_module(f'defense.{name}')",
            "defense",
            "upward",
        ),
        (
            "defense/harness/defense.py",
            "import importlib\nimportlib.import_module('attack.' + name)",
            "attack",
            "upward",
        ),
        (
            "attack/badnet.py",
            "from defense.harness.run import Case",
            "defense.harness.run.Case",
            "only other rooms may",
        ),
        (
            "attack/poisoning/trigger.py",
            "import defense.elixir.config",
            "defense.elixir.config",
            "only attack.poisoning.run and attack.poisoning.command may",
        ),
        ("attack/badnet.py", "from tests.toys import toy", "tests.toys.toy", "not part of the program"),
    ],
)  # fmt: skip
def test_a_planted_violation_is_found(tmp_path, file, source, name, reason):
    plant(tmp_path, file, source)
    module = module_name(tmp_path / file, tmp_path)
    assert violations(tmp_path) == [f"{module} imports {name}: {reason}"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "attack/poisoning/run.py",
            "from defense.harness.run import Case\nfrom diffusion import sampler\nimport utils.page.charts",
        ),
        ("attack/badnet.py", "from attack.poisoning.run import main\nfrom .poisoning import trigger"),
        ("diffusion/train.py", "from utils.config import UserError\nfrom . import sampler"),
        (
            "defense/harness/defense.py",
            "import defense.elixir.config, importlib\nimportlib.import_module(f'defense.{name}')",
        ),
        ("defense/a.py", "from defense.own_data import given\nfrom .harness import run"),
        ("utils/report.py", "from utils.page import charts"),
        (
            "utils/images/data.py",
            "import torch\nfrom torchvision import datasets  # not from defense\nname = 'import attack'",
        ),
    ],
)  # fmt: skip
def test_allowed_imports_are_not_complained_about(tmp_path, file, source):
    plant(tmp_path, file, source)
    assert violations(tmp_path) == []


def test_relative_imports_are_resolved():
    tree = ast.parse("from ..a import b\nfrom . import c\nfrom .d import e")
    assert list(imported_names(tree, "x.y")) == ["x.a.b", "x.y.c", "x.y.d.e"]


def test_no_circle_of_imports():
    assert circles(edges(ROOT)) == []


@pytest.mark.parametrize(
    "files",
    [
        {"utils/a.py": "import utils.b", "utils/b.py": "from utils import a"},
        {
            "defense/elixir/a.py": "def f():\n    from defense.elixir.b import x",
            "defense/elixir/b.py": "from .deep import c",
            "defense/elixir/deep/c.py": "if TYPE_CHECKING:\n    from ..a import f",
        },
        {"utils/a.py": "from utils.a import f"},
    ],
)
def test_a_planted_circle_is_found_and_what_leads_to_it_is_no_part_of_it(tmp_path, files):
    plant(tmp_path, "attack/leads.py", "import utils.a, defense.elixir.a")
    plant(tmp_path, "utils/last.py", "import torch")
    for file, source in files.items():
        plant(tmp_path, file, source)
    assert circles(edges(tmp_path)) == [sorted(module_name(Path(file), Path()) for file in files)]


def test_every_file_at_the_top_of_attack_and_defense_is_a_command():
    trees = modules_of(ROOT, *FOLDERS)
    assert [name for name in sorted(commands()) if not is_command(trees[name])] == []


def test_nobody_imports_a_command():
    graph, forbidden = edges(ROOT), commands()
    found = [(module, name) for module in graph for name in graph[module] if name in forbidden]
    assert found == []


def script_folders():
    """The folders that are first on Python's search path while one of our scripts runs."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    return {file.parent for file in files if is_command(ast.parse(file.read_text("utf-8")))}


def test_no_name_beside_a_script_hides_another_module():
    trees = modules_of(ROOT, *FOLDERS)
    imported = {
        name.split(".")[0]
        for module, tree in trees.items()
        for name in imported_names(tree, module.rpartition(".")[0])
    }
    assert {"torch", "utils"} <= imported
    hidden = imported | set(sys.stdlib_module_names)
    for folder in script_folders():
        beside = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
        assert not beside & hidden, folder


def test_tests_import_nothing_of_benchmarks():
    for module, tree in modules_of(ROOT, "tests").items():
        names = [*imported_names(tree, "tests"), *names_put_together(tree)]
        assert not [name for name in names if name.split(".")[0] == "benchmarks"], module


# What only those may name who measure a defence, or are declared to know the truth.
HIDDEN = {
    "Truth",
    "truth",
    "poison",
    "original_labels",
    "poison_indicator",
    "load_case",
    "Case",
    "attack",
    "utils.classifier.metrics",
    "truth.npz",
}
MEASURING = (
    "defense.harness.case",
    "defense.harness.evidence",
    "defense.harness.knowledge",
    "defense.harness.report",
    "defense.harness.run",
    "defense.oracle_remove",
    "defense.oracle_relabel",
)


def names_and_words(tree):
    """Every name and string of Python code but its docstrings."""
    for node in ast.walk(tree):
        yield from (getattr(node, key, None) for key in ("id", "attr", "arg", "name", "module"))
        yield node.value if isinstance(node, ast.Constant) else None


def test_a_defence_has_no_way_to_the_truth():
    trees = modules_of(ROOT, "defense")
    checked = [module for module in trees if module not in MEASURING]
    assert {"defense.dataelixir", "defense.elixir.rounds", "defense.own_data.given"} <= set(checked)
    for module in checked:
        words = {word for word in names_and_words(trees[module]) if isinstance(word, str)}
        assert not words & HIDDEN, module


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
    scripts = [str(ROOT / name.replace(".", "/")) + ".py" for name in sorted(commands())]
    assert len(scripts) > 20
    command = [sys.executable, "-c", HELP, *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage: ") == len(scripts)
