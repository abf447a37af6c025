"""Controls, repairs and what all baseline defences share, on toys whose truth is known."""

from dataclasses import fields
from typing import ClassVar

import pytest
import torch
from torch import nn

from attack.badnet import BadNet
from attack.poisoning.config import PoisonConfig, RunConfig
from defense.elixir import purification, purifier
from defense.elixir.purifier import Purifier
from defense.harness.case import save_case
from defense.harness.defense import Defense, find_defense
from defense.harness.defense_run import DefenseRun
from defense.harness.findings import Findings
from tests.test_knowledge import DEFENSES
from tests.toys import (
    CLASSES,
    CORNER,
    INFO,
    FlatDenoiser,
    PatchReader,
    poisoned_toy,
    random_images,
    toy_dataset,
)
from utils.classifier import models, training
from utils.classifier.networks import Classifier
from utils.config import ROOT, DataConfig, TrainConfig, UserError, parse_config
from utils.images.data import LabeledImages
from utils.storage import record as record_module
from utils.storage.record import Record

KEYS = {
    "model": "preactresnet_small",
    "epochs": 2,
    "batch_size": 16,
    "device": "cpu",
    "amp": False,
    "random_seed": 1,
}
PURIFY = {"steps_T": 20, "rounds_n": 2, "last_steps_m": 4, "purify_batch_size": 13}
DATASET = toy_dataset()
POISONED, TRUTH, TRIGGERED = poisoned_toy(DATASET)
N, POISON = len(POISONED), int(TRUTH.poison.sum())
BASELINES = [name for name in DEFENSES if name != "dataelixir"]


class SpyTrainer:
    """Takes the place of training: notes what was asked for, leaves the model as it is."""

    seen: ClassVar[list] = []

    def __init__(self, model, config, stage, flip, checkpoint=None, together=True, augment=None):
        self.model, self.config, self.stage = model, config, stage

    def fit(self, data, observer=None):
        SpyTrainer.seen.append((self.stage, self.config, data, self.model))
        return self.model.eval()


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "RECORDS", tmp_path)
    monkeypatch.setattr(
        purifier, "open_denoiser", lambda config, resolution, dataset: FlatDenoiser()
    )
    SpyTrainer.seen = []


@pytest.fixture
def spy(monkeypatch):
    monkeypatch.setattr("utils.classifier.models.Trainer", SpyTrainer)


def config_of(name, **changes):
    kind, keys = find_defense(name), KEYS | PURIFY | {"unlearn_epochs": 1}
    known = {f.name for f in fields(kind)}
    return kind(**{key: value for key, value in keys.items() if key in known} | changes)


def victim():
    return PatchReader().eval()


def run(name, victim=victim, folder="toy", data=POISONED, **changes):
    """The result of a defence on the toy, whose truth lies in the record."""
    save_case(Record(folder), POISONED, TRUTH, TRIGGERED)
    defense = config_of(name, **changes)
    return defense.defend(data, victim(), run_of(defense, folder))


def run_of(defense, folder="toy", observer=None):
    return DefenseRun(defense, DATASET, Record(folder), torch.device("cpu"), observer)


