"""Image files and arrays to uint8 (N, 3, H, W), decoded once and kept in `record/.cache/`.

A file is read as a viewer shows it: turned as EXIF says, transparency over white, 16 bits scaled
down, the first frame of an animation. What cannot be read so is a bad image, with a reason.
"""

import contextlib
import hashlib
import io
import logging
import os
import re
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
# names that systems and programs leave beside a user's files, in any case
SYSTEM = ("__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin")
RULES = 2  # raised when images are read differently, so that no earlier cache is used
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


def open_with_kind(
    path: str | Path | io.BytesIO, root: Path | None = None
) -> tuple[Image.Image, bool]:
    """An image file as a person sees it, in mode RGB, and whether it holds grey levels alone.

    Args:
        path: a file, or the content of one.
        root: the folder that the path must not lead out of, by a link or by its name.

    Raises:
        BadImage: not an image, damaged, too large, of pixels without a known scale, or not there.
    """
    if root and not isinstance(path, io.BytesIO) and leads_out(path, root):
        raise BadImage(OUTSIDE)
    try:
        if not isinstance(path, io.BytesIO) and not stat.S_ISREG(os.stat(path).st_mode):
            raise BadImage("not a regular file")
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            if image.format == "EPS":
                raise BadImage("a program in PostScript, which is not run")
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
            return as_rgb(ImageOps.exif_transpose(image)), image.mode in GREY
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - each of PIL's readers raises its own
        raise BadImage(_reason(error, path)) from None


def _reason(error: Exception, path: str | Path | io.BytesIO) -> str:
    if isinstance(error, UnidentifiedImageError):
        size = path.getbuffer().nbytes if isinstance(path, io.BytesIO) else os.path.getsize(path)
        return "not an image" if size else "empty file"
    told = isinstance(error, OSError) and error.strerror
    return told or shortened(error) or type(error).__name__


def as_rgb(image: Image.Image) -> Image.Image:
    """An open image in mode RGB, converted as files are; raises BadImage as `open_with_kind`."""
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


def read_again(
    source: str | Path | io.BytesIO, name: str | Path, root: Path | None = None
) -> np.ndarray:
    """uint8 (1, H, W, 3) of an image that was readable before, as `open_with_kind` reads it.

    Raises:
        UserError: it is not any more; `name` is what a person finds it by.
    """
    try:
        return np.asarray(open_with_kind(source, root)[0])[None]
    except BadImage as error:
        reason = f"cannot be read any more ({error}); repair or remove it"
        raise UserError(f"{name}: {reason}") from None


def resize_all(images_hwc: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N, H, W, 3) -> uint8 (N, 3, size, size): PIL bilinear."""
    if images_hwc.shape[1:3] != (size, size):
        images = (Image.fromarray(image) for image in images_hwc)
        resized = (image.resize((size, size), Image.Resampling.BILINEAR) for image in images)
        images_hwc = np.stack([np.asarray(image) for image in resized])
    return np.ascontiguousarray(images_hwc.transpose(0, 3, 1, 2))


def decode_files(files: Sequence[tuple[str, int]], size: int) -> np.ndarray:
    """uint8 (N, 3, size, size) of (path, label) pairs; raises UserError where one is bad."""
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
        root: what leads out of this folder is a bad image; None lets it lead anywhere.
    """
    cached = CACHE / f"{_fingerprint(files, size, root)}.npz"
    # missing or damaged: what can be made again is no error
    with contextlib.suppress(Exception), np.load(cached, allow_pickle=False) as content:
        bad = dict(zip(content["bad"].tolist(), content["reasons"].tolist()))
        return Decoded(content["images"], content["kept"], bad)
    images, bad = np.empty((len(files), 3, size, size), np.uint8), {}
    kept: list[int] = []
    for place, (path, _) in enumerate(files):
        try:
            pixels = np.asarray(open_with_kind(path, root)[0])
            images[len(kept)] = resize_all(pixels[None], size)[0]
            kept.append(place)
        except BadImage as error:
            bad[place] = str(error)
    found = Decoded(images[: len(kept)], np.array(kept, np.int64), bad)
    _keep(cached, found)
    return found


def leads_out(path: str | Path, root: Path) -> bool:
    """Whether a path, or the link that it is, leads out of the data folder `root`."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


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


def _fingerprint(files: Sequence[tuple[str, int]], size: int, root: Path | None) -> str:
    digest = hashlib.sha256(f"{RULES} {size}".encode())
    for path, label in files:
        state = _state(path, root)
        digest.update(os.fsencode(os.path.abspath(path)) + f"|{label}|{state}\n".encode())
    return digest.hexdigest()[:24]


def _state(path: str, root: Path | None) -> str:
    if root and leads_out(path, root):
        return OUTSIDE
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
    """Names of the folders in `folder`, by `class_order`; FileNotFoundError where it is none."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    names = (path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    return tuple(sorted(names, key=class_order))


def class_order(name: str) -> tuple[bool, int, str]:
    """Key that sorts names of classes: integers by value, then all others as text."""
    is_number = re.fullmatch(r"[+-]?[0-9]{1,18}", name)
    return not is_number, int(name) if is_number else 0, name


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or a system's own."""
    return name.startswith(".") or name.casefold() in SYSTEM
