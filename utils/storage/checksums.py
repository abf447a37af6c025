"""checksums.txt: what a record's files must hash to; a damaged or foreign one is no result.

An append-only list. A file's line is synced before the file takes its place, so a run that is
killed leaves no file without a line. Any hash noted for a name is right: the older one where the
run was killed between the newer line and its file. "# stage NAME" says which stage made the files
below it, "# done NAME" that the stage was finished with what is listed above.
"""

import functools
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from utils.command import UserError

FILE = "checksums.txt"
ADVICE = "the command that made this record sets it aside and makes it again"
RESULTS = (".npz", ".safetensors")
LINE = re.compile(r"([0-9a-f]{64})  (\S.*)|# (stage|done) (.*)")


@dataclass
class Checksums:
    """The list of one folder as it was read.

    Attributes:
        hashes: for each name, in the order noted.
        stage: for each name, the one that wrote it last.
        stages: in the order in which they first began.
        done: for each stage, its files each time that it was finished, {name: hash}.
    """

    hashes: dict[str, list[str]] = field(default_factory=dict)
    stage: dict[str, str] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    done: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def is_whole(self, name: str, file: Path) -> bool:
        """Whether the file's content was noted under this name."""
        return sha256_of(file) in self.hashes.get(name, ())

    def made_by(self, stage: str) -> list[str]:
        """Names that the stage wrote last."""
        return [name for name, maker in self.stage.items() if maker == stage]

    def changed(self, stage: str) -> bool:
        """Whether arrays or weights came out different the last time that the stage was run."""
        before, now = [{}, {}, *self.done.get(stage, [])][-2:]
        results = [name for name in before.keys() & now.keys() if name.endswith(RESULTS)]
        return any(before[name] != now[name] for name in results)

    def later(self, stage: str) -> list[str]:
        """Names written by the stages after this one."""
        after = self.stages[self.stages.index(stage) + 1 :]
        return [name for stage in after for name in self.made_by(stage)]


def read(folder: Path) -> Checksums | None:
    """The folder's list, the caller's own, if there is one. Damaged lines count as not there."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    found, stage = Checksums(), ""
    for match in filter(None, map(LINE.fullmatch, text.splitlines())):
        digest, name, word, what = match.groups()
        if word == "stage":
            stage = what
            if what not in found.stages:
                found.stages.append(what)
        elif word == "done":
            made = {name: found.hashes[name][-1] for name in found.made_by(what)}
            found.done.setdefault(what, []).append(made)
        else:
            found.hashes.setdefault(name, []).append(digest)
            found.stage[name] = stage
    return found


@functools.lru_cache(16)
def _read_once(folder: Path, *_: int) -> Checksums | None:
    return read(folder)


def _state(path: Path) -> tuple[int, int, int]:
    """What changes when a file does."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def note(folder: Path, *lines: str) -> None:
    """Append lines and sync them; a line that a power cut left unfinished is ended first."""
    with open(folder / FILE, "a+b") as out:
        if out.seek(0, os.SEEK_END):
            out.seek(-1, os.SEEK_END)
            lines = lines if out.read(1) == b"\n" else ("", *lines)
        out.write("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
        out.flush()
        os.fsync(out.fileno())


def note_written(path: Path, temporary: Path) -> None:
    """Note what `path` is about to hold, where its folder, or the one above, keeps a list."""
    if home := _home(path):
        note(home, f"{sha256_of(temporary)}  {path.relative_to(home).as_posix()}")


def verify(path: Path, advice: str = ADVICE) -> None:
    """Refuse a file whose content was never noted, where its folder or the one above has a list.

    Raises:
        UserError: damaged, or put there by something else.
    """
    home = _home(path)
    if home is None or not path.exists():
        return
    listed = _read_once(home, *_state(home / FILE))  # not to be changed
    if listed is None or not listed.is_whole(path.relative_to(home).as_posix(), path):
        reason = f"its sha256 is none that {home / FILE} lists"
        raise UserError(f"{path}: damaged or foreign ({reason}); {advice}")


def _home(path: Path) -> Path | None:
    folders = (path.parent, path.parent.parent)
    return next((folder for folder in folders if (folder / FILE).exists()), None)


def of_tensors(*tensors: Tensor) -> str:
    """The first 16 digits of the sha256 of tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal, computed once until the file changes."""
    return _sha256(path, *_state(path))


@functools.lru_cache(8192)
def _sha256(path: Path, *_: int) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
