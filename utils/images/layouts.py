"""Sets of labelled images as people keep them, read whole and written back in the same layout.

A layout knows how to read a set (`read`) and how to write it with some samples relabelled, replaced
or left out (`write`). Untouched files are copied byte for byte. Reading runs nothing that a file
says: images as everywhere in this program (utils/images/decoding.py), arrays without unpickling
(array_file.py), CIFAR's pickles through an unpickler that knows arrays and nothing else (cifar.py).
Only CIFAR's set comes back in another layout, as a .npz file.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.config import UserError
from utils.images.array_file import ArrayFile
from utils.images.cifar import CifarFiles, is_cifar
from utils.images.decoding import (
    OUTSIDE,
    BadImage,
    are_splits,
    class_folders,
    files_by_class,
    leads_out,
    open_with_kind,
    resize_all,
    training_part,
)
from utils.images.folders import tell_bad
from utils.images.layout import Layout, Outcome, fitted


def open_layout(path: Path) -> Layout:
    """The set at `path`: a folder of class folders, a .npz file, or CIFAR's python files.

    Raises:
        UserError: nothing that can be read as one of these, or fewer than two classes.
    """
    layout: Layout
    if path.suffix == ".npz" and path.is_file():
        layout = ArrayFile(path)
    elif is_cifar(path):
        layout = CifarFiles(path)
    elif path.is_dir():
        layout = ImageFolder(path)
    else:
        raise UserError(
            f"data: {path} is no folder of class folders, no .npz file and no folder of CIFAR "
            "batches"
        )
    present = len(layout.labels.unique())
    if present < 2:
        raise UserError(
            f"data: {path} has images of {present} class; two or more are needed "
            f"(expected {path.name}/<class>/<image>)"
        )
    return layout


class ImageFolder(Layout):
    """<class>/**/<image>; classes are the folder names, sorted.

    Images are read as a viewer shows them (utils/images/decoding.py), so one that is replaced is
    written upright.

    Raises:
        UserError: files that are no usable images, or links out of the folder (all are logged); or
            the folders are parts of a set.
    """

    kind = "image folder"

    def __init__(self, folder: Path):
        self.folder, self.classes = folder, class_folders(folder)
        if are_splits(self.classes):
            raise UserError(
                f"data: {folder} holds {'/, '.join(self.classes)}/, which are no classes; "
                f"give the part to be cleaned, {folder / training_part(self.classes)}"
            )
        files = files_by_class(folder, self.classes)
        self.labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        self.paths = [Path(path).relative_to(folder).as_posix() for path, _ in files]
        self.shapes = self._shapes()
        self.sizes = common_sizes([shape[:2] for shape in self.shapes]) if files else []
        inside = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        self.left_out = sorted(inside - set(self.paths))

    def _open(self, path: str) -> tuple[Image.Image, bool]:
        if leads_out(self.folder / path, self.folder):
            raise BadImage(OUTSIDE)
        return open_with_kind(self.folder / path)

    def _shapes(self) -> list[tuple[int, int, bool]]:
        """Height, width and whether it is grey, of every image.

        Memory holds one image at a time, so they are decoded again later.
        """
        shapes, bad = [], []
        for path in self.paths:
            try:
                image, grey = self._open(path)
                shapes.append((image.height, image.width, grey))
            except BadImage as error:
                bad.append(f"{self.folder / path}: {error}")
        if told := tell_bad(bad, len(self.paths), self.folder):
            raise UserError(f"data: {told}")
        return shapes

    def images(self, size: int) -> Tensor:
        parts = [resize_all(self._pixels(path), size) for path in self.paths]
        return torch.from_numpy(np.concatenate(parts))

    def _pixels(self, path: str) -> np.ndarray:
        try:
            return np.asarray(self._open(path)[0])[None]
        except BadImage as error:
            raise UserError(
                f"{self.folder / path}: cannot be read any more ({error}); repair or remove it"
            ) from None

    def write(self, folder: Path, outcome: Outcome) -> None:
        """Untouched files first, under their names; then those that keep their class; then all.

        A replaced image becomes a .png. Where its name is taken, a number is added.
        """
        for name in self.classes:
            (folder / name).mkdir(parents=True, exist_ok=True)
        rows = lambda mask: (mask & ~outcome.dropped).nonzero().flatten().tolist()
        relabelled = outcome.labels != self.labels
        untouched = rows(~outcome.replaced & ~relabelled)
        for k in untouched:
            self._copy(k, folder / self.paths[k])
        taken = {self.paths[k].casefold() for k in untouched}
        for k in rows(outcome.replaced & ~relabelled) + rows(relabelled):
            path = Path(self.classes[outcome.labels[k]], *Path(self.paths[k]).parts[1:])
            if outcome.replaced[k]:
                target = folder / free_name(path.with_suffix(".png"), taken)
                target.parent.mkdir(parents=True, exist_ok=True)
                height, width, grey = self.shapes[k]
                image = fitted(outcome.images[k].numpy(), (height, width), grey)
                Image.fromarray(image).save(target)
            else:
                self._copy(k, folder / free_name(path, taken))

    def _copy(self, k: int, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder / self.paths[k], target)


def common_sizes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The distinct sizes, most common first."""
    distinct, counts = np.unique(np.array(sizes), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(height), int(width)) for height, width in distinct[order]]


def free_name(name: Path, taken: set[str]) -> str:
    """`name`, or with -2, -3, ... before its ending where that is taken.

    What is returned is added to `taken` (case-folded).
    """
    numbered = (name.with_stem(f"{name.stem}-{k}") for k in range(2, len(taken) + 3))
    candidates = (path.as_posix() for path in (name, *numbered))
    free = next(path for path in candidates if path.casefold() not in taken)
    taken.add(free.casefold())
    return free
