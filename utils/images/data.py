"""Data sets as two aligned tensors: images uint8 (N, 3, H, W) and labels int64 (N,).

One `DATASETS` entry says all there is to know about a data set; nothing else in the project names
one. Images are decoded and resized once (PIL bilinear, as the papers of this field do).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.config import DataConfig, UserError, candidate_paths, choose_by_name
from utils.images.loaders import (
    Splits,
    download,
    load_cifar,
    load_digits,
    load_gtsrb,
    load_imagefolder,
)
from utils.storage.checksums import of_tensors

log = logging.getLogger("dataelixir")
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html (the python version, unpacked there)"


@dataclass(frozen=True)
class LabeledImages:
    """Images uint8 (N, 3, H, W) and labels int64 (N,), aligned.

    Images become contiguous: what is computed from them must not depend on where they came from.
    """

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
        """The same on another device."""
        return LabeledImages(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class TriggeredImages:
    """The ASR test set of M samples.

    Attributes:
        images: triggered images uint8 (M, 3, H, W).
        labels, original_labels: int64 (M,), the attack's and the true ones.
        index: int64 (M,), places in the test set.
    """

    images: Tensor
    labels: Tensor
    original_labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class DatasetInfo:
    """All there is to know about one data set.

    Attributes:
        mean, std: of each channel of pixels in [0, 1]; the classifier's first layer normalises.
        flip: whether a horizontal flip leaves the class unchanged.
        load: (folder, DataConfig) -> Splits; raises FileNotFoundError where the folder does not
            hold the data set.
        download: (name, folder) -> None, or None where there is nothing to download.
        url: where a person gets it.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool
    load: Callable[[Path, DataConfig], Splits]
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
        UserError: unknown name, nothing found (lists every place and how to get it), fewer than
            two classes.
    """
    info = choose_by_name(config.dataset, DATASETS, "dataset")
    *parts, classes = _load_from_any_place(info, config)
    train, test = (
        LabeledImages(torch.from_numpy(images), torch.tensor(np.asarray(labels, np.int64)))
        for images, labels in parts
    )
    present = len(train.labels.unique())
    if present < 2:
        raise UserError(
            f"dataset: '{config.dataset}' has training images of {present} class; "
            "two or more are needed"
        )
    log.info(
        f"{config.dataset}: {len(train)} training and {len(test)} test images of "
        f"{len(classes)} classes, {config.image_size}x{config.image_size}"
    )
    return Dataset(train, test, classes, config.dataset, info)


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
        info.download(config.dataset, places[-1])
        return info.load(places[-1], config)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"dataset_path: no {config.dataset} data at {tried}, and the download failed "
            f"({str(error)[:120]}); get it from {info.url}"
        ) from None


GTSRB = (
    "https://benchmark.ini.rub.de (GTSRB/Training or GTSRB/Final_Training/Images, "
    "GTSRB/Final_Test/Images and GT-final_test.csv)"
)
FOLDERS = "train/<class>/* and test/<class>/*, or <class>/* to be split by test_fraction"
HALF, QUARTER = (0.5,) * 3, (0.25,) * 3
DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo((0.3, 0.3, 0.3), (0.35, 0.35, 0.35), False, load_digits),
    "cifar10": DatasetInfo(
        (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), True, load_cifar, download, CIFAR
    ),
    "cifar100": DatasetInfo(
        (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True, load_cifar, download, CIFAR
    ),
    "gtsrb": DatasetInfo((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), False, load_gtsrb, download, GTSRB),
    "imagefolder": DatasetInfo(HALF, QUARTER, False, load_imagefolder, url=FOLDERS),
}
