"""The output folder of defense/purify.py: a record that lies where the user wants it, with the cleaned set beside its files."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from utils.config import UserError
from utils.images.data import LabeledImages
from utils.images.layout import Layout, Outcome
from utils.late import Tensor, torch
from utils.page.source import Source
from utils.storage import checksums, lock
from utils.storage.record import DATA_KEY, Record, load_arrays

log = logging.getLogger("dataelixir")
CLEANED = "cleaned"  # also the key of SUMMARY that says of which action the set there is
SUMMARY = "summary.json"
COMPARED = 1024  # images at a time


class OutputFolder(Record):
    """A record outside record/.

    Args:
        path: made if it is not there.
    """

    def __init__(self, path: Path):
        self.name, self.path, self.key = path.name, path, "out"
        path.mkdir(parents=True, exist_ok=True)

    def claim(self, config: dict[str, Any]) -> None:
        """Take the folder, or go on with the run that it holds; what lies in cleaned/ is left as it is.

        Raises:
            UserError: it holds something else, or the run of another config or another set.
        """
        with contextlib.suppress(FileNotFoundError):
            others = [path.name for path in self.path.iterdir()]
            if others and DATA_KEY not in (self.config() if "config.yaml" in others else {}):
                raise UserError(
                    f"out: {self.path} is not empty and holds no run of this command; name a new or an empty folder"
                )
        self.lock = lock.acquire(self.path, self.key)
        for left in self.path.glob(f".{CLEANED}.*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.note_cleaned()
        super().claim(config)

    def note_cleaned(self) -> None:
        """Note the checksums of what lies in cleaned/, and in what was put aside, now: it is the user's, so it is neither judged nor set aside by `mend`.

        Files in deeper folders, as those of an image folder, are never looked at there.
        """
        listed = checksums.read(self.path)
        if listed is None:
            return
        names = {
            path.relative_to(self.path).as_posix(): path
            for path in sorted(self.path.glob(f"{CLEANED}*/*"))
            if path.is_file()
        }
        new = [
            f"{checksums.sha256_of(path)}  {name}"
            for name, path in names.items()
            if not listed.is_whole(name, path)
        ]
        if new:
            checksums.note(self.path, *new)

    def holds(self) -> str | None:
        """The action whose set lies in cleaned/; None where nothing lies there, or where nobody knows what."""
        summary = Source(self.path).json(SUMMARY) if (self / CLEANED).exists() else {}
        return summary.get(
            CLEANED, summary.get("action")
        )  # without the key where an older version wrote it

    def forget(self) -> None:
        """Take the summary away: what it says of cleaned/ is about to be true no more."""
        (self / SUMMARY).unlink(missing_ok=True)

    def put_aside(self) -> None:
        """cleaned/ becomes cleaned-1/, or the next number that is free: files that the user changed or added there stay."""
        if os.path.lexists(self / CLEANED):
            aside = next(
                path
                for k in itertools.count(1)
                if not os.path.lexists(path := self / f"{CLEANED}-{k}")
            )
            os.replace(self / CLEANED, aside)
            log.info(
                "what was in %s is kept in %s; delete it if you do not need it",
                self / CLEANED,
                aside,
            )


def refuse_overlap(given: Path, out: Path) -> None:
    """The input is never written to: raises UserError where one folder lies in the other, or `out` is a file."""
    a, b = given.resolve(), out.resolve()
    if a == b or b.is_relative_to(a) or a.is_relative_to(b):
        raise UserError(
            f"out: {out} and the data at {given} lie in each other; name a folder apart from the data"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; name a new or an empty folder")


def differing(a: Tensor, b: Tensor) -> Tensor:
    """bool (N,): whether images uint8 (N, 3, H, W) differ from those of another set; in parts, as the comparison takes as much memory as they do."""
    return torch.cat(
        [(x != y).flatten(1).any(1) for x, y in zip(a.split(COMPARED), b.split(COMPARED))]
    )


def outcome(folder: OutputFolder, given: Tensor, action: str) -> Outcome:
    """What a finished analysis and an action ("relabel", "drop") make of each sample.

    "relabel" gives what purified.npz holds, also of images that were not purified but requantised (`index0`). Where images were scaled for
    the analysis (`resize`), these stay as they were given: scaling them down and up again would change them far more.

    Args:
        given: int64 (N,), the labels as given.
    """
    purified, table = (
        LabeledImages(**load_arrays(folder / "purified.npz")),
        Source(folder.path).decisions,
    )
    chosen, relabelled = torch.from_numpy(table["round"] != -1), purified.labels != given
    none = torch.zeros_like(chosen)
    if action == "drop":
        return Outcome(given, purified.images, none, chosen | relabelled)
    replaced = differing(purified.images, load_arrays(folder / "poisoned.npz", "images")["images"])
    return Outcome(
        purified.labels,
        purified.images,
        replaced & chosen if folder.config().get("resize") else replaced,
        none,
    )


def carry_out(action: str, folder: OutputFolder, layout: Layout, labels: Tensor) -> str | None:
    """Write cleaned/ as the action wants it, where it is not there; returns the action whose set lies in cleaned/ then, None where nobody knows.

    Args:
        action: relabel, drop or report.
        labels: int64 (N,), as given.
    """
    if action == "report":
        return folder.holds()
    if action == folder.holds():
        log.info(
            "the set is in %s since an earlier run; it is left as it is, with what was changed there (delete it to have it anew)",
            folder / CLEANED,
        )
    else:
        log.info("the set is in %s", write_cleaned(folder, layout, outcome(folder, labels, action)))
    return action


def write_cleaned(folder: OutputFolder, layout: Layout, result: Outcome) -> Path:
    """cleaned/: the set in its own layout, all of it or nothing; what lay there before is put aside."""
    target, temporary = folder / CLEANED, folder / f".{CLEANED}.{os.getpid()}"
    temporary.mkdir()
    try:
        layout.write(temporary, result)
        folder.forget()  # a run that ends before it has written another leaves a set that nobody takes for an action's
        folder.put_aside()
        os.replace(temporary, target)
        folder.note_cleaned()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
