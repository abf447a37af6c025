"""Cleaning a set: a classifier is trained on it, DataElixir decides, the outcome is written."""

import copy
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.elixir.config import DataElixirConfig
from defense.elixir.forecast import planned, training_line
from defense.harness.defense import Defense
from defense.harness.defense_run import DefenseRun
from defense.harness.evidence import write_arrays, write_evidence
from defense.harness.result import Result
from defense.own_data.config import CleanConfig
from defense.own_data.given import (
    Given,
    fitting_denoiser,
    open_given,
    refuse_few,
    refuse_small,
    refuse_unfit,
)
from defense.own_data.in_memory import as_labeled, class_names, names_in
from defense.own_data.oddities import copies
from defense.own_data.output_folder import SUMMARY, OutputFolder, carry_out, differing
from defense.own_data.summary import findings, summarise
from defense.own_data.under_way import WatchedFolder
from utils.classifier.models import build_classifier, load_weights, trained
from utils.classifier.networks import Classifier
from utils.classifier.training import Observer
from utils.config import UserError, as_flat_dict, resolve_path
from utils.devices import pick_device
from utils.images.data import DATASETS, Dataset, LabeledImages
from utils.images.folders import in_words, tell, tell_reasons
from utils.page.record_page import write_page
from utils.storage.checksums import of_tensors
from utils.storage.files import printable, write_table
from utils.storage.record import DATA_KEY, save_arrays, start_logging, write_json

log = logging.getLogger("dataelixir")
VICTIM_KEY = "victim_sha256"
OWN = DATASETS["imagefolder"]  # the entry of a set that nobody knows


@dataclass(frozen=True)
class Cleaned:
    """What `defense.purify.clean` gives back; N samples in the order given.

    Attributes:
        data: images uint8 (N, 3, H, W) and labels int64 (N,) after cleaning.
        changed: bool (N,), label or image differs from what was given.
        left_out: bool (N,), samples that may be poisoned and that the benign model is not sure of:
            leave them out of a training (`data[~left_out]`); `data` holds them as they were given.
        target_labels: the classes that a backdoor points to; empty = none found, nothing changed.
        decisions: columns of decisions.csv, each (N,).
        result: everything the defence gives back, the benign model (`result.model`) among it.
    """

    data: LabeledImages
    changed: Tensor
    left_out: Tensor
    target_labels: tuple[int, ...]
    decisions: dict[str, np.ndarray]
    result: Result


@dataclass(frozen=True)
class Cleaning:
    """One run: DataElixir cleans the training set of `dataset`.

    Attributes:
        victim: a classifier trained on the set; None to have one trained.
    """

    dataset: Dataset
    defense: Defense
    victim: Classifier | None

    @property
    def data(self) -> LabeledImages:
        return self.dataset.train

    @property
    def config(self) -> DataElixirConfig:
        assert isinstance(self.defense, DataElixirConfig)
        return self.defense

    def claim(self, folder: OutputFolder, told: dict[str, Any]) -> None:
        """Take the folder for this run; `told` are keys beside those of the defence.

        Raises:
            UserError: it holds something else, or the run of other keys, another set or victim.
        """
        data, victim = self.data, self.victim and weights_digest(self.victim)
        known = {DATA_KEY: of_tensors(data.images, data.labels), VICTIM_KEY: victim}
        folder.claim(as_flat_dict(self.defense) | told | known, type(self.defense))

    def analyse(
        self, folder: OutputFolder, paths: Sequence[str] = (), observer: Observer | None = None
    ) -> Result:
        """Run the defence; write decisions.csv, with the samples' `paths`, and the page's data.

        `observer` is told of every epoch.
        """
        data, dataset, config = self.data, self.dataset, self.config
        save_arrays(folder / "poisoned.npz", images=data.images, labels=data.labels)
        victim, device = self.victim, pick_device(config.device)
        if victim is None:
            with folder.stage("victim"):
                victim = trained("victim", data, config, dataset, device, folder.path, observer)
        run = DefenseRun(config, dataset, folder, device, observer)
        result = self.defense.defend(data, victim, run)
        with folder.stage("report") as found:
            steps = config.last_steps_m
            write_arrays(result, folder)
            names, columns = np.array(dataset.classes), result.table(data.labels, steps)
            columns |= {f"{age}_class": names[columns[f"{age}_label"]] for age in ("given", "new")}
            write_table(folder / "decisions.csv", ({"path": paths} if paths else {}) | columns)
            write_evidence(result, data.labels, dataset.classes, steps, folder)
            found |= findings(result, data, steps, str(victim.device))
        return result


