"""DataElixir end to end on a toy whose truth is known, and what must not depend on that truth.

What the default decides by cause is in test_by_cause.py.
"""

import csv
import json
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from defense.dataelixir import DataElixir
from defense.elixir import purification, rounds
from defense.elixir.purifier import requantised
from defense.elixir.verdict import Verdict
from defense.harness.case import Case
from defense.harness.defense_run import DefenseRun
from defense.harness.run import run_defense
from diffusion.sampler import Sampler
from tests.toys import CORNER, FlatDenoiser, PatchReader, body_level, poisoned_toy, toy_dataset
from utils.classifier import models
from utils.classifier.metrics import Truth
from utils.images.data import LabeledImages
from utils.storage import record as record_module
from utils.storage.record import Record

CONFIG = DataElixir(
    model="preactresnet_small",
    epochs=1,
    batch_size=16,
    ft_lr=0.001,
    steps_T=20,
    rounds_n=4,
    last_steps_m=4,
    purify_batch_size=13,
    threshold_tau=4,
    device="cpu",
    amp=False,
    random_seed=1,
)
PUBLISHED = replace(CONFIG, preset="published")
DATASET = toy_dataset()
POISONED, TRUTH, TRIGGERED = poisoned_toy(DATASET)


class PartialDenoiser(FlatDenoiser):
    """Removes the corner of class 2 at once, of class 1 in round 2, of class 3 in round 4, and never that of class 4."""

    def __init__(self):
        super().__init__()
        self.round = 0

    def forward(self, x, t):
        self.round += int(t[0]) == CONFIG.steps_T - 1
        noise = super().forward(x, t)
        clean = (x - (1 - self.ab(t)) ** 0.5 * noise) / self.ab(t) ** 0.5
        lasts = (
            torch.tensor([0, 1, 0, 3, 99])[self.classes(x, t)]
            >= (self.round - 1) % CONFIG.rounds_n + 1
        )
        bright = x[..., -CORNER:, -CORNER:].mean(dim=(1, 2, 3)) / self.ab(t) ** 0.5 > 0.9
        clean[..., -CORNER:, -CORNER:] = torch.where(
            (lasts & bright).view(-1, 1, 1, 1), 1.0, clean[..., -CORNER:, -CORNER:]
        )
        return (x - self.ab(t) ** 0.5 * clean) / (1 - self.ab(t)) ** 0.5

    def ab(self, t):
        return Sampler(None).schedule.alpha_bar(int(t[0]))

    def classes(self, x, t):
        levels = PatchReader().levels * 2 - 1
        return (body_level(x)[:, None] / self.ab(t) ** 0.5 - levels).abs().argmin(1)


class Reader(PatchReader):
    """A benign model: never looks at the corner."""

    def forward(self, x):
        return -(body_level(x)[:, None] - self.levels).abs()


class SpyTrainer:
    """Takes the place of training: notes what was asked for, leaves the model as it is."""

    seen: ClassVar = []

    def __init__(self, model, config, stage, flip, checkpoint=None, together=True, augment=None):
        self.model, self.config, self.stage = model, config, stage

    def fit(self, data, observer=None):
        SpyTrainer.seen.append((self.stage, self.config.lr, self.config.epochs, data))
        return self.model


@pytest.fixture(autouse=True)
def toy_world(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "RECORDS", tmp_path)
    # The toys count how often they are called.
    monkeypatch.setattr(purification, "warn_if_noise", lambda *_: None)
    use_denoiser(monkeypatch, FlatDenoiser())


def use_denoiser(monkeypatch, denoiser):
    monkeypatch.setattr(purification, "open_denoiser", lambda *_: denoiser)


def run(config=CONFIG, data=POISONED, name="run", victim=None):
    work = DefenseRun(config, DATASET, Record(name), torch.device("cpu"))
    return config.defend(data, (victim or PatchReader()).eval(), work)


def spied(monkeypatch, config=CONFIG, denoiser=None):
    """The result with the partial denoiser, and the training sets that were asked for, by stage."""
    use_denoiser(monkeypatch, denoiser or PartialDenoiser())
    monkeypatch.setattr("utils.classifier.models.Trainer", SpyTrainer)
    monkeypatch.setattr(
        "utils.classifier.models.build_classifier", lambda name, classes, info, seed: Reader()
    )
    SpyTrainer.seen = []
    result = run(replace(config, purify_batch_size=1000))
    return result, {stage: (lr, epochs, data) for stage, lr, epochs, data in SpyTrainer.seen}


def rows(data):
    """The set as a sorted list of (label, pixels)."""
    return sorted(
        (label, image.numpy().tobytes()) for label, image in zip(data.labels.tolist(), data.images)
    )


