"""Configuration: who wins over whom, what is refused and in which words, and what every key
promises."""

import dataclasses
import errno
import importlib
import itertools
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from attack.badnet import BadNet
from attack.poisoning.config import PoisonConfig, RunConfig
from attack.poisoning.trigger import Trigger
from defense.elixir.config import DataElixirConfig, PurifyConfig
from defense.harness.config import AgainConfig
from diffusion.config import DenoiserConfig
from utils import config as module
from utils.config import (
    DataConfig,
    TrainConfig,
    UserError,
    as_flat_dict,
    command_line,
    parse_config,
    passed_over,
    peek,
    resolve_path,
)
from utils.old_keys import Alias, OldKeys, RemovedKey

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(
    path
    for path in (ROOT / "config").glob("*/*.yaml")
    if path.parent.name not in ("purify", "variants")
)
VARIANTS = sorted((ROOT / "config/variants").glob("*.yaml"))
ATTACKS = sorted(p.stem for p in (ROOT / "attack").glob("*.py") if "\n    main(" in p.read_text())
PUBLISHED = """\
amp: true
device: cuda
attack_label_trans: all2one
attack_target: 0
client_optimizer: sgd
dataset: cifar10
dataset_path: ../data
frequency_save: 0
batch_size: 128
lr: 0.01
lr_scheduler: CosineAnnealingLR
model: preactresnet18
pratio: 0.1
random_seed: 2022
sgd_momentum: 0.9
wd: 0.0005
attack: badnet
patch_mask_path: ../resource/badnet/mask.npy
epochs: 100
purify_batch_size: 1024
steps_T: 150
rounds_n: 5
last_steps_m: 10
threshold_tau: 5
ft_lr: 0.002
"""


def trigger_class(name):
    """The Trigger that attack/<name>.py defines."""
    content = vars(importlib.import_module(f"attack.{name}")).values()
    return next(
        v for v in content if isinstance(v, type) and issubclass(v, Trigger) and v.name == name
    )


def classes_of(attack="badnet"):
    return RunConfig, DataConfig, PoisonConfig, DataElixirConfig, trigger_class(attack)


def parse(*argv, classes=None):
    """All keys of a run as one dictionary."""
    return as_flat_dict(*parse_config(list(map(str, argv)), *(classes or classes_of())))


