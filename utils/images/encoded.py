"""What layouts share whose images are encoded one by one: in files, tables or archives."""

import io
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from utils.config import UserError
from utils.images.decoding import BadImage, leads_out, open_with_kind, read_again, resize_all
from utils.images.folders import tell
from utils.images.layout import Layout

# names of columns, without case, spaces, - and _
FILE_COLUMNS = (
    *("file", "filename", "filepath", "path", "image", "imagefile", "imagepath", "imagename"),
    *("imageid", "img", "images", "id"),
)
PICTURE_COLUMNS = ("image", "img", "images", "picture", "pixels")  # of images themselves
LABEL_COLUMNS = (
    *("label", "labels", "class", "classid", "classname", "category", "target", "finelabel"),
)


class EncodedImages(Layout):
    """A layout of encoded images; those who derive from it set `paths`, `labels` and `classes`."""

    def contents(self) -> Iterator[bytes]:
        """The N encoded images."""
        raise NotImplementedError

    def look(self, place: Path) -> None:
        """Find the sizes that occur; memory holds one image at a time.

        Raises:
            UserError: some of them are no usable images (all are logged).
        """
        sizes, bad = [], []
        for path, content in zip(self.paths, self.contents()):
            try:
                sizes.append(open_with_kind(io.BytesIO(content))[0].size[::-1])
            except BadImage as error:
                bad.append(f"{path}: {error}")
        if bad:
            tell(f"{len(bad)} of {len(self.paths)} images in {place} cannot be used", bad)
            found = f"{len(bad)} images in {place} cannot be used, the first is {bad[0]}"
            raise UserError(f"data: {found};\nrepair or remove what is listed above")
        self.sizes = [size for size, _ in Counter(sorted(sizes)).most_common()]

    def images(self, size: int) -> Tensor:
        parts = [np.empty((0, 3, size, size), np.uint8)]
        for path, content in zip(self.paths, self.contents()):
            parts.append(resize_all(read_again(io.BytesIO(content), path), size))
        return torch.from_numpy(np.concatenate(parts))


def files_beside(folder: Path, own: Sequence[Path]) -> list[str]:
    """Names of the files in a folder, at any depth, that are none of `own`."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p.relative_to(folder).as_posix() for p in files if p not in own)


STRAY = "hidden, out of date or led out of the folder"


def parted(folder: Path, names: Sequence[str], stale: str = "") -> tuple[list[str], list[str]]:
    """(those that belong to the set, those that do not): hidden, `stale`, or led out of the folder."""
    is_stray = lambda name: (
        any(part.startswith(".") for part in PurePosixPath(name).parts)
        or bool(stale and PurePosixPath(name).match(stale))
        or leads_out(folder / name, folder)
    )
    return [n for n in names if not is_stray(n)], [n for n in names if is_stray(n)]


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def column(
    kind: str, given: str, found: Sequence[str], known: Sequence[str], place: Path | str
) -> int:
    """The place in `found` of the column that holds images or labels.

    Args:
        kind: image or label.
        given: the name that the user gave, or empty.
        known: names to look for, the likeliest first.

    Raises:
        UserError: there is none of these names.
    """
    key = f"{kind}_column"
    listed = ", ".join(map(repr, found)) or "none"
    if given and given not in found:
        raise UserError(f"{key}: {place} has no column '{given}'; it has {listed}")
    if given:
        return list(found).index(given)
    place_of = known_column(found, known)
    if place_of is None:
        raise UserError(
            f"{key}: no column of {place} is known to hold {kind}s; it has {listed}. "
            f"Name it with --{key}, or call it one of {', '.join(known)}"
        )
    return place_of


def known_column(found: Sequence[str], known: Sequence[str]) -> int | None:
    """The place in `found` of the first of `known` that is there; None without any."""
    bare = [_bare(name) for name in found]
    return next((bare.index(name) for name in known if name in bare), None)


def _bare(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in " -_\ufeff")
