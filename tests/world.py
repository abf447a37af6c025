"""A small world in which runs are forked, killed and compared: images, a denoiser, a config, and room for records.

Runs are forked from the process that asks for them, so that none of them waits for torch to be imported. A record is "the same" as
another where the bytes of its results are.
"""

import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from attack.badnet import BadNet
from attack.poisoning.command import main as run_attack
from diffusion.config import DenoiserConfig
from diffusion.denoiser import Denoiser
from diffusion.network import build_unet
from utils.images import decoding
from utils.storage import checksums, record

SIDE, CLASSES, TRAIN, TEST = 16, 4, 15, 6  # pixels, classes, images of each
EPOCHS, BATCH = 3, 12
KEYS = {
    "attack": "badnet",
    "attack_target": 1,
    "pratio": 0.2,
    "dataset": "imagefolder",
    "image_size": SIDE,
    "model": "preactresnet_small",
    "epochs": EPOCHS,
    "batch_size": 6,
    "lr": 0.05,
    "amp": False,
    "device": "cpu",
    "random_seed": 5,
    "steps_T": 3,
    "rounds_n": 2,
    "last_steps_m": 3,
    "purify_batch_size": BATCH,
    "conform": True,
    "ft_epochs": 2,
    "threshold_tau": 2,
}
STAGES = ("poison", "victim", "purify", "stage1", "finetune", "report")
SAME_BYTES = (
    "poisoned.npz",
    "purified.npz",
    "decisions.csv",
    "votes.npz",
    "victim.safetensors",
    "benign.safetensors",
)
LATE_IMPORTS = (
    "torch._dynamo",
    "docstring_parser",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "defense.dataelixir",
    "diffusers.models.unets.unet_2d",
    "scipy.stats",
    "sklearn.metrics",
)