@pytest.fixture
def yaml_file(tmp_path):
    def write(text, name="given.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_flags_win_over_yaml_and_yaml_over_defaults_in_any_order(yaml_file):
    path = yaml_file("epochs: 7\nlr: 0.5\n")
    for words in itertools.permutations([("--yaml_path", path), ("--epochs", "3"), ("--wd=0.25",)]):
        values = parse(*itertools.chain(*words))
        assert (values["epochs"], values["lr"], values["wd"], values["batch_size"]) == (
            3,
            0.5,
            0.25,
            TrainConfig.batch_size,
        )
    assert parse("--epochs", 3, f"--yaml_path={path}")["epochs"] == 3
    other = yaml_file("lr: 0.25\n", "other.yaml")
    assert [
        parse("--epochs", 3, "--yaml_path", path, "--yaml_path", other)[key]
        for key in ("epochs", "lr")
    ] == [3, 0.25]


def test_of_several_files_the_later_wins_in_the_parser_and_where_it_is_peeked_at(yaml_file):
    first = yaml_file("defense: one\nlr: 0.5\nepochs: 7\nattack_target: [1, 2]\n", "1.yaml")
    second = yaml_file("defense: two\nlr: 0.25\nattack_target: [3, 0]\n", "2.yaml")
    for words in (["--yaml_path", first, f"--yaml_path={second}"], ["--yaml_path", second]):
        values = parse(*words, "--wd", 0.25)
        assert (values["lr"], values["wd"], values["attack_target"]) == (0.25, 0.25, [3, 0])
        assert values["defense"] == peek(words, "defense", "none") == "two"
    words = ["--yaml_path", second, "--yaml_path", first]
    assert parse(*words)["lr"] == 0.5
    assert peek(words, "defense", "none") == "one"
    assert peek([*words, "--defense", "three"], "defense", "none") == "three"
    assert peek(["--yaml_path", first, "--yaml_path", yaml_file("")], "defense", "") == "one"


def test_every_file_of_several_is_checked_and_read_in_the_keys_of_its_day(yaml_file):
    good, bad = yaml_file("lr: 0.5\n"), yaml_file("lrr: 0.5\n", "bad.yaml")
    for files in ((good, bad), (bad, good)):
        with pytest.raises(UserError, match=r"bad\.yaml: unknown key 'lrr'"):
            parse(*itertools.chain(*(("--yaml_path", file) for file in files)))
    fast, slow = yaml_file("fast: true\n", "fast.yaml"), yaml_file("speed: low\n", "slow.yaml")
    for files, speed in (((fast, slow), "low"), ((slow, fast), "high")):
        words = itertools.chain(*(("--yaml_path", file) for file in files))
        assert parse(*words, classes=[NewConfig])["speed"] == speed
    gone = yaml_file("turbo: true\n", "gone.yaml")
    with pytest.raises(UserError, match="turbo: this key is gone"):
        parse("--yaml_path", gone, "--yaml_path", fast, classes=[NewConfig])


def test_keys_for_other_defences_are_kept_from_all_files(yaml_file):
    class Other(TrainConfig):
        PASSED_OVER: ClassVar[frozenset[str]] = frozenset({"steps_T", "rounds_n"})

    first = yaml_file("steps_T: 3\nrounds_n: 2\nlr: 0.5\n", "1.yaml")
    second = yaml_file("steps_T: 4\n", "2.yaml")
    words = ["--yaml_path", first, "--yaml_path", second]
    assert passed_over(words, Other) == {"steps_T": 4, "rounds_n": 2}
    assert passed_over(words[:2], Other) == {"steps_T": 3, "rounds_n": 2}
    assert passed_over([], Other) == {}


def test_replaced_defaults_lose_to_yaml(yaml_file):
    old = {"epochs": 9, "lr": 0.125, "of_another_program": 1}
    [config] = parse_config(["--yaml_path", yaml_file("lr: 0.5\n")], TrainConfig, defaults=old)
    assert (config.epochs, config.lr, config.wd) == (9, 0.5, TrainConfig.wd)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--epochz", "3"], "epochs"),
        (["--epoch", "3"], "epochs"),
        (["--threshold_tua=4"], "threshold_tau"),
        (["--yaml_pat", "x"], "yaml_path"),
    ],
)
def test_unknown_flags_are_refused_with_the_nearest_one(words, meant):
    with pytest.raises(UserError, match=f"{words[0].partition('=')[0]}.*Did you mean '{meant}'"):
        parse(*words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", "unknown key 'epoch'. Did you mean 'epochs'"),
        ("lr: 0.1\nsteps_t: 9", "unknown key 'steps_t'. Did you mean 'steps_T'"),
        ("yaml_path: other.yaml", "unknown key 'yaml_path'"),
        ("help: true", "unknown key 'help'"),
        ("3: 4", "unknown key '3'"),
        ("- lr", "found a list"),
        ("lr: [", "cannot be read as YAML"),
        ("lr: 1\n\tepochs: 2", "cannot be read as YAML"),
    ],
)
def test_unsuitable_yaml_is_refused_with_the_file_named(yaml_file, text, words):
    path = yaml_file(text)
    with pytest.raises(UserError, match=re.escape(path) + ".*" + re.escape(words)):
        parse("--yaml_path", path)


