"""What lies below the folder of a set: which files are images of which class, and what is not.

A file is taken for an image by its content, or by its ending where it is damaged (it is then told
of). Every file that is not has a reason. Links are followed, each folder once below a first-level
folder; what leads out of the set is a bad image unless links may lead out (`follow_links`).
"""

import functools
import os
import stat
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from utils.config import ReadConfig, UserError
from utils.images.decoding import IMAGE_ENDINGS, class_order, is_hidden, leads_out
from utils.images.parts import refuse_doubt

HIDDEN, NO_IMAGE = "hidden or of the system", "no images"
NO_CLASS, AGAIN = "images in no class folder", "links to folders that are read already"
NO_PIXELS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # PIL knows them by name and reads none


@dataclass(frozen=True)
class Tree:
    """The files of a set, below its folder.

    Attributes:
        folder: where it lies.
        classes: their names, by `class_order`; a nested class's is its path below the folder.
        files: (path below the folder, label) of images, by label and then by name.
        left_out: {reason: paths below the folder} of all that is no image of a class.
        found: how many files there are.
    """

    folder: Path
    classes: tuple[str, ...]
    files: list[tuple[str, int]]
    left_out: dict[str, list[str]]
    found: int

    @property
    def paths(self) -> list[tuple[str, int]]:
        """(path, label) of the images."""
        return [(str(self.folder / path), label) for path, label in self.files]


class _Walk:
    """Collects what lies below `root`, as paths with slashes; see `read_tree`.

    Attributes:
        folders: all folders that are not hidden.
        images: (path, its folder); all that lies outside `within` is among them, unopened.
        others: {reason: paths}.
        count: files met.
    """

    def __init__(self, root: Path, within: Path | None):
        self.root, self.within, self.count = root, within, 0
        self.folders: list[str] = []
        self.images: list[tuple[str, str]] = []
        self.others: dict[str, list[str]] = {}
        for top in self._listed(""):
            self._below(top)

    def _below(self, top: str) -> None:
        seen, folders = {os.path.realpath(self.root)}, [top]
        links: list[str] = []
        while folders or links:
            here = folders.pop() if folders else links.pop(0)
            place = os.path.realpath(self.root / here)
            if place in seen:
                self._leave(AGAIN, here)
            else:
                seen.add(place)
                self.folders.append(here)
                for inner in self._listed(here):
                    (links if os.path.islink(self.root / inner) else folders).append(inner)

    def _listed(self, here: str) -> list[str]:
        """The folders in a folder; its files are sorted in."""
        try:
            names = sorted(os.listdir(self.root / here))
        except OSError as error:
            raise UserError(
                f"data: {self.root / here} cannot be listed ({error.strerror})"
            ) from None
        folders = []
        for name, path in ((name, f"{here}/{name}" if here else name) for name in names):
            if is_hidden(name):
                self._leave(HIDDEN, *self._hidden(path))
            elif os.path.isdir(self.root / path):
                folders.append(path)
            else:
                self._sort(path, here)
        return folders

    def _hidden(self, path: str) -> list[str]:
        """What is hidden, with all that lies in it; no link is followed there."""
        if os.path.islink(self.root / path) or not os.path.isdir(self.root / path):
            return [path]
        files = (Path(at, name) for at, _, names in os.walk(self.root / path) for name in names)
        return sorted(file.relative_to(self.root).as_posix() for file in files)

    def _sort(self, path: str, here: str) -> None:
        if not is_image(self.root / path, self.within):
            self._leave(NO_IMAGE, path)
        elif not here:
            self._leave(NO_CLASS, path)
        else:
            self.count += 1
            self.images.append((path, here))

    def _leave(self, reason: str, *paths: str) -> None:
        self.count += len(paths)
        self.others.setdefault(reason, []).extend(paths)


def read_tree(folder: Path, how: ReadConfig, within: Path | None = None, key: str = "data") -> Tree:
    """Sort everything below `folder`.

    Args:
        how: which folders are classes, and whether links may lead out.
        within: the folder out of which nothing may lead; `folder` by default.
        key: of the config, in whose name errors are raised.

    Raises:
        UserError: what lies in `folder` are parts of a set, or classes at two levels; or two
            classes have names that fall together on other file systems.
    """
    walk = _Walk(folder, None if how.follow_links else within or folder)
    holders = {place for _, place in walk.images}
    refuse_doubt(folder, walk.folders, holders, how.classes, key)
    if how.classes == "leaf":
        above = {os.path.dirname(path) for path in walk.folders}
        names, named = holders | (set(walk.folders) - above), walk.images
    else:
        names = {path.partition("/")[0] for path in (*walk.folders, *holders)}
        named = [(path, path.partition("/")[0]) for path, _ in walk.images]
    classes = tuple(sorted(names, key=class_order))
    _refuse_twins(folder, classes, key)
    label = {name: k for k, name in enumerate(classes)}
    files = [(path, label[name]) for path, name in named]
    files.sort(key=lambda file: (file[1], file[0].split("/")))
    left_out = {reason: sorted(paths) for reason, paths in sorted(walk.others.items())}
    return Tree(folder, classes, files, left_out, walk.count)


def _refuse_twins(folder: Path, classes: tuple[str, ...], key: str) -> None:
    """UserError where two names are one to a file system that knows no case, or composes letters."""
    composed = functools.partial(unicodedata.normalize, "NFC")
    known: dict[str, str] = {}
    for name in classes:
        twin = known.setdefault(composed(composed(name).casefold()), name)
        if twin == name:
            continue
        same = composed(twin) == composed(name)
        how = "how letters are composed (Unicode NFC, NFD)" if same else "case"
        pair = " and ".join(map(ascii if same else repr, (twin, name)))
        raise UserError(
            f"{key}: in {folder} the class folders {pair} differ only in {how}, and fall together "
            "on other file systems; rename one, or merge them if they are one class"
        )


def is_image(path: Path, within: Path | None = None) -> bool:
    """Whether a file is an image, or was meant to be one: a link that is broken may have been."""
    try:
        if path.suffix.lower() in IMAGE_ENDINGS or (within and leads_out(path, within)):
            return True
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return image.format not in NO_PIXELS
    except UnidentifiedImageError:
        return False
    except (OSError, Image.DecompressionBombError):
        return True
    except Exception:  # noqa: BLE001 - of a reader that took the file for one of its own
        return False
