"""CIFAR's python files (Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html): pickles, read without executing them.

A pickle is a program that may call anything it names. This unpickler lets it name the few things that an array is made
of and nothing else, so a file that names more is refused before anything of it is called.
"""

from __future__ import annotations

import functools
import pickle
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct
from numpy._core.numeric import _frombuffer

from utils.config import UserError
from utils.images.decoding import OUTSIDE, leads_out, resize_all
from utils.images.layouts import Layout, Outcome, fitted
from utils.late import Tensor, torch

SIDE = 32
META = ("batches.meta", "meta")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """What python 3 writes bytes as in old pickles."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"the encoding {encoding}")
    return text.encode("latin1")


ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
    **{
        (f"numpy.{core}.{part.__module__.rsplit('.')[-1]}", part.__name__): part
        for core in ("core", "_core")
        for part in (_reconstruct, _frombuffer)
    },
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers, numbers, text, bytes and numpy arrays; raises pickle.UnpicklingError at anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("names something outside")


class ArrayPickler(
    pickle._Pickler
):  # the one written in Python: the other's treatment of bytes cannot be changed
    """Writes bytes as python 2 wrote text, so that CIFAR's readers get back the keys they look for."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, content: bytes) -> None:
        head = (
            pickle.SHORT_BINSTRING + bytes([len(content)])
            if len(content) < 256
            else pickle.BINSTRING + struct.pack("<i", len(content))
        )
        self.write(head + content)
        self.memoize(content)

    dispatch[bytes] = save_bytes


def load_arrays(path: Path) -> dict[Any, Any]:
    """The mapping in a CIFAR file; text of python 2 comes as bytes.

    Raises:
        UserError: not such a file, or one that names anything but arrays.
    """
    try:
        with open(path, "rb") as file:
            content = ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise whatever its opcodes do
        raise UserError(
            f"data: {path} is not read: as a CIFAR batch it may hold arrays and text, but it "
            f"{str(error)[:100] or type(error).__name__}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"data: {path}: expected a mapping, found a {type(content).__name__}")
    return content


def key_of(content: dict[Any, Any], name: str) -> Any:
    """The key `name` as it is written in this file, as bytes or text; None where it is not there."""
    return next((key for key in (name.encode(), name) if key in content), None)


def is_cifar(folder: Path) -> bool:
    """Whether a folder holds CIFAR's python files."""
    return (
        folder.is_dir()
        and any((folder / meta).is_file() for meta in META)
        and bool(training_files(folder))
    )


def training_files(folder: Path) -> list[Path]:
    """data_batch_1 ... of CIFAR-10, or train of CIFAR-100."""
    return sorted(folder.glob("data_batch_*"), key=lambda path: (len(path.name), path.name)) or [
        p for p in [folder / "train"] if p.is_file()
    ]


class CifarFiles(Layout):
    """A folder cifar-10-batches-py or cifar-100-python; the test batch and everything else is passed through as it is.

    Raises:
        UserError: a file is a link out of the folder, or no CIFAR batch.
    """

    kind = "CIFAR python files"

    def __init__(self, folder: Path):
        self.folder, self.files = folder, training_files(folder)
        stray = next((path for path in sorted(folder.iterdir()) if leads_out(path, folder)), None)
        if stray:
            raise UserError(
                f"data: {stray} {OUTSIDE}; put the file itself there, or remove the link"
            )
        self.batches = [load_arrays(path) for path in self.files]
        for path, batch in zip(self.files, self.batches):
            self._check(path, batch)
        self.label_name = "fine_labels" if key_of(self.batches[0], "fine_labels") else "labels"
        self.labels = torch.tensor(
            [label for batch in self.batches for label in batch[key_of(batch, self.label_name)]],
            dtype=torch.int64,
        )
        self.classes, self.sizes = self._names(), [(SIDE, SIDE)]
        self.paths = [
            f"{path.name}#{k}"
            for path, batch in zip(self.files, self.batches)
            for k in range(len(batch[key_of(batch, "data")]))
        ]

    @staticmethod
    def _check(path: Path, batch: dict[Any, Any]) -> None:
        data = batch.get(key_of(batch, "data"))
        labels = next(
            (batch[key] for name in ("fine_labels", "labels") if (key := key_of(batch, name))), None
        )
        pixels = (
            isinstance(data, np.ndarray)
            and data.dtype == np.uint8
            and data.ndim == 2
            and data.shape[1] == 3 * SIDE * SIDE
        )
        if (
            not pixels
            or not isinstance(labels, list)
            or len(labels) != len(data)
            or not all(type(y) is int and 0 <= y < 1000 for y in labels)
        ):
            raise UserError(
                f"data: {path}: expected data uint8 (N, {3 * SIDE * SIDE}) and a list of N labels"
            )

    def _names(self) -> tuple[str, ...]:
        meta = load_arrays(
            next(self.folder / name for name in META if (self.folder / name).is_file())
        )
        names = next(
            (
                meta[key]
                for name in ("fine_label_names", "label_names")
                if (key := key_of(meta, name))
            ),
            [],
        )
        names = [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names]
        return tuple(names + [str(k) for k in range(len(names), int(self.labels.max()) + 1)])

    def images(self, size: int) -> Tensor:
        pixels = np.concatenate([batch[key_of(batch, "data")] for batch in self.batches]).reshape(
            -1, 3, SIDE, SIDE
        )
        return torch.from_numpy(
            resize_all(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), size)
        )

    def write(self, folder: Path, outcome: Outcome) -> None:
        """Files without a change are copied; of the others, data, labels and file names are written anew."""
        for path in sorted(p for p in self.folder.iterdir() if p.is_file()):
            shutil.copyfile(path, folder / path.name)
        changed, start = outcome.replaced | outcome.dropped | (outcome.labels != self.labels), 0
        for path, batch in zip(self.files, self.batches):
            rows = slice(start, start + len(batch[key_of(batch, "data")]))
            start = rows.stop
            if changed[rows].any():
                with open(folder / path.name, "wb") as file:
                    ArrayPickler(file, 2).dump(self._with(batch, outcome, rows))

    def _with(self, batch: dict[Any, Any], outcome: Outcome, rows: slice) -> dict[Any, Any]:
        data, kept = batch[key_of(batch, "data")].copy(), ~outcome.dropped[rows].numpy()
        for k in outcome.replaced[rows].nonzero().flatten().tolist():
            data[k] = (
                fitted(outcome.images[rows.start + k].numpy(), (SIDE, SIDE))
                .transpose(2, 0, 1)
                .reshape(-1)
            )
        new = {
            key_of(batch, "data"): data[kept],
            key_of(batch, self.label_name): outcome.labels[rows].numpy()[kept].tolist(),
        }
        others = {
            key: [v for v, keep in zip(value, kept) if keep]
            for key, value in batch.items()
            if key not in new and isinstance(value, list) and len(value) == len(kept)
        }
        coarse = key_of(others, "coarse_labels")
        if coarse is not None and self.label_name == "fine_labels":
            others[coarse] = [
                self._superclass(label) for label in new[key_of(batch, self.label_name)]
            ]
        return {**batch, **others, **new}

    @functools.cache
    def _superclass(self, label: int) -> int:
        """The coarse label that most samples of a fine one have."""
        pairs = [
            pair
            for batch in self.batches
            for pair in zip(
                batch[key_of(batch, "fine_labels")], batch[key_of(batch, "coarse_labels")]
            )
        ]
        return Counter(coarse for fine, coarse in pairs if fine == label).most_common(1)[0][0]
