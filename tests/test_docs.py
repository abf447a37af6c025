"""README.md and docs/: commands parse, links lead somewhere, the reference of keys is current."""

import argparse
import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from docs import generate_config
from utils.storage import record as record_module

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETS_UP = {"pip install uv"}  # what no program of this project reads
TESTS = "pytest -n 2 --dist loadfile"  # is running
MADE_BY = {  # what a benchmark left, which shows that its command was run
    "attacks": "attacks_gtsrb_small.md",
    "compare": "digits_badnet.md",
    "denoisers": "denoisers.md",
    "false_alarm": "false_alarm_digits.md",
    "kills": "kills.md",
    "levers": "levers_digits.md",
    "part": "levers_gtsrb_part.md",
    "processes": "processes.md",
    "purify": "purify.md",
    "seeds": "badnet_digits.md",
    "soak": "soak_digits.md",
    "training": "training.md",
}


def commands(text):
    """The commands of a page's `sh` fences, without comments, launchers and environment."""
    for block in re.findall(r"(?ms)^```sh\n(.*?)^```", text):
        for line in block.splitlines():
            for part in " ".join(shlex.split(line, comments=True)).split(" && "):
                bare = re.sub(
                    r"^((\w+=\S+|uv run|torchrun --nproc_per_node \d+|python) )+", "", part
                )
                if bare:
                    yield bare


def all_commands():
    """Every command of every page once, with the page that prints it first."""
    first = {}
    for page in PAGES:
        for command in commands(page.read_text(encoding="utf-8")):
            first.setdefault(command, page.name)
    return [pytest.param(command, id=f"{page}: {command[:60]}") for command, page in first.items()]


class Understood(Exception):
    """A command line was read to its end."""


def understood(command, monkeypatch):
    """Whether the program of a command knows its words; raises SystemExit where it complains.

    The programs read their command lines themselves and then print the configuration, or are ended.
    """
    script, *words = command.split()
    if script.startswith("benchmarks/"):
        return not unknown_flags(ROOT / script, words)
    read = argparse.ArgumentParser.parse_args

    def read_and_end(parser, *given, **options):
        read(parser, *given, **options)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read_and_end)
    own_flags = script.startswith(("attack/", "defense/", "diffusion/"))
    monkeypatch.setattr(sys, "argv", [script, *words, *(["--print_config"] if own_flags else [])])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Understood:
        return True
    except SystemExit as end:
        return not end.code
    return False


def unknown_flags(script, words):
    """The flags before `--` that a benchmark's source does not name."""
    given = {word for word in words[: [*words, "--"].index("--")] if word.startswith("--")}
    return given - flags_of(script)


def flags_of(script):
    """The flags that a benchmark's source names."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return {word for word in words if isinstance(word, str) and word.startswith("--")}


@pytest.fixture
def records(tmp_path, monkeypatch):
    """A place for records, with the one that the pages name; it holds no key."""
    monkeypatch.setattr(record_module, "RECORDS", tmp_path)
    (tmp_path / "badnet").mkdir()
    (tmp_path / "badnet" / "config.yaml").write_text("{}\n")


@pytest.mark.parametrize("command", all_commands())
def test_every_command_is_understood_by_its_program(command, records, monkeypatch, capsys):
    if command in SETS_UP or command == TESTS:
        return
    name = re.match(r"benchmarks/(\w+)\.py", command)
    if name:
        assert (ROOT / "benchmarks" / "results" / MADE_BY[name[1]]).is_file()
    assert understood(command, monkeypatch), capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "attack/badnet.py --pratoi 0.1",
        "attack/badnet.py --pratio ten",
        "attack/badnet.py --yaml_path ../config/badnet/nothing.yaml",
        "attack/badnet.py --defense nothing",
        "defense/spectral.py --result_file badnet --overlays 3",
        "defense/dataelixir.py --result_file nothing",
        "defense/purify.py --data DIR --out OUT --dpm DENOISER",
        "diffusion/train.py --data DIR --out OUT --channel 8",
        "utils/storage/record.py check",
        "benchmarks/kills.py --record 5",
    ],
)
def test_a_wrong_command_is_not(command, records, monkeypatch):
    assert not understood(command, monkeypatch)


def test_the_test_command_is_the_one_that_ci_reads():
    text = PAGES[0].read_text(encoding="utf-8")
    after = text.split("<!-- test command -->")[1]
    assert re.search(r"^uv run (.*)$", after, re.MULTILINE)[1] == TESTS
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def prose(page):
    """A page without its fences."""
    return re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))


def anchors(page):
    """What a link's #part may be: the page's headings as a browser of Markdown names them."""
    headings = re.findall(r"(?m)^#+ (.*)$", prose(page))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """(text, target) of every link that leads to a file or a heading of this repository."""
    pairs = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", prose(page))
    return [(text, target) for text, target in pairs if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    lost = []
    for text, target in links(page):
        file, _, part = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        named = re.fullmatch(r"`(\w+)`", text)
        if not there.exists() or (part and part not in anchors(there)):
            lost.append(target)
        elif named and there.suffix == ".py" and not defines(there, named[1]):
            lost.append(f"{target} defines no {named[1]}")
    assert links(page)
    assert lost == []


def defines(file, name):
    """Whether a Python file defines a class or function of that name."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return name in {getattr(node, "name", None) for node in ast.walk(tree)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    rooms = "attack|benchmarks|config|defense|diffusion|docs|tests|utils"
    named = re.findall(rf"`((?:{rooms})/[\w./]+)`", prose(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 250


def test_every_page_is_reached_from_the_readme():
    reached = {target.partition("#")[0] for _, target in links(PAGES[0])}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= reached


def test_the_reference_of_keys_is_current():
    page = generate_config.PAGE.read_text(encoding="utf-8")
    assert page == generate_config.page(), "run: python docs/generate_config.py"


def test_every_flag_that_a_page_names_exists():
    kinds = generate_config.config_classes()
    known = {f"--{key.name}" for kind in kinds for key in generate_config.keys(kind)}
    known |= set().union(*map(flags_of, (ROOT / "benchmarks").glob("*.py")))
    for page in PAGES:
        flags = set(re.findall(r"`(--\w+)", prose(page)))
        assert flags - known - {"--yaml_path", "--help", "--print_config"} == set(), page.name