@pytest.mark.parametrize("config", [CONFIG, PUBLISHED])
def test_a_sample_that_leaves_its_label_is_more_suspicious_where_that_is_a_target_label(
    monkeypatch, config
):
    """By cause, suspicion in accused classes is the probability that a sample carries a trigger."""
    result, _ = spied(monkeypatch, config)
    left = (result.votes[:, 1:] != POISONED.labels[:, None]).double().mean(1)
    is_target = result.discrepancy.is_target[POISONED.labels]
    assert is_target.any()
    assert left[is_target].any()
    assert not is_target.all()
    expected = left * (0.5 + 0.5 * is_target)
    if config is CONFIG:
        carrier = result.decisions.cause.carrier
        assert torch.equal(carrier.isfinite(), is_target)
        expected = torch.where(is_target, carrier, expected)
    torch.testing.assert_close(result.score, expected)
    flipped = replace(
        POISONED,
        labels=(POISONED.labels + (torch.arange(len(POISONED)) == int((~is_target).nonzero()[0])))
        % 5,
    )  # a wrong label
    odd = run(config, data=flipped, name="flipped").score[
        ~is_target & (flipped.labels != POISONED.labels)
    ]
    assert len(odd) == 1
    assert odd.item() == 0.5


def test_published_finds_relabels_and_cleans_poison_and_touches_nothing_else():
    result = run(PUBLISHED)
    changed, benign = result.purified.labels != POISONED.labels, ~TRUTH.poison
    assert result.discrepancy.targets == (0,)
    assert torch.equal(changed, TRUTH.poison)
    assert torch.equal(result.purified.labels, TRUTH.original_labels)
    assert torch.equal(result.purified.images[benign], requantised(POISONED.images[benign]))
    assert (result.purified.images[~benign, :, -CORNER:, -CORNER:] < 230).all()
    assert torch.equal(result.decisions.verdict == Verdict.POISONED, TRUTH.poison)
    assert torch.equal(result.votes[:, 0], POISONED.labels)
    assert (result.votes[:, 1:] == TRUTH.original_labels[:, None]).all()
    assert result.unet_passes == len(POISONED) * 4 * 20
    assert result.keep is None
    assert result.decisions.cause is None
    assert result.discrepancy.paste is None
    assert not result.model.training
    assert result.stage1 is not result.model


def test_another_target_is_found_too():
    data, truth, _ = poisoned_toy(DATASET, target=3)
    result = run(PUBLISHED, data=data, victim=PatchReader(3))
    assert result.discrepancy.targets == (3,)
    assert torch.equal(result.purified.labels, truth.original_labels)


class TwoPatchReader(PatchReader):
    """Reads a white corner as class 0 and a black one as class 3."""

    def forward(self, x):
        logits = super().forward(x)
        logits[:, 3] += 9.0 * (x[:, :, -CORNER:, -CORNER:].mean(dim=(1, 2, 3)) < 0.05)
        return logits


def test_two_backdoors_with_two_targets_are_both_found():
    data, truth, _ = poisoned_toy(DATASET)
    again = (truth.original_labels != 3) & ~truth.poison & (torch.arange(len(data)) % 3 == 1)
    images, labels = data.images.clone(), torch.where(again, 3, data.labels)
    images[again, :, -CORNER:, -CORNER:] = 0
    result = run(PUBLISHED, LabeledImages(images, labels), victim=TwoPatchReader())
    assert result.discrepancy.targets == (0, 3)
    assert torch.equal(result.purified.labels, truth.original_labels)
    assert torch.equal(result.decisions.verdict == Verdict.POISONED, truth.poison | again)
    assert again.sum() > 5
    assert (result.purified.images[again][..., -CORNER:, -CORNER:] > 20).all()
    assert (result.purified.images[truth.poison][..., -CORNER:, -CORNER:] < 230).all()


def test_without_a_backdoor_the_set_stays_and_the_victim_is_the_model():
    victim = PatchReader()
    result = run(data=DATASET.train, victim=victim)
    assert result.discrepancy.targets == ()
    assert result.model is victim
    assert result.stage1 is None
    assert torch.equal(result.purified.images, DATASET.train.images)
    assert torch.equal(result.purified.labels, DATASET.train.labels)
    assert (result.decisions.verdict == Verdict.BENIGN).all()
    assert (Record("run") / "benign.safetensors").exists()


def test_published_each_kind_of_poison_goes_its_way(monkeypatch):
    """Class 1: consensus; 2: transition; 3: suspicious without consensus; 4: the trigger survives."""
    result, stages = spied(monkeypatch, replace(PUBLISHED, ft_epochs=7))
    assert result.discrepancy.targets == (0,)
    of = lambda k: TRUTH.poison & (TRUTH.original_labels == k)
    expected = {
        1: Verdict.SUSPICIOUS,
        2: Verdict.POISONED,
        3: Verdict.SUSPICIOUS,
        4: Verdict.BENIGN,
    }
    assert all(
        (result.decisions.verdict[of(k)] == verdict).all() for k, verdict in expected.items()
    )
    assert (result.decisions.verdict[~TRUTH.poison] == Verdict.BENIGN).all()
    assert torch.equal(result.purified.labels, torch.where(of(4), 0, TRUTH.original_labels))
    settled, consensus = ~(of(1) | of(3)), ~of(3)
    lr, epochs, stage1 = stages["benign_stage1"]
    assert (lr, epochs) == (CONFIG.lr, CONFIG.epochs)
    assert rows(stage1) == rows(result.purified[settled])
    lr, epochs, stage2 = stages["benign"]
    assert (lr, epochs) == (CONFIG.ft_lr, 7)
    assert rows(stage2) == rows(result.purified[consensus])


