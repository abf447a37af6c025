"""Damaged files in a record: each is named and set aside, and its stage is run again.

A stage that writes again what it wrote before leaves the stages after it as they are. Where it
writes something else (another machine, other data), their files go and are made again as well.
config.yaml cannot be made again: a record without its own is refused. Rows of a damaged
metrics.csv stay missing.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from utils.command import UserError
from utils.storage import checksums
from utils.storage.checksums import Checksums
from utils.storage.files import write_json
from utils.storage.lock import holder

log = logging.getLogger("dataelixir")
ASIDE = ".damaged"
# a run takes these, and the next, for its own wherever it finds them
READ_SUFFIXES = (".npz", ".safetensors", ".pt")
READ_FILES = ("config.yaml", "stages.json", "report.json", "metrics.csv")
NO_STAGE = ("config.yaml", "stages.json", "metrics.csv")
TEMPORARY = re.compile(r"\..+\.\d+\.\w+")  # as utils.storage.files.replacing names them


def mend(folder: Path, key: str) -> None:
    """Leave nothing damaged, foreign or half-written where a run would read it.

    Args:
        folder: of a record that the run has to itself.
        key: names the folder in messages.

    Raises:
        UserError: config.yaml is damaged or foreign.
    """
    for path in _files(folder, hidden=True):
        if TEMPORARY.fullmatch(path.name):
            path.unlink()
    listed = checksums.read(folder)
    if listed is None:
        _adopt(folder)
        return
    for name, state in _states(folder, listed).items():
        if state == "missing":
            _stage_again(folder, listed.stage[name], f"{folder / name}: missing")
        elif state != "whole":
            _set_aside(folder, name, state, listed, key)
    _drop_checkpoints(folder)


def _adopt(folder: Path) -> None:
    """Begin the list; files of a record older than such lists are taken as they are."""
    present = [path for path in _files(folder) if _is_read(path)]
    if present:
        words = "%s: made before checksums were kept; its %d files are taken as they are"
        log.warning(words, folder, len(present))
    lines = [f"{checksums.sha256_of(p)}  {p.relative_to(folder).as_posix()}" for p in present]
    checksums.note(folder, *lines)


def _set_aside(folder: Path, name: str, state: str, listed: Checksums, key: str) -> None:
    """Rename a damaged or foreign file, and have its stage run again."""
    path, stage = folder / name, listed.stage.get(name, "")
    if name == "config.yaml":
        raise UserError(f"{path}: {state}; restore it, or give another --{key}")
    aside = path.with_name(path.name + ASIDE)
    os.replace(path, aside)
    told = f"{path}: {state}, not what a run wrote; set aside as {aside.name}"
    if name == "metrics.csv":
        log.warning("%s; the epochs in it are lost", told)
    elif name in NO_STAGE or state == "foreign" or not stage or name.endswith(".pt"):
        log.warning("%s and made again if it is needed", told)
    else:
        blocks = [name for name in listed.stage if "/" in name and not (folder / name).exists()]
        _stage_again(folder, stage, told, {listed.stage[block] for block in blocks})


def _stage_again(folder: Path, stage: str, told: str, others: Collection[str] = ()) -> None:
    """Strike a stage off the finished ones, with the report and `others`."""
    log.warning("%s; stage '%s' is run again", told, stage)
    with contextlib.suppress(UserError):  # stages.json is damaged too: every stage is run again
        _keep_stages(folder, set(read_stages(folder)) - {stage, "report", *others})
    (folder / "report.json").unlink(missing_ok=True)  # it stands for a record that is complete


def _keep_stages(folder: Path, kept: Collection[str]) -> None:
    """Strike all but these stages off the finished ones."""
    found = read_stages(folder)
    write_json(folder / "stages.json", {key: found[key] for key in found if key in kept})


def read_stages(folder: Path) -> dict[str, Any]:
    """Finished stages: {stage: {"seconds": s, ...}}; raises UserError where they are damaged."""
    file = folder / "stages.json"
    checksums.verify(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{file}: damaged; delete it to have every stage made again")


def begin(folder: Path, stage: str) -> None:
    """Files written from now on are this stage's."""
    if (folder / checksums.FILE).exists():
        checksums.note(folder, f"# stage {stage}")


def end(folder: Path, stage: str) -> None:
    """After a stage: where it came out different from before, what later stages made goes."""
    if not (folder / checksums.FILE).exists():
        return
    checksums.note(folder, f"# done {stage}")
    listed = checksums.read(folder) or Checksums()
    if listed.changed(stage):
        later = [name for name in listed.later(stage) if name not in NO_STAGE]
        stale = [name for name in later if (folder / name).exists()]
        words = "%s: '%s' came out different this time; made again as well: %s"
        log.warning(words, folder, stage, ", ".join(stale) or "nothing")
        for name in stale:
            (folder / name).unlink()
        _keep_stages(folder, listed.stages[: listed.stages.index(stage) + 1])
    _drop_checkpoints(folder)


def _drop_checkpoints(folder: Path) -> None:
    """A training whose model is saved needs its checkpoint no more."""
    for path in folder.glob("*.checkpoint.pt"):
        if (folder / path.name.replace(".checkpoint.pt", ".safetensors")).exists():
            path.unlink()


def _files(folder: Path, hidden: bool = False) -> Iterator[Path]:
    """Files in the record and in the folders in it, but not of records below it."""
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        below = path.parent != folder and (path.parent / "config.yaml").exists()
        if path.is_file() and path.name.startswith(".") == hidden and not below:
            yield path


def _is_read(path: Path) -> bool:
    return path.suffix in READ_SUFFIXES or path.name in READ_FILES


def _states(folder: Path, listed: Checksums) -> dict[str, str]:
    """{name: whole, damaged, foreign or missing} of every file that is listed or would be read."""
    found = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name in listed.hashes:
            found[name] = "whole" if listed.is_whole(name, path) else "damaged"
        elif _is_read(path):
            found[name] = "foreign"
    with contextlib.suppress(UserError):
        done = read_stages(folder)
        for name, stage in listed.stage.items():
            result = "/" not in name and name.endswith(checksums.RESULTS)
            if result and name not in found and stage in done:
                found[name] = "missing"
    return found


def inventory(folder: Path) -> str:
    """A table of a record's files: state, size, stage; its finished stages, and who is using it."""
    kept, user = checksums.read(folder), holder(folder)
    listed, lines = kept or Checksums(), []
    for name, state in sorted(_states(folder, listed).items()):
        path, stage = folder / name, listed.stage.get(name) or "-"
        size = f"{path.stat().st_size:,}" if path.exists() else "-"
        lines.append(f"{state if kept else 'unlisted':9s} {size:>12s}  {stage:10s} {name}")
    try:
        found = read_stages(folder).items()
        done = ", ".join(f"{stage} ({notes['seconds']} s)" for stage, notes in found) or "none"
    except (UserError, TypeError, KeyError):
        done = "not known, stages.json is damaged"
    used = f"in use by {user}" if user else "not in use"
    return "\n".join([*lines, f"finished stages: {done}", used])


def require_whole(folder: Path) -> None:
    """Raise UserError that names the damaged, foreign and missing files, if there are any."""
    listed = checksums.read(folder)
    if listed is None:
        reason = f"has no {checksums.FILE}, so nothing can be said about its files"
        raise UserError(f"{folder}: {reason}; the command that made it begins one")
    states = _states(folder, listed).items()
    if bad := [f"{name} ({state})" for name, state in states if state != "whole"]:
        advice = "the command that made the record mends what can be made again"
        raise UserError(f"{folder}: not whole: {', '.join(bad)}; {advice}")