def weights_digest(victim: Classifier) -> str:
    """A hash of a classifier's weights, by which a run knows it again."""
    found = hashlib.sha256(type(victim).__qualname__.encode())
    for key, value in victim.state_dict().items():
        found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def clean_in_memory(
    data: Any,
    labels: Any,
    defense: Defense,
    victim: Classifier | None,
    classes: Sequence[str] | None,
    folder: Path | None,
) -> Cleaned:
    """What `defense.purify.clean` says; `defense` is DataElixir with its keys."""
    given = as_labeled(data, labels)
    names = class_names(given.labels, names_in(data) if classes is None else classes)
    dataset = Dataset(given, given[:0], names, "", OWN)
    refuse_few(given.labels, dataset.num_classes)
    assert isinstance(defense, DataElixirConfig)
    refuse_small(given.labels, defense)
    defense.check(dataset)
    if victim is not None:
        victim = copy.deepcopy(victim).to(pick_device(defense.device)).eval()
    refuse_unfit(dataset, defense, victim)
    cleaning = Cleaning(dataset, defense, victim)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as path:
        place = OutputFolder(Path(path))
        cleaning.claim(place, {"data": "in memory", "victim": victim is not None})
        result = cleaning.analyse(place)
        defense.clean_up(place)
    assert result.product
    cleaned, out = result.product
    changed = differing(cleaned.images, given.images) | (cleaned.labels != given.labels)
    table = result.table(given.labels, cleaning.config.last_steps_m)
    return Cleaned(cleaned, changed, ~out, result.targets or (), table, result)


def clean_given(order: CleanConfig, defense: Defense) -> None:
    """Read the set that `order` names, find its denoiser, and clean it or say what that costs."""
    if not order.data or not (order.out or order.dry_run):
        both = "--data DIR (what is to be cleaned) and --out DIR (a new folder)"
        raise UserError(f"data, out: give {both}")
    start_logging(None)
    given = open_given(order.data, order.keys, order)
    if order.out:
        given.refuse_overlap(Path(os.path.expanduser(order.out)))
    assert isinstance(defense, DataElixirConfig)
    refuse_small(given.layout.labels, defense)
    given.layout.account()
    denoiser = fitting_denoiser(given, defense, order.resize)
    data, info = given.layout.read(denoiser.resolution), DATASETS.get(given.dataset, OWN)
    dataset = Dataset(data, data[:0], given.layout.classes, given.dataset, info)
    refuse_unfit(dataset, defense, None)
    cleaning = Cleaning(dataset, defense, read_victim(order.victim, dataset, defense))
    if order.dry_run:
        tell_given(given)
        lines = [] if cleaning.victim else [training_line("victim", data, defense, dataset)]
        log.info("\n".join([*lines, *defense.costs(data, dataset)]))
    else:
        write_all(order, given, cleaning)


def tell_given(given: Given) -> None:
    """Log what was read, and what was not; UserError where a file is not accounted for."""
    layout = given.layout
    counts = f"{len(layout.labels)} images of {len(layout.classes)} classes, {given.shown_sizes}"
    log.info(f"{given.path}: {layout.kind}, {counts}")
    log.info("in all %s", in_words(layout.account()))
    tell_reasons(layout.reasons)
    tell("classes without images", layout.empty)


def write_all(order: CleanConfig, given: Given, cleaning: Cleaning) -> None:
    """Analyse what is not analysed yet, carry the action out, and write summary and page."""
    folder, data = WatchedFolder(Path(os.path.expanduser(order.out))), cleaning.data
    place = {"data": printable(str(given.path)), "victim": order.victim, "resize": order.resize}
    cleaning.claim(folder, place)
    start_logging(folder / "log.txt")
    tell_given(given)
    if "report" in folder.finished():
        log.info("analysed before: nothing to compute")
    else:
        folder.forget()
        dataset, has_victim = cleaning.dataset, cleaning.victim is not None
        stages = planned(data, cleaning.config, dataset, has_victim)
        folder.watch(stages, len(data), dataset.classes)
        cleaning.analyse(folder, given.layout.paths, folder.observe)
    held = carry_out(order.action, folder, given.layout, data.labels)
    side, seed = data.images.shape[-1], cleaning.defense.random_seed
    summary = summarise(given, data.labels, folder, order.action, held, side, seed)
    summary["notes"] += copies(data, given.layout.paths)
    write_json(folder / SUMMARY, summary)
    cleaning.defense.clean_up(folder)
    log.info("%s", "\n".join(summary["notes"]))
    if left_out := summary["left_out"]:
        log.info("left out, as the model is not sure of them:\n%s", "\n".join(left_out))
    targets = summary["target_labels"]["names"] or "none"
    page = write_page(folder.path)
    log.info(f"{summary['status']}: target labels {targets}; the page is {page}")


def read_victim(text: str | None, dataset: Dataset, config: DataElixirConfig) -> Classifier | None:
    """The classifier in the file that `--victim` means; UserError where it does not fit the set."""
    if not text:
        return None
    file, classes = resolve_path(text, "victim"), dataset.num_classes
    victim = build_classifier(config.model, classes, dataset.info, (0, "victim"))
    device = pick_device(config.device)
    try:
        return load_weights(victim, file).to(device).eval()
    except UserError:
        wanted = f"{config.model} for {classes} classes saved as .safetensors"
        advice = "give the --model that it is, or leave --victim out to have one trained"
        raise UserError(f"victim: {file} is no {wanted}; {advice}") from None
