"""Metrics: hand-computed tables, what is undefined is null, and the log of epochs."""

import csv

import pytest
import torch

from tests.toys import PatchReader, flat_images, with_corner
from utils.classifier.metrics import (
    EpochLog,
    Truth,
    accuracy,
    defense_effectiveness,
    detection,
    epoch_rows,
    relabelling,
    share,
    survival,
    suspicion,
)
from utils.classifier.training import Epoch
from utils.images.data import LabeledImages, TriggeredImages

# samples 0..3 poisoned (target 0), 4 and 5 cover, 6..9 clean
ORIGINAL = torch.tensor([1, 2, 3, 4, 1, 2, 0, 1, 2, 3])
GIVEN = torch.tensor([0, 0, 0, 0, 1, 2, 0, 1, 2, 3])
TRUTH = Truth(ORIGINAL, torch.arange(10) < 4, (torch.arange(10) // 2) == 2, [0])
NO_POISON = Truth(
    ORIGINAL, torch.zeros(10, dtype=torch.bool), torch.zeros(10, dtype=torch.bool), [0]
)


def flags(*index):
    return torch.isin(torch.arange(10), torch.tensor(index, dtype=torch.int64))


def triggered_set(labels, target=0):
    labels = torch.tensor(labels, dtype=torch.int64)
    return TriggeredImages(
        with_corner(flat_images(labels)),
        torch.full_like(labels, target),
        labels,
        torch.arange(len(labels)),
    )


@pytest.mark.parametrize(
    ("flagged", "tpr", "fpr", "precision", "f1"),
    [
        (flags(0, 1, 2, 3), 1, 0, 1, 1),
        (flags(0, 1, 2, 6), 3 / 4, 1 / 4, 3 / 4, 3 / 4),
        (flags(0, 6, 7, 8), 1 / 4, 3 / 4, 1 / 4, 1 / 4),
        (flags(0, 1, 4, 5), 2 / 4, 0, 1, 2 / 3),  # cover samples count in nothing
        (flags(4, 5), 0, 0, None, 0),
        (flags(), 0, 0, None, 0),
        (flags(6), 0, 1 / 4, 0, 0),
        (flags(*range(10)), 1, 1, 1 / 2, 2 / 3),
    ],
)
def test_detection_by_hand(flagged, tpr, fpr, precision, f1):
    assert detection(flagged, TRUTH) == pytest.approx(
        {"tpr": tpr, "fpr": fpr, "precision": precision, "f1": f1}
    )


def test_detection_without_poison_has_no_tpr():
    assert detection(flags(), NO_POISON) == {"tpr": None, "fpr": 0, "precision": None, "f1": None}
    assert detection(flags(3, 4), NO_POISON) == {
        "tpr": None,
        "fpr": 0.2,
        "precision": 0,
        "f1": None,
    }
    everything = Truth(ORIGINAL, torch.ones(10, dtype=torch.bool), NO_POISON.cover, [0])
    assert detection(flags(1), everything)["fpr"] is None


@pytest.mark.parametrize(
    ("new", "on_poison", "on_all", "collateral"),
    [
        ([1, 2, 3, 4, 1, 2, 0, 1, 2, 3], 1, 1, 0),
        (
            [0, 0, 0, 0, 1, 2, 0, 1, 2, 3],
            None,
            0.6,
            0,
        ),  # nothing changed: there is nothing to be right about
        (
            [1, 2, 1, 0, 1, 2, 0, 1, 2, 3],
            2 / 3,
            0.8,
            0,
        ),  # one missed, one changed into a wrong label
        ([1, 0, 0, 0, 3, 2, 4, 1, 2, 3], 1, 0.5, 2 / 6),  # one cover and one clean sample spoilt
    ],
)
def test_relabelling_by_hand(new, on_poison, on_all, collateral):
    expected = {"accuracy_on_poison": on_poison, "label_accuracy": on_all, "collateral": collateral}
    assert relabelling(GIVEN, torch.tensor(new), TRUTH) == pytest.approx(expected)


def test_a_label_that_was_wrong_before_is_no_collateral():
    given = ORIGINAL.clone()
    given[7] = 4  # label noise, not poison
    new = given.clone()
    new[7] = 3
    assert relabelling(given, new, NO_POISON)["collateral"] == 0


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.9, 0.5), (0.9, 0.5), 0.5),
        ((0.9, 1.0), (0.9, 0.0), 1.0),
        ((0.9, 1.0), (0.8, 0.0), 0.95),
        ((0.9, 0.5), (0.4, 1.0), 0.25),
        ((0.5, 1.0), (0.9, 0.0), 1.0),  # a gain of accuracy is not added
        ((0.9, None), (0.9, 0.1), None),
        ((0.9, 0.1), (0.9, None), None),
    ],
)
def test_defense_effectiveness_by_hand(before, after, expected):
    as_dict = lambda pair: dict(zip(("c_acc", "asr"), pair))
    assert defense_effectiveness(as_dict(before), as_dict(after)) == pytest.approx(expected)


