"""The output folder of defense/purify.py: a record that lies where the user wants it, with the cleaned set beside its files."""
from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from utils import checksums, lock
from utils.config import UserError
from utils.data import LabeledImages
from utils.late import Tensor, torch
from utils.layouts import Layout, Outcome
from utils.record import DATA_KEY, Record, load_arrays
from utils.source import Source

CLEANED = "cleaned"


class OutputFolder(Record):
    """A record outside record/.

    Args:
        path: made if it is not there.
    """

    def __init__(self, path: Path):
        self.name, self.path = path.name, path
        path.mkdir(parents=True, exist_ok=True)

    def claim(self, config: dict[str, Any]) -> None:
        """Take the folder, or go on with the run that it holds; what lies in cleaned/ is left as it is.

        Raises:
            UserError: it holds something else, or the run of another config or another set.
        """
        with contextlib.suppress(FileNotFoundError):
            others = [path.name for path in self.path.iterdir()]
            if others and DATA_KEY not in (self.config() if "config.yaml" in others else {}):
                raise UserError(f"out: {self.path} is not empty and holds no run of this command; name a new or an empty folder")
        try:
            self.lock = lock.take(self.path, "save_folder_name")
            for left in self.path.glob(f".{CLEANED}.*"):    # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            self.note_cleaned()
            super().claim(config)
        except UserError as error:
            raise UserError(str(error).replace("save_folder_name", "out")) from None

    def note_cleaned(self) -> None:
        """Note the checksums of what lies in cleaned/ now: it is the user's, so it is neither judged nor set aside by `mend`.

        Files in deeper folders, as those of an image folder, are never looked at there.
        """
        listed = checksums.read(self.path)
        if listed is None:
            return
        names = {f"{CLEANED}/{path.name}": path for path in sorted((self / CLEANED).glob("*")) if path.is_file()}
        new = [f"{checksums.sha256_of(path)}  {name}" for name, path in names.items() if not listed.is_whole(name, path)]
        if new:
            checksums.note(self.path, *new)


def refuse_overlap(given: Path, out: Path) -> None:
    """The input is never written to: raises UserError where one folder lies in the other, or `out` is a file."""
    a, b = given.resolve(), out.resolve()
    if a == b or b.is_relative_to(a) or a.is_relative_to(b):
        raise UserError(f"out: {out} and the data at {given} lie in each other; name a folder apart from the data")
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; name a new or an empty folder")


def outcome(folder: OutputFolder, given: Tensor, action: str) -> Outcome:
    """What a finished analysis and an action ("relabel", "drop") make of each sample.

    Args:
        given: int64 (N,), the labels as given.
    """
    purified, table = LabeledImages(**load_arrays(folder / "purified.npz")), Source(folder.path).decisions
    replaced, relabelled = torch.from_numpy(table["round"] != -1), purified.labels != given
    none = torch.zeros_like(replaced)
    if action == "drop":
        return Outcome(given, purified.images, none, replaced | relabelled)
    return Outcome(purified.labels, purified.images, replaced, none)


def write_cleaned(folder: OutputFolder, layout: Layout, result: Outcome) -> Path:
    """cleaned/: the set in its own layout, all of it or nothing; takes the place of what another action left there."""
    target, temporary = folder / CLEANED, folder / f".{CLEANED}.{os.getpid()}"
    temporary.mkdir()
    try:
        layout.write(temporary, result)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        folder.note_cleaned()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
