"""Clean a set of labelled images of your own: python defense/purify.py --data DIR --out DIR --ddpm DENOISER

DIR is a folder of class folders, a .npz file, a folder of CIFAR's python files, or the name of a record. A classifier is
trained on the set (or given by --victim), DataElixir decides, and OUT gets cleaned/ (the set in its own layout),
decisions.csv, summary.json and report.html. The input is only read. Without anything found, nothing is changed.

From Python, on tensors or arrays: `from defense import purify; purify.clean(images, labels, config=...)`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from defense import dataelixir
from defense.elixir.config import DataElixirConfig
from defense.elixir.forecast import training_line
from defense.harness.evidence import write_evidence
from defense.harness.result import Result
from defense.own_data.given import Given, fitting_denoiser, open_given, refuse_few
from defense.own_data.in_memory import as_labeled, class_names
from defense.own_data.output_folder import (
    CLEANED,
    SUMMARY,
    OutputFolder,
    carry_out,
    differing,
    refuse_overlap,
)
from defense.own_data.summary import findings, summarise
from utils.classifier.models import build_classifier, load_weights, trained
from utils.config import UserError, as_flat_dict, command_line, parse_config, resolve_path
from utils.devices import pick_device
from utils.images.data import DATASETS, Dataset, LabeledImages
from utils.late import Tensor, torch
from utils.page.record_page import write_page
from utils.processes import leading_process
from utils.storage.checksums import of_tensors
from utils.storage.files import printable, write_table
from utils.storage.record import DATA_KEY, save_arrays, start_logging, write_json

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

log = logging.getLogger("dataelixir")
VICTIM_KEY = "victim_sha256"


@dataclass(frozen=True)
class CleanConfig:
    """Which set is cleaned, and what becomes of it.

    Args:
        data: folder of class folders, .npz file, folder of CIFAR's python files, or name of a record.
        out: new folder for the cleaned set, the decisions and the page; a run that was interrupted goes on in its own.
            The same command again leaves cleaned/ as it is, another action puts it aside as cleaned-1/.
        victim: a classifier (.safetensors of this program, of the kind that `model` names) instead of one trained on the set.
        action: relabel (purified images under their new labels), drop (leave the changed samples out) or report (write no images).
        resize: analyse images of other sizes at the denoiser's; only purified ones are affected, they are scaled back.
        dry_run: count, measure a small batch and say what the run would cost, without writing anything.
    """

    data: str = ""
    out: str = ""
    victim: str | None = None
    action: Literal["relabel", "drop", "report"] = "relabel"
    resize: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Cleaned:
    """What `clean` gives back; N samples in the order given.

    Attributes:
        data: images uint8 (N, 3, H, W) and labels int64 (N,) after cleaning.
        changed: bool (N,), label or image differs from what was given.
        target_labels: the classes that a backdoor points to; empty = none found, nothing changed.
        decisions: columns of decisions.csv, each (N,).
        result: everything the defence gives back, the benign model (`result.model`) among it.
    """

    data: LabeledImages
    changed: Tensor
    target_labels: tuple[int, ...]
    decisions: dict[str, np.ndarray]
    result: Result


def clean(
    data: Tensor | np.ndarray | torch.utils.data.Dataset,
    labels: Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    config: DataElixirConfig,
    victim: Classifier | None = None,
    classes: Sequence[str] | None = None,
    folder: Path | None = None,
) -> Cleaned:
    """Clean a set that is in memory.

    Args:
        data: images uint8 (N, 3, H, W) or (N, H, W, 3), or floats in [0, 1] of these shapes (rounded to 256 levels), as a
            tensor or an array; or a torch Dataset of (image, label) pairs with images (3, H, W) or (H, W, 3) of these kinds, or
            PIL's, which are read as files are: 16 bits scaled to 8, transparency over white. All images are of one size.
        labels: integers (N,), 0..K-1, three classes or more with samples; None where `data` is a Dataset, whose labels are integers too.
        config: keys of DataElixir; `config.ddpm` names the denoiser, which must be for images of this size.
        victim: a classifier trained on the set; a copy of it works on `config.device`. By default one is trained.
        classes: a name for each class, K or more (a class may have no samples); by default the numbers.
        folder: where the run's files stay, so that one that was interrupted goes on; by default they are deleted. Going on is for
            interrupted runs only: on the folder of a complete one images are purified again, as the intermediaries, and
            `result.examples` with them, stay after a complete run only with `config.keep_intermediaries`.

    Raises:
        UserError: images, labels or names that do not fit, fewer than three classes with samples, no such denoiser, or whatever stops a training.
    """
    given = as_labeled(data, labels)
    dataset = Dataset(
        given, given[:0], class_names(given.labels, classes), "", DATASETS["imagefolder"]
    )
    refuse_few(given.labels, dataset.num_classes)
    dataelixir.check(config, dataset)
    victim = copy.deepcopy(victim).to(pick_device(config.device)).eval() if victim else None
    with _kept(folder) as place:
        place.claim(
            as_flat_dict(config)
            | {
                "data": "in memory",
                DATA_KEY: of_tensors(given.images, given.labels),
                "victim": victim is not None,
                VICTIM_KEY: weights_digest(victim),
            }
        )
        result = analyse(given, dataset, config, place, victim)
        dataelixir.clean_up(config, place)
    table = result.decisions.table(given.labels, config.last_steps_m)
    changed = differing(result.purified.images, given.images) | (
        result.purified.labels != given.labels
    )
    return Cleaned(result.purified, changed, result.discrepancy.targets, table, result)


@contextlib.contextmanager
def _kept(folder: Path | None) -> Iterator[OutputFolder]:
    with (
        tempfile.TemporaryDirectory() if folder is None else contextlib.nullcontext(folder) as path
    ):
        yield OutputFolder(Path(path))


def weights_digest(victim: Classifier | None) -> str | None:
    """A hash of a given classifier's weights, by which a run knows it again; None where the run trains its own."""
    if victim is None:
        return None
    found = hashlib.sha256(type(victim).__qualname__.encode())
    for key, value in victim.state_dict().items():
        found.update(
            f"{key} {value.dtype} {tuple(value.shape)}".encode()
            + value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()[:16]


def analyse(
    data: LabeledImages,
    dataset: Dataset,
    config: DataElixirConfig,
    folder: OutputFolder,
    victim: Classifier | None,
    paths: Sequence[str] | None = None,
) -> Result:
    """Train the classifier where none is given, run DataElixir, and leave the files that summary and page are made of."""
    save_arrays(folder / "poisoned.npz", images=data.images, labels=data.labels)
    if victim is None:
        with folder.stage("victim"):
            victim = trained(
                "victim", data, config, dataset, pick_device(config.device), folder.path
            )
    result = dataelixir.defend(data, victim, config, dataset, folder)
    with folder.stage("report") as found:
        save_arrays(
            folder / "purified.npz", images=result.purified.images, labels=result.purified.labels
        )
        save_arrays(folder / "votes.npz", votes=result.votes.to(torch.int16))
        names, columns = (
            np.array(dataset.classes),
            result.decisions.table(data.labels, config.last_steps_m),
        )
        named = {f"{age}_class": names[columns[f"{age}_label"]] for age in ("given", "new")}
        write_table(folder / "decisions.csv", ({"path": paths} if paths else {}) | columns | named)
        write_evidence(result, data.labels, dataset.classes, config.last_steps_m, folder)
        found |= findings(result, data, config.last_steps_m, str(victim.device))
    return result


def given_victim(file: Path, dataset: Dataset, config: DataElixirConfig) -> Classifier:
    """The classifier in a file, checked against the set.

    Raises:
        UserError: it does not fit.
    """
    victim = build_classifier(config.model, dataset.num_classes, dataset.info, (0, "victim"))
    device = pick_device(config.device)
    try:
        return load_weights(victim, file).to(device).eval()
    except UserError:
        raise UserError(
            f"victim: {file} is no {config.model} for {dataset.num_classes} classes saved as .safetensors; "
            "give the --model that it is, or leave --victim out to have one trained"
        ) from None


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Clean the set that the command line names."""
    with leading_process() as leading:
        if leading:
            lead(argv)


def lead(argv: Sequence[str] | None) -> None:
    """Read the set, find the denoiser, and say what it would cost or do it."""
    order, config = parse_config(argv, CleanConfig, DataElixirConfig, description=__doc__)
    if not order.data or not (order.out or order.dry_run):
        raise UserError(
            "data, out: give --data DIR (what is to be cleaned) and --out DIR (a new folder)"
        )
    start_logging(None)
    given = open_given(order.data)
    if order.out:
        refuse_overlap(given.path, Path(os.path.expanduser(order.out)))
    denoiser = fitting_denoiser(given, config.resolved(), order.resize)
    data = given.layout.read(denoiser.resolution)
    dataset = Dataset(
        data,
        data[:0],
        given.layout.classes,
        given.dataset,
        DATASETS.get(given.dataset, DATASETS["imagefolder"]),
    )
    victim = (
        given_victim(resolve_path(order.victim, "victim"), dataset, config)
        if order.victim
        else None
    )
    log.info(
        "%s: %s, %d images of %d classes, %s",
        given.path,
        given.layout.kind,
        len(data),
        dataset.num_classes,
        ", ".join(f"{h}x{w}" for h, w in given.layout.sizes[:3])
        + (" and others" if len(given.layout.sizes) > 3 else ""),
    )
    if order.dry_run:
        lines = [] if victim else [training_line("victim", data, config, dataset)]
        lines += dataelixir.DataElixir(**vars(config)).costs(data, dataset)
        log.info("\n".join(lines))
        return
    run(order, given, data, dataset, config, victim)


def run(
    order: CleanConfig,
    given: Given,
    data: LabeledImages,
    dataset: Dataset,
    config: DataElixirConfig,
    victim: Classifier | None,
) -> None:
    """Analyse what is not analysed yet, carry the action out, and write summary and page."""
    folder = OutputFolder(Path(os.path.expanduser(order.out)))
    folder.claim(
        as_flat_dict(config)
        | {
            "data": printable(str(given.path)),
            DATA_KEY: of_tensors(data.images, data.labels),
            "victim": order.victim,
            VICTIM_KEY: weights_digest(victim),
            "resize": order.resize,
        }
    )
    start_logging(folder / "log.txt")
    if "report" in folder.finished():
        log.info("analysed before: nothing to compute")
    else:
        folder.forget()
        analyse(data, dataset, config, folder, victim, given.layout.paths)
    held = carry_out(order.action, folder, given.layout, data.labels)
    summary = summarise(
        given, data.labels, folder, order.action, data.images.shape[-1], config.random_seed
    )
    write_json(folder / SUMMARY, summary | {CLEANED: held})
    dataelixir.clean_up(config, folder)
    log.info("%s", "\n".join(summary["notes"]))
    log.info(
        "%s: target labels %s; the page is %s",
        summary["status"],
        summary["target_labels"]["names"] or "none",
        write_page(folder.path),
    )


if __name__ == "__main__":
    main()
