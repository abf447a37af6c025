"""Tar archives as webdataset has them: members of one name and several endings are a sample.

The image is in KEY.jpg or KEY.png, the label in KEY.cls; other members go with their sample.
"""

import copy
import io
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from utils.config import UserError
from utils.images.decoding import IMAGE_ENDINGS, OUTSIDE, leads_out
from utils.images.encoded import STRAY, EncodedImages, column, copy_files, files_beside, parted
from utils.images.layout import Keys, Outcome, numbered
from utils.images.saving import saved_like
from utils.storage.files import shortened

IMAGES = tuple(ending.removeprefix(".") for ending in IMAGE_ENDINGS)
LABELS = ("cls",)
LABEL_BYTES = 1000  # at most


@dataclass(frozen=True)
class Member:
    """Where the content of a member lies in the archive at place `archive` of the list."""

    archive: int
    name: str
    start: int
    size: int


def tar_files(path: Path, split: str) -> list[Path]:
    """The archives of a part of a set at `path`; none where it is no such set.

    Raises:
        UserError: it is one, but has no such part.
    """
    if path.is_file():
        return [path] if path.suffix.lower() == ".tar" else []
    files = sorted(path.glob("*.tar"))
    names = {file: re.sub(r"[-_.]*[0-9]*$", "", file.stem) for file in files}
    chosen = [file for file in files if split in re.split("[-_.]", names[file])]
    if files and not chosen and len(set(names.values())) == 1 and split == Keys.split:
        return files
    if files and not chosen:
        parts = ", ".join(sorted(set(names.values())))
        raise UserError(f"split: {path} has no archives of the part '{split}'; it has {parts}")
    return chosen


