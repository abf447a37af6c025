"""Sets of labelled images as people keep them, read whole and written back in the same layout.

A layout knows how to read a set (`read`) and how to write it with some samples relabelled, replaced or left out
(`write`). Untouched files are copied byte for byte. Reading runs nothing that a file says: images as everywhere in this
program (utils/images/decoding.py), arrays without unpickling, CIFAR's pickles through an unpickler that knows arrays and
nothing else (utils/images/cifar.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.config import UserError
from utils.images.data import LabeledImages
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
from utils.images.folders import refuse_bad
from utils.late import Tensor, torch

PAIRS = (
    ("images", "labels"),
    ("x", "y"),
    ("x_train", "y_train"),
    ("data", "labels"),
)  # names of the two arrays in a .npz
PLAIN = 1000  # labels 0..K-1 below this are class numbers as they stand; any others are numbered in ascending order


@dataclass(frozen=True)
class Outcome:
    """What is to become of N samples.

    Attributes:
        labels: int64 (N,), the new labels.
        images: uint8 (N, 3, R, R), the new images; looked at where `replaced`.
        replaced: bool (N,), the image changes.
        dropped: bool (N,), the sample is left out.
    """

    labels: Tensor
    images: Tensor
    replaced: Tensor
    dropped: Tensor


class Layout:
    """A set in one layout.

    Attributes:
        kind: what the layout is called.
        classes: class names; label k is the k-th.
        labels: int64 (N,).
        paths: N names by which a person finds a sample.
        sizes: the (height, width) that occur, most common first.
    """

    kind: str
    classes: tuple[str, ...]
    labels: Tensor
    paths: list[str]
    sizes: list[tuple[int, int]]

    def images(self, size: int) -> Tensor:
        """uint8 (N, 3, size, size), resized (PIL bilinear) where a sample has another size."""
        raise NotImplementedError

    def write(self, folder: Path, outcome: Outcome) -> None:
        """Write the set with `outcome` carried out into an empty folder."""
        raise NotImplementedError

    def read(self, size: int) -> LabeledImages:
        """Images of that side, and labels."""
        return LabeledImages(self.images(size), self.labels)


def open_layout(path: Path) -> Layout:
    """The set at `path`: a folder of class folders, a .npz file, or a folder of CIFAR's python files.

    Raises:
        UserError: nothing that can be read as one of these, or fewer than two classes.
    """
    from utils.images.cifar import CifarFiles, is_cifar

    if path.suffix == ".npz" and path.is_file():
        layout: Layout = ArrayFile(path)
    elif is_cifar(path):
        layout = CifarFiles(path)
    elif path.is_dir():
        layout = ImageFolder(path)
    else:
        raise UserError(
            f"data: {path} is no folder of class folders, no .npz file and no folder of CIFAR batches"
        )
    present = len(layout.labels.unique())
    if present < 2:
        raise UserError(
            f"data: {path} has images of {present} class; two or more are needed (expected {path.name}/<class>/<image>)"
        )
    return layout


def common_sizes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The distinct sizes, most common first."""
    distinct, counts = np.unique(np.array(sizes), axis=0, return_counts=True)
    return [tuple(int(v) for v in distinct[k]) for k in np.argsort(-counts, kind="stable")]


def fitted(image: np.ndarray, size: tuple[int, int], grey: bool = False) -> np.ndarray:
    """uint8 (3, R, R) -> (H, W, 3), or (H, W) where `grey`, scaled to (H, W) = `size` (PIL bilinear)."""
    picture = Image.fromarray(image.transpose(1, 2, 0)).convert("L" if grey else "RGB")
    return np.asarray(
        picture
        if picture.size == size[::-1]
        else picture.resize(size[::-1], Image.Resampling.BILINEAR)
    )


