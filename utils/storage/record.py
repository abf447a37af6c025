"""A record: everything that one run produces, in `record/<save_folder_name>/`.

Files are complete or absent (files.py) and listed with their checksums (checksums.py). A run
recomputes nothing of the stages in `stages.json`, unless a file is damaged (mending.py).
As a script: python utils/storage/record.py check NAME
"""

import argparse
import contextlib
import io
import logging
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from utils.config import RECORDS, UserError, command_line
from utils.old_keys import OldKeys
from utils.storage import checksums, lock, mending
from utils.storage.environment import environment
from utils.storage.files import load_arrays, replacing, save_arrays, shortened, write_json  # noqa: F401
from utils.yaml_files import is_short

log = logging.getLogger("dataelixir")
# keys that may differ when a run is continued: they say how fast or where, not what
RUNTIME_KEYS = {"device", "frequency_save", "purify_batch_size", "dataset_path"}
RUNTIME_KEYS |= {"keep_intermediaries", "on_bad_image", "dry_run", "passed_over"}
RUNTIME_KEYS |= {"follow_links", "classes"}  # the images and labels themselves are compared
# what the data set was like, wherever it lay; older records have no such key
DATA_KEY = "data_sha256"
NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*")


class Record:
    """One folder of results.

    Args:
        name: save_folder_name, letters, digits, '.', '_', '-' and '/' between parts.
        must_exist: raise instead of creating.
        key: names the folder in messages; by default save_folder_name, or result_file where it
            must exist.

    Raises:
        UserError: a name that would leave record/, or (must_exist) one that is not there.
    """

    def __init__(self, name: str, must_exist: bool = False, key: str = ""):
        key = key or ("result_file" if must_exist else "save_folder_name")
        if not NAME.fullmatch(name) or ".." in name:
            allowed = "use letters, digits, '_', '-' and '.'"
            raise UserError(f"{key}: '{name}' is no name for a folder in record/; {allowed}")
        self.name, self.path, self.key = name, RECORDS / name, key
        self.lock: lock.Lock | None = None
        if not self.path.resolve().is_relative_to(RECORDS.resolve()):
            raise UserError(f"{key}: '{name}' leads out of record/ through a link")
        if must_exist and not self.path.is_dir():
            known = ", ".join(sorted(p.parent.name for p in RECORDS.glob("*/config.yaml")))
            raise UserError(f"{key}: there is no {self.path}; records: {known or 'none yet'}")
        self.path.mkdir(parents=True, exist_ok=True)

    def __truediv__(self, file: str) -> Path:
        return self.path / file

    def claim(self, config: dict[str, Any], *classes: type) -> None:
        """Take the folder for this run alone and mend it; write config.yaml, or check that it fits.

        A folder that holds nothing but a config and a log can be taken by any config.

        Args:
            config: the keys of this run.
            classes: config classes whose earlier keys (utils/old_keys.py) an older record may have.

        Raises:
            UserError: the folder belongs to another config (names the keys that differ) or is in
                use, or its config is damaged.
        """
        self.lock = lock.acquire(self.path, self.key)
        self.refuse_other(config, *classes)
        mending.mend(self.path, self.key)
        made_with = yaml.safe_dump({"environment": environment()}, sort_keys=False)
        text = yaml.safe_dump(config, sort_keys=False) + "\n# made with\n" + made_with
        with replacing(self / "config.yaml") as temporary:
            temporary.write_text(text, encoding="utf-8")

    def refuse_other(self, config: dict[str, Any], *classes: type) -> None:
        """Raises UserError where the folder holds results of another config; see `claim`."""
        if not self._holds_results():
            return
        old = OldKeys(*classes).in_file(self.config(), of_record=True)
        passed = RUNTIME_KEYS | ({DATA_KEY} - old.keys())
        differing = [k for k in config if k not in passed and old.get(k) != config[k]]
        if not differing:
            return
        pairs = "; ".join(f"{k}: {old.get(k)!r} there, {config[k]!r} now" for k in differing[:4])
        images = ": these are other images or labels" if DATA_KEY in differing else ""
        owner = f"{self.path} belongs to another config ({pairs}{images})"
        raise UserError(f"{self.key}: {owner}; give another --{self.key}, or delete that folder")

    def _holds_results(self) -> bool:
        beside = ("config.yaml", "log.txt", checksums.FILE)
        names = [path.name for path in self.path.iterdir()]
        if all(name in beside or name.startswith(".") for name in names):
            return False
        if "config.yaml" not in names and checksums.FILE in names:
            file, reason = self / "config.yaml", "missing, so nobody knows what made the rest"
            raise UserError(f"{file}: {reason}; restore it, or give another --{self.key}")
        return "config.yaml" in names

    def config(self) -> dict[str, Any]:
        """The keys of config.yaml; raises UserError where it is missing or damaged."""
        file = self / "config.yaml"
        checksums.verify(file, "restore it, or give another record")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = f"cannot be read ({shortened(error)})"
            raise UserError(f"{file}: {reason}; give another record") from None
        if not isinstance(content, dict):
            raise UserError(f"{file}: damaged, it holds no 'key: value' lines; give another record")
        if not all(map(is_short, content.values())):
            raise UserError(f"{file}: damaged, a key holds too many values; give another record")
        return content

    def finished(self) -> dict[str, Any]:
        """Finished stages: {stage: {"seconds": s, ...}}."""
        return mending.read_stages(self.path)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage and note it as finished, with what the block puts into the dict.

        The block of a stage that was finished before finds its files.
        """
        if name in self.finished():
            yield {}
            return
        notes: dict[str, Any] = {}
        before, started = self._partial_seconds(name), time.monotonic()
        log.info("-- %s", name)
        mending.begin(self.path, name)
        try:
            yield notes
        except BaseException:
            with contextlib.suppress(OSError):
                (self / f".{name}.partial").write_text(f"{before + time.monotonic() - started:.2f}")
            raise
        seconds = round(before + time.monotonic() - started, 2)
        write_json(self / "stages.json", self.finished() | {name: {"seconds": seconds} | notes})
        mending.end(self.path, name)
        (self / f".{name}.partial").unlink(missing_ok=True)

    def advance(self, done: int, of: int) -> None:
        """Told that `done` of about `of` steps of the stage under way are done; for who counts."""

    def _partial_seconds(self, name: str) -> float:
        """Seconds that interrupted tries at a stage took before."""
        try:
            return float((self / f".{name}.partial").read_text())
        except (OSError, ValueError):  # none, or one that a full disk cut short
            return 0.0


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A log that cannot be written (disk full) is told of once and then done without."""
        log.removeHandler(self)
        error = sys.exc_info()[1] or OSError()
        log.warning("%s: no more lines can be written (%s)", self.baseFilename, shortened(error))


def start_logging(file: Path | None) -> None:
    """Log to the terminal and, with time stamps, to `file` if there is one."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name can hold what it cannot
        sys.stdout.reconfigure(errors="backslashreplace")
    log.addHandler(logging.StreamHandler(sys.stdout))
    if file:
        to_file = _File(file, encoding="utf-8", errors="backslashreplace")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(to_file)


def main() -> None:
    """Say what a record holds, and whether it is whole; exit code 2 where it is not."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("name", metavar="NAME", help="of a folder below record/")
    record = Record(parser.parse_args().name, must_exist=True)
    print(mending.inventory(record.path))
    mending.require_whole(record.path)


if __name__ == "__main__":
    command_line(main)()
