"""The report of every defence and its files, on toys: one schema, and the truth in it alone."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from defense.elixir import purifier
from defense.harness.case import Case, save_case
from defense.harness.run import run_defense
from tests.test_baselines import (
    BASELINES,
    DATASET,
    POISON,
    POISONED,
    TRIGGERED,
    TRUTH,
    config_of,
    pooled_net,
)
from tests.toys import FlatDenoiser
from utils.classifier import models
from utils.classifier.metrics import Truth, epoch_rows
from utils.storage import record as record_module
from utils.storage.record import Record


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """Records of their own, a denoiser of flat images, and networks that are quickly trained."""
    monkeypatch.setattr(record_module, "RECORDS", tmp_path)
    monkeypatch.setattr(purifier, "open_denoiser", lambda *words: FlatDenoiser())
    monkeypatch.setattr(models, "build_classifier", pooled_net)


REPORT = {
    "schema",
    "attack",
    "dataset",
    "defense",
    "seed",
    "status",
    "victim",
    "benign_stage1",
    "benign",
    "der",
    "detection",
    "suspicion",
    "relabel",
    "target_labels",
    "power",
    "notes",
    "rounds",
    "knowledge",
    "training_epochs",
    "removed",
    "cost",
    "versions",
}


def report_of(name, truth=TRUTH, folder=None, victim=pooled_net, **changes):
    folder = folder or f"record-{name}"
    save_case(Record(folder), POISONED, truth, TRIGGERED)
    return run_defense(
        config_of(name, **changes),
        Case("toy", POISONED, truth, TRIGGERED, DATASET, victim()),
        Record(folder),
    )


@pytest.mark.parametrize("name", BASELINES)
def test_every_report_has_the_same_keys_and_names_what_was_told(name):
    report = report_of(name)
    assert set(report) == REPORT
    assert set(report["detection"]) == {
        "tpr",
        "fpr",
        "precision",
        "f1",
        "by_image",
        "by_either",
    }
    assert set(report["suspicion"]) == {"auroc", "auprc", "tpr_at_fpr1"}
    assert set(report["relabel"]) == {"accuracy_on_poison", "label_accuracy", "collateral"}
    assert report["knowledge"] == list(config_of(name).knowledge)
    assert report["benign"]["n_clean"] == 20
    record = Record(f"record-{name}")
    assert report["training_epochs"] == len(epoch_rows(record / "metrics.csv"))
    assert (record / "benign.safetensors").exists()
    assert json.loads((record / "report.json").read_text()) == json.loads(json.dumps(report))


@pytest.mark.parametrize(
    ("name", "changes", "epochs"),
    [
        ("none", {}, 0),
        ("oracle_relabel", {}, 2),
        ("train_longer", {"ft_epochs": 3}, 5),
        ("abl", {"isolation_epochs": 2, "tuning_epochs": 3, "unlearn_epochs": 4}, 9),
    ],
)
def test_epochs_are_counted(name, changes, epochs):
    assert report_of(name, **changes)["training_epochs"] == epochs


def test_the_product_of_a_filter_is_the_kept_samples_with_their_places():
    report, folder = report_of("oracle_remove"), Record("record-oracle_remove")
    product = np.load(folder / "purified.npz")
    with open(folder / "decisions.csv") as file:
        table = list(csv.DictReader(file))
    kept = (~TRUTH.poison).nonzero().flatten().numpy()
    assert np.array_equal(product["index"], kept)
    assert np.array_equal(product["images"], POISONED.images[kept].numpy())
    assert len(product["labels"]) == len(kept)
    assert [int(row["kept"]) for row in table] == (~TRUTH.poison).int().tolist()
    assert report["removed"] == POISON
    assert report["detection"]["tpr"] == 1
    assert report["detection"]["fpr"] == 0
    assert report["relabel"] == {"accuracy_on_poison": None, "label_accuracy": 1, "collateral": 0}


def test_where_nothing_is_flagged_all_poison_is_missed():
    """A port writes down the poison as false alarms then."""
    report = report_of("random_remove", remove_count=0)
    assert {key: report["detection"][key] for key in ("tpr", "fpr", "precision", "f1")} == {
        "tpr": 0,
        "fpr": 0,
        "precision": None,
        "f1": 0,
    }
    assert report["status"] in ("no-backdoor-found", "attack-failed")
    assert report["removed"] == 0


def test_what_judges_no_sample_has_no_rates():
    for name in ("none", "ft", "purify_only", "train_longer"):
        report = report_of(name)
        for part in ("detection", "suspicion"):
            assert set(report[part].values()) == {None}, (name, part)


@pytest.mark.parametrize("name", ["strip", "abl", "spectral"])
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
    assert np.array_equal(
        np.load(Record("false") / "purified.npz")["index"],
        (~false.poison).nonzero().flatten().numpy(),
    )
