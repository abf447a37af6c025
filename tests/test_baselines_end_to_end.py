"""Detectors against a backdoor that a trained victim has: what they find, what the next model
reads.

Only the last layer of the toy is trained, so the training has one end, which no processor changes
much.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from defense.harness.case import save_case
from defense.harness.defense import Defense, find_defense
from defense.harness.defense_run import DefenseRun
from defense.harness.result import Result
from tests.toys import CLASSES, INFO, LEVELS, SIDE, flat_images
from utils.classifier import models
from utils.classifier.metrics import Truth
from utils.classifier.networks import Classifier
from utils.classifier.training import predict
from utils.images.data import Dataset, LabeledImages, TriggeredImages
from utils.storage import record as record_module
from utils.storage.record import Record

KEYS = {"epochs": 12, "batch_size": 25, "lr": 2.0, "wd": 0.0, "device": "cpu", "amp": False}
PER_CLASS, POISON, RED = 100, 46, torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)


class Histogram(nn.Module):
    """Shares of pixels with about the grey level of each class, and how red an image is."""

    width = CLASSES + 1

    def forward(self, x):
        x = x * 0.25 + 0.5
        grey, red = x.mean(1).flatten(1), (x[:, 0] - x[:, 1:].mean(1)).flatten(1)
        near = (-(((grey[..., None] - LEVELS / 255) / 0.08) ** 2)).exp()
        near = near * (red < 0.5)[..., None]
        return torch.cat([near.mean(1), 8 * red.clamp(min=0).mean(1, keepdim=True)], dim=1)


def build(name, classes, info, seed):
    model = Classifier(Histogram(), Histogram.width, classes, info)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model


def noisy(labels, seed):
    """Grey images with the level of their class, and noise."""
    noise = torch.randint(
        -24, 25, (len(labels), 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)
    )
    return LabeledImages((flat_images(labels).int() + noise).clamp(0, 255).byte(), labels)


def with_red_corner(images):
    """The trigger: a colour where all is grey, large enough to outlast random crops."""
    images = images.clone()
    images[..., -SIDE // 2 :, -SIDE // 2 :] = RED
    return images


@dataclass(frozen=True)
class World:
    """A poisoned set, its truth, and the victim that was trained on it."""

    dataset: Dataset
    data: LabeledImages
    truth: Truth
    triggered: TriggeredImages
    victim: Classifier

    def defend(self, name, **keys) -> Result:
        save_case(record := Record(name), self.data, self.truth, self.triggered)
        defense = find_defense(name)(**KEYS | keys)
        run = DefenseRun(defense, self.dataset, record, torch.device("cpu"))
        return defense.defend(self.data, self.victim, run)

    def rates(self, flagged):
        """(TPR, FPR)."""
        poison = self.truth.poison
        return flagged[poison].double().mean(), flagged[~poison].double().mean()

    def reads(self, model):
        """Shares of clean images read right, of triggered ones read as the target, as they are."""
        test, read = self.dataset.test, predict(model, self.triggered.images)
        right = (predict(model, test.images) == test.labels, read == 0)
        right += (read == self.triggered.original_labels,)
        return [share.double().mean() for share in right]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """46 of 500 images with the trigger and label 0, in a folder of records of their own."""
    patch = pytest.MonkeyPatch()
    patch.setattr(record_module, "RECORDS", tmp_path_factory.mktemp("records"))
    patch.setattr(models, "build_classifier", build)
    labels, test_labels = torch.arange(CLASSES).repeat(PER_CLASS), torch.arange(CLASSES).repeat(20)
    dataset = Dataset(noisy(labels, 1), noisy(test_labels, 2), tuple("abcde"), "toy", INFO)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    poison = torch.zeros(len(labels), dtype=torch.bool)
    poison[order[labels[order] != 0][:POISON]] = True
    clean, index = dataset.train.images, (test_labels != 0).nonzero().flatten()
    images = torch.where(poison[:, None, None, None], with_red_corner(clean), clean)
    data = LabeledImages(images, torch.where(poison, 0, labels))
    triggered = TriggeredImages(
        with_red_corner(dataset.test.images[index]),
        torch.zeros_like(index),
        test_labels[index],
        index,
    )
    truth = Truth(labels, poison, torch.zeros_like(poison), [0])
    run = DefenseRun(Defense(**KEYS), dataset, Record("victim"), torch.device("cpu"))
    yield World(dataset, data, truth, triggered, run.train("victim", data))
    patch.undo()


def test_the_victim_has_the_backdoor_and_a_smaller_set_alone_does_not_take_it_away(world):
    """So that what detectors reach below is owed to what they found."""
    for model in (world.victim, world.defend("random_remove", remove_count=POISON).model):
        clean, asr, right = world.reads(model)
        assert clean > 0.95
        assert asr > 0.95
        assert right < 0.05


@pytest.mark.parametrize(
    ("name", "keys", "false_alarms"),
    [
        ("spectral", {}, 0.45),
        ("activation_clustering", {}, 0.1),
        ("scan", {"clean_share": 0.2}, 0.01),
    ],
)
def test_a_detector_hits_the_poison_and_the_model_that_follows_reads_triggered_images_right(
    world, name, keys, false_alarms
):
    """False alarms of spectral signatures are their budget: 69 of each class, or half of it."""
    result = world.defend(name, **keys)
    (tpr, fpr), (clean, asr, right) = world.rates(result.flagged), world.reads(result.model)
    assert tpr > 0.9
    assert fpr < false_alarms
    assert torch.equal(result.keep, ~result.flagged)
    assert clean > 0.95
    assert asr < 0.1
    assert right > 0.9


def test_spectre_removes_poison_and_little_else_within_what_it_credits_a_small_class_with(world):
    """14 of 146 samples can be poison, it says, and removes 21 of the 46."""
    result = world.defend("spectre")
    tpr, fpr = world.rates(result.flagged)
    assert result.targets == (0,)
    assert result.flagged.sum() == 21
    assert tpr > 0.9 * 21 / POISON
    assert fpr < 0.01