@dataclass
class World:
    """A folder with images, a denoiser and a config, and a place for records and caches.

    Args:
        folder: empty, or that of another world, whose images, denoiser and config are then used.
        classes, train, test: how many, and images of each.
        place: where records and caches lie; by default `folder`.
    """

    folder: Path
    classes: int = CLASSES
    train: int = TRAIN
    test: int = TEST
    place: Path | None = None

    def __post_init__(self):
        self.place = self.place or self.folder
        if not (self.folder / "config.yaml").exists():
            self._write_images()
            self._write_denoiser()
            self._write_config()

    def _write_images(self):
        shape = (self.classes, self.train + self.test, SIDE, SIDE)
        images = np.random.default_rng(0).integers(0, 64, shape, np.uint8)
        for label, k in np.ndindex(*shape[:2]):
            part = "train" if k < self.train else "test"
            file = self.folder / "data" / part / f"{label:03d}" / f"{k:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[label, k] + np.uint8(24 * label % 191)).save(file)

    def _write_denoiser(self):
        torch.manual_seed(0)
        unet = build_unet(DenoiserConfig(out="", channels="8", layers_per_block=1), SIDE)
        Denoiser(unet, t_max=20).save(self.folder / "ddpm")

    def _write_config(self):
        places = {"dataset_path": str(self.folder / "data"), "ddpm": str(self.folder / "ddpm")}
        (self.folder / "config.yaml").write_text(yaml.safe_dump(KEYS | places))

    def record(self, name: str) -> Path:
        """The folder of a record of this world."""
        return self.place / "record" / name

    def at(self, place: Path) -> "World":
        """This world with records and caches of its own, which begin as copies of those that are there."""
        for part in ("record", "cache"):
            shutil.copytree(self.place / part, place / part)
        return World(self.folder, self.classes, self.train, self.test, place)

    def start(self, name: str, *words: str, limit: Callable[[], None] = lambda: None) -> int:
        """Fork the command that fills record `name`; returns the process id. `limit` is called in the fork first."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code, config = 70, str(self.folder / "config.yaml")
        try:
            words = ("--yaml_path", config, "--save_folder_name", name, *words)
            code = self._run(list(words), limit)
        except BaseException:  # noqa: BLE001 a fork must not go on as its parent does
            traceback.print_exc()
        finally:
            os._exit(code)

    def _run(self, words: list[str], limit: Callable[[], None]) -> int:
        record.RECORDS, decoding.CACHE = self.place / "record", self.place / "cache"
        out = os.open(self.place / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        limit()
        try:
            run_attack(BadNet, words)
        except SystemExit as ended:
            return ended.code or 0
        return 0

    def said(self) -> str:
        """What the last command printed."""
        return (self.place / "out.txt").read_text(errors="replace")

    def finish(self, child: int) -> tuple[int, int]:
        """(exit code, or minus the signal; most memory held in bytes) of a forked command."""
        _, status, usage = os.wait4(child, 0)
        return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024

    def run(self, name: str, *words: str, **options) -> tuple[int, int]:
        """Start and finish."""
        return self.finish(self.start(name, *words, **options))

    def killed_in(self, name: str, stage: str, delay: float, number: int) -> tuple[int, str]:
        """Run, send a signal `delay` seconds after the stage began; returns exit code and the stage that was hit."""
        log, before = self.record(name) / "log.txt", _began(self.record(name) / "log.txt", stage)
        child, alive = self.start(name), True
        while alive and _began(log, stage) == before:
            time.sleep(0.001)
            alive = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        time.sleep(delay)
        code, _ = self.end(child, number)
        return code, last_stage(log)

    def end(self, child: int, number: int) -> tuple[int, int]:
        """Send a signal to a forked command, which may have ended by itself, and finish it."""
        os.kill(child, number)
        return self.finish(child)


def _began(log: Path, stage: str) -> int:
    return log.read_text(errors="replace").count(f"-- {stage}\n") if log.exists() else 0


def last_stage(log: Path) -> str:
    """The stage that a log ends in."""
    lines = log.read_text(errors="replace").splitlines()
    words = [line.rpartition("-- ")[2] for line in lines if " -- " in line]
    return words[-1] if words else "none"


def differences(one: Path, other: Path) -> list[str]:
    """Files in which two finished records differ, report.json without what it cost."""
    absent = [file for file in (*SAME_BYTES, "report.json") if not (other / file).exists()]
    if absent:
        return absent
    differ = lambda read: read(one) != read(other)
    found = [file for file in SAME_BYTES if differ(lambda folder: (folder / file).read_bytes())]  # noqa: B023 called at once
    found += ["metrics.csv"] * differ(_rows)
    return found + ["report.json"] * differ(_results)


def _rows(folder: Path) -> list[str]:
    """The rows of metrics.csv; a stage that is run again puts its own at the end."""
    return sorted((folder / "metrics.csv").read_text().split())


def _results(folder: Path) -> dict:
    report = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in report.items() if key not in ("cost", "versions")}


def repeated(folder: Path) -> dict[str, int]:
    """How many blocks and epochs a finished record had to make more than once."""
    listed = checksums.read(folder).hashes
    blocks = [len(hashes) for name, hashes in listed.items() if name.startswith("purify/")]
    epochs = [len(hashes) for name, hashes in listed.items() if name.endswith(".checkpoint.pt")]
    return {"blocks": sum(blocks) - len(blocks), "epochs": sum(epochs) - (2 * EPOCHS + 2)}


def warm_up(world: World) -> dict[str, float]:
    """Run record `whole` undisturbed; returns its seconds by stage."""
    import_late()
    code, _ = world.run("whole")
    assert code == 0, world.said()
    return seconds_by_stage(world)


def import_late():
    """Import what runs import in the middle, so that no fork has to."""
    for module in LATE_IMPORTS:
        importlib.import_module(module)
    Image.init()


def seconds_by_stage(world: World) -> dict[str, float]:
    """What each stage of record `whole` took."""
    stages = json.loads((world.record("whole") / "stages.json").read_text())
    return {stage: notes["seconds"] for stage, notes in stages.items()}
