"""Running a defence on a poisoned set: what every defence needs around it, and the script that defends a record again."""
from __future__ import annotations

import csv
import hashlib
import importlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import numpy as np
import torch

from defense import crew
from defense.evidence import write_evidence
from defense.result import Result
from utils import figures
from utils.config import DataConfig, UserError, as_flat_dict, command_line, nearest, parse_config, peek
from utils.data import Dataset, LabeledImages, TriggeredImages, load_dataset
from utils.metrics import EpochLog, Truth, accuracy, defense_effectiveness, detection, relabelling, survival
from utils.models import Classifier, build_classifier, load_weights
from utils.record import Record, environment, load_arrays, peak_rss_bytes, replacing, save_arrays, start_logging, write_json
from utils.report import write_page
from utils.training import pick_device

log = logging.getLogger("dataelixir")
SCHEMA = 1


@dataclass(frozen=True)
class AgainConfig:
    """Which record is defended, and where the results go.

    Args:
        result_file: name of the record, below record/.
        run_name: folder for the results below record/NAME/defense/; by default the defence's name and a hash of its keys.
    """

    result_file: str = ""
    run_name: Optional[str] = None


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


def find_defense(name: str) -> ModuleType:
    """The module defense/<name>.py.

    Raises:
        UserError: there is none with a `defend`.
    """
    known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "\ndef defend(" in p.read_text(encoding="utf-8"))
    if name not in known:
        raise UserError(f"defense: '{name}' is unknown.{nearest(name, known)} Known: {', '.join(known)}")
    return importlib.import_module(f"defense.{name}")


def save_case(record: Record, data: LabeledImages, truth: Truth, triggered: TriggeredImages) -> None:
    """poisoned.npz (what a defence may see), truth.npz and asr_test.npz (what it may not)."""
    save_arrays(record / "asr_test.npz", **{key: getattr(triggered, key) for key in ("images", "labels", "original_labels", "index")})
    save_arrays(record / "truth.npz", **{key: getattr(truth, key) for key in ("original_labels", "poison", "cover", "targets")})
    save_arrays(record / "poisoned.npz", images=data.images, labels=data.labels)


