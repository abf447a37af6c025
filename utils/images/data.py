"""Data sets as aligned images and labels; a `DATASETS` entry says all there is to know of one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.config import DataConfig, UserError, candidate_paths, choose_by_name
from utils.images import loaders
from utils.storage.checksums import of_tensors

log = logging.getLogger("dataelixir")


@dataclass(frozen=True)
class LabeledImages:
    """Images uint8 (N, 3, H, W), made contiguous, and labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        shape = self.images.shape
        assert len(shape) == 4 and shape[1] == 3, shape  # noqa: PT018 - one statement on a shape
        assert self.images.dtype == torch.uint8, self.images.dtype
        assert self.labels.dtype == torch.int64, self.labels.dtype
        assert self.labels.shape == shape[:1], self.labels.shape
        object.__setattr__(self, "images", self.images.contiguous())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which) -> LabeledImages:
        """The rows that a mask, an index tensor or a slice names."""
        return LabeledImages(self.images[which], self.labels[which])

    def to(self, device: torch.device) -> LabeledImages:
        return LabeledImages(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class TriggeredImages:
    """The ASR test set: triggered images uint8 (M, 3, H, W), and three tensors int64 (M,).

    These are the attack's labels, the true ones, and the places in the test set.
    """

    images: Tensor
    labels: Tensor
    original_labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class DatasetInfo:
    """One data set.

    Attributes:
        mean, std: of each channel of pixels in [0, 1].
        flip: whether a horizontal flip leaves the class unchanged.
        load: raises FileNotFoundError where the folder does not hold the data set.
        download: called with the set's name and a folder; None where there is nothing to download.
        url: where a person gets it.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool
    load: Callable[[Path, DataConfig], loaders.Splits]
    download: Callable[[str, Path], None] | None = None
    url: str = ""


@dataclass(frozen=True)
class Dataset:
    """Training and test set, class names, and the data set's name and entry."""

    train: LabeledImages
    test: LabeledImages
    classes: tuple[str, ...]
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
        UserError: unknown name, nothing found, or fewer than two classes.
    """
    info = choose_by_name(config.dataset, DATASETS, "dataset")
    *parts, classes = _load_from_any_place(info, config)
    train, test = (
        LabeledImages(torch.from_numpy(images), torch.tensor(np.asarray(labels, np.int64)))
        for images, labels in parts
    )
    present = len(train.labels.unique())
    if present < 2:
        found = f"training images of {present} class; two or more are needed"
        raise UserError(f"dataset: '{config.dataset}' has {found}")
    counts = f"{len(train)} training and {len(test)} test images of {len(classes)} classes"
    log.info(f"{config.dataset}: {counts}, {config.image_size}x{config.image_size}")
    return Dataset(train, test, classes, config.dataset, info)


def _load_from_any_place(info: DatasetInfo, config: DataConfig) -> loaders.Splits:
    places = candidate_paths(config.dataset_path)
    for place in places:
        try:
            return info.load(place, config)
        except FileNotFoundError:
            continue
    tried = " or ".join(str(place) for place in places)
    missing = f"dataset_path: no {config.dataset} data at {tried}"
    if info.download is None:
        raise UserError(f"{missing}; expected {info.url}")
    log.info("%s is not at %s: downloading", config.dataset, tried)
    try:
        info.download(config.dataset, places[-1])
        return info.load(places[-1], config)
    except (OSError, RuntimeError) as error:
        reason = f"the download failed ({str(error)[:120]}); get it from {info.url}"
        raise UserError(f"{missing}, and {reason}") from None


CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html (the python version, unpacked there)"
GTSRB = (
    "https://benchmark.ini.rub.de (GTSRB/Training or GTSRB/Final_Training/Images, "
    "GTSRB/Final_Test/Images and GT-final_test.csv)"
)
FOLDERS = "train/<class>/* and test/<class>/*, or <class>/* to be split by test_fraction"
of_cifar = loaders.load_cifar, loaders.download, CIFAR
of_gtsrb = loaders.load_gtsrb, loaders.download, GTSRB
DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo((0.3,) * 3, (0.35,) * 3, False, loaders.load_digits),
    "cifar10": DatasetInfo((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), True, *of_cifar),
    "cifar100": DatasetInfo((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True, *of_cifar),
    "gtsrb": DatasetInfo((0.0,) * 3, (1.0,) * 3, False, *of_gtsrb),
    "imagefolder": DatasetInfo(
        (0.5,) * 3, (0.25,) * 3, False, loaders.load_imagefolder, url=FOLDERS
    ),
}