def test_an_empty_yaml_file_says_nothing(yaml_file):
    assert parse("--yaml_path", yaml_file("# nothing\n")) == parse()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pratio", 1.5),
        ("pratio", -0.1),
        ("pratio", ".nan"),
        ("epochs", 0),
        ("epochs", 2.5),
        ("epochs", "null"),
        ("batch_size", -1),
        ("lr", 0),
        ("lr", ".nan"),
        ("lr", "fast"),
        ("sgd_momentum", 1.1),
        ("wd", -1),
        ("attack_target", -1),
        ("attack_target", "[1, -1]"),
        ("attack_target", "middle"),
        ("source_class", -1),
        ("attack_label_trans", "all2none"),
        ("amp", "maybe"),
        ("steps_T", 0),
        ("threshold_tau", 0),
        ("test_fraction", 1),
        ("client_optimizer", "lion"),
        ("device", "null"),
        ("dataset", "null"),
        ("random_seed", -1),
        ("rounds_n", True),
    ],
)
def test_values_out_of_range_are_refused_in_yaml_with_the_key_named(yaml_file, key, value):
    with pytest.raises(UserError, match=key):
        parse("--yaml_path", yaml_file(f"{key}: {value}\n"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("pratio", 1.5), ("epochs", 0), ("lr", "nan"), ("preset", "mine"), ("amp", "2")],
)
def test_values_out_of_range_are_refused_as_flags(key, value):
    with pytest.raises(UserError, match=key):
        parse(f"--{key}", value)


def test_a_value_of_none_of_a_keys_kinds_is_told_with_the_kinds():
    words = "attack_target: middle is none of NonNegativeInt, .*'smallest', 'median', 'largest'$"
    with pytest.raises(UserError, match=words):
        parse("--attack_target", "middle")
    with pytest.raises(UserError, match="^ft_epochs: soon is none of PositiveInt, null$"):
        parse("--ft_epochs", "soon")


def test_a_target_is_a_number_several_or_a_rank(yaml_file):
    for value in (3, [3, 10], "median"):
        assert parse(f"--attack_target={value}")["attack_target"] == value
        file = yaml_file(f"attack_target: {value}\n")
        assert parse("--yaml_path", file)["attack_target"] == value
    kept = parse("--attack_target=[3, 10]")["attack_target"]
    assert yaml.safe_load(yaml.safe_dump(kept)) == [3, 10]
    assert {type(each) for each in kept} == {int}


def test_the_ends_of_ranges_are_allowed():
    values = parse(
        "--pratio", 1, "--wd", 0, "--sgd_momentum", 0, "--epochs", 1, "--ft_epochs", "null"
    )
    assert [values[key] for key in ("pratio", "wd", "sgd_momentum", "epochs", "ft_epochs")] == [
        1,
        0,
        0,
        1,
        None,
    ]


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [{0}]",
        "!!python/object/new:os.mkdir [{0}]",
        "!!python/name:os.system ''",
    ],
)
def test_python_in_yaml_is_refused_and_does_not_run(yaml_file, tmp_path, tag):
    path = yaml_file("epochs: " + tag.format(tmp_path / "made"))
    for read in (
        lambda: parse("--yaml_path", path),
        lambda: parse("--yaml_path", path, "--epochs", "3"),
    ):
        with pytest.raises(UserError, match="cannot be read as YAML"):
            read()
    assert peek(["--yaml_path", path], "defense", "fallback") == "fallback"
    assert not (tmp_path / "made").exists()


