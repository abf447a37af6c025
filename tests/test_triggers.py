"""Laws that every attack keeps, whatever its trigger is.

Attacks are found by their files: a new one is tested by being there. One that must be fitted has in
its own test file a `planted(context)`: ready with weights that nobody trained.
"""

import importlib
import importlib.util
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from attack.poisoning.config import PoisonConfig, RunConfig
from attack.poisoning.labels import label_map
from attack.poisoning.poison import (
    Role,
    choose_cover,
    choose_poison,
    poison_training_set,
    trigger_test_set,
)
from attack.poisoning.trigger import FitContext, Trigger
from defense.dataelixir import DataElixir as Config
from utils.config import DataConfig, TrainConfig, UserError, parse_config
from utils.images.data import load_dataset
from utils.storage.record import load_arrays, save_arrays

ROOT = Path(__file__).resolve().parent.parent
TARGET = 3
RECIPE = TrainConfig(
    model="preactresnet_small", epochs=3, batch_size=64, lr=0.05, device="cpu", amp=False
)


def found_attacks():
    modules = [
        importlib.import_module(f"attack.{file.stem}")
        for file in sorted((ROOT / "attack").glob("*.py"))
    ]
    own = lambda value, module: (
        isinstance(value, type)
        and issubclass(value, Trigger)
        and value.__module__ == module.__name__
    )
    return [
        value
        for module in modules
        for value in vars(module).values()
        if own(value, module) and value is not Trigger
    ]


ATTACKS = found_attacks()
every_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
dirty_attacks = pytest.mark.parametrize(
    "attack", [a for a in ATTACKS if a.label_mode == "dirty"], ids=lambda attack: attack.name
)


@lru_cache
def digits():
    return load_dataset(DataConfig("digits"))


@lru_cache
def ready(attack, seed=2):
    context, tests = FitContext(digits(), TARGET, seed, RECIPE), f"tests.test_{attack.name}"
    own = importlib.import_module(tests) if importlib.util.find_spec(tests) else None
    return own.planted(context) if hasattr(own, "planted") else attack().prepare(context)


def poison_config(attack, **keys):
    rate = (
        {"pratio": 0.5, "rate_of": "target_class"}
        if attack.label_mode == "clean"
        else {"pratio": 0.1}
    )
    return PoisonConfig(**{"attack_target": TARGET} | rate | keys)


@lru_cache
def poisoned(attack, seed=2, **keys):
    config = poison_config(attack, **keys)
    labels_to = label_map(attack, config, 10)
    return poison_training_set(digits().train, ready(attack), labels_to, config, seed)


def ways(trigger):
    """Every way in which a trigger can be applied."""
    both = [lambda x, i, split=split: trigger.apply(x, i, split) for split in ("train", "test")]
    return both + [trigger.apply_cover] * (trigger.cross_ratio > 0)


def test_attacks_are_found_and_named_after_their_files():
    assert {"badnet", "blended", "sig", "ftrojan", "wanet", "adaptive_blend", "bpp"} <= {
        attack.name for attack in ATTACKS
    }
    for attack in ATTACKS:
        assert attack.__module__ == f"attack.{attack.name}"
        assert attack.label_mode in ("dirty", "clean")


@every_attack
def test_the_same_bytes_in_any_batch_and_order(attack, monkeypatch):
    trigger, index = ready(attack), torch.arange(300, 320)
    x = digits().train.images[index]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    for way in ways(trigger):
        monkeypatch.setattr("attack.poisoning.trigger.BATCH", 512)
        whole = way(x, index)
        for batch in (1, 7):
            monkeypatch.setattr("attack.poisoning.trigger.BATCH", batch)
            torch.manual_seed(batch)  # what others draw changes nothing
            assert torch.equal(way(x[order], index[order]), whole[order])
        assert torch.equal(way(x[9:12], index[9:12]), whole[9:12])


@every_attack
def test_images_in_and_out_are_uint8_and_the_input_is_left_alone(attack):
    x, index = digits().train.images[:20].clone(), torch.arange(20)
    for way in ways(ready(attack)):
        out = way(x, index)
        assert out.dtype == torch.uint8
        assert out.shape == x.shape
        assert torch.equal(x, digits().train.images[:20])
        assert (out != x).flatten(1).any(1).double().mean() > 0.9
        assert way(x[:0], index[:0]).shape == (0, 3, 32, 32)


@every_attack
def test_state_survives_a_file(attack, tmp_path):
    trigger, x, index = ready(attack), digits().train.images[:20], torch.arange(20)
    save_arrays(tmp_path / "state.npz", **trigger.fitted)
    again = trigger.with_fitted(**load_arrays(tmp_path / "state.npz"))
    for before, after in zip(ways(trigger), ways(again)):
        assert torch.equal(before(x, index), after(x, index))


@every_attack
def test_preparing_again_gives_the_same_bytes_and_leaves_the_keys(attack):
    first, x, index = ready(attack), digits().train.images[:20], torch.arange(20)
    ready.cache_clear()
    torch.manual_seed(99)
    again = ready(attack)
    assert again is not first
    assert again == first
    for before, after in zip(ways(first), ways(again)):
        assert torch.equal(before(x, index), after(x, index))


