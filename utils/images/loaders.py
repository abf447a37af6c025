"""The data sets this program knows, each read from its own files, with images resized."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.config import DataConfig, UserError
from utils.images.decoding import class_folders, files_by_class, resize_all
from utils.images.folders import gtsrb_test_files, read_parts, refuse_unknown, tell_reasons
from utils.images.tree import Tree, read_tree

log = logging.getLogger("dataelixir")
Part = tuple[np.ndarray, Sequence[int]]  # images uint8 (N, 3, S, S) and labels
Splits = tuple[Part, Part, tuple[str, ...]]  # training set, test set, names of the classes


def stratified_split(
    labels: Sequence[int] | np.ndarray, fraction: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the kept part and of the split-off one, `fraction` of every class.

    Either part has one sample of a class at least; a class's only sample is kept.
    """
    labels, parts = np.asarray(labels), []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = np.random.default_rng([seed, int(label)]).permutation(members)
        parts.append(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    test = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(labels)), test), test


def load_digits(_: Path, config: DataConfig) -> Splits:
    """The 1,797 digits of scikit-learn, a fifth of each class for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = resize_all(np.repeat(grey[..., None], 3, axis=-1), config.image_size)
    train, test = stratified_split(digits.target, 0.2)
    parts = [(images[part], digits.target[part]) for part in (train, test)]
    return parts[0], parts[1], tuple("0123456789")


def load_cifar(folder: Path, config: DataConfig) -> Splits:
    """CIFAR-10 or CIFAR-100, as `config.dataset` says, in torchvision's layout."""
    from torchvision import datasets

    cls, places = getattr(datasets, config.dataset.upper()), (folder, folder / config.dataset)
    roots = [root for root in places if (root / cls.base_folder).is_dir()]
    if not roots:
        raise FileNotFoundError(folder)
    try:
        parts = [cls(str(roots[0]), train=train) for train in (True, False)]
    except RuntimeError:
        advice = "delete the folder and run again to download it"
        found = f"{roots[0] / cls.base_folder}: files are missing or damaged (checksum)"
        raise UserError(f"{found}; {advice}") from None
    train, test = ((resize_all(part.data, config.image_size), part.targets) for part in parts)
    return train, test, tuple(parts[0].classes)


def load_gtsrb(folder: Path, config: DataConfig) -> Splits:
    """torchvision's layout with either archive of training images."""
    roots = [root for root in (folder, folder / "gtsrb") if (root / "GTSRB").is_dir()]
    base = roots[0] / "GTSRB" if roots else folder / "GTSRB"
    both = base / "Final_Training" / "Images", base / "Training"
    archives = [path for path in both if path.is_dir()]
    table = base.parent / "GT-final_test.csv"
    if not archives or not table.exists():
        raise FileNotFoundError(base)
    classes = class_folders(archives[0])
    tests = gtsrb_test_files(table, base / "Final_Test" / "Images", len(classes))
    train, test = read_parts([files_by_class(archives[0], classes), tests], config, base)
    full = "(full archives: Training 26,640, Final_Training 39,209)"
    log.info("gtsrb: %d training images from %s %s", len(train[1]), archives[0], full)
    return train, test, classes


def load_imagefolder(folder: Path, config: DataConfig) -> Splits:
    """folder/train/<class>/* and folder/test/<class>/*, or folder/<class>/* to be split (parts.py)."""
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        tree, test = _train_and_test(folder, config)
        parts = [tree.paths, test]
    else:
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        tree = read_tree(folder, config, key="dataset_path")
        tell_reasons(tree.left_out)
        if not (files := tree.paths):
            raise FileNotFoundError(folder)
        split = stratified_split([label for _, label in files], config.test_fraction)
        parts = [[files[i] for i in part] for part in split]
    if not parts[0] or not parts[1]:
        raise FileNotFoundError(folder)
    read = read_parts(parts, config, folder, tree.classes)
    return read[0], read[1], tree.classes


def _train_and_test(folder: Path, config: DataConfig) -> tuple[Tree, list[tuple[str, int]]]:
    """folder/train, and the files of folder/test under the same labels."""
    train = read_tree(folder / "train", config, folder, "dataset_path")
    same = replace(config, classes="leaf" if config.classes == "leaf" else "top")
    test = read_tree(folder / "test", same, folder, "dataset_path")
    for part in (train, test):
        tell_reasons(part.left_out)
    refuse_unknown(folder / "test", test.classes, train.classes)
    label = {name: k for k, name in enumerate(train.classes)}
    return train, [(path, label[test.classes[k]]) for path, k in test.paths]


def download(name: str, folder: Path) -> None:
    """Download the data set of that name into a folder, as torchvision does."""
    from torchvision import datasets

    parts = [{"split": "train"}, {"split": "test"}] if name == "gtsrb" else [{}]
    for part in parts:
        getattr(datasets, name.upper())(str(folder), **part, download=True)
