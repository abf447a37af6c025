"""Image files and arrays to uint8 (N, 3, H, W), decoded once and kept in `record/.cache/`."""
from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Sequence

import numpy as np
from PIL import Image

from utils.config import ROOT, UserError

CACHE = ROOT / "record" / ".cache"
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff")


def _resized(image: Image.Image, size: int) -> np.ndarray:
    """(3, size, size) uint8 of an image file: RGB, PIL bilinear."""
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def resize_all(images_hwc: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N, H, W, 3) -> uint8 (N, 3, size, size)."""
    if images_hwc.shape[1:3] == (size, size):
        return np.ascontiguousarray(images_hwc.transpose(0, 3, 1, 2))
    return np.stack([_resized(Image.fromarray(image), size) for image in images_hwc])


def decode_files(files: Sequence[tuple[str, int]], size: int) -> np.ndarray:
    """uint8 (N, 3, size, size) of (path, label) pairs; decoded once, then read from the cache.

    Raises:
        UserError: a file that is not an image that PIL reads, by name.
    """
    cached = CACHE / f"{_fingerprint(files, size)}.npz"
    if cached.exists():
        with np.load(cached, allow_pickle=False) as content:
            return content["images"]
    images = np.stack([_decoded(path, size) for path, _ in files])
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(temporary, images=images)
    os.replace(temporary, cached)
    return images


def _decoded(path: str, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return _resized(image, size)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not an image that can be read ({str(error)[:80]}); repair or remove it") from None


def _fingerprint(files: Sequence[tuple[str, int]], size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    for path, label in files:
        stat = os.stat(path)
        digest.update(f"{os.path.abspath(path)}|{label}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def files_by_class(folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """(path, label) of every image below folder/<class>/, in sorted order."""
    return [(str(path), label) for label, name in enumerate(classes)
            for path in sorted((folder / name).rglob("*")) if path.suffix.lower() in IMAGE_ENDINGS]


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in `folder`, sorted; raises FileNotFoundError where there is no such folder."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