def test_paths_are_tried_as_given_and_then_relative_to_attack(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SCRIPTS", tmp_path / "attack")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "attack").mkdir()
    (tmp_path / "attack" / "both").touch()
    (tmp_path / "beside").touch()
    assert resolve_path("both", "key") == tmp_path / "attack" / "both"
    assert resolve_path("../beside", "key") == tmp_path / "beside"
    (tmp_path / "both").touch()
    assert (
        resolve_path("both", "key")
        == resolve_path(str(tmp_path / "both"), "key")
        == tmp_path / "both"
    )
    with pytest.raises(UserError, match=f"some_key: .*{tmp_path}/none or {tmp_path}/attack/none"):
        resolve_path("none", "some_key")


def test_the_published_yaml_loads_and_every_key_of_it_is_a_flag(yaml_file):
    values, published = parse("--yaml_path", yaml_file(PUBLISHED)), yaml.safe_load(PUBLISHED)
    assert len(published) == 25
    assert {key: values[key] for key in published} == published
    for key, value in published.items():
        assert parse(f"--{key}", str(value).lower() if value is True else value)[key] == value


def test_our_cifar10_yaml_has_the_published_keys_and_values():
    published, ours = (
        yaml.safe_load(PUBLISHED),
        yaml.safe_load((ROOT / "config/badnet/cifar10.yaml").read_text()),
    )
    assert ours == published | {"patch_mask_path": "color4x4"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_belongs_to_its_attack(path):
    values, written = (
        parse("--yaml_path", path, classes=classes_of(path.parent.name)),
        yaml.safe_load(path.read_text()),
    )
    assert written
    assert {key: values[key] for key in written} == written
    assert values["attack"] in ("", path.parent.name)


@pytest.mark.parametrize("dataset", ["digits", "gtsrb_small", "cifar10_small"])
@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_every_variant_is_laid_over_the_configs_of_its_attack(path, dataset):
    text = path.read_text()
    own = yaml.safe_load(text)
    attack = own["attack"]
    under = ROOT / "config" / attack / f"{dataset}.yaml"
    values = parse("--yaml_path", under, "--yaml_path", path, classes=classes_of(attack))
    expected = yaml.safe_load(under.read_text()) | own
    assert {key: values[key] for key in expected} == expected
    assert re.match(r"# [A-Z].*\.\n\w", text)
    assert own != {"attack": attack}


def test_help_explains_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for key in ["yaml_path", *parse()]:
        entry = re.search(
            rf" --{key} (?:[A-Z_0-9]+(?:, --{key}\+ [A-Z_0-9]+)?|\{{\S+\}}) (.*?)(?= --\w+ (?:[A-Z_]|\{{)|$)",
            text.split("options:")[1],
        )
        assert entry, key
        assert len(entry[1]) > 25, key
        assert key == "yaml_path" or "default: " in entry[1], key


def test_print_config_is_a_config_that_gives_the_same(capsys, yaml_file):
    words = [
        "--epochs",
        3,
        "--ddpm",
        "some/folder",
        "--ft_epochs",
        4,
        "--amp",
        "false",
        "--lr",
        1e-5,
    ]
    with pytest.raises(SystemExit) as stopped:
        parse(*words, "--print_config")
    assert stopped.value.code == 0
    assert parse("--yaml_path", yaml_file(capsys.readouterr().out)) == parse(*words)


def test_values_are_plain_and_configs_frozen():
    configs = parse_config(["--epochs", "3", "--lr", "1", "--pratio", "1"], *classes_of())
    assert {type(value) for value in as_flat_dict(*configs).values()} <= {
        int,
        float,
        str,
        bool,
        type(None),
    }
    for config in configs:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, 1)


@pytest.mark.parametrize(
    "cls",
    [
        DataConfig,
        TrainConfig,
        PoisonConfig,
        RunConfig,
        AgainConfig,
        PurifyConfig,
        DataElixirConfig,
        DenoiserConfig,
        *map(trigger_class, ATTACKS),
    ],
)
def test_every_key_is_documented_and_nothing_else(cls):
    own = {f.name for f in dataclasses.fields(cls) if f.init} & set(vars(cls)["__annotations__"])
    documented = set(re.findall(r"^ {8}(\w+): \S", cls.__doc__.partition("Args:")[2], re.MULTILINE))
    assert own == documented
    assert BadNet.name in ATTACKS


def test_peek_agrees_with_the_parser(yaml_file):
    path = yaml_file("defense: from_yaml\n")
    for words in (
        [],
        ["--defense", "a"],
        ["--defense=a", "--yaml_path", path],
        ["--yaml_path", path],
        [f"--yaml_path={path}", "--defense", "a"],
    ):
        assert peek(words, "defense", RunConfig.defense) == parse(*words)["defense"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("lr: too high"), 2, "error: lr: too high"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y.npz"),
            2,
            "/x/y.npz: No space left",
        ),
        (KeyboardInterrupt(), 130, "same command goes on"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(capsys, error, code, words):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stopped:
        command_line(fail)()
    told = capsys.readouterr().err.strip()
    assert stopped.value.code == code
    assert words in told
    assert "Traceback" not in told
    assert len(told.splitlines()) == 1


def test_a_bug_is_not_dressed_up_as_the_users_mistake():
    with pytest.raises(ZeroDivisionError):
        command_line(lambda: 1 / 0)()


@dataclasses.dataclass(frozen=True)
class NewConfig(TrainConfig):
    """A config that has changed: `fast` stands for `speed`, `turbo` and `boost` are gone."""

    ALIASES: ClassVar[dict[str, Any]] = {"fast": Alias("speed", {True: "high", False: "low"})}
    REMOVED_KEYS: ClassVar[dict[str, Any]] = {
        "turbo": RemovedKey("use speed: high", [False]),
        "boost": RemovedKey("leave it out"),
    }

    LATER_KEYS: ClassVar[dict[str, Any]] = {"gear": "first"}

    speed: str = "medium"
    gear: str = "first"


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("turbo", "true", "use speed: high"),
        ("boost", "3", "leave it out"),
        ("steplr_gamma", "0.1", "use lr_scheduler: CosineAnnealingLR or constant"),
    ],
)
def test_a_removed_key_is_answered_with_what_to_use_instead(yaml_file, key, value, advice):
    file = yaml_file(f"{key}: {value}\n")
    for words in (["--yaml_path", file], [f"--{key}", value], [f"--{key}={value}"]):
        with pytest.raises(UserError, match=f"^{key}: this key is gone; {advice}$"):
            parse(*words, classes=[NewConfig])