class ImageFolder(Layout):
    """<class>/**/<image>; classes are the folder names, sorted.

    Images are read as a viewer shows them (utils/images/decoding.py), so one that is replaced is written upright.

    Raises:
        UserError: files that are no usable images, or links out of the folder (all are logged); or the folders are parts of a set.
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
        kept = set(self.paths)
        self.left_out = sorted(
            name
            for path in folder.rglob("*")
            if path.is_file() and (name := path.relative_to(folder).as_posix()) not in kept
        )

    def _open(self, path: str) -> tuple[Image.Image, bool]:
        if leads_out(self.folder / path, self.folder):
            raise BadImage(OUTSIDE)
        return open_with_kind(self.folder / path)

    def _shapes(self) -> list[tuple[int, int, bool]]:
        """Height, width and whether it is grey, of every image; memory holds one at a time, so they are decoded again later."""
        shapes, bad = [], []
        for path in self.paths:
            try:
                image, grey = self._open(path)
                shapes.append((image.height, image.width, grey))
            except BadImage as error:
                bad.append(f"{self.folder / path}: {error}")
        refuse_bad(bad, len(self.paths), self.folder)
        return shapes

    def images(self, size: int) -> Tensor:
        return torch.from_numpy(
            np.concatenate([resize_all(self._pixels(path), size) for path in self.paths])
        )

    def _pixels(self, path: str) -> np.ndarray:
        try:
            return np.asarray(self._open(path)[0])[None]
        except BadImage as error:
            raise UserError(
                f"{self.folder / path}: cannot be read any more ({error}); repair or remove it"
            ) from None

    def write(self, folder: Path, outcome: Outcome) -> None:
        """Untouched files first, under their names; then the others, as .png: those that keep their class, those that change it."""
        for name in self.classes:
            (folder / name).mkdir(parents=True, exist_ok=True)
        rows, relabelled = (
            lambda mask: (mask & ~outcome.dropped).nonzero().flatten().tolist(),
            outcome.labels != self.labels,
        )
        untouched = rows(~outcome.replaced & ~relabelled)
        for k in untouched:
            self._copy(k, folder / self.paths[k])
        taken = {self.paths[k].casefold() for k in untouched}
        for k in rows(outcome.replaced & ~relabelled) + rows(relabelled):
            name = Path(self.classes[outcome.labels[k]], *Path(self.paths[k]).parts[1:])
            target = folder / free_name(
                name.with_suffix(".png") if outcome.replaced[k] else name, taken
            )
            if outcome.replaced[k]:
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(
                    fitted(outcome.images[k].numpy(), self.shapes[k][:2], self.shapes[k][2])
                ).save(target)
            else:
                self._copy(k, target)

    def _copy(self, k: int, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder / self.paths[k], target)


def free_name(name: Path, taken: set[str]) -> str:
    """`name`, or with -2, -3, ... before its ending where that is taken; what is returned is added to `taken` (case-folded)."""
    candidates = (
        name if k == 1 else name.with_stem(f"{name.stem}-{k}") for k in range(1, len(taken) + 3)
    )
    free = next(path.as_posix() for path in candidates if path.as_posix().casefold() not in taken)
    taken.add(free.casefold())
    return free


class ArrayFile(Layout):
    """A .npz file with images uint8 (N, H, W, 3), (N, 3, H, W), (N, H, W, 1) or (N, H, W), and integer labels (N,)."""

    kind = "npz file"

    def __init__(self, file: Path):
        self.file = file
        try:
            with np.load(file, allow_pickle=False) as content:
                self.arrays = {key: content[key] for key in content.files}
        except Exception as error:  # zipfile, numpy and the file system each raise their own
            raise UserError(
                f"data: {file} cannot be read ({' '.join(str(error).split())[:120]})"
            ) from None
        self.keys = next((pair for pair in PAIRS if set(pair) <= set(self.arrays)), None)
        if self.keys is None:
            raise UserError(
                f"data: {file} holds {', '.join(self.arrays) or 'nothing'}; expected the arrays images and labels"
            )
        pixels, given = (self.arrays[key] for key in self.keys)
        if (
            pixels.dtype != np.uint8
            or given.dtype.kind not in "iu"
            or given.size != len(pixels)
            or self._axes(pixels.shape) is None
        ):
            raise UserError(
                f"data: {file}: images must be uint8 (N, H, W, 3) or (N, 3, H, W) and labels integers (N,), "
                f"not {pixels.dtype} {pixels.shape} and {given.dtype} {given.shape}"
            )
        self.values = (
            np.arange(int(given.max(initial=0)) + 1)
            if given.min(initial=0) >= 0 and given.max(initial=0) < PLAIN
            else np.unique(given)
        )
        self.labels, self.classes = (
            torch.from_numpy(np.searchsorted(self.values, given.reshape(-1))),
            tuple(map(str, self.values)),
        )
        self.paths = [f"{file.name}#{k}" for k in range(len(pixels))]
        self.sizes = [self._hwc(pixels[:1]).shape[1:3]]

    @staticmethod
    def _axes(shape: Sequence[int]) -> str | None:
        if len(shape) == 3:
            return "grey"
        if len(shape) == 4 and shape[3] in (1, 3):
            return "last"
        return "first" if len(shape) == 4 and shape[1] in (1, 3) else None

    def _hwc(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3)."""
        axes = self._axes(pixels.shape)
        pixels = (
            pixels[..., None]
            if axes == "grey"
            else pixels.transpose(0, 2, 3, 1)
            if axes == "first"
            else pixels
        )
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))

    def images(self, size: int) -> Tensor:
        return torch.from_numpy(resize_all(self._hwc(self.arrays[self.keys[0]]), size))

    def write(self, folder: Path, outcome: Outcome) -> None:
        """The same file name and arrays; arrays other than the two are left as they are."""
        pixels, given = (self.arrays[key].copy() for key in self.keys)
        channels = self._hwc_channels(pixels.shape)
        for k in outcome.replaced.nonzero().flatten().tolist():
            image = fitted(outcome.images[k].numpy(), self.sizes[0], channels == 1).reshape(
                *self.sizes[0], channels
            )
            pixels[k] = (
                image.transpose(2, 0, 1) if self._axes(pixels.shape) == "first" else image
            ).reshape(pixels.shape[1:])
        changed = (outcome.labels != self.labels).numpy()
        given.reshape(-1)[changed] = self.values[outcome.labels.numpy()[changed]]
        kept = ~outcome.dropped.numpy()
        np.savez(
            folder / self.file.name,
            **{**self.arrays, self.keys[0]: pixels[kept], self.keys[1]: given[kept]},
        )

    def _hwc_channels(self, shape: Sequence[int]) -> int:
        return {"grey": 1, "last": shape[-1], "first": shape[1]}[self._axes(shape)]