def test_published_requantises_every_image_that_stays(monkeypatch):
    result, _ = spied(monkeypatch, PUBLISHED)
    stays = result.decisions.column == 0
    assert torch.equal(result.purified.images[stays], requantised(POISONED.images[stays]))
    assert stays.sum() > 40
    assert not torch.equal(result.purified.images[stays], POISONED.images[stays])


def test_published_trains_even_where_no_target_is_found(monkeypatch):
    monkeypatch.setattr("utils.classifier.models.Trainer", SpyTrainer)
    SpyTrainer.seen = []
    result = run(PUBLISHED, DATASET.train)
    assert result.discrepancy.targets == ()
    assert [(stage, len(data)) for stage, *_, data in SpyTrainer.seen] == [
        ("benign_stage1", 60),
        ("benign", 60),
    ]
    assert torch.equal(result.purified.labels, DATASET.train.labels)


def test_fine_tuning_starts_from_the_first_model_and_leaves_it_alone():
    result = run()
    first, second = result.stage1.state_dict(), result.model.state_dict()
    assert any(not torch.equal(first[key], second[key]) for key in first)
    distance = sum(
        float((first[key].float() - second[key].float()).norm()) for key in first if "conv" in key
    )
    size = sum(float(first[key].norm()) for key in first if "conv" in key)
    assert distance < 0.05 * size  # a small step at ft_lr, no fresh start


def interrupt(monkeypatch, module, name, number):
    """Raise in the `number`th call of module.name; returns the list of calls."""
    calls, original = [], getattr(module, name)

    def wrapped(*words, **keys):
        calls.append(words)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*words, **keys)

    monkeypatch.setattr(module, name, wrapped)
    return calls


@pytest.mark.parametrize("config", [CONFIG, PUBLISHED])
@pytest.mark.parametrize(
    ("name", "number", "blocks_left"),
    [
        ("predict", 3, 3),
        ("target_labels", 1, 0),
        ("save_classifier", 1, 0),
        ("save_classifier", 2, 0),
    ],
)
def test_an_interrupted_defence_goes_on_to_the_same_result(
    monkeypatch, name, number, blocks_left, config
):
    module = {"save_classifier": models, "predict": rounds, "target_labels": purification}[name]
    whole = run(config, name="whole")
    with monkeypatch.context() as patched:
        interrupt(patched, module, name, number)
        with pytest.raises(KeyboardInterrupt):
            run(config, name="parts")
    purified = interrupt(monkeypatch, rounds.Rounds, "__call__", 0)
    parts = run(config, name="parts")
    assert len(purified) == blocks_left
    for key in ("images", "labels"):
        assert torch.equal(getattr(parts.purified, key), getattr(whole.purified, key))
    assert all(
        torch.equal(a, b)
        for a, b in zip(parts.model.state_dict().values(), whole.model.state_dict().values())
    )


def case(truth):
    return Case("toy", POISONED, truth, TRIGGERED, DATASET, PatchReader().eval())


@pytest.mark.parametrize("config", [CONFIG, PUBLISHED])
def test_the_truth_changes_the_report_and_nothing_else(tmp_path, monkeypatch, config):
    false = Truth(
        TRUTH.original_labels.flip(0), ~TRUTH.poison, TRUTH.poison.roll(1) & TRUTH.poison, [4]
    )
    for name, truth in (("true", TRUTH), ("false", false)):
        use_denoiser(monkeypatch, FlatDenoiser())
        run_defense(config, case(truth), Record(name))
    for file in ("purified.npz", "votes.npz"):
        true, other = (np.load(tmp_path / name / file) for name in ("true", "false"))
        assert true.files == other.files
        assert all(np.array_equal(true[key], other[key]) for key in true.files)
    for file in ("decisions.csv", "benign.safetensors"):
        assert (tmp_path / "true" / file).read_bytes() == (tmp_path / "false" / file).read_bytes()
    reports = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("true", "false")
    ]
    assert reports[0]["target_labels"] == {"detected": [0], "true": [0]}
    if config is CONFIG:  # its labels are those of a model that was trained for one epoch here
        assert reports[0]["detection"] != reports[1]["detection"]
        return
    assert [report["detection"]["tpr"] for report in reports] == [1, 0]
    assert reports[0]["detection"]["fpr"] == 0
    assert reports[0]["relabel"] == {"accuracy_on_poison": 1, "label_accuracy": 1, "collateral": 0}
    assert reports[0]["rounds"][-1] == {"clean_prediction_survives": 1, "poison_reads_target": 0}
    with open(tmp_path / "true" / "decisions.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["new_label"] for row in table] == [
        str(label) for label in TRUTH.original_labels.tolist()
    ]
