"""Runs at the edges: no poison, all poison, all targets, 100 classes of three, a blind victim."""

import csv
import json

import pytest

from defense.harness import run
from tests.world import CLASSES, World

REPORT_KEYS = {"victim", "benign", "detection", "relabel", "target_labels", "rounds", "status"}


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """Runs are forked from here, and spare the pictures."""
    monkeypatch.setattr(run, "write_page", lambda folder: folder)


def finished(world, name, *words):
    """The report of a run that must end well."""
    code, _ = world.run(name, *words)
    assert code == 0, world.said()
    assert "Traceback" not in world.said()
    report = json.loads((world.record(name) / "report.json").read_text())
    assert set(report) >= REPORT_KEYS
    return report


@pytest.mark.parametrize("conform", ["true", "false"])
def test_no_poison_at_all(world, conform):
    report = finished(world, f"none-{conform}", "--pratio", "0", "--conform", conform)
    assert report["detection"]["tpr"] is None
    assert report["detection"]["fpr"] is not None
    assert report["relabel"]["accuracy_on_poison"] is None
    assert all(row["poison_reads_target"] is None for row in report["rounds"])
    assert report["status"] in ("ok", "no-backdoor-found")
    assert (report["power"] is None) == bool(report["target_labels"]["detected"])
    assert report["notes"] or report["power"] is None


def test_everything_poisoned(world):
    """Then there is one class, and nothing to compare it with."""
    words = ("--attack_pool", "all", "--conform", "false")
    report = finished(world, "all", "--pratio", "1", *words)
    assert report["detection"]["fpr"] is None
    assert report["detection"]["tpr"] is not None


def test_every_class_a_target(world):
    words = ("--attack_label_trans", "all2all", "--conform", "false")
    report = finished(world, "all2all", *words)
    assert report["target_labels"]["true"] == list(range(CLASSES))


def test_a_victim_at_chance(world):
    report = finished(world, "chance", "--lr", "1e-12", "--epochs", "1", "--conform", "false")
    assert report["status"] == "attack-failed" or report["victim"]["c_acc"] < 0.6


def test_a_learning_rate_that_loses_the_loss(world):
    code, _ = world.run("lost", "--lr", "1e30", "--lr_scheduler", "constant", "--epochs", "30")
    assert code == 2
    assert "error: lr: " in world.said()
    assert "at learning rate 1e+30" in world.said()
    assert "Traceback" not in world.said()


def test_a_hundred_classes_of_three(tmp_path):
    world = World(tmp_path, classes=100, train=3, test=1)
    words = "--epochs 1 --batch_size 32 --rounds_n 1 --purify_batch_size 128 --pratio 0.01"
    report = finished(world, "many", *words.split(), "--conform", "false")
    assert report["victim"]["n_clean"] == 100
    with open(world.record("many") / "decisions.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 300
    assert {int(row["new_label"]) for row in rows} <= set(range(100))
