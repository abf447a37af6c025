"""report.json, which alone looks at the truth, and what is said at the end of a run."""

import json
import logging
from pathlib import Path
from typing import Any

from defense.elixir.verdict import round_ends
from defense.harness.case import Case, record_above
from defense.harness.defense import Defense
from defense.harness.result import Result
from utils.classifier.metrics import (
    accuracy,
    defense_effectiveness,
    detection,
    epoch_rows,
    relabelling,
    survival,
    suspicion,
)
from utils.page.source import Source
from utils.storage.environment import environment, peak_rss_bytes
from utils.storage.record import Record
from utils.words import listed

log = logging.getLogger("dataelixir")
SCHEMA = 1


def build_report(defense: Defense, result: Result, case: Case, record: Record) -> dict[str, Any]:
    """The content of report.json (docs/reliability.md documents each key)."""
    measure = lambda model: accuracy(model, case.dataset.test, case.triggered)
    before, after = measure(case.victim), measure(result.model)
    epochs = [row["stage"] for row in epoch_rows(record / "metrics.csv")]
    return {
        "schema": SCHEMA,
        "attack": case.attack,
        "dataset": case.dataset.name,
        "defense": defense.name,
        "seed": defense.random_seed,
        "status": _status(before, bool(case.truth.poison.any()), result),
        "victim": before,
        "benign_stage1": result.stage1 and measure(result.stage1),
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
        "rounds": _rounds(result, case, defense),
        "knowledge": list(defense.knowledge),
        "training_epochs": len(epochs) - epochs.count("victim"),
        "removed": None if result.product is None else int((~result.product[1]).sum()),
        "cost": {
            "unet_passes": result.unet_passes,
            "seconds": {stage: notes["seconds"] for stage, notes in _all_stages(record).items()},
            "peak_rss_bytes": peak_rss_bytes(),
            "device": str(case.victim.device),
        },
        "versions": environment(),
    }


def _rounds(result: Result, case: Case, defense: Defense) -> Any:
    """How predictions survive each round; None where nobody voted."""
    if result.votes is None:
        return None
    ends = round_ends(result.votes, getattr(defense, "last_steps_m", 1))
    return survival(ends, case.data.labels, case.truth)


def _detection(result: Result, case: Case) -> dict[str, Any]:
    """Of the samples taken for poisoned; all null where the defence does not judge samples."""
    if result.flagged is None:
        return dict.fromkeys(("tpr", "fpr", "precision", "f1", "by_image", "by_either"))
    found = detection(result.flagged, case.truth)
    if result.decisions is None:
        return found | {"by_image": None, "by_either": None}
    moved = result.decisions.column > 0
    either = detection(moved | result.flagged, case.truth)
    return found | {"by_image": detection(moved, case.truth), "by_either": either}


def _relabel(result: Result, case: Case) -> dict[str, Any]:
    """Over the samples that are given out; all null where only a model is."""
    if result.product is None:
        return dict.fromkeys(("accuracy_on_poison", "label_accuracy", "collateral"))
    purified, out = result.product
    return relabelling(case.data.labels[out], purified.labels[out], case.truth[out])


def _all_stages(record: Record) -> dict[str, Any]:
    above, kept = record_above(record), {}
    if above and (above / "stages.json").exists():
        stages = json.loads((above / "stages.json").read_text())
        kept = {stage: stages[stage] for stage in ("poison", "victim") if stage in stages}
    return kept | record.finished()


def _status(victim: dict[str, Any], poisoned: bool, result: Result) -> str:
    asr = victim["asr"]
    if poisoned and asr is not None and asr < 0.5:
        told = "the attack failed (victim ASR %.3f): what the defence reaches means little"
        log.warning(told, asr)
        return "attack-failed"
    nothing_flagged = result.flagged is not None and not result.flagged.any()
    nothing = nothing_flagged if result.targets is None else not result.targets
    return "no-backdoor-found" if nothing else "ok"


def summary(report: dict[str, Any], folder: Path) -> str:
    """What a person wants to know at the end of a run, in a few lines."""
    show = lambda value: "n/a" if value is None else f"{value:.4f}"
    lines = []
    for who in ("victim", "benign_stage1", "benign"):
        if read := report[who]:
            c_acc, asr, r_acc = (show(read[key]) for key in ("c_acc", "asr", "r_acc"))
            lines.append(f"{who:14s} C-Acc {c_acc}  ASR {asr}  R-Acc {r_acc}")
    found, d, r = report["target_labels"], report["detection"], report["relabel"]
    if found["detected"] is not None:
        names = Source(folder).classes["names"]
        named = lambda labels: listed([names[k] if k < len(names) else str(k) for k in labels])
        lines.append(
            f"target labels  detected {named(found['detected'])}, true {named(found['true'])}"
        )
    if d["fpr"] is not None:
        lines.append(f"detection      TPR {show(d['tpr'])}  FPR {show(d['fpr'])}")
    if r["label_accuracy"] is not None:
        right, every = show(r["accuracy_on_poison"]), show(r["label_accuracy"])
        lines.append(f"relabelling    {right} right on poison, {every} on all")
    return "\n".join([*lines, f"status {report['status']}; everything is in {folder}"])
