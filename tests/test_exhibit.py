"""What is shown of the cause of a toy whose trigger is a white corner, and who says so."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from defense.elixir.exhibit import SHOWN, _drawn
from tests.cleaning import CONFIG, POISONED, TRUTH, purify
from tests.toys import CORNER, toy_dataset


@pytest.fixture
def seen(toy, tmp_path):
    """The exhibit as the record holds it, classes.json, and the result."""
    folder = tmp_path / "run"
    cleaned = purify.clean(POISONED.images, POISONED.labels, config=CONFIG, folder=folder)
    kept = {key: torch.from_numpy(value) for key, value in np.load(folder / "cause.npz").items()}
    return kept, json.loads((folder / "classes.json").read_text()), cleaned


def test_groups_and_votes_are_those_of_the_accused_class(seen):
    kept, _, _ = seen
    own = (POISONED.labels == 0).nonzero().flatten()
    assert kept["labels"].tolist() == [0]
    assert torch.equal(kept["index"], own)
    carriers = kept["group"] == 2
    assert carriers.any()
    assert TRUTH.poison[own][carriers].all()
    assert (kept["group"][~TRUTH.poison[own]] == 0).all()
    assert torch.equal(kept["moved"] > 0.5, TRUTH.poison[own])
    assert kept["view"].isfinite().all()


def test_the_mean_residual_of_the_carriers_is_the_trigger(seen):
    kept, _, _ = seen
    clean, carriers = kept["means"][0]
    corner = torch.zeros(carriers.shape[1:], dtype=torch.bool)
    corner[-CORNER:, -CORNER:] = True
    assert carriers[:, corner].min() > 50
    assert carriers[:, ~corner].abs().max() < 5
    assert clean.abs().max() < carriers[:, corner].min()
    assert kept["obeyed"][0, 1] > 0.9 > kept["obeyed"][0, 0]


def test_pasted_images_are_of_other_classes_and_read_before_and_after(seen):
    kept, _, _ = seen
    assert len(kept["carriers"]) == SHOWN
    assert TRUTH.poison[kept["carriers"]].all()
    assert (POISONED.labels[kept["onto"]] != 0).all()
    image, single, mean = kept["pasted"].unbind(1)
    assert torch.equal(image, POISONED.images[kept["onto"]])
    assert torch.equal(single, (image.int() + kept["residuals"]).clamp(0, 255).to(torch.uint8))
    added = image + kept["means"][0, 1]
    assert torch.equal(mean, added.clamp(0, 255).round().to(torch.uint8))
    assert torch.equal(kept["read"][:, 0], POISONED.labels[kept["onto"]])
    assert (kept["read"][:, 2] == 0).all()
    assert (kept["read"][:, 1] == 0).sum() > SHOWN / 2  # single carriers may leave little behind


def test_it_is_keyed(seen):
    kept, _, cleaned = seen
    again = purify.clean(POISONED.images, POISONED.labels, config=CONFIG).result.exhibit
    for key, value in kept.items():
        assert torch.equal(value, getattr(again, key)), key
    assert cleaned.target_labels == (0,)


def test_classes_json_says_which_measure_accuses(seen):
    _, classes, _ = seen
    assert classes["by_pattern"] == [True, False, False, False, False]
    assert classes["pattern"][0] > classes["pattern_limit"]
    assert classes["undecided"] == [1, 2, 3, 4]
    assert classes["pattern"][1:] == [None] * 4


def test_a_set_without_an_accusation_keeps_none(toy, tmp_path):
    clean = toy_dataset(per_class=20).train
    cleaned = purify.clean(clean.images, clean.labels, config=CONFIG, folder=tmp_path / "run")
    assert cleaned.result.exhibit is None
    assert not (tmp_path / "run" / "cause.npz").exists()
    assert not cleaned.left_out.any()
    assert np.isfinite(cleaned.decisions["paste_rate"]).all()
    assert np.isnan(cleaned.decisions["carrier"]).all()
    assert set(cleaned.decisions["kept"]) == {1}


def test_where_one_class_obeys_the_images_shown_are_its_own():
    labels = POISONED.labels
    paster = SimpleNamespace(bank=torch.arange(len(labels)), seed=0)
    purified = SimpleNamespace(rounds=SimpleNamespace(paster=paster), data=POISONED)
    group, rates = torch.full_like(labels, 2), torch.linspace(0, 1, len(labels))
    carriers, onto = _drawn(purified, labels, group, rates, [3, -1, 0, -1, -1])
    for k, source in enumerate([3, None, 0, None, None]):
        shown = labels[onto[labels[carriers] == k]]
        usable = labels != k if source is None else labels == source
        assert len(shown) == min(SHOWN, int(usable.sum()))
        assert (shown != k).all() if source is None else (shown == source).all()