def pooled_net(name="", classes=CLASSES, info=INFO, seed=(0,)):
    """A network that sees four means of an image: quick, and trained by its last layer alone."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return Classifier(body, 12, classes, info)


def small_net():
    """A network as it was made."""
    return models.build_classifier(KEYS["model"], CLASSES, INFO, (0, "small")).eval()


def trained():
    """{stage: (config, data, model)} that was asked of the spy."""
    return {stage: words for stage, *words in SpyTrainer.seen}


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


# every baseline


@pytest.mark.parametrize("name", BASELINES)
def test_every_defence_has_one_shape_and_takes_the_shipped_config(name):
    defense = find_defense(name)
    yaml_path = str(ROOT / "config" / "badnet" / "digits.yaml")
    *_, config, _ = parse_config(
        ["--yaml_path", yaml_path], RunConfig, DataConfig, PoisonConfig, defense, BadNet
    )
    assert (config.epochs, config.lr, config.batch_size) == (25, 0.05, 64)
    assert config.clean_up(Record("empty")) is None


def test_keys_of_others_are_passed_over_in_a_file_and_nowhere_else(tmp_path):
    (tmp_path / "a.yaml").write_text("steps_T: 7\nepochs: 3\n")
    (tmp_path / "b.yaml").write_text("steps_T: 7\n")
    (tmp_path / "c.yaml").write_text("stepsT: 7\n")
    assert parse_config(["--yaml_path", str(tmp_path / "a.yaml")], Defense)[0].epochs == 3
    assert parse_config(["--yaml_path", str(tmp_path / "b.yaml")], Defense)[0] == Defense()
    for words, classes in (
        (["--yaml_path", str(tmp_path / "c.yaml")], [Defense]),
        (["--steps_T", "7"], [Defense]),
        (["--yaml_path", str(tmp_path / "b.yaml")], [TrainConfig]),
    ):
        with pytest.raises(UserError, match="steps"):
            parse_config(words, *classes)


def test_the_recipe_is_the_victims_and_a_model_is_made_once(spy):
    recipe = run_of(Defense(**KEYS))
    start = small_net()
    first, second = recipe.train("benign", POISONED), recipe.train("benign", POISONED)
    assert [(stage, config) for stage, config, *_ in SpyTrainer.seen] == [("benign", recipe.config)]
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values())
    )
    tuned = recipe.train("tuned", POISONED, start, lr=0.5, epochs=9)
    assert tuned is not start
    assert (
        trained()["tuned"][0].lr,
        trained()["tuned"][0].epochs,
        recipe.config.epochs,
    ) == (0.5, 9, 2)
    with pytest.raises(UserError, match="1 training samples are left"):
        recipe.train("more", POISONED[:1])


def falling(epochs):
    """An observer that keeps each epoch's weights in {stage: [...]}.

    It says that the test set was read best after the first.
    """

    def observe(epoch):
        epochs.setdefault(epoch.stage, []).append(
            {key: value.clone() for key, value in epoch.model.state_dict().items()}
        )
        return {"C-Acc": 1 / epoch.number, "ASR": 1 - 1 / epoch.number}

    return observe


def weights_are(model, kept):
    return all(torch.equal(kept[key], value) for key, value in model.state_dict().items())


def test_the_last_epoch_is_the_model():
    """Ports keep the epoch with the best accuracy on the test set."""
    epochs = {}
    model = run_of(Defense(**KEYS), observer=falling(epochs)).train("benign", POISONED)
    assert [weights_are(model, kept) for kept in epochs["benign"]] == [False, True]


def test_features_are_pooled_not_augmented_and_in_the_sets_order():
    """Ports take them un-pooled, shuffled, or augmented; here 150 images are three batches."""
    data, net = (
        LabeledImages(random_images(150, 3, 8, 8), torch.zeros(150, dtype=torch.int64)),
        small_net(),
    )
    state = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        expected = torch.cat([net.features(image[None] / 255) for image in data.images]).double()
    found = DefenseRun.features(net, data)
    assert found.shape == (150, 128)
    assert found.dtype == "float64"
    assert torch.from_numpy(found).allclose(expected, rtol=1e-3, atol=1e-4)
    assert not torch.from_numpy(found).allclose(expected.roll(1, 0), rtol=1e-3, atol=1e-4)
    assert weights_are(net, state)


def test_flagged_samples_are_dropped_and_the_rest_is_trained_on(spy):
    recipe = run_of(Defense(**KEYS))
    result = recipe.drop_and_retrain(Findings(TRUTH.poison), POISONED, victim())
    assert same(trained()["benign"][1], POISONED[~TRUTH.poison])
    assert torch.equal(result.keep, ~TRUTH.poison)
    nobody, reader = torch.zeros(N, dtype=torch.bool), victim()
    assert recipe.drop_and_retrain(Findings(nobody), POISONED, reader).model is reader
    assert len(SpyTrainer.seen) == 1


# controls


def test_none_is_the_victim_on_the_set_as_it_came(spy):
    result = run("none")
    assert isinstance(result.model, PatchReader)
    assert same(result.purified, POISONED)
    assert result.flagged is None
    assert not SpyTrainer.seen


def test_oracles_do_what_the_truth_says(spy):
    removed = run("oracle_remove", folder="a")
    assert torch.equal(removed.flagged, TRUTH.poison)
    assert same(trained()["benign"][1], POISONED[~TRUTH.poison])
    relabelled = run("oracle_relabel", folder="b")
    assert torch.equal(relabelled.purified.labels, TRUTH.original_labels)
    assert torch.equal(relabelled.purified.images, POISONED.images)
    assert same(trained()["benign"][1], relabelled.purified)


@pytest.mark.parametrize(
    ("keys", "count"),
    [({}, 6), ({"remove_share": 0.25}, 15), ({"remove_count": 7}, 7), ({"remove_count": 0}, 0)],
)
def test_random_removal_counts(spy, keys, count):
    assert int(run("random_remove", **keys).flagged.sum()) == count


def test_random_removal_is_random_by_its_seed_and_not_by_order(spy):
    drawn = [
        run("random_remove", folder=f"r{i}", remove_count=20, random_seed=seed).flagged
        for i, seed in enumerate((1, 1, 2))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not drawn[0][:20].all()
    with pytest.raises(UserError, match="remove_count: 61, but there are 60"):
        run("random_remove", remove_count=61)


def test_training_longer_spends_what_dataelixir_spends(spy):
    result = run("train_longer", ft_lr=0.003, ft_epochs=5)
    (first, set1, _), (second, set2, _) = trained()["benign_stage1"], trained()["benign"]
    assert (first.epochs, first.lr, second.epochs, second.lr) == (2, KEYS.get("lr", 0.01), 5, 0.003)
    assert same(set1, POISONED)
    assert same(set2, POISONED)
    assert result.stage1 is not result.model
    assert result.flagged is None


def test_training_longer_has_as_many_epochs_as_dataelixir_at_the_same_rates(monkeypatch):
    monkeypatch.setattr(
        purification, "open_denoiser", lambda config, resolution, dataset: FlatDenoiser()
    )
    monkeypatch.setattr(models, "build_classifier", pooled_net)
    seen = {}
    for name in ("dataelixir", "train_longer"):
        epochs = seen[name] = []
        observer = lambda epoch, epochs=epochs: epochs.append((epoch.number, epoch.lr)) or {}
        defense = config_of(name, ft_epochs=3, ft_lr=0.004)
        defense.defend(POISONED, victim(), run_of(defense, name, observer))
    assert seen["train_longer"] == seen["dataelixir"]
    assert len(seen["dataelixir"]) > 0


# purification alone and repair


def test_purification_alone_cleans_images_and_leaves_labels(spy):
    result = run("purify_only")
    assert torch.equal(result.purified.labels, POISONED.labels)
    assert (result.purified.images[TRUTH.poison][..., -CORNER:, -CORNER:] < 230).all()
    assert result.unet_passes == N * 2 * 20
    assert result.flagged is None
    assert same(trained()["benign"][1], result.purified)
    config_of("purify_only").clean_up(Record("toy"))
    assert not (Record("toy") / "purify").exists()


def test_purification_alone_is_the_last_state_of_dataelixirs(spy):
    config = config_of("purify_only")
    states = Purifier(FlatDenoiser(), config, 1, torch.device("cpu")).intermediaries(
        POISONED.images, torch.arange(N)
    )
    assert torch.equal(run("purify_only").purified.images, states[:, -1])


def test_an_interrupted_purification_goes_on(spy, monkeypatch):
    whole, calls, original = run("purify_only", folder="whole"), [], training.predict

    def stopped(*words):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*words)

    monkeypatch.setattr(training, "predict", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("purify_only", folder="parts")
    assert same(run("purify_only", folder="parts").purified, whole.purified)
    assert len(calls) == 3 + 3


def test_fine_tuning_sees_clean_images_and_starts_from_the_victim(spy):
    start = small_net()
    before = {key: value.clone() for key, value in start.state_dict().items()}
    result = run("ft", victim=lambda: start, clean_share=0.25)
    config, data, model = trained()["benign"]
    pool = {
        (label, image.numpy().tobytes())
        for label, image in zip(DATASET.train.labels.tolist(), DATASET.train.images)
    }
    assert len(data) == 15
    assert {
        (label, image.numpy().tobytes()) for label, image in zip(data.labels.tolist(), data.images)
    } <= pool
    assert model is result.model is not start
    assert all(torch.equal(before[key], value) for key, value in start.state_dict().items())
    assert result.purified is None
    assert config.lr == Defense(**KEYS).lr
