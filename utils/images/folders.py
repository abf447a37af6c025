"""Image files of a data set that a person collected: every odd one is told of, in one list."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.config import DataConfig, ReadConfig, UserError, nearest
from utils.images.decoding import OUTSIDE, Decoded, decode_readable

log = logging.getLogger("dataelixir")
Files = Sequence[tuple[str, int]]  # (path, label)
SHOWN = 200
UNUSABLE = "images that cannot be used"


def read_parts(
    parts: Sequence[Files], config: DataConfig, root: Path, classes: Sequence[str] = ()
) -> list[tuple[np.ndarray, list[int]]]:
    """(images uint8 (M, 3, S, S), labels) of the training and of the test files.

    Args:
        root: the data folder; nothing outside it is read unless links may lead there.
        classes: their names, to log what is readable but hardly meant.

    Raises:
        UserError: a file is no usable image (all are logged), and `config.on_bad_image` is stop.
    """
    within = None if config.follow_links else root
    found = [decode_readable(part, config.image_size, within) for part in parts]
    both = list(zip(parts, found))
    bad = {part[k][0]: reason for part, read in both for k, reason in read.bad.items()}
    refuse_bad(bad, sum(map(len, parts)), root, config, "dataset_path")
    if classes:
        _tell_oddities(parts, found, classes)
    return [(read.images, [part[place][1] for place in read.kept]) for part, read in both]


def refuse_bad(bad: Mapping[str, str], total: int, root: Path, how: ReadConfig, key: str) -> None:
    """Log the unusable ones of `total` files, {path: reason}; UserError where none may be skipped.

    Args:
        key: of the config, in whose name the error is raised.
    """
    lines = [f"{root / path}: {reason}" for path, reason in bad.items()]
    tell(f"{len(bad)} of {total} image files in {root} cannot be used", lines)
    if lines and how.on_bad_image == "stop":
        raise UserError(
            f"{key}: {len(bad)} image files in {root} cannot be used, the first is {lines[0]};\n"
            "repair or remove what is listed above, or leave it out with --on_bad_image skip"
            + ", or read what links lead to with --follow_links"
            * (OUTSIDE in bad.values())
        )


def tell_reasons(reasons: Mapping[str, Sequence[str]]) -> None:
    """Warn of files that are left out, {reason: names}."""
    for reason, names in reasons.items():
        tell(f"left out: {reason}", names)


def in_words(account: Mapping[str, Any]) -> str:
    """What `Layout.account` says, in a sentence."""
    out = [f"{count:,} {reason}" for reason, count in account["left_out"].items()]
    left = f"{sum(account['left_out'].values()):,} left out"
    left += f" ({', '.join(out)})" if out else ""
    return f"{account['found']:,} found: {account['analysed']:,} analysed, {left}"


def refuse_unknown(test: Path, tested: Sequence[str], classes: Sequence[str]) -> None:
    """Raises UserError where `tested`, the folders in test/, has some that train/ has not: they
    would be left out."""
    if unknown := [name for name in tested if name not in classes]:
        first = f"the first is {unknown[0]}/.{nearest(unknown[0], list(classes))}"
        advice = "Rename them as in train/, or take them out"
        found = f"{test} has {len(unknown)} folders that train/ has not, {first} {advice}"
        raise UserError(f"dataset_path: {found}")


def _tell_oddities(parts: Sequence[Files], found: Sequence[Decoded], classes: Sequence[str]):
    labels = ([part[place][1] for place in read.kept] for part, read in zip(parts, found))
    train, test = (np.bincount(column, minlength=len(classes)) for column in labels)
    few = [f"{name}: {n}" for name, n in zip(classes, train) if n < 2]
    untested = [name for name, n, m in zip(classes, train, test) if n > 1 and not m]
    tell("classes with hardly any training images", few)
    tell("classes without a test image", untested)
    tell("pictures that are in more than one class (kept in each)", _in_two_classes(parts, found))


def picture_digest(image: np.ndarray) -> bytes:
    """By which equal pictures are known."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _in_two_classes(parts: Sequence[Files], found: Sequence[Decoded]) -> list[str]:
    seen: dict[bytes, tuple[str, int]] = {}
    twice = []
    for part, decoded in zip(parts, found):
        for image, place in zip(decoded.images, decoded.kept):
            path, label = part[place]
            first = seen.setdefault(picture_digest(image), (path, label))
            if first[1] != label:
                twice.append(f"{path}: the same as {first[0]}")
    return twice


def tell(heading: str, lines: Sequence[str]) -> None:
    """Warn of `lines`, where there are any."""
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        log.warning("%s:\n%s", heading, "\n".join(f"  {line}" for line in [*lines[:SHOWN], *more]))


def gtsrb_test_files(table: Path, images: Path, classes: int) -> list[tuple[str, int]]:
    """(path, label) of those that GTSRB's table lists and that are there; UserError if damaged."""
    try:
        lines = table.read_text(encoding="utf-8").splitlines()[1:]
        rows = [line.strip().split(";") for line in lines if line.strip()]
        files = [(str(images / row[0]), int(row[-1])) for row in rows if (images / row[0]).exists()]
    except ValueError as error:  # no number, no UTF-8, a zero byte in a name
        raise UserError(f"{table}: damaged ({str(error)[:80]}); download it again") from None
    if not files:
        listed = "none of the images that it lists"
        raise UserError(f"{table}: {listed} is in {images}; download both again")
    strange = [label for _, label in files if not 0 <= label < classes]
    if strange:
        known = f"the training images have classes 0..{classes - 1}"
        raise UserError(f"{table}: lists class {strange[0]}, but {known}; download both again")
    return files
