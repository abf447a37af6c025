"""The stages of a run, in order: poison, victim, and then whatever the defence does."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from attack.poisoning.export import export_images, refuse_occupied
from attack.poisoning.poison import (
    LabelMap,
    PoisonConfig,
    Role,
    label_map,
    poison_training_set,
    trigger_test_set,
)
from attack.poisoning.trigger import FitContext, Trigger
from defense.elixir.forecast import training_line
from defense.harness.case import Case, load_case, save_case
from defense.harness.defense import Defense, find_defense
from defense.harness.run import run_defense, show_finished
from utils.classifier.metrics import EpochLog, Truth
from utils.classifier.models import check_model, trained
from utils.config import (
    DataConfig,
    TrainConfig,
    as_flat_dict,
    command_line,
    parse_config,
    passed_over,
    peek,
)
from utils.devices import pick_device
from utils.images.data import Dataset, LabeledImages, TriggeredImages, load_dataset
from utils.late import torch
from utils.page import figures
from utils.processes import leading_process
from utils.storage.record import DATA_KEY, Record, start_logging

log = logging.getLogger("dataelixir")


@dataclass(frozen=True)
class RunConfig:
    """The run.

    Args:
        save_folder_name: folder for everything this run produces, below record/; by default ATTACK_DATASET.
        defense: name of a module of defense/ that gets the poisoned set.
        stop_after: end the run after this stage.
        export: new folder for the poisoned training set as images, with its labels and, apart, the truth.
        dry_run: say what every stage would cost, from a little of it measured on the spot, and stop.
    """

    save_folder_name: str | None = None
    defense: str = "dataelixir"
    stop_after: Literal["poison", "victim", "report"] = "report"
    export: str | None = None
    dry_run: bool = False


@command_line
def main(trigger_class: type[Trigger], argv: Sequence[str] | None = None) -> None:
    """Run the attack of `trigger_class`, then the defence, as the command line says."""
    with leading_process() as leading:
        if leading:
            lead(trigger_class, argv)


def lead(trigger_class: type[Trigger], argv: Sequence[str] | None) -> None:
    """The stages in order."""
    defense_class = find_defense(peek(argv, "defense", RunConfig.defense))
    run, data_config, poison, defense, trigger = parse_config(
        argv,
        RunConfig,
        DataConfig,
        PoisonConfig,
        defense_class,
        trigger_class,
        description=trigger_class.__doc__.split("\n")[0],
    )
    start_logging(None)
    dataset = load_dataset(data_config)
    check_model(defense.model, dataset)
    poison = replace(poison, attack=poison.attack or trigger.name)
    labels_to = label_map(trigger, poison, dataset.num_classes)
    if run.stop_after == "report":
        defense.check(dataset)
    export = Path(os.path.abspath(os.path.expanduser(run.export))) if run.export else None
    if export:
        refuse_occupied(export)
    if run.dry_run:
        log.info("\n".join(costs(run, trigger, defense, dataset)))
        return
    record = Record(run.save_folder_name or f"{trigger.name}_{dataset.name}")
    keys = as_flat_dict(
        replace(run, save_folder_name=record.name, stop_after="report", export=None, dry_run=False),
        data_config,
        poison,
        defense,
        trigger,
    )
    record.claim(
        keys | {DATA_KEY: dataset.digest(), "passed_over": passed_over(argv, defense_class)}
    )  # for the defences that the record is defended with later
    start_logging(record / "log.txt")
    data, truth, triggered = poisoned_case(record, trigger, labels_to, poison, defense, dataset)
    if export:
        export_images(export, data, truth, dataset.classes)
    if show_finished(record):
        return
    if run.stop_after == "poison":
        return
    with record.stage("victim"):
        observer = EpochLog(record / "metrics.csv", dataset.test, triggered)
        victim = trained(
            "victim", data, defense, dataset, pick_device(defense.device), record.path, observer
        )
    if run.stop_after == "victim":
        return
    run_defense(defense, Case(trigger.name, data, truth, triggered, dataset, victim), record)


def costs(run: RunConfig, trigger: Trigger, defense: Defense, dataset: Dataset) -> list[str]:
    """Lines that say what the stages of a run would cost."""
    data, device, fits = (
        dataset.train,
        pick_device(defense.device),
        getattr(trigger, "fit_images", None),
    )
    lines = [
        f"poison: {len(data):,} images"
        + (
            f"; {trigger.name} is first fitted on {min(fits, len(data)):,} of them, which takes minutes and is not "
            "measured here"
            if fits
            else ""
        )
    ]
    if run.stop_after != "poison":
        lines.append(training_line("victim", data, defense, dataset))
    return lines + (defense.costs(data, dataset) if run.stop_after == "report" else [])


def poisoned_case(
    record: Record,
    trigger: Trigger,
    labels_to: LabelMap,
    poison: PoisonConfig,
    config: TrainConfig,
    dataset: Dataset,
) -> tuple[LabeledImages, Truth, TriggeredImages]:
    """What a defence may see and what only metrics may: from the record, or made now."""
    if "poison" in record.finished():
        return load_case(record)
    with record.stage("poison"):
        trigger = trigger.prepare(FitContext(dataset, labels_to.target, config.random_seed, config))
        poisoned = poison_training_set(
            dataset.train, trigger, labels_to, poison, config.random_seed
        )
        triggered = trigger_test_set(dataset.test, trigger, labels_to)
        truth = Truth(
            poisoned.original_labels,
            poisoned.poison_indicator,
            poisoned.roles == Role.COVER,
            labels_to.targets,
        )
        save_case(record, poisoned.data, truth, triggered)
        write_trigger_sheet(record, dataset, triggered)
    return poisoned.data, truth, triggered


def write_trigger_sheet(record: Record, dataset: Dataset, triggered: TriggeredImages) -> None:
    """trigger.png: eight test images clean, triggered, and their difference."""
    n = len(triggered.labels)
    if not n:
        log.warning(
            "trigger.png is left out: no test image has a label that the attack would change, so there is no ASR either"
        )
        return
    picked = torch.linspace(0, n - 1, min(8, n)).long()
    captions = [dataset.classes[label] for label in triggered.original_labels[picked]]
    figures.trigger_sheet(
        record / "trigger.png",
        dataset.test.images[triggered.index[picked]],
        triggered.images[picked],
        captions,
    )
