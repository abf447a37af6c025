"""Controls, repairs and what all baseline defences share, on toys whose truth is known; and the report of each."""
import csv
import inspect
import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from attack.badnet import BadNet
from attack.poison import PoisonConfig
from attack.run import RunConfig
from defense import baseline, purify_only
from defense.baseline import BaselineConfig, Findings, Recipe, drop_and_retrain
from defense.run import Case, find_defense, run_defense, save_case
from tests.test_knowledge import DEFENSES
from tests.toys import CORNER, FlatDenoiser, PatchReader, poisoned_toy, toy_dataset
from utils import record as record_module
from utils.config import ROOT, DataConfig, TrainConfig, UserError, parse_config
from utils.metrics import Truth
from utils.record import Record

KEYS = dict(model="preactresnet_small", epochs=2, batch_size=16, device="cpu", amp=False, random_seed=1)
PURIFY = dict(steps_T=20, rounds_n=2, last_steps_m=4, purify_batch_size=13)
DATASET = toy_dataset()
POISONED, TRUTH, TRIGGERED = poisoned_toy(DATASET)
N, POISON = len(POISONED), int(TRUTH.poison.sum())
BASELINES = [name for name in DEFENSES if name != "dataelixir"]
REPORT = {"schema", "attack", "dataset", "defense", "seed", "status", "victim", "benign_stage1", "benign", "der", "detection", "suspicion", "relabel",
          "target_labels", "rounds", "knowledge", "training_epochs", "removed", "cost", "versions"}


class SpyTrainer:
    """Takes the place of training: notes what was asked for, leaves the model as it is."""

    seen = []

    def __init__(self, model, config, stage, flip, checkpoint=None):
        self.model, self.config, self.stage = model, config, stage

    def fit(self, data, observer=None):
        SpyTrainer.seen.append((self.stage, self.config, data, self.model))
        return self.model.eval()


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "RECORDS", tmp_path)
    monkeypatch.setattr(purify_only, "open_denoiser", lambda config, resolution, dataset: FlatDenoiser())
    SpyTrainer.seen = []


@pytest.fixture
def spy(monkeypatch):
    monkeypatch.setattr(baseline, "Trainer", SpyTrainer)


def config_of(name, **changes):
    config = find_defense(name).Config
    known = {f.name for f in fields(config)}
    return config(**{key: value for key, value in (KEYS | PURIFY).items() if key in known} | changes)


def victim():
    return PatchReader().eval()


def run(name, victim=victim, folder="toy", data=POISONED, **changes):
    """The result of a defence on the toy, whose truth lies in the record."""
    save_case(Record(folder), POISONED, TRUTH, TRIGGERED)
    return find_defense(name).defend(data, victim(), config_of(name, **changes), DATASET, Record(folder))


def small_net():
    recipe = Recipe(BaselineConfig(**KEYS), DATASET, torch.device("cpu"), Record("victim"))
    return recipe.train("victim", POISONED)


def trained():
    """{stage: (config, data, model)} that was asked of the spy."""
    return {stage: words for stage, *words in SpyTrainer.seen}


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


# every baseline

@pytest.mark.parametrize("name", BASELINES)
def test_every_defence_has_one_shape_and_takes_the_shipped_config(name):
    module = find_defense(name)
    assert list(inspect.signature(module.defend).parameters) == ["data", "victim", "config", "dataset", "record", "observer"]
    yaml_path = str(ROOT / "config" / "badnet" / "digits.yaml")
    *_, config, _ = parse_config(["--yaml_path", yaml_path], RunConfig, DataConfig, PoisonConfig, module.Config, BadNet)
    assert (config.epochs, config.lr, config.batch_size) == (25, 0.05, 64) and module.clean_up(config, Record("empty")) is None


def test_keys_of_others_are_passed_over_in_a_file_and_nowhere_else(tmp_path):
    (tmp_path / "a.yaml").write_text("steps_T: 7\nepochs: 3\n")
    (tmp_path / "b.yaml").write_text("steps_T: 7\n")
    (tmp_path / "c.yaml").write_text("stepsT: 7\n")
    assert parse_config(["--yaml_path", str(tmp_path / "a.yaml")], BaselineConfig)[0].epochs == 3
    assert parse_config(["--yaml_path", str(tmp_path / "b.yaml")], BaselineConfig)[0] == BaselineConfig()
    for words, classes in ((["--yaml_path", str(tmp_path / "c.yaml")], [BaselineConfig]), (["--steps_T", "7"], [BaselineConfig]),
                           (["--yaml_path", str(tmp_path / "b.yaml")], [TrainConfig])):
        with pytest.raises(UserError, match="steps"):
            parse_config(words, *classes)


