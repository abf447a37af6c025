"""Sets of labelled images as people keep them, read whole and written back in the same layout.

Untouched files are copied byte for byte. Reading runs nothing that a file says: arrays are read
without unpickling (array_file.py), CIFAR's pickles by an unpickler that knows arrays and nothing
else (cifar.py), archives without unpacking them (tar_files.py). Only CIFAR's set comes back in
another layout, as a .npz file. saving.py says what a changed image keeps.
"""

import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.config import ReadConfig, UserError
from utils.images import decoding
from utils.images.array_file import ArrayFile
from utils.images.arrow_files import ArrowFiles, arrow_files
from utils.images.cifar import CifarFiles, is_cifar
from utils.images.file_table import TABLES, FileTable, NoFiles, find_table
from utils.images.folders import UNUSABLE, refuse_bad
from utils.images.layout import Keys, Layout, Outcome
from utils.images.saving import free_name, saved_like
from utils.images.tar_files import TarFiles, tar_files
from utils.images.tree import is_image, read_tree


def open_layout(
    path: Path,
    keys: Keys = Keys(),  # noqa: B008 - it is frozen
    how: ReadConfig | None = None,
) -> Layout:
    """The set at `path`, in any of the layouts that docs/own-data.md lists.

    Args:
        how: how a folder of images is read.

    Raises:
        UserError: nothing that can be read as one of these, keys that mean nothing to it, or fewer
            than two classes.
    """
    layout = _open(path, keys, how or ReadConfig())
    for field in fields(Keys):
        if getattr(keys, field.name) != field.default and field.name not in layout.uses:
            known = ", ".join(layout.uses) or "no such key"
            found = f"{path} is read as {layout.kind}, which takes {known}"
            raise UserError(f"{field.name}: {found}; leave it out")
    present = len(layout.labels.unique())
    if present < 2:
        needed = f"two or more are needed (expected {path.name}/<class>/<image>)"
        raise UserError(f"data: {path} has images of {present} class; {needed}")
    return layout


def _open(path: Path, keys: Keys, how: ReadConfig) -> Layout:
    if path.suffix == ".npz" and path.is_file():
        return ArrayFile(path, keys)
    if path.suffix.lower() in TABLES and path.is_file():
        return FileTable(path, keys)
    if is_cifar(path):
        return CifarFiles(path)
    if path.is_dir() and _has_classes(path):
        return ImageFolder(path, how)
    if files := arrow_files(path, keys.split):
        return ArrowFiles(path, files, keys)
    if archives := tar_files(path, keys.split):
        return TarFiles(path, archives, keys)
    if path.is_dir():
        return _flat(path, keys) or ImageFolder(path, how)
    kinds = "no folder of class folders, no .npz file and no folder of CIFAR batches"
    others = "no .csv, .tsv, .parquet, .arrow or .tar file"
    raise UserError(f"data: {path} is {kinds}; it is {others} either")


def _flat(folder: Path, keys: Keys) -> FileTable | None:
    """A folder's table with its files; None where it has none, or one about other files."""
    table = find_table(folder, keys.split)
    try:
        return FileTable(table, keys) if table else None
    except NoFiles:
        if not decoding.class_folders(folder):
            raise
        return None


def _has_classes(folder: Path) -> bool:
    """Whether two or more folders in a folder hold images."""
    files = lambda name: (path for path in (folder / name).rglob("*") if not path.is_dir())
    shown = lambda path: not any(map(decoding.is_hidden, path.relative_to(folder).parts))
    holds = lambda name: any(shown(path) and is_image(path, folder) for path in files(name))
    return sum(map(holds, decoding.class_folders(folder))) > 1


class ImageFolder(Layout):
    """<class>/**/<image>, or with `classes: leaf` <any>/<class>/<image> (tree.py, parts.py).

    Raises:
        UserError: files that are no usable images, or links out of the folder (all are logged),
            unless bad images are to be skipped; or it cannot be told which folders are classes.
    """

    kind = "image folder"

    def __init__(self, folder: Path, how: ReadConfig):
        tree = read_tree(folder, how)
        self.folder, self.classes = folder, tree.classes
        self.within = None if how.follow_links else folder
        shapes, bad = self._shapes([path for path, _ in tree.files])
        refuse_bad(bad, len(tree.files), folder, how, "data")
        read = [(path, label) for path, label in tree.files if path not in bad]
        self.shapes, self.paths = shapes, [path for path, _ in read]
        self.labels = torch.tensor([label for _, label in read], dtype=torch.int64)
        sizes = Counter(sorted(shape[:2] for shape in self.shapes))
        self.sizes = [size for size, _ in sizes.most_common()]
        self.reasons = tree.left_out | ({UNUSABLE: list(bad)} if bad else {})
        self.found = tree.found

    def _shapes(self, paths: list[str]) -> tuple[list[tuple[int, int, bool]], dict[str, str]]:
        """Height, width and whether it is grey, of every image; memory holds one at a time. And
        {path: reason} of those that are not usable."""
        shapes, bad = [], {}
        for path in paths:
            try:
                image, grey = decoding.open_with_kind(self.folder / path, self.within)
                shapes.append((image.height, image.width, grey))
            except decoding.BadImage as error:
                bad[path] = str(error)
        return shapes, bad

    def images(self, size: int) -> Tensor:
        files = (self.folder / path for path in self.paths)
        again = (decoding.read_again(file, file, self.within) for file in files)
        return torch.from_numpy(np.concatenate([decoding.resize_all(x, size) for x in again]))

    def write(self, folder: Path, outcome: Outcome) -> dict[str, str]:
        """Untouched files first, under their names; then those that keep their class; then all.

        A replaced image keeps its format, or becomes a .png. Where its name is taken, a number is
        added.
        """
        lost: dict[str, str] = {}
        rows = lambda mask: (mask & ~outcome.dropped).nonzero().flatten().tolist()
        relabelled = outcome.labels != self.labels
        untouched = rows(~outcome.replaced & ~relabelled)
        for k in untouched:
            self._copy(k, folder / self.paths[k])
        taken = {self.paths[k].casefold() for k in untouched}
        for k in rows(outcome.replaced & ~relabelled) + rows(relabelled):
            inside = Path(self.paths[k]).relative_to(self.classes[self.labels[k]])
            path = Path(self.classes[outcome.labels[k]], inside)
            if outcome.replaced[k]:
                original = (self.folder / self.paths[k]).read_bytes()
                saved = saved_like(original, outcome.images[k].numpy())
                path = path.with_suffix(saved.ending or path.suffix)
                target = folder / free_name(path, taken)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(saved.content)
                lost |= {self.paths[k]: saved.lost} if saved.lost else {}
            else:
                self._copy(k, folder / free_name(path, taken))
        return lost

    def _copy(self, k: int, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder / self.paths[k], target)