def load_case(record: Record) -> tuple[LabeledImages, Truth, TriggeredImages]:
    """What `save_case` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    truth = load_arrays(record / "truth.npz")
    return (LabeledImages(**load_arrays(record / "poisoned.npz")),
            Truth(truth["original_labels"], truth["poison"], truth["cover"], truth["targets"].tolist()),
            TriggeredImages(**load_arrays(record / "asr_test.npz")))


def run_defense(module: ModuleType, case: Case, config: Any, record: Record) -> dict[str, Any]:
    """Defend, measure, and write the purified set, decisions, report and figures into `record`; returns the report."""
    observer = EpochLog(record / "metrics.csv", case.dataset.test, case.triggered)
    result = module.defend(case.data, case.victim, config, case.dataset, record, observer)
    with record.stage("report"):
        write_product(result, case, config, record)
        write_figures(result, case, config, record)
        write_evidence(result, case.data.labels, case.dataset.classes, config.last_steps_m, record)
    report = build_report(module.__name__.rsplit(".")[-1], result, case, config, record)
    write_json(record / "report.json", report)
    write_page(record.path)
    module.clean_up(config, record)
    log.info(summary(report, record.path))
    return report


def show_finished(record: Record) -> bool:
    """Whether the record is complete already; if so, its result is shown again."""
    file = record / "report.json"
    if not file.exists():
        return False
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        log.info("finished before: nothing to compute\n%s", summary(report, record.path))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: damaged; delete it to have it made again") from None
    return True


def write_product(result: Result, case: Case, config: Any, record: Record) -> None:
    """purified.npz, decisions.csv and votes.npz."""
    save_arrays(record / "purified.npz", images=result.purified.images, labels=result.purified.labels)
    save_arrays(record / "votes.npz", votes=result.votes.to(torch.int16))
    columns = result.decisions.table(case.data.labels, config.last_steps_m)
    with replacing(record / "decisions.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(columns)
        writer.writerows(zip(*(_cells(column) for column in columns.values())))


def _cells(column: np.ndarray) -> list[Any]:
    if column.dtype.kind == "f":
        return ["" if np.isnan(value) else f"{value:.6f}" for value in column]
    return column.tolist()


def write_figures(result: Result, case: Case, config: Any, record: Record) -> None:
    """discrepancy.png, purified.png, curves.png."""
    found, classes = result.discrepancy, case.dataset.classes
    figures.discrepancy_chart(record / "discrepancy.png", found.metric.numpy(), found.threshold, found.targets, classes)
    figures.training_curves(record / "curves.png", _curves(record))
    changed = (result.decisions.column > 0).nonzero().flatten()
    picked = changed[torch.linspace(0, len(changed) - 1, min(8, len(changed))).long()] if len(changed) else changed
    examples = result.examples(picked)
    if examples:
        ends = list(range(config.last_steps_m, examples[0].images.shape[0], config.last_steps_m))
        name = lambda e: f"{classes[case.data.labels[e.index]]} -> {classes[result.purified.labels[e.index]]}"
        rows = [(name(e), [*e.images[[0, *ends]], result.purified.images[e.index]]) for e in examples]
        figures.image_grid(record / "purified.png", rows, ["given", *(f"round {r + 1}" for r in range(len(ends))), "chosen"])


def _curves(record: Record) -> list[dict[str, str]]:
    """Epochs of this defence, after those of the victim where that was trained in the record above."""
    rows = EpochLog(record / "metrics.csv", None, None).rows()
    above = record.path.parent.parent / "metrics.csv"
    if record.path.parent.name == "defense" and above.exists():
        rows = [row for row in EpochLog(above, None, None).rows() if row["stage"] == "victim"] + rows
    return rows


def build_report(name: str, result: Result, case: Case, config: Any, record: Record) -> dict[str, Any]:
    """The content of report.json (the README documents each key)."""
    measure = lambda model: accuracy(model, case.dataset.test, case.triggered) if model else None
    before, after = measure(case.victim), measure(result.model)
    given, new, moved = case.data.labels, result.purified.labels, result.decisions.column > 0
    seconds = {stage: notes["seconds"] for stage, notes in _all_stages(record).items()}
    return {
        "schema": SCHEMA, "attack": case.attack, "dataset": case.dataset.name, "defense": name, "seed": config.random_seed,
        "status": _status(before, result), "victim": before, "benign_stage1": measure(result.stage1), "benign": after,
        "der": defense_effectiveness(before, after),
        "detection": detection(new != given, case.truth) | {"by_image": detection(moved, case.truth),
                                                            "by_either": detection(moved | (new != given), case.truth)},
        "relabel": relabelling(given, new, case.truth),
        "target_labels": {"detected": list(result.discrepancy.targets), "true": case.truth.targets},
        "rounds": survival(result.votes, config.last_steps_m, given, case.truth),
        "cost": {"unet_passes": result.unet_passes, "seconds": seconds, "peak_rss_bytes": peak_rss_bytes(),
                 "device": str(case.victim.device)},
        "versions": environment(),
    }


def _all_stages(record: Record) -> dict[str, Any]:
    above = record.path.parent.parent / "stages.json"
    inherited = json.loads(above.read_text()) if record.path.parent.name == "defense" and above.exists() else {}
    return {stage: inherited[stage] for stage in ("poison", "victim") if stage in inherited} | record.finished()


def _status(victim: dict[str, Any], result: Result) -> str:
    if victim["asr"] is not None and victim["asr"] < 0.5:
        log.warning("the attack failed (victim ASR %.3f): what the defence reaches means little", victim["asr"])
        return "attack-failed"
    return "ok" if result.discrepancy.targets else "no-backdoor-found"


def summary(report: dict[str, Any], folder: Path) -> str:
    """What a person wants to know at the end of a run, in a few lines."""
    show = lambda value: "n/a" if value is None else f"{value:.4f}"
    line = lambda who: f"{who:14s} C-Acc {show(report[who]['c_acc'])}  ASR {show(report[who]['asr'])}  R-Acc {show(report[who]['r_acc'])}"
    models = [line(who) for who in ("victim", "benign_stage1", "benign") if report[who]]
    found, d, r = report["target_labels"], report["detection"], report["relabel"]
    return "\n".join([*models, f"target labels  detected {found['detected']}, true {found['true']}",
                      f"detection      TPR {show(d['tpr'])}  FPR {show(d['fpr'])}",
                      f"relabelling    {show(r['accuracy_on_poison'])} right on poison, {show(r['label_accuracy'])} on all",
                      f"status {report['status']}; everything is in {folder}"])


@command_line
def main(name: str) -> None:
    """Entry of `python defense/<name>.py --result_file NAME`: the record's own keys, unless others are given."""
    with crew.led() as leading:
        if leading:
            defend_again(name)


def defend_again(name: str) -> None:
    """Defend a record again, as the command line says."""
    module = find_defense(name)
    again = peek(None, "result_file", "")
    if not again:
        raise UserError("result_file: give --result_file NAME, the name of a record that an attack script made")
    source = Record(again, must_exist=True)
    again, data_config, config = parse_config(None, AgainConfig, DataConfig, module.Config, defaults=source.config(),
                                              description=f"Defend a record again with {name}.")
    dataset = load_dataset(data_config)
    module.check(config, dataset)
    keys = as_flat_dict(data_config, config)
    digest = hashlib.sha256(json.dumps(keys, sort_keys=True, default=str).encode()).hexdigest()[:8]
    record = Record(f"{source.name}/defense/{again.run_name or f'{name}-{digest}'}")
    record.claim({"defense": name, **keys})
    start_logging(record / "log.txt")
    if not show_finished(record):
        run_defense(module, load_whole_case(source, dataset, config), config, record)


def load_whole_case(record: Record, dataset: Dataset, config: Any) -> Case:
    """The case that a record holds, with its victim."""
    data, truth, triggered = load_case(record)
    kept = record.config()
    victim = build_classifier(kept["model"], dataset.num_classes, dataset.info, (0, "victim"))
    victim = load_weights(victim, record / "victim.safetensors").to(pick_device(config.device)).eval()
    return Case(kept.get("attack", ""), data, truth, triggered, dataset, victim)
