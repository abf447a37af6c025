"""Data sets as two aligned tensors: images uint8 (N, 3, H, W) and labels int64 (N,).

One `DATASETS` entry says all there is to know about a data set; nothing else in the project names one. Images are
decoded and resized once (PIL bilinear, as the papers of this field do), in utils/images/decoding.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.config import DataConfig, UserError, candidate_paths, choose_by_name
from utils.images.decoding import are_splits, class_folders, files_by_class, resize_all
from utils.images.folders import gtsrb_test_files, read_parts, refuse_unknown
from utils.late import Tensor, torch
from utils.storage.checksums import of_tensors

log = logging.getLogger("dataelixir")
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html (the python version, unpacked there)"


@dataclass(frozen=True)
class LabeledImages:
    """Images uint8 (N, 3, H, W) and labels int64 (N,), aligned."""

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        assert (
            self.images.dtype == torch.uint8 and self.images.ndim == 4 and self.images.shape[1] == 3
        ), self.images.shape
        assert self.labels.dtype == torch.int64 and self.labels.shape == self.images.shape[:1], (
            self.labels.shape
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which) -> LabeledImages:
        """The rows that a mask, an index tensor or a slice names."""
        return LabeledImages(self.images[which], self.labels[which])

    def to(self, device: torch.device) -> LabeledImages:
        """The same on another device."""
        return LabeledImages(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class TriggeredImages:
    """The ASR test set: triggered images uint8 (M, 3, H, W), the attack's labels, the true labels, test set indices (M,)."""

    images: Tensor
    labels: Tensor
    original_labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class DatasetInfo:
    """What one data set needs to be known by; `load` returns the decoded train and test sets and the class names.

    Attributes:
        mean, std: per channel, of pixels in [0, 1]; the classifier's first layer subtracts and divides by them.
        flip: whether a horizontal flip leaves the class unchanged.
        load: (folder, DataConfig) -> Splits; raises FileNotFoundError where the folder does not hold the data set.
        download: (folder) -> None, or None where there is nothing to download.
        url: where a person gets it.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool
    load: Callable[[Path, DataConfig], Splits]
    download: Callable[[Path], None] | None = None
    url: str = ""


@dataclass(frozen=True)
class Splits:
    """Training and test set of one data set, with the names of its classes."""

    train: LabeledImages
    test: LabeledImages
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Dataset(Splits):
    """Splits and the data set's name and entry: everything later stages ask about the data."""

    name: str
    info: DatasetInfo

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def digest(self) -> str:
        """A hash of all images and labels."""
        return of_tensors(self.train.images, self.train.labels, self.test.images, self.test.labels)


def to_uint8(x: Tensor) -> Tensor:
    """[0, 1] floats -> uint8, clamped and rounded: the nearest image that a PNG can hold."""
    return x.clamp(0, 1).mul(255).round().to(torch.uint8)


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return images.float() / 255


def load_dataset(config: DataConfig) -> Dataset:
    """The data set that `config` names, decoded, checked and cached.

    Raises:
        UserError: unknown name, nothing found (lists every place and how to get it), fewer than two classes.
    """
    info = choose_by_name(config.dataset, DATASETS, "dataset")
    splits = _load_from_any_place(info, config)
    present = splits.train.labels.unique()
    if len(present) < 2:
        raise UserError(
            f"dataset: '{config.dataset}' has training images of {len(present)} class; two or more are needed"
        )
    log.info(
        "%s: %d training and %d test images of %d classes, %dx%d",
        config.dataset,
        len(splits.train),
        len(splits.test),
        len(splits.classes),
        config.image_size,
        config.image_size,
    )
    return Dataset(splits.train, splits.test, splits.classes, config.dataset, info)


def _load_from_any_place(info: DatasetInfo, config: DataConfig) -> Splits:
    places = candidate_paths(config.dataset_path)
    for place in places:
        try:
            return info.load(place, config)
        except FileNotFoundError:
            continue
    tried = " or ".join(str(place) for place in places)
    if info.download is None:
        raise UserError(f"dataset_path: no {config.dataset} data at {tried}; expected {info.url}")
    log.info("%s is not at %s: downloading", config.dataset, tried)
    try:
        info.download(places[-1])
        return info.load(places[-1], config)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"dataset_path: no {config.dataset} data at {tried}, and the download failed "
            f"({str(error)[:120]}); get it from {info.url}"
        ) from None


def _labeled(images: np.ndarray, labels: Sequence[int]) -> LabeledImages:
    return LabeledImages(
        torch.from_numpy(images), torch.tensor(np.asarray(labels), dtype=torch.int64)
    )


