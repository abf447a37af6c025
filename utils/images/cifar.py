"""CIFAR's python files (Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html), read safely.

They are pickles, and a pickle is a program that may call anything it names. This unpickler lets it
name only what an array is made of, and refuses a file that names more before anything is called.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.config import UserError
from utils.images.decoding import OUTSIDE, leads_out, resize_all
from utils.images.layout import Layout, Outcome, fitted

SIDE = 32
META = ("batches.meta", "meta")
MOST_LABELS = 1000


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """What python 3 writes bytes as in old pickles."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"the encoding {encoding}")
    return text.encode("latin1")


# What any version of numpy names to rebuild an array; an array says where this version has them.
REBUILDERS = (("multiarray", "_reconstruct", 2), ("numeric", "_frombuffer", 5))  # with protocol
ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
    **{
        (f"numpy.{core}.{module}", name): np.zeros(1).__reduce_ex__(protocol)[0]
        for core in ("core", "_core")
        for module, name, protocol in REBUILDERS
    },
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads containers, numbers, text, bytes and arrays; raises UnpicklingError at anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("names something outside")


def read_pickle(path: Path) -> dict[Any, Any]:
    """The mapping in a CIFAR file; text of python 2 comes as bytes.

    Raises:
        UserError: not such a file, or one that names anything but arrays.
    """
    try:
        with open(path, "rb") as file:
            content = ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises whatever its opcodes do
        raise UserError(
            f"data: {path} is not read: as a CIFAR batch it may hold arrays and text, but it "
            f"{str(error)[:100] or type(error).__name__}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"data: {path}: expected a mapping, found a {type(content).__name__}")
    return content


def entry(content: dict[Any, Any], *names: str) -> Any:
    """The value of the first of `names` that is a key, as bytes or text; None where none is."""
    keys = (key for name in names for key in (name.encode(), name))
    return next((content[key] for key in keys if key in content), None)


def is_cifar(folder: Path) -> bool:
    """Whether a folder holds CIFAR's python files."""
    has_names = folder.is_dir() and any((folder / meta).is_file() for meta in META)
    return has_names and bool(training_files(folder))


def training_files(folder: Path) -> list[Path]:
    """data_batch_1 ... of CIFAR-10, or train of CIFAR-100."""
    batches = sorted(folder.glob("data_batch_*"), key=lambda path: (len(path.name), path.name))
    return batches or [path for path in [folder / "train"] if path.is_file()]


class CifarFiles(Layout):
    """Training images and (fine) labels in a folder cifar-10-batches-py or cifar-100-python.

    They are read only. The cleaned set is written as FOLDER.npz with images uint8 (N, 32, 32, 3),
    labels int64 (N,) and, where the folder has them, names (K,) of the classes.

    Raises:
        UserError: a file is a link out of the folder, or no CIFAR batch.
    """

    kind = "CIFAR python files"

    def __init__(self, folder: Path):
        for path in sorted(folder.iterdir()):
            if leads_out(path, folder):
                advice = "put the file itself there, or remove the link"
                raise UserError(f"data: {path} {OUTSIDE}; {advice}")
        files = training_files(folder)
        parts = [self._read(path) for path in files]
        pixels = np.concatenate([data for data, _ in parts]).reshape(-1, 3, SIDE, SIDE)
        self.folder, self.pixels = folder, np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        labels = [label for _, labels in parts for label in labels]
        self.labels, self.names = torch.tensor(labels, dtype=torch.int64), self._names()
        unnamed = range(len(self.names), max(labels, default=-1) + 1)
        self.classes = (*self.names, *map(str, unnamed))
        self.sizes = [(SIDE, SIDE)]
        counts = [(path.name, len(data)) for path, (data, _) in zip(files, parts)]
        self.paths = [f"{name}#{k}" for name, count in counts for k in range(count)]
        self.remark = (
            f"CIFAR's python files are not written: cleaned/{folder.name}.npz holds the training "
            "set as images uint8 (N, 32, 32, 3), labels int64 (N,) and the names of the classes."
        )

    @staticmethod
    def _read(path: Path) -> tuple[np.ndarray, list[int]]:
        """Pixels uint8 (N, 3072) and N labels of a batch."""
        batch = read_pickle(path)
        data, labels = entry(batch, "data"), entry(batch, "fine_labels", "labels")
        values, is_label = 3 * SIDE**2, lambda k: type(k) is int and 0 <= k < MOST_LABELS
        pixels = isinstance(data, np.ndarray) and data.dtype == np.uint8
        listed = isinstance(labels, list) and all(map(is_label, labels))
        if pixels and data.shape[1:] == (values,) and listed and len(labels) == len(data):
            return data, labels
        raise UserError(f"data: {path}: expected data uint8 (N, {values}) and a list of N labels")

    def _names(self) -> list[str]:
        meta = next(self.folder / name for name in META if (self.folder / name).is_file())
        names = entry(read_pickle(meta), "fine_label_names", "label_names") or []
        return [str(name, "latin1") if isinstance(name, bytes) else str(name) for name in names]

    def images(self, size: int) -> Tensor:
        return torch.from_numpy(resize_all(self.pixels, size))

    def write(self, folder: Path, outcome: Outcome) -> dict[str, str]:
        pixels, kept = self.pixels.copy(), ~outcome.dropped.numpy()
        for k in outcome.replaced.nonzero().flatten().tolist():
            pixels[k] = fitted(outcome.images[k].numpy(), (SIDE, SIDE))
        arrays: dict[str, Any] = {"images": pixels[kept], "labels": outcome.labels.numpy()[kept]}
        if self.names:
            arrays["names"] = np.array(self.classes)
        np.savez(folder / f"{self.folder.name}.npz", **arrays)
        return {}
