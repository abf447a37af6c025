"""The field's numbers, as DataElixir's evaluation defines them; None where a number is undefined.

C-Acc: clean test images read as their class. ASR: triggered images read as the attack's label.
R-Acc: the same images read as their true class. TPR and FPR are over training samples; cover
samples (triggered, true label) count in neither.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.classifier.networks import Classifier
from utils.classifier.training import Epoch, predict
from utils.images.data import LabeledImages, TriggeredImages
from utils.storage.record import replacing


@dataclass(frozen=True)
class Truth:
    """What only metrics may know about a training set.

    Attributes:
        original_labels: int64 (N,), before poisoning.
        poison: bool (N,), triggered and given the attack's label.
        cover: bool (N,), triggered with its true label.
        targets: every label that poisoned samples are given.
    """

    original_labels: Tensor
    poison: Tensor
    cover: Tensor
    targets: list[int]

    def __getitem__(self, which: Tensor) -> Truth:
        """The truth about the samples that a mask names."""
        masks = self.poison[which], self.cover[which]
        return Truth(self.original_labels[which], *masks, self.targets)


def share(mask: Tensor) -> float | None:
    """Mean of a bool tensor; None if it is empty."""
    return mask.double().mean().item() if mask.numel() else None


def accuracy(model: Classifier, clean: LabeledImages, triggered: TriggeredImages) -> dict[str, Any]:
    """{c_acc, asr, r_acc, n_clean, n_triggered} of a classifier."""
    read = predict(model, triggered.images)
    return {
        "c_acc": share(predict(model, clean.images) == clean.labels),
        "asr": share(read == triggered.labels),
        "r_acc": share(read == triggered.original_labels),
        "n_clean": len(clean),
        "n_triggered": len(triggered.labels),
    }


def detection(flagged: Tensor, truth: Truth) -> dict[str, float | None]:
    """{tpr, fpr, precision, f1} of a suspected set bool (N,)."""
    hits = int((flagged & truth.poison).sum())
    benign = ~truth.poison & ~truth.cover
    counted = hits + int((flagged & benign).sum())
    tpr, precision = share(flagged[truth.poison]), hits / counted if counted else None
    f1 = None if tpr is None else 0.0
    if tpr and precision:
        f1 = 2 * precision * tpr / (precision + tpr)
    return {"tpr": tpr, "fpr": share(flagged[benign]), "precision": precision, "f1": f1}


def suspicion(score: Tensor | None, truth: Truth) -> dict[str, float | None]:
    """{auroc, auprc, tpr_at_fpr1} of a score float (N,), higher = more suspicious.

    Areas under the ROC and the precision-recall curve (average precision), and the largest TPR
    that a threshold reaches at an FPR of 1 % or less; all None for no score or a constant one.
    """
    counted = ~truth.cover
    poison = truth.poison[counted]
    if score is None or poison.all() or not poison.any() or bool((score == score[0]).all()):
        return {"auroc": None, "auprc": None, "tpr_at_fpr1": None}
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    truth_and_score = poison.numpy(), score[counted].numpy()
    fpr, tpr, _ = roc_curve(*truth_and_score, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(*truth_and_score)),
        "auprc": float(average_precision_score(*truth_and_score)),
        "tpr_at_fpr1": float(tpr[fpr <= 0.01].max()),
    }


def relabelling(given: Tensor, new: Tensor, truth: Truth) -> dict[str, float | None]:
    """{accuracy_on_poison, label_accuracy, collateral} of new labels int64 (N,).

    accuracy_on_poison is over poisoned samples whose label changed; collateral is the share of the
    other samples whose true label was changed into a wrong one.
    """
    right, changed = new == truth.original_labels, new != given
    spoilt = ~right & (given == truth.original_labels)
    return {
        "accuracy_on_poison": share(right[truth.poison & changed]),
        "label_accuracy": share(right),
        "collateral": share(spoilt[~truth.poison]),
    }


def defense_effectiveness(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """DER in [0, 1]: 0.5 = nothing happened, 1 = the backdoor is gone at no loss of accuracy."""
    if before["asr"] is None or after["asr"] is None:
        return None
    gain, loss = max(0.0, before["asr"] - after["asr"]), max(0.0, before["c_acc"] - after["c_acc"])
    return (gain - loss + 1) / 2


def survival(ends: Tensor, given: Tensor, truth: Truth) -> list[dict[str, float | None]]:
    """Per round: the shares of clean samples read as before, and of poison read as its label.

    Args:
        ends: int64 (N, 1 + n), the victim's labels of the original and of the image after each
            round; samples that were not purified (-1) do not count.
        given: int64 (N,), labels as received.
    """
    known = ends[:, 0] >= 0
    poison, clean = truth.poison & known, known & ~truth.poison & ~truth.cover
    same, target = ends == ends[:, :1], ends == given[:, None]
    return [
        {
            "clean_prediction_survives": share(same[clean, r]),
            "poison_reads_target": share(target[poison, r]),
        }
        for r in range(1, ends.shape[1])
    ]


def epoch_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; none where it is not there yet."""
    if not file.exists():
        return []
    with open(file, newline="", encoding="utf-8") as source:
        return list(csv.DictReader(source))


class EpochLog:
    """An observer of trainings: keeps metrics.csv, and gives the progress bar C-Acc and ASR.

    Rows of a stage that is trained again from an earlier epoch are replaced.
    """

    FIELDS = ("stage", "epoch", "lr", "train_loss", "c_acc", "asr", "r_acc")

    def __init__(self, file: Path, clean: LabeledImages, triggered: TriggeredImages):
        self.file, self.clean, self.triggered = file, clean, triggered

    def __call__(self, epoch: Epoch) -> dict[str, float]:
        measured = accuracy(epoch.model, self.clean, self.triggered)
        row = {"stage": epoch.stage, "epoch": str(epoch.number)}
        numbers = {"lr": epoch.lr, "train_loss": epoch.loss, **measured}
        for key in self.FIELDS[2:]:
            row[key] = "" if numbers[key] is None else f"{numbers[key]:.6g}"
        replaced = lambda r: r["stage"] == epoch.stage and int(r["epoch"]) >= epoch.number
        rows = [r for r in epoch_rows(self.file) if not replaced(r)]
        with replacing(self.file) as part, open(part, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, self.FIELDS)
            writer.writeheader()
            writer.writerows([*rows, row])
        shown = {"C-Acc": measured["c_acc"], "ASR": measured["asr"]}
        return {key: value for key, value in shown.items() if value is not None}
