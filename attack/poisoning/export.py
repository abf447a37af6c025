"""A poisoned training set as a folder of images, for other programs."""

import csv
import filecmp
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from utils.classifier.metrics import Truth
from utils.config import UserError
from utils.images.data import LabeledImages

TRUTH = "truth.csv"


def export_images(folder: Path, data: LabeledImages, truth: Truth, classes: Sequence[str]) -> None:
    """Write FOLDER/<given class>/<index>.png, manifest.csv (path, given label) and truth.csv.

    All of it is written or nothing. Every class has a folder, also an empty one, so that labels can
    be read off the sorted names. A folder that holds this very export, from a run that was
    interrupted later, is left as it is.

    Raises:
        UserError: the folder holds something else already.
    """
    refuse_occupied(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    labels = data.labels.tolist()
    paths = [f"{classes[label]}/{i:05d}.png" for i, label in enumerate(labels)]
    truths = [t.int().tolist() for t in (truth.original_labels, truth.poison, truth.cover)]
    columns = ("path", "original_label", "poison", "cover")
    try:
        for name in classes:
            (temporary / name).mkdir(parents=True)
        for path, image in zip(paths, data.images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary / path)
        _write_csv(temporary / "manifest.csv", ("path", "label"), zip(paths, labels))
        _write_csv(temporary / TRUTH, columns, zip(paths, *truths))
        if folder.is_dir() and _same_files(temporary, folder):
            return
        if folder.exists() and any(folder.iterdir()):
            raise _occupied(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_occupied(folder: Path) -> None:
    """Fail early: raises UserError where something lies there that is no export."""
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / TRUTH).is_file()):
        raise _occupied(folder)


def _occupied(folder: Path) -> UserError:
    return UserError(f"export: {folder} holds something already; name a new or an empty folder")


def _same_files(one: Path, other: Path) -> bool:
    listed = lambda folder: sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    names = listed(one)
    if names != listed(other):
        return False
    files = [name for name in names if (one / name).is_file()]
    return not any(filecmp.cmpfiles(one, other, files, shallow=False)[1:])


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(columns)
        writer.writerows(rows)