def test_the_recipe_is_the_victims_and_a_model_is_made_once(spy):
    recipe = Recipe(BaselineConfig(**KEYS), DATASET, torch.device("cpu"), Record("toy"))
    start = small_net()
    first, second = recipe.train("benign", POISONED), recipe.train("benign", POISONED)
    assert [(stage, config) for stage, config, *_ in SpyTrainer.seen] == [("victim", recipe.config), ("benign", recipe.config)]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    tuned = recipe.train("tuned", POISONED, start, lr=0.5, epochs=9)
    assert tuned is not start and (trained()["tuned"][0].lr, trained()["tuned"][0].epochs, recipe.config.epochs) == (0.5, 9, 2)
    with pytest.raises(UserError, match="1 training samples are left"):
        recipe.train("more", POISONED[:1])


def test_the_last_epoch_is_the_model():
    """Ports keep the epoch with the best accuracy on the test set."""
    epochs = []
    observer = lambda epoch: epochs.append({key: value.clone() for key, value in epoch.model.state_dict().items()}) or {}
    model = Recipe(BaselineConfig(**KEYS), DATASET, torch.device("cpu"), Record("toy"), observer).train("benign", POISONED)
    differs = lambda old: any(not torch.equal(old[key], value) for key, value in model.state_dict().items())
    assert len(epochs) == 2 and differs(epochs[0]) and not differs(epochs[1])


def test_flagged_samples_are_dropped_and_the_rest_is_trained_on(spy):
    recipe = Recipe(BaselineConfig(**KEYS), DATASET, torch.device("cpu"), Record("toy"))
    result = drop_and_retrain(Findings(TRUTH.poison), POISONED, victim(), recipe)
    assert same(trained()["benign"][1], POISONED[~TRUTH.poison]) and torch.equal(result.keep, ~TRUTH.poison)
    nobody, reader = torch.zeros(N, dtype=torch.bool), victim()
    assert drop_and_retrain(Findings(nobody), POISONED, reader, recipe).model is reader and len(SpyTrainer.seen) == 1


# controls

def test_none_is_the_victim_on_the_set_as_it_came(spy):
    result = run("none")
    assert isinstance(result.model, PatchReader) and same(result.purified, POISONED) and result.flagged is None and not SpyTrainer.seen


def test_oracles_do_what_the_truth_says(spy):
    removed = run("oracle_remove", folder="a")
    assert torch.equal(removed.flagged, TRUTH.poison) and same(trained()["benign"][1], POISONED[~TRUTH.poison])
    relabelled = run("oracle_relabel", folder="b")
    assert torch.equal(relabelled.purified.labels, TRUTH.original_labels) and torch.equal(relabelled.purified.images, POISONED.images)
    assert same(trained()["benign"][1], relabelled.purified)


@pytest.mark.parametrize(("keys", "count"), [({}, 6), ({"remove_share": 0.25}, 15), ({"remove_count": 7}, 7), ({"remove_count": 0}, 0)])
def test_random_removal_counts(spy, keys, count):
    assert int(run("random_remove", **keys).flagged.sum()) == count


def test_random_removal_is_random_by_its_seed_and_not_by_order(spy):
    drawn = [run("random_remove", folder=f"r{i}", remove_count=20, random_seed=seed).flagged for i, seed in enumerate((1, 1, 2))]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and not drawn[0][:20].all()
    with pytest.raises(UserError, match="remove_count: 61, but there are 60"):
        run("random_remove", remove_count=61)


def test_training_longer_spends_what_dataelixir_spends(spy):
    result = run("train_longer", ft_lr=0.003, ft_epochs=5)
    (first, set1, _), (second, set2, _) = trained()["benign_stage1"], trained()["benign"]
    assert (first.epochs, first.lr, second.epochs, second.lr) == (2, KEYS.get("lr", 0.01), 5, 0.003) and same(set1, POISONED) and same(set2, POISONED)
    assert result.stage1 is not result.model and result.flagged is None


# purification alone and repair

def test_purification_alone_cleans_images_and_leaves_labels(spy):
    result = run("purify_only")
    assert torch.equal(result.purified.labels, POISONED.labels) and (result.purified.images[TRUTH.poison][..., -CORNER:, -CORNER:] < 230).all()
    assert result.unet_passes == N * 2 * 20 and result.flagged is None and same(trained()["benign"][1], result.purified)
    purify_only.clean_up(None, Record("toy"))
    assert not (Record("toy") / "purify").exists()


def test_purification_alone_is_the_last_state_of_dataelixirs(spy):
    config = config_of("purify_only")
    states = purify_only.Purifier(FlatDenoiser(), config, 1, torch.device("cpu")).intermediaries(POISONED.images, torch.arange(N))
    assert torch.equal(run("purify_only").purified.images, states[:, -1])


