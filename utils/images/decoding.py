"""Image files and arrays to uint8 (N, 3, H, W), decoded once and kept in `record/.cache/`.

A file is read as a viewer shows it: turned as EXIF says, transparency over white, 16 bits scaled
down, the first frame of an animation. What cannot be read so is a bad image, with a reason. Nothing
a file holds is run, and no file outside the data folder is read through a link in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.config import RECORDS, UserError
from utils.storage.files import replacing, shortened

log = logging.getLogger("dataelixir")
CACHE = RECORDS / ".cache"
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff", ".gif")
OUTSIDE = "leads out of the data folder"
MAX_PIXELS = 80_000_000  # a small file can unfold to more than memory holds
GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I")
# names of the parts of a set, in lower case
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
RULES = 2  # to be raised when images are read differently, so that no cache from before is used
STALE = 3600  # seconds after which a half-written file in the cache is nobody's


class BadImage(ValueError):
    """A file that cannot be read as an image; the message is the reason."""


@dataclass(frozen=True)
class Decoded:
    """What became of a list of files.

    Attributes:
        images: uint8 (M, 3, H, W) of those that could be read.
        kept: int64 (M,), their places in the list.
        bad: {place: reason} of the others.
    """

    images: np.ndarray
    kept: np.ndarray
    bad: dict[int, str]


def open_image(path: str | Path) -> Image.Image:
    """An image file as a person sees it: mode RGB, any size; raises as `open_with_kind` does."""
    return open_with_kind(path)[0]


def open_with_kind(path: str | Path) -> tuple[Image.Image, bool]:
    """An image file as a person sees it, in mode RGB, and whether it holds grey levels alone.

    Raises:
        BadImage: not an image, damaged, too large, or of pixels without a known scale.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadImage("not a regular file")
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
            return as_rgb(ImageOps.exif_transpose(image)), image.mode in GREY
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - each of PIL's readers raises its own
        raise BadImage(_reason(error, path)) from None


def _reason(error: Exception, path: str | Path) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image" if os.path.getsize(path) else "empty file"
    told = isinstance(error, OSError) and error.strerror
    return told or shortened(error) or type(error).__name__


def as_rgb(image: Image.Image) -> Image.Image:
    """An image that is open in mode RGB: 16 bits of grey scaled to 8, transparency over white.

    Raises:
        BadImage: pixels without a known scale.
    """
    if image.mode == "F":
        raise BadImage("floating point pixels have no known scale")
    if image.mode.startswith("I"):  # 16 bits of grey
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise BadImage("32-bit pixels have no known scale")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image.convert("RGB")


def _resized(image: Image.Image, size: int) -> np.ndarray:
    """(3, size, size) uint8 of an RGB image: PIL bilinear."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def resize_all(images_hwc: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N, H, W, 3) -> uint8 (N, 3, size, size)."""
    if images_hwc.shape[1:3] == (size, size):
        return np.ascontiguousarray(images_hwc.transpose(0, 3, 1, 2))
    return np.stack([_resized(Image.fromarray(image), size) for image in images_hwc])


def decode_files(files: Sequence[tuple[str, int]], size: int) -> np.ndarray:
    """uint8 (N, 3, size, size) of (path, label) pairs, every one of which must be an image.

    Raises:
        UserError: a file that is not an image that PIL reads, by name.
    """
    found = decode_readable(files, size)
    for place, reason in found.bad.items():
        path = files[place][0]
        raise UserError(f"{path}: not an image that can be read ({reason}); repair or remove it")
    return found.images


def decode_readable(
    files: Sequence[tuple[str, int]], size: int, root: Path | None = None
) -> Decoded:
    """The images among (path, label) pairs, at `size`; decoded once, then read from the cache.

    Args:
        root: what leads out of this folder, by a link or by its name, is a bad image; None lets it
            lead anywhere.
    """
    strays = [root is not None and leads_out(path, root) for path, _ in files]
    inside = np.flatnonzero(~np.array(strays, bool))
    found = _decode([files[place] for place in inside.tolist()], size)
    bad = {place: OUTSIDE for place, stray in enumerate(strays) if stray}
    bad |= {int(inside[k]): reason for k, reason in found.bad.items()}
    return Decoded(found.images, inside[found.kept], dict(sorted(bad.items())))


def leads_out(path: str | Path, root: Path) -> bool:
    """Whether a path, or the link that it is, leads out of the data folder `root`."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _decode(files: Sequence[tuple[str, int]], size: int) -> Decoded:
    cached = CACHE / f"{_fingerprint(files, size)}.npz"
    # missing or damaged: what can be made again is no error
    with contextlib.suppress(Exception), np.load(cached, allow_pickle=False) as content:
        bad = dict(zip(content["bad"].tolist(), content["reasons"].tolist()))
        return Decoded(content["images"], content["kept"], bad)
    images, bad = np.empty((len(files), 3, size, size), np.uint8), {}
    kept: list[int] = []
    for place, (path, _) in enumerate(files):
        try:
            images[len(kept)] = _resized(open_image(path), size)
            kept.append(place)
        except BadImage as error:
            bad[place] = str(error)
    found = Decoded(images[: len(kept)], np.array(kept, np.int64), bad)
    _keep(cached, found)
    return found


def _keep(cached: Path, found: Decoded) -> None:
    """Write the cache, if that is possible; another run may be doing the same."""
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        for path in CACHE.glob(".*.npz"):
            if path.stat().st_mtime < time.time() - STALE:
                path.unlink(missing_ok=True)
        bad, reasons = np.array(list(found.bad), np.int64), np.array(list(found.bad.values()), str)
        # without sync: what a power cut spoils is noticed when it is read
        with replacing(cached, sync=False) as temporary:
            np.savez(temporary, images=found.images, kept=found.kept, bad=bad, reasons=reasons)
    except (OSError, UserError) as error:
        log.warning("decoded images are not kept for the next run: %s", shortened(error))


def _fingerprint(files: Sequence[tuple[str, int]], size: int) -> str:
    digest = hashlib.sha256(f"{RULES} {size}".encode())
    for path, label in files:
        digest.update(os.fsencode(os.path.abspath(path)) + f"|{label}|{_state(path)}\n".encode())
    return digest.hexdigest()[:24]


def _state(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError:  # a broken link
        return "none"
    return f"{found.st_size}|{found.st_mtime_ns}"


def files_by_class(folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """(path, label) of every image below folder/<class>/, in sorted order.

    What is hidden, or in a hidden folder, and other endings are passed over.
    """
    found = []
    for label, root in enumerate(folder / name for name in classes):
        for path in sorted(root.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if path.suffix.lower() in IMAGE_ENDINGS and not hidden and not path.is_dir():
                found.append((str(path), label))
    return found


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in `folder`, sorted; FileNotFoundError where it is none itself."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    folders = (path.name for path in folder.iterdir() if path.is_dir())
    return tuple(sorted(name for name in folders if not name.startswith(".")))


def are_splits(names: Sequence[str]) -> bool:
    """Whether folders of these names are parts of a set, such as train and val, and no classes."""
    return bool(names) and all(name.casefold() in SPLITS for name in names)


def training_part(names: Sequence[str]) -> str:
    """Of the names of parts, the one a model is trained on; the first where none is called so."""
    return next((name for name in names if name.casefold().startswith("train")), names[0])
