"""What a defence leaves behind: the product, the decisions, figures, and report.json, which alone looks at the truth."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defense.elixir.verdict import round_ends
from defense.harness.result import Result
from utils.classifier.metrics import (
    Truth,
    accuracy,
    defense_effectiveness,
    detection,
    epoch_rows,
    relabelling,
    survival,
    suspicion,
)
from utils.images.data import Dataset, LabeledImages, TriggeredImages
from utils.late import torch
from utils.page import figures
from utils.storage.files import write_table
from utils.storage.record import Record, environment, peak_rss_bytes, save_arrays

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

log = logging.getLogger("dataelixir")
SCHEMA = 1


@dataclass(frozen=True)
class Case:
    """A poisoned set with everything that is known about it; the defence itself is given `data` alone.

    Attributes:
        attack: the attack's name.
        data: the training set as received.
        truth, triggered: for metrics only.
        dataset: clean data set; its test images measure C-Acc.
        victim: the classifier trained on `data`, in eval mode.
    """

    attack: str
    data: LabeledImages
    truth: Truth
    triggered: TriggeredImages
    dataset: Dataset
    victim: Classifier


def write_product(result: Result, case: Case, config: Any, record: Record) -> None:
    """purified.npz, decisions.csv and votes.npz, of these what the defence has.

    Where samples were dropped, purified.npz holds the others, with their places in the training set as `index`.
    """
    if result.purified:
        kept = {} if result.keep is None else {"index": result.keep.nonzero().flatten()}
        product = result.purified[result.given_out]
        save_arrays(record / "purified.npz", images=product.images, labels=product.labels, **kept)
    if result.votes is not None:
        save_arrays(record / "votes.npz", votes=result.votes.to(torch.int16))
    write_table(
        record / "decisions.csv", result.table(case.data.labels, getattr(config, "last_steps_m", 1))
    )


def write_figures(result: Result, case: Case, config: Any, record: Record) -> None:
    """discrepancy.png, suspicion.png, purified.png, curves.png, of these what the defence has."""
    found, classes = result.discrepancy, case.dataset.classes
    if found:
        measures = {
            "discrepancy (nats)": (found.metric.numpy(), found.threshold),
            "share of others taken in": (found.inflow.share.numpy(), found.inflow_limit),
        }
        figures.target_label_chart(record / "discrepancy.png", measures, found.targets, classes)
    elif result.score is not None:
        figures.suspicion_chart(
            record / "suspicion.png",
            result.score.numpy(),
            case.truth.poison.numpy(),
            result.flagged.numpy(),
        )
    curves = _curves(record)
    if curves:
        figures.training_curves(record / "curves.png", curves)
    if result.decisions:
        _write_examples(result, case, config, record)


def _write_examples(result: Result, case: Case, config: Any, record: Record) -> None:
    classes, changed = case.dataset.classes, (result.decisions.column > 0).nonzero().flatten()
    picked = (
        changed[torch.linspace(0, len(changed) - 1, min(8, len(changed))).long()]
        if len(changed)
        else changed
    )
    examples = result.examples(picked)
    if examples:
        ends = list(range(config.last_steps_m, examples[0].images.shape[0], config.last_steps_m))
        name = lambda e: (
            f"{classes[case.data.labels[e.index]]} -> {classes[result.purified.labels[e.index]]}"
        )
        rows = [
            (name(e), [*e.images[[0, *ends]], result.purified.images[e.index]]) for e in examples
        ]
        figures.image_grid(
            record / "purified.png",
            rows,
            ["given", *(f"round {r + 1}" for r in range(len(ends))), "chosen"],
        )


def _curves(record: Record) -> list[dict[str, str]]:
    """Epochs of this defence, after those of the victim where that was trained in the record above."""
    rows = epoch_rows(record / "metrics.csv")
    above = record.path.parent.parent / "metrics.csv"
    if record.path.parent.name == "defense" and above.exists():
        rows = [row for row in epoch_rows(above) if row["stage"] == "victim"] + rows
    return rows


def build_report(
    name: str, knowledge: Sequence[str], result: Result, case: Case, config: Any, record: Record
) -> dict[str, Any]:
    """The content of report.json (the README documents each key)."""
    measure = lambda model: accuracy(model, case.dataset.test, case.triggered) if model else None
    before, after = measure(case.victim), measure(result.model)
    return {
        "schema": SCHEMA,
        "attack": case.attack,
        "dataset": case.dataset.name,
        "defense": name,
        "seed": config.random_seed,
        "status": _status(before, bool(case.truth.poison.any()), result),
        "victim": before,
        "benign_stage1": measure(result.stage1),
        "benign": after,
        "der": defense_effectiveness(before, after),
        "detection": _detection(result, case),
        "suspicion": suspicion(result.score, case.truth),
        "relabel": _relabel(result, case),
        "target_labels": {
            "detected": None if result.targets is None else list(result.targets),
            "true": case.truth.targets,
        },
        "power": result.power,
        "notes": list(result.notes),
        "rounds": None
        if result.votes is None
        else survival(round_ends(result.votes, config.last_steps_m), case.data.labels, case.truth),
        "knowledge": list(knowledge),
        "training_epochs": sum(
            row["stage"] != "victim" for row in epoch_rows(record / "metrics.csv")
        ),
        "removed": None if result.purified is None else int((~result.given_out).sum()),
        "cost": {
            "unet_passes": result.unet_passes,
            "seconds": {stage: notes["seconds"] for stage, notes in _all_stages(record).items()},
            "peak_rss_bytes": peak_rss_bytes(),
            "device": str(case.victim.device),
        },
        "versions": environment(),
    }


def _detection(result: Result, case: Case) -> dict[str, Any]:
    """Of the samples taken for poisoned; all null where the defence does not judge samples."""
    if result.flagged is None:
        return dict.fromkeys(("tpr", "fpr", "precision", "f1", "by_image", "by_either"))
    found = detection(result.flagged, case.truth)
    if result.decisions is None:
        return found | {"by_image": None, "by_either": None}
    moved = result.decisions.column > 0
    return found | {
        "by_image": detection(moved, case.truth),
        "by_either": detection(moved | result.flagged, case.truth),
    }


def _relabel(result: Result, case: Case) -> dict[str, Any]:
    """Over the samples that are given out; all null where only a model is."""
    if result.purified is None:
        return dict.fromkeys(("accuracy_on_poison", "label_accuracy", "collateral"))
    out = result.given_out
    return relabelling(case.data.labels[out], result.purified.labels[out], case.truth[out])


def _all_stages(record: Record) -> dict[str, Any]:
    above = record.path.parent.parent / "stages.json"
    inherited = (
        json.loads(above.read_text())
        if record.path.parent.name == "defense" and above.exists()
        else {}
    )
    return {
        stage: inherited[stage] for stage in ("poison", "victim") if stage in inherited
    } | record.finished()


def _status(victim: dict[str, Any], poisoned: bool, result: Result) -> str:
    if poisoned and victim["asr"] is not None and victim["asr"] < 0.5:
        log.warning(
            "the attack failed (victim ASR %.3f): what the defence reaches means little",
            victim["asr"],
        )
        return "attack-failed"
    nothing_flagged = result.flagged is not None and not result.flagged.any()
    nothing = nothing_flagged if result.targets is None else not result.targets
    return "no-backdoor-found" if nothing else "ok"


def summary(report: dict[str, Any], folder: Path) -> str:
    """What a person wants to know at the end of a run, in a few lines."""
    show = lambda value: "n/a" if value is None else f"{value:.4f}"
    line = lambda who: (
        f"{who:14s} C-Acc {show(report[who]['c_acc'])}  ASR {show(report[who]['asr'])}  R-Acc {show(report[who]['r_acc'])}"
    )
    lines = [line(who) for who in ("victim", "benign_stage1", "benign") if report[who]]
    found, d, r = report["target_labels"], report["detection"], report["relabel"]
    if found["detected"] is not None:
        lines.append(f"target labels  detected {found['detected']}, true {found['true']}")
    if d["fpr"] is not None:
        lines.append(f"detection      TPR {show(d['tpr'])}  FPR {show(d['fpr'])}")
    if r["label_accuracy"] is not None:
        lines.append(
            f"relabelling    {show(r['accuracy_on_poison'])} right on poison, {show(r['label_accuracy'])} on all"
        )
    return "\n".join([*lines, f"status {report['status']}; everything is in {folder}"])