def test_survival_by_hand():
    # samples 0 and 1 poisoned with label 0, 6 a cover sample, 7 not purified
    ends = torch.tensor(
        [[0, 0, 3], [0, 5, 0], [1, 1, 1], [2, 1, 2], [1, 1, 4], [2, 2, 0], [3, 2, 2], [-1, -1, -1]]
    )
    truth = Truth(
        torch.tensor([3, 5, 1, 2, 1, 2, 3, 4]), torch.arange(8) < 2, torch.arange(8) == 6, [0]
    )
    given = torch.tensor([0, 0, 1, 2, 1, 2, 3, 4])
    assert survival(ends, given, truth) == [
        {"clean_prediction_survives": 0.75, "poison_reads_target": 0.5}
    ] + [{"clean_prediction_survives": 0.5, "poison_reads_target": 0.5}]
    none = Truth(given, torch.zeros(8, dtype=torch.bool), truth.cover, [0])
    assert [row["poison_reads_target"] for row in survival(ends, given, none)] == [None, None]


def test_accuracy_by_hand():
    clean = LabeledImages(flat_images(torch.tensor([0, 1, 2, 3])), torch.tensor([0, 1, 2, 4]))
    found = accuracy(PatchReader(target=0), clean, triggered_set([1, 2, 3]))
    assert found == {"c_acc": 0.75, "asr": 1, "r_acc": 0, "n_clean": 4, "n_triggered": 3}
    immune = PatchReader(target=0)
    immune.forward = lambda x: PatchReader.forward(immune, x * 0.9)  # no corner is white any more
    found = accuracy(immune, clean, triggered_set([1, 2, 3]))
    assert found["asr"] + found["r_acc"] <= 1
    assert found["asr"] == 0
    assert accuracy(immune, clean, triggered_set([])) | {"c_acc": 0} == {
        "c_acc": 0,
        "asr": None,
        "r_acc": None,
        "n_clean": 4,
        "n_triggered": 0,
    }


def test_the_share_of_nothing_is_null():
    assert share(torch.tensor([True, False, False, False])) == 0.25
    assert share(torch.tensor([], dtype=torch.bool)) is None


def log_of(tmp_path, triggered=None):
    clean = LabeledImages(flat_images(torch.arange(5)), torch.arange(5))
    return EpochLog(tmp_path / "metrics.csv", clean, triggered or triggered_set([1, 2]))


def test_epochs_are_logged_as_they_come(tmp_path):
    log = log_of(tmp_path)
    shown = log(Epoch("victim", 1, 0.05, 1.25, PatchReader()))
    log(Epoch("victim", 2, 0.025, 0.5, PatchReader()))
    assert shown == {"C-Acc": 1, "ASR": 1}
    assert (tmp_path / "metrics.csv").read_text().splitlines()[
        0
    ] == "stage,epoch,lr,train_loss,c_acc,asr,r_acc"
    assert epoch_rows(log.file)[1] == {
        "stage": "victim",
        "epoch": "2",
        "lr": "0.025",
        "train_loss": "0.5",
        "c_acc": "1",
        "asr": "1",
        "r_acc": "0",
    }
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert list(csv.DictReader(file)) == epoch_rows(log.file)
    assert len(epoch_rows(log.file)) == 2


