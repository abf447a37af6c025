"""Files that are complete or absent: written under another name, synced, noted, renamed."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from utils.command import GOES_ON, UserError
from utils.storage import checksums


@contextlib.contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, else goes.

    With `sync`, file, checksum and the folder's entry reach the disk in this order: a power cut
    leaves the old file or the new one.

    Raises:
        UserError: the file could not be written (disk full, no permission).
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        temporary.chmod(0o644)
        checksums.note_written(path, temporary)
        os.replace(temporary, path)
        if sync:
            _sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch wraps the system's error
        raise UserError(f"{path}: could not be written ({shortened(error)}); {GOES_ON}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def shortened(error: BaseException) -> str:
    """An error's message on one line of at most 120 characters."""
    return " ".join(str(error).split())[:120]


def write_json(path: Path, content: Any) -> None:
    """Write JSON, complete or not at all; NaN and infinity become null, text `printable`."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2) + "\n", encoding="utf-8")


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """Write a .csv with named columns of equal length, complete or not at all.

    Floats have six digits, nan is an empty cell, text is made `printable`.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*(_cells(np.asarray(column)) for column in columns.values())))
    with replacing(path) as temporary:
        temporary.write_bytes(text.getvalue().encode("utf-8", "backslashreplace"))


def printable(text: str) -> str:
    """Text as UTF-8 can hold it: bytes of a file name that are none are spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _cells(column: np.ndarray) -> list[Any]:
    if column.dtype.kind == "f":
        return ["" if np.isnan(value) else f"{value:.6f}" for value in column]
    return column.tolist()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, str):
        return printable(value)
    return None if isinstance(value, float) and not np.isfinite(value) else value


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write tensors or arrays as .npz, complete or not at all; equal arrays give equal bytes."""
    with replacing(path) as temporary:
        np.savez(temporary, **arrays)


def load_arrays(path: Path, *keys: str) -> dict[str, torch.Tensor]:
    """The tensors of a .npz file, or those named `keys`; raises UserError: missing or damaged."""
    checksums.verify(path)
    try:
        with np.load(path, allow_pickle=False) as content:
            return {key: torch.from_numpy(content[key]) for key in keys or content.files}
    except Exception as error:  # noqa: BLE001  zipfile, numpy and the system each raise their own
        reason = f"cannot be read ({shortened(error)})"
        raise UserError(f"{path}: {reason}; delete it to have it made again") from None
