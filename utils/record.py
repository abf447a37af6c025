"""A record: everything that one run produces, in `record/<save_folder_name>/`.

Files are written under a temporary name and renamed, so each is complete or absent. `stages.json` names the stages
that are finished and how long they took; a run that finds a stage there recomputes nothing of it.
"""
from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
import yaml
from safetensors import SafetensorError

from utils.config import ROOT, UserError

log = logging.getLogger("dataelixir")
RECORDS = ROOT / "record"
# keys that may differ when a run is continued: they say how fast or where, not what
RUNTIME_KEYS = ("device", "frequency_save", "purify_batch_size", "dataset_path", "keep_intermediaries")
PACKAGES = ("torch", "torchvision", "diffusers", "timm", "numpy", "scikit-learn")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when it does not.

    Raises:
        UserError: the file could not be written (disk full, no permission).
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:   # torch and safetensors wrap the system's error
        raise UserError(f"{path}: could not be written ({' '.join(str(error).split())[:120]}); "
                        "what is finished is kept, the same command goes on from there") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, complete or not at all; NaN and infinity become null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write tensors or arrays as .npz, complete or not at all."""
    with replacing(path) as temporary:
        np.savez(temporary, **{key: np.asarray(value) for key, value in arrays.items()})


def load_arrays(path: Path, *only: str) -> dict[str, torch.Tensor]:
    """The tensors of a .npz file, or those named, read without unpickling.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            return {key: torch.from_numpy(content[key]) for key in only or content.files}
    except Exception as error:  # zipfile, numpy and the file system each raise their own
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]}); delete it to have it made again") from None


class Record:
    """One folder of results.

    Args:
        name: save_folder_name, letters, digits, '.', '_', '-' and '/' between parts.
        must_exist: raise instead of creating.

    Raises:
        UserError: a name that would leave record/, or (must_exist) one that is not there.
    """

    def __init__(self, name: str, must_exist: bool = False):
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", name) or ".." in name:
            raise UserError(f"save_folder_name: '{name}' is no name for a folder in record/; use letters, digits, '_', '-' and '.'")
        self.name, self.path = name, RECORDS / name
        if not self.path.resolve().is_relative_to(RECORDS.resolve()):
            raise UserError(f"save_folder_name: '{name}' leads out of record/ through a link")
        if must_exist and not self.path.is_dir():
            known = sorted(p.parent.name for p in RECORDS.glob("*/config.yaml"))
            raise UserError(f"result_file: there is no {self.path}; records: {', '.join(known) or 'none yet'}")
        self.path.mkdir(parents=True, exist_ok=True)

    def __truediv__(self, file: str) -> Path:
        return self.path / file

    def claim(self, config: dict[str, Any]) -> None:
        """Take the folder for this config: write config.yaml, or check that it was written by the same one.

        A folder that holds nothing but a config and a log can be taken by any config.

        Raises:
            UserError: the folder belongs to another config; names the keys that differ.
        """
        if self._holds_results():
            old = self.config()
            differing = [key for key in config if key not in RUNTIME_KEYS and old.get(key) != config[key]]
            if differing:
                shown = "; ".join(f"{key}: {old.get(key)!r} there, {config[key]!r} now" for key in differing[:4])
                raise UserError(f"save_folder_name: {self.path} belongs to another config ({shown}); "
                                "give another --save_folder_name, or delete that folder")
        with replacing(self / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(config, sort_keys=False) + "\n# made with\n"
                                 + yaml.safe_dump({"environment": environment()}, sort_keys=False), encoding="utf-8")

    def _holds_results(self) -> bool:
        beside = ("config.yaml", "log.txt")
        return (self / "config.yaml").exists() and any(path.name not in beside and not path.name.startswith(".") for path in self.path.iterdir())

    def config(self) -> dict[str, Any]:
        """The resolved keys the record was made with.

        Raises:
            UserError: config.yaml is missing or damaged.
        """
        file = self / "config.yaml"
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:120]}); give another record") from None
        if not isinstance(content, dict):
            raise UserError(f"{file}: damaged, it holds no 'key: value' lines; give another record")
        return content

    def finished(self) -> dict[str, Any]:
        """Finished stages: {stage: {"seconds": s, ...}}."""
        file = self / "stages.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError:
            raise UserError(f"{file}: damaged; delete it to have every stage made again") from None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage and note it as finished when the block ends well; what the block puts into the dict is kept too.

        A stage that was finished before is neither timed nor announced again; its block then finds its files there.
        """
        if name in self.finished():
            yield {}
            return
        before, notes, started = self.partial_seconds(name), {}, time.monotonic()
        log.info("-- %s", name)
        try:
            yield notes
        except BaseException:
            self._note_partial(name, before + time.monotonic() - started)
            raise
        done = self.finished() | {name: {"seconds": round(before + time.monotonic() - started, 2)} | notes}
        write_json(self / "stages.json", done)
        (self / f".{name}.partial").unlink(missing_ok=True)

    def partial_seconds(self, name: str) -> float:
        """Seconds that interrupted tries at a stage took before."""
        file = self / f".{name}.partial"
        try:
            return float(file.read_text())
        except (OSError, ValueError):   # none, or one that a full disk cut short
            return 0.0

    def _note_partial(self, name: str, seconds: float) -> None:
        with contextlib.suppress(OSError):
            (self / f".{name}.partial").write_text(f"{seconds:.2f}")


def environment() -> dict[str, Any]:
    """Versions, machine and git commit, to lie beside results."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions, "platform": platform.platform(),
            "threads": torch.get_num_threads(), "git_commit": git_commit()}


def git_commit() -> str | None:
    """The commit this code is at, with '+' where files differ from it; None outside a checkout."""
    try:
        run = lambda *words: subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True)
        return run("rev-parse", "HEAD").stdout.strip() + ("+" if run("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def peak_rss_bytes() -> int:
    """The most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def start_logging(file: Path | None) -> None:
    """Log to the terminal and, with time stamps, to `file` if there is one."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    handlers = [(logging.StreamHandler(sys.stdout), "%(message)s")]
    if file:
        handlers.append((logging.FileHandler(file, encoding="utf-8"), "%(asctime)s %(levelname)s %(message)s"))
    for handler, layout in handlers:
        handler.setFormatter(logging.Formatter(layout))
        log.addHandler(handler)
