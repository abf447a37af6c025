"""Running a defence on a poisoned set: what every defence needs around it."""

import hashlib
import json
import logging
from dataclasses import fields
from typing import Any

from defense.harness.case import Case, load_case, load_whole_case
from defense.harness.config import Order
from defense.harness.defense import Defense
from defense.harness.defense_run import DefenseRun
from defense.harness.evidence import write_evidence, write_figures, write_product
from defense.harness.report import build_report, summary
from utils.classifier.metrics import EpochLog
from utils.config import TrainConfig, UserError, as_flat_dict
from utils.images.data import load_dataset
from utils.page.record_page import write_page
from utils.storage.record import DATA_KEY, RUNTIME_KEYS, Record, start_logging, write_json

log = logging.getLogger("dataelixir")


def run_defense(defense: Defense, case: Case, record: Record) -> dict[str, Any]:
    """Defend and measure; the purified set, decisions, report and figures go into `record`.

    Returns:
        The content of report.json.
    """
    observer = EpochLog(record / "metrics.csv", case.dataset.test, case.triggered)
    run = DefenseRun(defense, case.dataset, record, case.victim.device, observer)
    result = defense.defend(case.data, case.victim, run)
    labels, last_steps_m = case.data.labels, getattr(defense, "last_steps_m", 1)
    with record.stage("report"):
        write_product(result, labels, last_steps_m, record)
        write_figures(result, case, last_steps_m, record)
        write_evidence(result, labels, case.dataset.classes, last_steps_m, record)
    report = build_report(defense, result, case, record)
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
        UserError: a record that cannot be defended, or a folder for the results that is another
            run's.
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
        log.info("\n".join(defense.costs(load_case(source)[0], dataset)))
        return
    keys = as_flat_dict(order.data, defense)
    deciding = {key: value for key, value in keys.items() if key not in RUNTIME_KEYS}
    text = json.dumps(deciding, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    folder = again.run_name or f"{defense.name}-{digest}"
    record = Record(f"{source.name}/defense/{folder}", key="run_name")
    record.claim({"defense": defense.name, **keys}, type(defense))
    start_logging(record / "log.txt")
    if taken := taken_over(kept, defense):
        told = ", ".join(f"{key} {value}" for key, value in taken.items())
        log.info("keys of the record that are not today's defaults: %s", told)
    if not show_finished(record):
        run_defense(defense, load_whole_case(source, dataset, defense.device), record)


def taken_over(kept: dict[str, Any], defense: Defense) -> dict[str, Any]:
    """Keys of a defence that have the record's value and not the default.

    The default may have been another when the record was made.
    """
    of_training = {field.name for field in fields(TrainConfig)}
    own = [field for field in fields(defense) if field.name not in of_training]
    return {
        field.name: kept[field.name]
        for field in own
        if field.name in kept and kept[field.name] == getattr(defense, field.name) != field.default
    }
