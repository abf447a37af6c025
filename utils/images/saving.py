"""A changed image in its original's stead: same format, mode, depth, colour profile, orientation.

What is seen of an image is upright, of 8 bits, over white (decoding.py). Only what changed there is
carried onto what is stored: 16-bit levels move as those seen do, so that unchanged pixels keep all
of theirs, and colours behind an image's own alpha become those that are seen as wanted.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from utils.images.decoding import GREY, as_rgb
from utils.images.layout import fitted

FULL = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
# formats that Pillow writes without loss, and the modes that each can hold
LOSSLESS = {
    "PNG": FULL,
    "TIFF": FULL,
    "BMP": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
}
ORIENTATION = 274  # the tag in EXIF
Turn = Image.Transpose
# the turn from what is seen back to what is stored
BACK = {
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_90,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_270,
}
# tags of TIFF that describe an image; the others say how it is stored
DESCRIBING = (270, 271, 272, ORIENTATION, 282, 283, 296, 305, 306, 315, 33432)
LOSSLESS_TIFF = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate")
PALETTE = 256  # colours in one


@dataclass(frozen=True)
class Saved:
    """An encoded image.

    Attributes:
        ending: what the file's name must end with; empty where the original's name serves.
        lost: what could not be kept of the original; empty where all was.
    """

    content: bytes
    ending: str
    lost: str


def saved_like(original: bytes, image: np.ndarray) -> Saved:
    """An image uint8 (3, R, R), scaled to the size of an encoded image, encoded as that one is.

    Where the format or mode of the original, which `decoding` could read, does not hold the image
    without loss, the result is PNG, or of another mode, and `lost` says so.
    """
    with warnings.catch_warnings(), Image.open(io.BytesIO(original)) as source:
        warnings.simplefilter("ignore")
        kind, frames = source.format or "", getattr(source, "n_frames", 1)
        exif, deep = source.getexif(), is_deep(source)
        turn = exif.get(ORIENTATION)
        upright = ImageOps.exif_transpose(source)
        goal = fitted(image, upright.size[::-1], grey=upright.mode in GREY)
        new, lost = carried(upright, goal)
        if turn in BACK:
            new, exif[ORIENTATION] = new.transpose(BACK[turn]), turn  # TIFF's reader removed it
        new_kind = kind if new.mode in LOSSLESS.get(kind, ()) else "PNG"
        lost += [f"{kind} became PNG"] if new_kind != kind else []
        lost += ["only its first frame is there"] if frames > 1 else []
        levels = deep_levels(original, source, new) if deep and kind == "PNG" else None
        if levels is not None:
            content = _deep_png(levels, source, exif)
        else:
            content = _encoded(new, new_kind, source, exif)
            lost += ["16 bits a channel became 8"] if deep else []
        return Saved(content, ".png" if new_kind != kind else "", "; ".join(lost))


def is_deep(source: Image.Image) -> bool:
    """Whether an opened image has colours of 16 bits, of which Pillow reads 8."""
    return source.mode in FULL[:-1] and any(
        ";16" in str(tile[3]) for tile in getattr(source, "tile", ())
    )


def carried(source: Image.Image, goal: np.ndarray) -> tuple[Image.Image, list[str]]:
    """An upright image stored as `source` is, seen as `goal`, uint8 (H, W, 3) or (H, W), and what was lost.

    Where little of a pixel's colour is seen through the image's own alpha, it comes as near as its
    range allows; where none is, it is `goal` itself, so that nothing stays hidden there.
    """
    if source.mode.startswith("I"):
        seen = np.asarray(as_rgb(source))[..., 0].astype(np.int64)
        levels = np.asarray(source).astype(np.int64) + 257 * (goal - seen)
        return Image.fromarray(levels.clip(0, 65535).astype(np.uint16)), []
    if "A" in source.mode or "a" in source.mode or "transparency" in source.info:
        return _behind_alpha(source, goal)
    if source.mode == "1":
        picture = Image.fromarray(goal)
        is_bilevel = bool(np.isin(goal, (0, 255)).all())
        return (picture.convert("1"), []) if is_bilevel else (picture, ["1 bit a pixel became 8"])
    if source.mode == "P":
        return _with_palette(goal)
    told = [] if source.mode in ("L", "RGB") else [f"{source.mode} became RGB"]
    return Image.fromarray(goal), told


def _behind_alpha(source: Image.Image, goal: np.ndarray) -> tuple[Image.Image, list[str]]:
    wanted = goal if goal.ndim == 3 else np.repeat(goal[..., None], 3, axis=-1)
    own, seen = np.asarray(source.convert("RGBA")), np.asarray(as_rgb(source))
    alpha = own[..., 3:].astype(np.float64) / 255
    through = (wanted - 255 * (1 - alpha)) / np.maximum(alpha, 1 / 255)
    colours = np.where(alpha > 0, through.round().clip(0, 255), wanted)
    same = (wanted == seen).all(-1, keepdims=True) & (alpha > 0)
    new = np.where(same, own[..., :3], colours).astype(np.uint8)
    mode = "LA" if goal.ndim == 2 else "RGBA"
    layers = [new[..., 0]] if mode == "LA" else list(np.moveaxis(new, -1, 0))
    bands = [Image.fromarray(np.ascontiguousarray(layer)) for layer in (*layers, own[..., 3])]
    return Image.merge(mode, bands), [] if source.mode == mode else [f"{source.mode} became {mode}"]


def _with_palette(goal: np.ndarray) -> tuple[Image.Image, list[str]]:
    colours, index = np.unique(goal.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) > PALETTE:
        return Image.fromarray(goal), [f"{len(colours):,} colours need more than a palette"]
    picture = Image.fromarray(index.reshape(goal.shape[:2]).astype(np.uint8))
    picture.putpalette(colours.tobytes())
    return picture, []


def _encoded(new: Image.Image, kind: str, source: Image.Image, exif: Image.Exif) -> bytes:
    """`new` in the format `kind`, with the colour profile and the EXIF data of `source`."""
    options: dict[str, Any] = {}
    if kind in ("PNG", "TIFF", "WEBP"):
        options["icc_profile"] = _profile(new.mode, source)
    if kind in ("PNG", "WEBP") and exif:
        options["exif"] = _exif(exif)
    if kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    if kind == "TIFF":
        packing = source.info.get("compression")
        options["compression"] = packing if packing in LOSSLESS_TIFF else "tiff_adobe_deflate"
        options["tiffinfo"] = {tag: exif[tag] for tag in DESCRIBING if tag in exif}
    if kind == "GIF":
        options["optimize"] = False
    file = io.BytesIO()
    new.save(file, kind, **options)
    return file.getvalue()


def _profile(mode: str, source: Image.Image) -> bytes | None:
    """The original's colour profile where the new mode's pixels are still of its colours."""
    profile: bytes = source.info.get("icc_profile") or b""
    kept = mode == source.mode or profile[16:20] == b"RGB "
    return profile if kept and profile else None


def _exif(exif: Image.Exif) -> bytes:
    """EXIF data as bytes: the orientation alone where the rest is damaged."""
    try:
        return exif.tobytes()
    except Exception:  # noqa: BLE001 - what a damaged tag raises is its own
        plain = Image.Exif()
        plain[ORIENTATION] = exif.get(ORIENTATION, 1)
        return plain.tobytes()


def deep_levels(original: bytes, source: Image.Image, new: Image.Image) -> np.ndarray | None:
    """Levels uint16 (H, W, 3 or 4) of a PNG's original, moved by what `new` changes in `source`.

    The 8 bits that are seen are the high bytes, so they become exactly those of `new`. None where
    channels were added or merged.
    """
    try:
        from torchvision.io import decode_png
    except ImportError:  # announced by torchvision 0.29
        return None
    levels = decode_png(torch.frombuffer(bytearray(original), dtype=torch.uint8))
    if new.mode != source.mode or len(levels) != len(source.getbands()) or len(levels) < 3:
        return None
    change = np.asarray(new).astype(np.int32) - np.asarray(source)
    return (levels.numpy().transpose(1, 2, 0) + 256 * change).astype(np.uint16)


def _deep_png(levels: np.ndarray, source: Image.Image, exif: Image.Exif) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write."""
    height, width, channels = levels.shape
    rows = levels.astype(">u2").reshape(height, -1).view(np.uint8)
    packed = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())  # 0: rows are not filtered
    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in _chunks(head, packed, source, exif)
    )


def _chunks(
    head: bytes, packed: bytes, source: Image.Image, exif: Image.Exif
) -> Iterator[tuple[bytes, bytes]]:
    yield b"IHDR", head
    if profile := source.info.get("icc_profile"):
        yield b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile)
    if exif:
        yield b"eXIf", _exif(exif).removeprefix(b"Exif\0\0")
    yield b"IDAT", packed
    yield b"IEND", b""


def free_name(name: Path, taken: set[str]) -> str:
    """`name`, or with -2, -3, ... before its ending; added, case-folded, to what is `taken`."""
    numbered = (name.with_stem(f"{name.stem}-{k}") for k in range(2, len(taken) + 3))
    candidates = (path.as_posix() for path in (name, *numbered))
    free = next(path for path in candidates if path.casefold() not in taken)
    taken.add(free.casefold())
    return free