def test_an_interrupted_purification_goes_on(spy, monkeypatch):
    whole, calls, original = run("purify_only", folder="whole"), [], purify_only.predict

    def stopped(*words):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*words)

    monkeypatch.setattr(purify_only, "predict", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("purify_only", folder="parts")
    assert same(run("purify_only", folder="parts").purified, whole.purified) and len(calls) == 3 + 3    # two of five blocks were there


def test_fine_tuning_sees_clean_images_and_starts_from_the_victim(spy):
    start = small_net()
    before = {key: value.clone() for key, value in start.state_dict().items()}
    result = run("ft", victim=lambda: start, clean_share=0.25)
    config, data, model = trained()["benign"]
    pool = {(label, image.numpy().tobytes()) for label, image in zip(DATASET.train.labels.tolist(), DATASET.train.images)}
    assert len(data) == 15 and {(label, image.numpy().tobytes()) for label, image in zip(data.labels.tolist(), data.images)} <= pool
    assert model is result.model is not start and all(torch.equal(before[key], value) for key, value in start.state_dict().items())
    assert result.purified is None and config.lr == BaselineConfig(**KEYS).lr


# the report

def report_of(name, truth=TRUTH, folder=None, victim=small_net, **changes):
    folder = folder or f"record-{name}"
    save_case(Record(folder), POISONED, truth, TRIGGERED)
    return run_defense(find_defense(name), Case("toy", POISONED, truth, TRIGGERED, DATASET, victim()), config_of(name, **changes), Record(folder))


@pytest.mark.parametrize("name", BASELINES)
def test_every_report_has_the_same_keys_and_names_what_was_told(name):
    report = report_of(name)
    assert set(report) == REPORT and set(report["detection"]) == {"tpr", "fpr", "precision", "f1", "by_image", "by_either"}
    assert set(report["suspicion"]) == {"auroc", "auprc", "tpr_at_fpr1"} and set(report["relabel"]) == {"accuracy_on_poison", "label_accuracy", "collateral"}
    assert report["knowledge"] == list(getattr(config_of(name), "knowledge", find_defense(name).KNOWLEDGE)) and report["benign"]["n_clean"] == 20
    rows = list(csv.DictReader(open(Record(f"record-{name}") / "metrics.csv"))) if (Record(f"record-{name}") / "metrics.csv").exists() else []
    assert report["training_epochs"] == len(rows) and (Record(f"record-{name}") / "benign.safetensors").exists()
    assert json.loads((Record(f"record-{name}") / "report.json").read_text())["training_epochs"] == len(rows)


@pytest.mark.parametrize(("name", "changes", "epochs"), [("none", {}, 0), ("oracle_relabel", {}, 2), ("train_longer", {"ft_epochs": 3}, 5),
                                                         ("abl", {"isolation_epochs": 2, "tuning_epochs": 3, "unlearn_epochs": 4}, 9)])
def test_epochs_are_counted(name, changes, epochs):
    assert report_of(name, **changes)["training_epochs"] == epochs


def test_the_product_of_a_filter_is_the_kept_samples_with_their_places():
    report, folder = report_of("oracle_remove"), Record("record-oracle_remove")
    product, table = np.load(folder / "purified.npz"), list(csv.DictReader(open(folder / "decisions.csv")))
    kept = (~TRUTH.poison).nonzero().flatten().numpy()
    assert np.array_equal(product["index"], kept) and np.array_equal(product["images"], POISONED.images[kept].numpy()) and len(product["labels"]) == len(kept)
    assert [int(row["kept"]) for row in table] == (~TRUTH.poison).int().tolist() and report["removed"] == POISON
    assert report["detection"]["tpr"] == 1 and report["detection"]["fpr"] == 0 and report["relabel"] == {"accuracy_on_poison": None, "label_accuracy": 1, "collateral": 0}


def test_where_nothing_is_flagged_all_poison_is_missed():
    """A port writes down the poison as false alarms then."""
    report = report_of("random_remove", remove_count=0)
    assert {key: report["detection"][key] for key in ("tpr", "fpr", "precision", "f1")} == {"tpr": 0, "fpr": 0, "precision": None, "f1": 0}
    assert report["status"] in ("no-backdoor-found", "attack-failed") and report["removed"] == 0


def test_what_judges_no_sample_has_no_rates():
    for name in ("none", "ft", "purify_only", "train_longer"):
        report = report_of(name)
        assert set(report["detection"].values()) == {None} and set(report["suspicion"].values()) == {None}, name


@pytest.mark.parametrize("name", ["activation_clustering", "strip", "abl", "spectral", "random_remove"])
def test_a_false_truth_changes_the_report_and_nothing_else(name):
    changes = {"budget": "share"} if name == "spectral" else {}
    false = Truth(TRUTH.original_labels.flip(0), TRUTH.poison.roll(2), TRUTH.cover, [4])
    for folder, truth in (("true", TRUTH), ("false", false)):
        report_of(name, truth, folder, **changes)
    for file in ("decisions.csv", "benign.safetensors"):
        assert (Record("true") / file).read_bytes() == (Record("false") / file).read_bytes()


def test_the_oracle_follows_the_truth_that_is_in_its_record():
    false = replace(TRUTH, poison=TRUTH.poison.roll(2))
    report_of("oracle_remove", false, "false")
    assert np.array_equal(np.load(Record("false") / "purified.npz")["index"], (~false.poison).nonzero().flatten().numpy())
