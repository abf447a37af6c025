"""Running a defence on a poisoned set: what every defence needs around it, and the script that defends a record again."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from defense.elixir.config import PurifyConfig
from defense.elixir.purifier import open_denoiser
from defense.harness.evidence import write_evidence
from defense.harness.forecast import defense_lines
from defense.harness.report import Case, build_report, summary, write_figures, write_product
from utils.classifier.metrics import EpochLog, Truth
from utils.classifier.models import build_classifier, load_weights
from utils.config import (
    DataConfig,
    TrainConfig,
    UserError,
    as_flat_dict,
    command_line,
    nearest,
    parse_config,
    peek,
)
from utils.devices import pick_device
from utils.images.data import Dataset, LabeledImages, TriggeredImages, load_dataset
from utils.processes import leading_process
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


@dataclass(frozen=True)
class AgainConfig:
    """Which record is defended, and where the results go.

    Args:
        result_file: name of the record, below record/.
        run_name: folder for the results below record/NAME/defense/; by default the defence's name and a hash of its keys.
        dry_run: say what the defence would cost, from a little of it measured on the spot, and stop.
    """

    result_file: str = ""
    run_name: str | None = None
    dry_run: bool = False


def find_defense(name: str) -> ModuleType:
    """The module defense/<name>.py.

    Raises:
        UserError: there is none with a `defend`.
    """
    known = sorted(
        p.stem
        for p in Path(__file__).parent.parent.glob("*.py")
        if "\ndef defend(" in p.read_text(encoding="utf-8")
    )
    if name not in known:
        raise UserError(
            f"defense: '{name}' is unknown.{nearest(name, known)} Known: {', '.join(known)}"
        )
    return importlib.import_module(f"defense.{name}")


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


def run_defense(module: ModuleType, case: Case, config: Any, record: Record) -> dict[str, Any]:
    """Defend, measure, and write the purified set, decisions, report and figures into `record`; returns the report."""
    observer = EpochLog(record / "metrics.csv", case.dataset.test, case.triggered)
    result = module.defend(case.data, case.victim, config, case.dataset, record, observer)
    with record.stage("report"):
        write_product(result, case, config, record)
        write_figures(result, case, config, record)
        write_evidence(
            result,
            case.data.labels,
            case.dataset.classes,
            getattr(config, "last_steps_m", 1),
            record,
        )
    name, knowledge = (
        module.__name__.rsplit(".")[-1],
        getattr(config, "knowledge", module.KNOWLEDGE),
    )
    report = build_report(name, knowledge, result, case, config, record)
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


@command_line
def main(name: str) -> None:
    """Entry of `python defense/<name>.py --result_file NAME`: the record's own keys, unless others are given."""
    with leading_process() as leading:
        if leading:
            defend_again(name)


def defend_again(name: str) -> None:
    """Defend a record again, as the command line says.

    Raises:
        UserError: keys that do not fit, a record that cannot be defended, or a folder for the results that is another run's.
    """
    module = find_defense(name)
    given = peek(None, "result_file", "")
    source = Record(given, must_exist=True) if given else None
    kept = source.config() if source else {}
    kept = {**(kept.get("passed_over") or {}), **kept}
    again, data_config, config = parse_config(
        None,
        AgainConfig,
        DataConfig,
        module.Config,
        defaults=kept,
        description=f"Defend a record again with {name}.",
    )
    if source is None:
        raise UserError(
            "result_file: give --result_file NAME, the name of a record that an attack script made"
        )
    dataset = load_dataset(data_config)
    if DATA_KEY in kept and kept[DATA_KEY] != dataset.digest():
        raise UserError(
            f"dataset_path: the images or labels there are others than those that record {source.name} was made from; give the folder that they are in"
        )
    module.check(config, dataset)
    if again.dry_run:
        start_logging(None)
        log.info("\n".join(defense_costs(name, load_case(source)[0], config, dataset)))
        return
    keys = as_flat_dict(data_config, config)
    deciding = {key: value for key, value in keys.items() if key not in RUNTIME_KEYS}
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()[
        :8
    ]
    record = Record(f"{source.name}/defense/{again.run_name or f'{name}-{digest}'}", key="run_name")
    record.claim({"defense": name, **keys})
    start_logging(record / "log.txt")
    if taken := taken_over(kept, config):
        log.info(
            "keys of the record that are not today's defaults: %s",
            ", ".join(f"{key} {value}" for key, value in taken.items()),
        )
    if not show_finished(record):
        run_defense(module, load_whole_case(source, dataset, config), config, record)


def taken_over(kept: dict[str, Any], config: Any) -> dict[str, Any]:
    """Keys of a defence that are what the record has and not the default, maybe because that was another when the record was made."""
    of_training = {field.name for field in fields(TrainConfig)}
    own = [field for field in fields(config) if field.name not in of_training]
    return {
        field.name: kept[field.name]
        for field in own
        if field.name in kept and kept[field.name] == getattr(config, field.name) != field.default
    }


def defense_costs(name: str, data: LabeledImages, config: Any, dataset: Dataset) -> list[str]:
    """Lines that say what the defence `name` would cost on `data`."""
    config = config.resolved() if hasattr(config, "resolved") else config
    denoiser = (
        open_denoiser(config, data.images.shape[-1], dataset.name)
        if isinstance(config, PurifyConfig)
        else None
    )
    return defense_lines(name, data, denoiser, config, dataset, pick_device(config.device))


def load_whole_case(record: Record, dataset: Dataset, config: Any) -> Case:
    """The case that a record holds, with its victim.

    Raises:
        UserError: the attack's run was ended before there was one.
    """
    if not (record / "victim.safetensors").exists():
        raise UserError(
            f"result_file: {record.name} has no victim yet; run the command that made it with --stop_after victim, or without"
        )
    data, truth, triggered = load_case(record)
    kept = record.config()
    victim = build_classifier(kept["model"], dataset.num_classes, dataset.info, (0, "victim"))
    victim = (
        load_weights(victim, record / "victim.safetensors").to(pick_device(config.device)).eval()
    )
    return Case(kept.get("attack", ""), data, truth, triggered, dataset, victim)
