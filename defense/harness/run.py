"""Running a defence on a poisoned set: what every defence needs around it, and how a record is defended again."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import fields
from typing import Any

from defense.elixir.config import PurifyConfig
from defense.elixir.purifier import open_denoiser
from defense.harness.command import Order
from defense.harness.defense import Defense
from defense.harness.defense_run import DefenseRun
from defense.harness.evidence import write_evidence
from defense.harness.forecast import defense_lines
from defense.harness.report import Case, build_report, summary, write_figures, write_product
from utils.classifier.metrics import EpochLog, Truth
from utils.classifier.models import build_classifier, load_weights
from utils.config import TrainConfig, UserError, as_flat_dict
from utils.devices import pick_device
from utils.images.data import Dataset, LabeledImages, TriggeredImages, load_dataset
from utils.page.record_page import write_page
from utils.storage.record import (
    DATA_KEY,
    RUNTIME_KEYS,
    Record,
    load_arrays,
    save_arrays,
    start_logging,
    write_json,
)

log = logging.getLogger("dataelixir")


def save_case(
    record: Record, data: LabeledImages, truth: Truth, triggered: TriggeredImages
) -> None:
    """poisoned.npz (what a defence may see), truth.npz and asr_test.npz (what it may not)."""
    save_arrays(
        record / "asr_test.npz",
        **{
            key: getattr(triggered, key) for key in ("images", "labels", "original_labels", "index")
        },
    )
    save_arrays(
        record / "truth.npz",
        **{key: getattr(truth, key) for key in ("original_labels", "poison", "cover", "targets")},
    )
    save_arrays(record / "poisoned.npz", images=data.images, labels=data.labels)


def load_case(record: Record) -> tuple[LabeledImages, Truth, TriggeredImages]:
    """What `save_case` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    truth = load_arrays(record / "truth.npz")
    return (
        LabeledImages(**load_arrays(record / "poisoned.npz")),
        Truth(truth["original_labels"], truth["poison"], truth["cover"], truth["targets"].tolist()),
        TriggeredImages(**load_arrays(record / "asr_test.npz")),
    )


def run_defense(defense: Defense, case: Case, record: Record) -> dict[str, Any]:
    """Defend, measure, and write the purified set, decisions, report and figures into `record`; returns the report."""
    observer = EpochLog(record / "metrics.csv", case.dataset.test, case.triggered)
    run = DefenseRun(defense, case.dataset, record, case.victim.device, observer)
    result = defense.defend(case.data, case.victim, run)
    with record.stage("report"):
        write_product(result, case, defense, record)
        write_figures(result, case, defense, record)
        last_steps_m = getattr(defense, "last_steps_m", 1)
        write_evidence(result, case.data.labels, case.dataset.classes, last_steps_m, record)
    report = build_report(defense.name, defense.knowledge, result, case, defense, record)
    write_json(record / "report.json", report)
    write_page(record.path)
    defense.clean_up(record)
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


def defend_again(order: Order) -> None:
    """Defend a record again, as the command line says.

    Raises:
        UserError: a record that cannot be defended, or a folder for the results that is another run's.
    """
    again, kept, defense = order.again, order.kept, order.defense
    source, dataset = Record(again.result_file, must_exist=True), load_dataset(order.data)
    if DATA_KEY in kept and kept[DATA_KEY] != dataset.digest():
        raise UserError(
            "dataset_path: the images or labels there are others than those that record "
            f"{source.name} was made from; give the folder that they are in"
        )
    defense.check(dataset)
    if again.dry_run:
        start_logging(None)
        log.info("\n".join(defense_costs(defense, load_case(source)[0], dataset)))
        return
    keys = as_flat_dict(order.data, defense)
    deciding = {key: value for key, value in keys.items() if key not in RUNTIME_KEYS}
    text = json.dumps(deciding, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    folder = again.run_name or f"{defense.name}-{digest}"
    record = Record(f"{source.name}/defense/{folder}", key="run_name")
    record.claim({"defense": defense.name, **keys})
    start_logging(record / "log.txt")
    if taken := taken_over(kept, defense):
        told = ", ".join(f"{key} {value}" for key, value in taken.items())
        log.info("keys of the record that are not today's defaults: %s", told)
    if not show_finished(record):
        run_defense(defense, load_whole_case(source, dataset, defense), record)


def taken_over(kept: dict[str, Any], defense: Defense) -> dict[str, Any]:
    """Keys of a defence that have the record's value and not the default, maybe because that was another when the record was made."""
    of_training = {field.name for field in fields(TrainConfig)}
    own = [field for field in fields(defense) if field.name not in of_training]
    return {
        field.name: kept[field.name]
        for field in own
        if field.name in kept and kept[field.name] == getattr(defense, field.name) != field.default
    }


def defense_costs(defense: Defense, data: LabeledImages, dataset: Dataset) -> list[str]:
    """Lines that say what a defence would cost on `data`."""
    config = defense.resolved() if hasattr(defense, "resolved") else defense
    denoiser = (
        open_denoiser(config, data.images.shape[-1], dataset.name)
        if isinstance(config, PurifyConfig)
        else None
    )
    device = pick_device(config.device)
    return defense_lines(defense.name, data, denoiser, config, dataset, device)


def load_whole_case(record: Record, dataset: Dataset, config: TrainConfig) -> Case:
    """The case that a record holds, with its victim.

    Raises:
        UserError: the attack's run was ended before there was one.
    """
    file = record / "victim.safetensors"
    if not file.exists():
        raise UserError(
            f"result_file: {record.name} has no victim yet; run the command that made it "
            "with --stop_after victim, or without"
        )
    data, truth, triggered = load_case(record)
    kept = record.config()
    victim = build_classifier(kept["model"], dataset.num_classes, dataset.info, (0, "victim"))
    victim = load_weights(victim, file).to(pick_device(config.device)).eval()
    return Case(kept.get("attack", ""), data, truth, triggered, dataset, victim)
