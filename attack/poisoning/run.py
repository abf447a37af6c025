"""The stages of a run, in order: poison, victim, and then whatever the defence does."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from attack.poisoning.config import Order
from attack.poisoning.export import export_images, refuse_occupied
from attack.poisoning.labels import LabelMap, label_map, with_target_number
from attack.poisoning.poison import Role, poison_training_set, trigger_test_set
from attack.poisoning.trigger import FitContext
from defense.elixir.forecast import training_line
from defense.harness.case import Case, load_case, save_case
from defense.harness.run import run_defense, show_finished
from utils.classifier.metrics import EpochLog, Truth
from utils.classifier.models import check_model, trained
from utils.devices import pick_device
from utils.images.data import Dataset, LabeledImages, TriggeredImages, load_dataset
from utils.page import figures
from utils.storage.record import DATA_KEY, Record, start_logging

log = logging.getLogger("dataelixir")


def run_attack(order: Order) -> None:
    """Check what can be checked beforehand, then run the stages up to `stop_after`."""
    run, trigger, defense = order.run, order.trigger, order.defense
    start_logging(None)
    dataset = load_dataset(order.data)
    check_model(defense.model, dataset, defense.batch_size)
    pick_device(defense.device)
    numbered = with_target_number(order.poison, dataset.train.labels, dataset.classes)
    order = replace(order, poison=numbered)
    labels_to = label_map(trigger, order.poison, dataset.num_classes)
    if run.stop_after == "report":
        defense.check(dataset)
    export = Path(os.path.abspath(os.path.expanduser(run.export))) if run.export else None
    if export:
        refuse_occupied(export)
    if run.dry_run:
        log.info("\n".join(costs(order, dataset)))
        return
    record = Record(run.save_folder_name or f"{trigger.name}_{dataset.name}")
    claimed = {DATA_KEY: dataset.digest(), "passed_over": order.passed_over}
    record.claim(order.keys(record.name) | claimed, type(defense), type(trigger))
    start_logging(record / "log.txt")
    data, truth, triggered = poisoned_case(order, record, labels_to, dataset)
    if export:
        export_images(export, data, truth, dataset.classes)
    if show_finished(record) or run.stop_after == "poison":
        return
    with record.stage("victim"):
        observer, device = EpochLog(record / "metrics.csv", dataset.test, triggered), defense.device
        victim = trained(
            "victim", data, defense, dataset, pick_device(device), record.path, observer
        )
    if run.stop_after == "report":
        case = Case(trigger.name, data, truth, triggered, dataset, victim)
        run_defense(defense, case, record)


def costs(order: Order, dataset: Dataset) -> list[str]:
    """Lines that say what the stages of a run would cost."""
    data, defense, stop_after = dataset.train, order.defense, order.run.stop_after
    images = min(order.trigger.images_fitted_on, len(data))
    fitted = f"{order.trigger.name} is first fitted on {images:,} of them"
    minutes = f"; {fitted}, which takes minutes and is not measured here" if images else ""
    lines = [f"poison: {len(data):,} images{minutes}"]
    if stop_after != "poison":
        lines.append(training_line("victim", data, defense, dataset))
    return lines + (defense.costs(data, dataset) if stop_after == "report" else [])


def poisoned_case(
    order: Order, record: Record, labels_to: LabelMap, dataset: Dataset
) -> tuple[LabeledImages, Truth, TriggeredImages]:
    """What a defence may see and what only metrics may: from the record, or made now."""
    if "poison" in record.finished():
        return load_case(record)
    with record.stage("poison"):
        seed = order.defense.random_seed
        trigger = order.trigger.prepare(FitContext(dataset, labels_to.target, seed, order.defense))
        poisoned = poison_training_set(dataset.train, trigger, labels_to, order.poison, seed)
        triggered = trigger_test_set(dataset.test, trigger, labels_to)
        poison, cover = poisoned.poison_indicator, poisoned.roles == Role.COVER
        truth = Truth(poisoned.original_labels, poison, cover, labels_to.targets)
        save_case(record, poisoned.data, truth, triggered)
        write_trigger_sheet(record, dataset, triggered)
    return poisoned.data, truth, triggered


def write_trigger_sheet(record: Record, dataset: Dataset, triggered: TriggeredImages) -> None:
    """trigger.png: eight test images clean, triggered, and their difference."""
    n = len(triggered.labels)
    if not n:
        log.warning(
            "trigger.png is left out: no test image has a label that the attack would change, "
            "so there is no ASR either"
        )
        return
    picked = torch.linspace(0, n - 1, min(8, n)).long()
    captions = [dataset.classes[label] for label in triggered.original_labels[picked]]
    clean = dataset.test.images[triggered.index[picked]]
    figures.trigger_sheet(record / "trigger.png", clean, triggered.images[picked], captions)