def test_a_stage_that_is_trained_again_replaces_its_later_rows(tmp_path):
    log = log_of(tmp_path)
    for stage, epochs in (("victim", 5), ("benign", 2)):
        for number in range(1, epochs + 1):
            log(Epoch(stage, number, 1, number, PatchReader()))
    for number in (3, 4):  # a run that goes on after epoch 2
        log_of(tmp_path)(Epoch("victim", number, 1, 10 * number, PatchReader()))
    victim = [
        (row["epoch"], row["train_loss"])
        for row in epoch_rows(log.file)
        if row["stage"] == "victim"
    ]
    assert victim == [("1", "1"), ("2", "2"), ("3", "30"), ("4", "40")]
    assert [row["epoch"] for row in epoch_rows(log.file) if row["stage"] == "benign"] == ["1", "2"]


def test_without_triggered_images_the_log_leaves_the_cell_empty(tmp_path):
    log = log_of(tmp_path, triggered_set([]))
    assert log(Epoch("victim", 1, 1, 1, PatchReader())) == {"C-Acc": 1}
    assert epoch_rows(log.file)[0]["asr"] == epoch_rows(log.file)[0]["r_acc"] == ""


def brute_force_auroc(score, poison):
    """The share of (poisoned, other) pairs that the score puts in order, ties counting half."""
    pairs = score[poison][:, None] - score[~poison][None, :]
    return ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item()


def test_suspicion_is_over_all_thresholds_and_leaves_cover_samples_out():
    score = torch.tensor([9.0, 8, 3, 1, 99, -99, 7, 2, 2, 1])
    counted = ~TRUTH.cover
    measured = suspicion(score, TRUTH)
    assert measured["auroc"] == pytest.approx(
        brute_force_auroc(score[counted], TRUTH.poison[counted])
    )
    assert measured["auprc"] == pytest.approx((1 + 1 + 3 / 4 + 4 / 8) / 4)
    assert measured["tpr_at_fpr1"] == 0.5
    assert suspicion(-score, TRUTH)["auroc"] == pytest.approx(1 - measured["auroc"])
    perfect = suspicion(TRUTH.poison.double(), TRUTH)
    assert perfect == {"auroc": 1, "auprc": 1, "tpr_at_fpr1": 1}


@pytest.mark.parametrize(("above", "tpr"), [(0, 0.8), (1, 0.8), (2, 0.8), (3, 0.3)])
def test_tpr_at_one_percent_of_false_alarms(above, tpr):
    """Of 200 clean samples two may be flagged; `above` lie above all poisoned ones but three."""
    score = torch.cat(
        [
            torch.full((3,), 9.0),
            torch.full((5,), 5.0),
            torch.full((2,), -1.0),
            torch.full((above,), 7.0),
            torch.zeros(200 - above),
        ]
    )
    poison = torch.arange(210) < 10
    assert suspicion(
        score, Truth(torch.zeros(210, dtype=torch.int64), poison, ~poison & poison, [0])
    )["tpr_at_fpr1"] == pytest.approx(tpr)


@pytest.mark.parametrize(
    ("score", "truth"), [(None, TRUTH), (torch.ones(10), TRUTH), (torch.arange(10.0), NO_POISON)]
)
def test_what_ranks_nothing_has_no_suspicion(score, truth):
    assert suspicion(score, truth) == {"auroc": None, "auprc": None, "tpr_at_fpr1": None}


def test_the_truth_about_some_samples():
    part = TRUTH[flags(0, 4, 9)]
    assert part.poison.tolist() == [True, False, False]
    assert part.cover.tolist() == [False, True, False]
    assert part.original_labels.tolist() == [1, 1, 3]