def test_a_record_may_have_removed_keys_whose_values_change_nothing():
    old = {"turbo": False, "boost": 3, "steplr_stepsize": 50, "epochs": 7}
    [config] = parse_config([], NewConfig, defaults=old)
    assert config == NewConfig(epochs=7)
    with pytest.raises(UserError, match="turbo: this key is gone; use speed: high"):
        parse_config([], NewConfig, defaults={"turbo": True})
    with pytest.raises(UserError, match="lr_scheduler.*CosineAnnealingLR.*constant.*StepLR"):
        parse_config([], NewConfig, defaults={"lr_scheduler": "StepLR"})


@pytest.mark.parametrize(
    ("words", "speed"),
    [
        ([], "high"),
        (["--fast"], "high"),
        (["--fast", "--epochs", "3"], "high"),
        (["--fast=false"], "low"),
        (["--fast", "false"], "low"),
        (["--fast", "--speed", "high"], "high"),
        (["--speed", "medium"], "medium"),
    ],
)
def test_an_alias_stands_for_its_key(yaml_file, words, speed):
    file = yaml_file("fast: true\n")
    assert parse("--yaml_path", file, *words, classes=[NewConfig])["speed"] == speed
    [config] = parse_config(words, NewConfig, defaults={"fast": True, "speed": "high"})
    assert config.speed == speed


def test_a_record_from_before_a_key_did_what_was_done_then():
    old_keys = OldKeys(NewConfig)
    assert old_keys.in_file({"epochs": 7}, of_record=True) == {"epochs": 7, "gear": "first"}
    assert old_keys.in_file({"gear": "second"}, of_record=True) == {"gear": "second"}
    assert old_keys.in_file({"epochs": 7}) == {"epochs": 7}


def test_an_alias_that_contradicts_its_key_is_refused(yaml_file):
    file = yaml_file("fast: false\nspeed: high\n")
    for words in (["--yaml_path", file], ["--fast=false", "--speed", "high"]):
        with pytest.raises(UserError, match="fast, speed: fast false stands for speed low"):
            parse(*words, classes=[NewConfig])
    with pytest.raises(UserError, match="fast: 3 is none of true, false"):
        parse("--fast", 3, classes=[NewConfig])
