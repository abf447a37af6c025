"""The output folder of defense/purify.py: a record where the user wants it, and the cleaned set."""

import contextlib
import itertools
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defense.elixir.verdict import Verdict
from utils.config import UserError
from utils.images.layout import Layout, Outcome
from utils.page.source import Source
from utils.storage import checksums, lock
from utils.storage.files import printable
from utils.storage.record import DATA_KEY, Record, load_arrays

log = logging.getLogger("dataelixir")
CLEANED = "cleaned"  # also the key of SUMMARY that says of which action the set there is
SUMMARY = "summary.json"
NOT_KEPT = "not_kept"  # a key of SUMMARY
COMPARED = 1024  # images at a time


class OutputFolder(Record):
    """A record outside record/; its folder is made when it is claimed, if it is not there."""

    def __init__(self, path: Path):
        self.name, self.path, self.key = path.name, path, "out"

    def claim(self, config: dict[str, Any], *classes: type) -> None:
        """Take the folder, or go on with the run that it holds; cleaned/ is left as it is.

        Raises:
            UserError: it holds something else, or the run of another config or another set; then
                nothing in it is touched, and no folder is made.
        """
        with contextlib.suppress(FileNotFoundError):
            others = [path.name for path in self.path.iterdir()]
            if others and DATA_KEY not in (self.config() if "config.yaml" in others else {}):
                found = "is not empty and holds no run of this command"
                raise UserError(f"out: {self.path} {found}; name a new or an empty folder")
            self.refuse_other(config, *classes)
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = lock.acquire(self.path, self.key)
        for left in self.path.glob(f".{CLEANED}.*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.note_cleaned()
        super().claim(config, *classes)

    def note_cleaned(self) -> None:
        """Note the checksums of what lies in cleaned/ and cleaned-1/... as it is now.

        It is the user's, so `mend` must not set it aside; files in deeper folders it never reads.
        """
        listed = checksums.read(self.path)
        if listed is None:
            return
        files = (path for path in sorted(self.path.glob(f"{CLEANED}*/*")) if path.is_file())
        names = {path.relative_to(self.path).as_posix(): path for path in files}
        new = {name: path for name, path in names.items() if not listed.is_whole(name, path)}
        if new:
            lines = (f"{checksums.sha256_of(path)}  {name}" for name, path in new.items())
            checksums.note(self.path, *lines)

    def holds(self) -> dict[str, Any]:
        """What is known of the set in cleaned/, as keys of SUMMARY.

        CLEANED is the action whose set it is, None where none lies there or nobody knows which;
        NOT_KEPT says what of their originals' encoding its new images lack.
        """
        summary = Source(self.path).json(SUMMARY) if (self / CLEANED).exists() else {}
        action = summary.get(CLEANED, summary.get("action"))  # older versions wrote only the second
        return {CLEANED: action, NOT_KEPT: summary.get(NOT_KEPT, of_lost({}))}

    def forget(self) -> None:
        """Take the summary away: what it says of cleaned/ is about to be true no more."""
        (self / SUMMARY).unlink(missing_ok=True)

    def put_aside(self) -> None:
        """cleaned/ becomes cleaned-1/, or the next free number; what was changed there stays."""
        if not os.path.lexists(self / CLEANED):
            return
        numbered = (self / f"{CLEANED}-{k}" for k in itertools.count(1))
        aside = next(path for path in numbered if not os.path.lexists(path))
        os.replace(self / CLEANED, aside)
        told = "what was in %s is kept in %s; delete it if you do not need it"
        log.info(told, self / CLEANED, aside)


def differing(a: Tensor, b: Tensor) -> Tensor:
    """bool (N,): whether images uint8 (N, 3, H, W) differ from others; in parts, to save memory."""
    parts = zip(a.split(COMPARED), b.split(COMPARED))
    return torch.cat([(x != y).flatten(1).any(1) for x, y in parts])


def outcome(folder: OutputFolder, given: Tensor, action: str) -> Outcome:
    """What a finished analysis and an action ("relabel", "drop") make of each sample.

    "relabel" gives what purified.npz holds, also of images that were merely requantised (preset
    published); under `resize` these stay as given, as scaling back would change them far more.
    Samples that the model is not sure of are dropped by either action; "drop" drops those that
    were changed, too, and those that carry a trigger under their own label.

    Args:
        given: int64 (N,), the labels as given.
    """
    table = Source(folder.path).decisions
    chosen, out = (
        torch.from_numpy(table[key] != kept) for key, kept in (("round", -1), ("kept", 1))
    )
    original = load_arrays(folder / "poisoned.npz", "images")["images"]
    labels, images = given.clone(), original.clone()
    new = load_arrays(folder / "purified.npz")
    kept = new.get("index", torch.arange(len(given)))  # where samples may be left out
    labels[kept], images[kept] = new["labels"], new["images"]
    none = torch.zeros_like(out)
    if action == "drop":
        poisoned = torch.from_numpy(table["verdict"] == Verdict.POISONED.name)
        return Outcome(given, images, none, chosen | (labels != given) | poisoned | out)
    replaced = differing(images, original)
    if folder.config().get("resize"):
        replaced &= chosen
    return Outcome(labels, images, replaced, out)


def of_lost(lost: dict[str, str]) -> dict[str, Any]:
    """The content of NOT_KEPT for {name of a sample: what its new image lacks}."""
    return {"count": len(lost), "files": {printable(name): what for name, what in lost.items()}}


def carry_out(action: str, folder: OutputFolder, layout: Layout, labels: Tensor) -> dict[str, Any]:
    """Write cleaned/ as the action (relabel, drop or report) wants it, where it is not there.

    Args:
        labels: int64 (N,), as given.

    Returns:
        What is known of the set that lies in cleaned/ then, as `OutputFolder.holds` has it.
    """
    held = folder.holds()
    if action == "report":
        return held
    if action == held[CLEANED]:
        kept = "it is left as it is, with what was changed there (delete it to have it anew)"
        log.info("the set is in %s since an earlier run; %s", folder / CLEANED, kept)
        return held
    lost = write_cleaned(folder, layout, outcome(folder, labels, action))
    log.info("the set is in %s", folder / CLEANED)
    return {CLEANED: action, NOT_KEPT: of_lost(lost)}


def write_cleaned(folder: OutputFolder, layout: Layout, result: Outcome) -> dict[str, str]:
    """cleaned/: all of the set or nothing; what lay there before is put aside.

    Returns what `Layout.write` does.
    """
    target, temporary = folder / CLEANED, folder / f".{CLEANED}.{os.getpid()}"
    temporary.mkdir()
    try:
        lost = layout.write(temporary, result)
        # a run that ends before the next summary leaves a set that nobody takes for an action's
        folder.forget()
        folder.put_aside()
        os.replace(temporary, target)
        folder.note_cleaned()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return lost