def stratified_split(
    labels: Sequence[int], fraction: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the kept and of the split-off part, `fraction` of every class, fixed by `seed`.

    Either part has one sample of a class at least; a class's only sample is kept.
    """
    labels, test = np.asarray(labels), []
    for label in np.unique(labels):
        members = np.random.default_rng([seed, int(label)]).permutation(
            np.flatnonzero(labels == label)
        )
        test.append(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    test = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), test), test


def _load_digits(_: Path, config: DataConfig) -> Splits:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    data = _labeled(
        resize_all(np.repeat(grey[..., None], 3, axis=-1), config.image_size), digits.target
    )
    train, test = stratified_split(digits.target, 0.2)
    return Splits(data[torch.from_numpy(train)], data[torch.from_numpy(test)], tuple("0123456789"))


def _load_cifar(name: str, folder: Path, config: DataConfig) -> Splits:
    from torchvision import datasets

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    roots = [root for root in (folder, folder / name) if (root / cls.base_folder).is_dir()]
    if not roots:
        raise FileNotFoundError(folder)
    try:
        parts = [cls(str(roots[0]), train=train) for train in (True, False)]
    except RuntimeError:
        raise UserError(
            f"{roots[0] / cls.base_folder}: files are missing or damaged (checksum); "
            "delete the folder and run again to download it"
        ) from None
    train, test = (
        _labeled(resize_all(part.data, config.image_size), part.targets) for part in parts
    )
    return Splits(train, test, tuple(parts[0].classes))


def _load_gtsrb(folder: Path, config: DataConfig) -> Splits:
    """torchvision's layout with either training archive: Training (26,640 images) or Final_Training/Images (39,209)."""

    roots = [root for root in (folder, folder / "gtsrb") if (root / "GTSRB").is_dir()]
    base = roots[0] / "GTSRB" if roots else folder / "GTSRB"
    archives = [
        path for path in (base / "Final_Training" / "Images", base / "Training") if path.is_dir()
    ]
    table = base.parent / "GT-final_test.csv"
    if not archives or not table.exists():
        raise FileNotFoundError(base)
    classes = class_folders(archives[0])
    files = (
        files_by_class(archives[0], classes),
        gtsrb_test_files(table, base / "Final_Test" / "Images", len(classes)),
    )
    train, test = (_labeled(*part) for part in read_parts(files, config, base))
    log.info(
        "gtsrb: %d training images from %s (full archives: Training 26,640, Final_Training 39,209)",
        len(train),
        archives[0],
    )
    return Splits(train, test, classes)


def _load_imagefolder(folder: Path, config: DataConfig) -> Splits:
    """folder/train/<class>/* and folder/test/<class>/*, or folder/<class>/* split by test_fraction."""
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        classes = class_folders(folder / "train")
        refuse_unknown(folder / "test", classes)
        parts = [files_by_class(folder / part, classes) for part in ("train", "test")]
    else:
        classes = class_folders(folder)
        if are_splits(classes):
            raise UserError(
                f"dataset_path: {folder} holds {'/, '.join(classes)}/, which are no classes; name the two to be used train/ and test/, or give one of them"
            )
        files = files_by_class(folder, classes)
        kept, split = (
            stratified_split([label for _, label in files], config.test_fraction)
            if files
            else ([], [])
        )
        parts = [[files[i] for i in kept], [files[i] for i in split]]
    if not parts[0] or not parts[1]:
        raise FileNotFoundError(folder)
    train, test = (_labeled(*part) for part in read_parts(parts, config, folder, classes))
    return Splits(train, test, classes)


def _download(name: str) -> Callable[[Path], None]:
    def download(folder: Path) -> None:
        from torchvision import datasets

        if name == "gtsrb":
            for split in ("train", "test"):
                datasets.GTSRB(str(folder), split=split, download=True)
        else:
            {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](
                str(folder), download=True
            )

    return download


DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo((0.3, 0.3, 0.3), (0.35, 0.35, 0.35), False, _load_digits),
    "cifar10": DatasetInfo(
        (0.4914, 0.4822, 0.4465),
        (0.247, 0.243, 0.261),
        True,
        lambda folder, config: _load_cifar("cifar10", folder, config),
        _download("cifar10"),
        CIFAR,
    ),
    "cifar100": DatasetInfo(
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        True,
        lambda folder, config: _load_cifar("cifar100", folder, config),
        _download("cifar100"),
        CIFAR,
    ),
    "gtsrb": DatasetInfo(
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        False,
        _load_gtsrb,
        _download("gtsrb"),
        "https://benchmark.ini.rub.de (GTSRB/Training or GTSRB/Final_Training/Images, GTSRB/Final_Test/Images and GT-final_test.csv)",
    ),
    "imagefolder": DatasetInfo(
        (0.5, 0.5, 0.5),
        (0.25, 0.25, 0.25),
        False,
        _load_imagefolder,
        url="train/<class>/* and test/<class>/*, or <class>/* to be split by test_fraction",
    ),
}
