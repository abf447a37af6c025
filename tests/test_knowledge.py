"""What defences are told: each declares what it takes, and nobody else has a way to the truth."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

from defense.harness import knowledge
from defense.harness.case import save_case
from defense.harness.defense import NO_DEFENSE, find_defense
from defense.harness.knowledge import (
    CLEAN_IMAGES,
    DENOISER,
    POISON_RATE,
    TRUTH,
    clean_images,
    oracle_truth,
    poison_rate,
)
from tests.toys import poisoned_toy, toy_dataset
from utils.config import UserError
from utils.storage import record as record_module
from utils.storage.record import Record

FILES = sorted(Path(knowledge.__file__).parent.parent.rglob("*.py"))
DEFENSES = sorted(
    file.stem for file in FILES if file.parent.name == "defense" and file.stem not in NO_DEFENSE
)
MEASURING = {"case", "evidence", "knowledge", "report", "run"}
ASKING = {
    "oracle_truth": TRUTH,
    "poison_rate": POISON_RATE,
    "clean_images": CLEAN_IMAGES,
    "open_denoiser": DENOISER,
}
DATASET = toy_dataset()
POISONED, TRUE, TRIGGERED = poisoned_toy(DATASET)


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "RECORDS", tmp_path)


def names_in(file):
    """Every name that a file uses."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        getattr(node, key)
        for node in ast.walk(tree)
        for key in ("id", "attr", "arg", "name", "module")
        if isinstance(getattr(node, key, None), str)
    }


@pytest.mark.parametrize("name", DEFENSES)
def test_a_defence_declares_exactly_what_it_asks_for(name):
    defense, file = find_defense(name), Path(inspect.getfile(find_defense(name)))
    asked = {word for function, word in ASKING.items() if function in names_in(file)}
    assert asked == set(defense.KNOWLEDGE)
    assert [word.split(" (0")[0] for word in defense().knowledge] == list(defense.KNOWLEDGE)


def test_only_oracles_can_reach_the_truth():
    """Beside the files of the harness that keep it and measure with it."""
    oracles = {name for name in DEFENSES if TRUTH in find_defense(name).KNOWLEDGE}
    assert oracles == {"oracle_remove", "oracle_relabel"}
    hidden = {"oracle_truth", "Truth", "load_case", "Case", "utils.classifier.metrics"}
    hidden |= {f"defense.harness.{name}" for name in MEASURING - {"knowledge"}}
    for file in FILES:
        if not (file.parent.name == "harness" and file.stem in MEASURING | {"__init__"}):
            found = names_in(file) & hidden
            allowed = oracles if found == {"oracle_truth"} else {"cleaning", "purify", "command"}
            assert not found or file.stem in allowed, (file.name, found)


def test_the_truth_is_that_of_the_record_or_of_the_record_above():
    save_case(Record("attacked"), POISONED, TRUE, TRIGGERED)
    for name in ("attacked", "attacked/defense/again"):
        told = oracle_truth(Record(name))
        assert torch.equal(told.poison, TRUE.poison)
        assert torch.equal(told.original_labels, TRUE.original_labels)
        assert poison_rate(Record(name)) == pytest.approx(TRUE.poison.double().mean().item())
    with pytest.raises(UserError, match="holds no truth.npz"):
        oracle_truth(Record("elsewhere"))


@pytest.mark.parametrize(("share", "each"), [(0.05, 1), (0.25, 3), (0.5, 6)])
def test_clean_images_are_a_share_of_every_class_of_the_clean_training_set(share, each):
    clean = clean_images(DATASET, share, seed=1)
    assert clean.labels.bincount().tolist() == [each] * 5
    pool = {
        (label, image.numpy().tobytes())
        for label, image in zip(DATASET.train.labels.tolist(), DATASET.train.images)
    }
    assert {
        (label, image.numpy().tobytes())
        for label, image in zip(clean.labels.tolist(), clean.images)
    } <= pool
    assert torch.equal(clean.images, clean_images(DATASET, share, seed=1).images)


def test_another_seed_draws_other_clean_images():
    marked = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    dataset = type(DATASET)(
        type(POISONED)(marked, DATASET.train.labels),
        DATASET.test,
        DATASET.classes,
        "marked",
        DATASET.info,
    )
    first, second = (
        set(clean_images(dataset, 0.5, seed).images[:, 0, 0, 0].tolist()) for seed in (1, 2)
    )
    assert first != second
    assert len(first) == 30