@every_attack
def test_counts_are_exact_and_all_other_rows_untouched(attack):
    train, found = digits().train, poisoned(attack)
    labels = train.labels
    base = int((labels == TARGET).sum()) if attack.label_mode == "clean" else len(labels)
    poison, cover, clean = (
        (found.roles == role).nonzero().flatten() for role in (Role.POISON, Role.COVER, Role.CLEAN)
    )
    assert len(poison) == round(poison_config(attack).pratio * base) > 0
    assert len(cover) == round(ready(attack).cross_ratio * len(poison))
    assert len(poison) + len(cover) + len(clean) == len(train)
    assert torch.equal(found.data.images[clean], train.images[clean])
    assert torch.equal(found.data.labels[clean], labels[clean])
    assert torch.equal(
        found.data.images[poison], ready(attack).apply(train.images[poison], poison, "train")
    )
    assert torch.equal(
        found.data.images[cover], ready(attack).apply_cover(train.images[cover], cover)
    )
    assert torch.equal(found.original_labels, labels)
    assert torch.equal(found.data.labels[cover], labels[cover])
    assert torch.equal(found.poison_indicator, found.roles == Role.POISON)


@every_attack
def test_labels_become_the_target_or_stay(attack):
    found = poisoned(attack)
    given, original = (
        found.data.labels[found.poison_indicator],
        found.original_labels[found.poison_indicator],
    )
    assert (given == TARGET).all()
    assert (
        (original == TARGET).all() if attack.label_mode == "clean" else (original != TARGET).all()
    )


@every_attack
def test_another_seed_chooses_other_samples(attack):
    config, labels = poison_config(attack), digits().train.labels
    chosen = [
        choose_poison(labels, ready(attack), label_map(attack, config, 10), config, seed).tolist()
        for seed in (2, 2, 3)
    ]
    assert chosen[0] == chosen[1] != chosen[2]


@every_attack
def test_a_pool_that_is_too_small_is_refused_with_the_numbers(attack):
    with pytest.raises(
        UserError,
        match=r"pratio: .* of 1438 images are 1438, but the pool .* holds \d+; lower pratio",
    ):
        poisoned(attack, pratio=1.0, rate_of="all")


@every_attack
def test_the_asr_test_set_has_no_image_of_the_target(attack):
    test, labels_to = digits().test, label_map(attack, poison_config(attack), 10)
    found = trigger_test_set(test, ready(attack), labels_to)
    assert torch.equal(found.index, (test.labels != TARGET).nonzero().flatten())
    assert (found.labels == TARGET).all()
    assert torch.equal(found.original_labels, test.labels[found.index])
    assert torch.equal(
        found.images, ready(attack).apply(test.images[found.index], found.index, "test")
    )


@dirty_attacks
def test_all2all_is_a_bijection_without_fixed_points(attack):
    found, labels_to = (
        poisoned(attack, attack_label_trans="all2all"),
        label_map(attack, poison_config(attack, attack_label_trans="all2all"), 10),
    )
    poison = found.poison_indicator
    assert poison.sum() == 144
    assert torch.equal(found.data.labels[poison], (found.original_labels[poison] + 1) % 10)
    assert torch.equal(labels_to(torch.arange(10)).sort().values, torch.arange(10))
    assert len(trigger_test_set(digits().test, ready(attack), labels_to).labels) == len(
        digits().test
    )


@dirty_attacks
def test_several_targets_and_a_source_class_fit_every_dirty_label_attack(attack):
    config = poison_config(attack, attack_target=[3, 5])
    several = poison_training_set(
        digits().train, ready(attack), label_map(attack, config, 10), config, 2
    )
    given = several.data.labels[several.poison_indicator]
    assert set(given.tolist()) == {3, 5}
    assert (given != several.original_labels[several.poison_indicator]).all()
    config = poison_config(attack, source_class=7, pratio=0.05)
    of_one = poison_training_set(
        digits().train, ready(attack), label_map(attack, config, 10), config, 2
    )
    assert (of_one.original_labels[of_one.poison_indicator] == 7).all()
    cover = int((of_one.roles == Role.COVER).sum())
    assert cover == round(72 * (ready(attack).cross_ratio or 1))


@pytest.mark.parametrize(
    "attack", [a for a in ATTACKS if a.label_mode == "clean"], ids=lambda attack: attack.name
)
def test_all2all_is_refused_for_clean_labels(attack):
    with pytest.raises(
        UserError,
        match=f"all2all changes labels, which the clean-label attack '{attack.name}' never does",
    ):
        poisoned(attack, attack_label_trans="all2all")


@pytest.mark.parametrize(
    "attack", [a for a in ATTACKS if a().cross_ratio > 0], ids=lambda attack: attack.name
)
def test_too_many_cover_samples_are_refused_with_the_numbers(attack):
    roles = torch.full((1438,), Role.CLEAN)
    roles[:1150] = Role.POISON
    words = r"cross_ratio: .* for each of 1150 poisoned are \d+, but only 288 images are left"
    with pytest.raises(UserError, match=words):
        choose_cover(roles, attack(), 2)


@pytest.mark.parametrize("dataset", ["digits", "gtsrb_small", "gtsrb", "cifar10"])
@every_attack
def test_configs_load_and_so_do_the_presets_in_their_comments(attack, dataset):
    """A comment line '# paper: --key value ...' holds flags that can be added to the command."""
    file = ROOT / "config" / attack.name / f"{dataset}.yaml"
    presets = re.findall(r"^# (?:v1|paper)\b[^:\n]*: (--.+)$", file.read_text(), re.MULTILINE)
    for flags in ["", *presets]:
        argv = ["--yaml_path", str(file), *shlex.split(flags)]
        _, data, poison, _, _ = parse_config(
            argv, RunConfig, DataConfig, PoisonConfig, Config, attack
        )
        assert poison.attack == attack.name
        assert dataset.startswith(data.dataset)
