"""Detectors and fine-tuning against a backdoor that a real, tiny victim has learned: what is found, and what the model that follows reads."""

from dataclasses import dataclass

import pytest
import torch

from defense.harness.case import save_case
from defense.harness.defense import Defense, find_defense
from defense.harness.defense_run import DefenseRun
from defense.harness.result import Result
from tests.toys import CLASSES, INFO, SIDE, flat_images
from utils.classifier.metrics import Truth
from utils.classifier.networks import Classifier
from utils.classifier.training import predict
from utils.images.data import Dataset, LabeledImages, TriggeredImages
from utils.storage import record as record_module
from utils.storage.record import Record

KEYS = {
    "model": "preactresnet_small",
    "epochs": 8,
    "batch_size": 25,
    "lr": 0.05,
    "device": "cpu",
    "amp": False,
    "random_seed": 1,
}
PER_CLASS, POISON, RED = 100, 46, torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)


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
        return flagged[self.truth.poison].double().mean(), flagged[
            ~self.truth.poison
        ].double().mean()

    def reads(self, model):
        """(accuracy on clean images, triggered images read as the target, triggered images read as what they are)."""
        read = predict(model, self.triggered.images)
        return tuple(
            round(right.double().mean().item(), 3)
            for right in (
                predict(model, self.dataset.test.images) == self.dataset.test.labels,
                read == 0,
                read == self.triggered.original_labels,
            )
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """46 of 500 images with the trigger and label 0, in a folder of records of their own."""
    patch = pytest.MonkeyPatch()
    patch.setattr(record_module, "RECORDS", tmp_path_factory.mktemp("records"))
    labels, test_labels = torch.arange(CLASSES).repeat(PER_CLASS), torch.arange(CLASSES).repeat(20)
    dataset = Dataset(noisy(labels, 1), noisy(test_labels, 2), tuple("abcde"), "toy", INFO)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    poison = torch.zeros(len(labels), dtype=torch.bool)
    poison[order[labels[order] != 0][:POISON]] = True
    images = torch.where(
        poison[:, None, None, None], with_red_corner(dataset.train.images), dataset.train.images
    )
    data, index = (
        LabeledImages(images, torch.where(poison, 0, labels)),
        (test_labels != 0).nonzero().flatten(),
    )
    triggered = TriggeredImages(
        with_red_corner(dataset.test.images[index]),
        torch.zeros_like(index),
        test_labels[index],
        index,
    )
    run = DefenseRun(Defense(**KEYS), dataset, Record("victim"), torch.device("cpu"))
    victim = run.train("victim", data)
    yield World(
        dataset, data, Truth(labels, poison, torch.zeros_like(poison), [0]), triggered, victim
    )
    patch.undo()


def test_the_victim_has_the_backdoor_and_a_smaller_set_alone_does_not_take_it_away(world):
    """So that what detectors reach below is owed to what they found."""
    clean, asr, right = world.reads(world.victim)
    assert clean > 0.95
    assert asr > 0.95
    assert right < 0.05
    clean, asr, _ = world.reads(world.defend("random_remove", remove_count=POISON * 2).model)
    assert clean > 0.95
    assert asr > 0.9


@pytest.mark.parametrize(
    ("name", "keys", "false_alarms"),
    [
        ("spectral", {}, 0.45),
        ("activation_clustering", {}, 0.1),
        ("scan", {"clean_share": 0.2}, 0.01),
        ("strip", {"clean_share": 0.2, "overlays": 20}, 0.2),
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


def test_fine_tuning_on_clean_images_takes_the_backdoor_away(world):
    before = {key: value.clone() for key, value in world.victim.state_dict().items()}
    clean, asr, right = world.reads(
        world.defend("ft", clean_share=0.2, lr=0.1, batch_size=16, epochs=12).model
    )
    assert clean > 0.95
    assert asr < 0.2
    assert right > 0.8
    assert all(torch.equal(before[key], value) for key, value in world.victim.state_dict().items())