class TarFiles(EncodedImages):
    """Images and labels in the members of archives, in their order.

    Raises:
        UserError: members that are no plain files below the archive's root, samples without image
            or label, or labels that are none.
    """

    kind = "tar dataset"
    uses = ("split", "image_column", "label_column")

    def __init__(self, path: Path, files: Sequence[Path], keys: Keys):
        self.root, self.files = (path.parent if path.is_file() else path), list(files)
        samples: dict[tuple[int, str], dict[str, Member]] = {}
        for place, file in enumerate(self.files):
            if leads_out(file, self.root):
                raise UserError(f"data: {file} {OUTSIDE}; put the file itself there")
            for member in self._members(place, file):
                key, ending = parts_of(member.name)
                sample = samples.setdefault((place, key), {})
                if ending in sample:
                    raise UserError(f"data: {file} has {member.name} twice; take one out")
                sample[ending] = member
        self._sort_out(path, samples, keys)
        self.look(path)
        beside = [] if path.is_file() else files_beside(self.root, self.files)
        self.others, out = parted(self.root, beside)
        self.reasons = {STRAY: out} if out else {}

    def _members(self, place: int, file: Path) -> Iterator[Member]:
        try:
            with tarfile.open(file, "r:") as archive:
                for info in archive:
                    refuse_odd(info, file)
                    hidden = PurePosixPath(info.name).name.startswith(".")
                    if info.isfile() and not hidden:
                        yield Member(place, info.name, info.offset_data, info.size)
        except (tarfile.TarError, OSError, ValueError) as error:
            told = f"cannot be read ({shortened(error)}); unpack it if it is packed"
            raise UserError(f"data: {file} {told}") from None

    def _sort_out(
        self, path: Path, samples: dict[tuple[int, str], dict[str, Member]], keys: Keys
    ) -> None:
        """Finds each sample's image and label, and reads the labels."""
        wanted = (("image", keys.image_column, IMAGES), ("label", keys.label_column, LABELS))
        found: dict[str, list[Member]] = {"image": [], "label": []}
        self.keys = list(samples)
        if not samples:
            raise UserError(f"data: {path} holds no samples; expected members KEY.jpg and KEY.cls")
        for (place, key), sample in samples.items():
            held, where = list(sample), f"{self.files[place]}, sample '{key}',"
            for kind, given, known in wanted:
                found[kind].append(sample[held[column(kind, given, held, known, where)]])
        self.image_members, self.label_members = found["image"], found["label"]
        self.paths = [f"{self.files[m.archive].name}/{m.name}" for m in self.image_members]
        self.texts = [self._text(member) for member in self.label_members]
        bare = [text.strip() for text in self.texts]
        whole = all(re.fullmatch("-?[0-9]{1,18}", text) for text in bare)
        values, self.labels = numbered(np.array(bare, np.int64) if whole else np.array(bare))
        self.classes = tuple(map(str, values))

    def _text(self, member: Member) -> str:
        """A label as it is written."""
        place = f"{self.files[member.archive]}, {member.name}"
        content = self._content(member) if member.size <= LABEL_BYTES else b""
        text = content.decode("utf-8", "replace")
        if not text.strip() or "\ufffd" in text:
            raise UserError(f"data: {place} holds no label; expected a number or a name in UTF-8")
        return text

    def _content(self, member: Member) -> bytes:
        with open(self.files[member.archive], "rb") as file:
            file.seek(member.start)
            return file.read(member.size)

    def contents(self) -> Iterator[bytes]:
        return map(self._content, self.image_members)

    def write(self, folder: Path, outcome: Outcome) -> dict[str, str]:
        """The same archives, of which those with changes are written anew; others are copied."""
        lost: dict[str, str] = {}
        changed = outcome.replaced | outcome.dropped | (outcome.labels != self.labels)
        touched = {self.keys[k][0] for k in changed.nonzero().flatten().tolist()}
        for place, file in enumerate(self.files):
            if place in touched:
                self._rewrite(place, folder / file.name, outcome, lost)
            else:
                shutil.copyfile(file, folder / file.name)
        copy_files(self.root, folder, self.others)
        return lost

    def _rewrite(self, place: int, target: Path, outcome: Outcome, lost: dict[str, str]) -> None:
        numbers = {key: k for k, key in enumerate(self.keys)}
        with tarfile.open(self.files[place], "r:") as old, tarfile.open(target, "w") as new:
            for info in old:
                k = numbers.get((place, parts_of(info.name)[0])) if info.isfile() else None
                if k is not None and outcome.dropped[k]:
                    continue
                content = None if k is None else self._changed(k, info, outcome, lost)
                if content is None:
                    new.addfile(info, old.extractfile(info) if info.isfile() else None)
                else:
                    name, data = content
                    info = copy.copy(info)
                    info.name, info.size, info.pax_headers = name, len(data), {}
                    new.addfile(info, io.BytesIO(data))

    def _changed(
        self, k: int, info: tarfile.TarInfo, outcome: Outcome, lost: dict[str, str]
    ) -> tuple[str, bytes] | None:
        """Name and content that a member of sample k gets; None where it stays as it is."""
        image, label = self.image_members[k], self.label_members[k]
        if info.name == image.name and outcome.replaced[k]:
            saved = saved_like(self._content(image), outcome.images[k].numpy())
            lost |= {self.paths[k]: saved.lost} if saved.lost else {}
            ending = saved.ending or PurePosixPath(info.name).suffix
            return str(PurePosixPath(info.name).with_suffix(ending)), saved.content
        if info.name == label.name and outcome.labels[k] != self.labels[k]:
            text, new = self.texts[k], self.classes[outcome.labels[k]]
            return info.name, text.replace(text.strip(), new).encode()
        return None


def parts_of(name: str) -> tuple[str, str]:
    """Key and ending of a member: what is before the first dot of its last name, and after it."""
    folder, _, last = name.rpartition("/")
    key, _, ending = last.partition(".")
    return f"{folder}/{key}".removeprefix("/"), ending.lower()


def refuse_odd(info: tarfile.TarInfo, file: Path) -> None:
    """Raises UserError where a member is no plain file or folder below the archive's root."""
    path = PurePosixPath(info.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"data: {file} has the member {info.name!r}, which {OUTSIDE}; remove it")
    if not (info.isfile() or info.isdir()) or info.issparse():
        told = "which is no plain file; put the file itself there, or remove it"
        raise UserError(f"data: {file} has the member {info.name!r}, {told}")
