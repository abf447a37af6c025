"""Kills a small run in every stage, lets it go on, and compares the end with that of a run nobody disturbed.

    python benchmarks/kills.py [--records 5] [--seed 0]

A record is killed once in each stage, at a random moment, by SIGKILL, SIGTERM or Ctrl-C in turn, and each time continued by
the same command. Runs are forked from this process, so that none of them waits for torch to be imported. Writes
benchmarks/results/kills.json and .md; exit code 1 where a result differs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
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
from attack.poisoning.run import main as run_attack
from benchmarks.runs import write_results
from diffusion.denoiser import Denoiser
from diffusion.network import DenoiserConfig, build_unet
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
    "steps_T": 8,
    "rounds_n": 2,
    "last_steps_m": 3,
    "purify_batch_size": BATCH,
    "conform": True,
    "ft_epochs": 2,
    "threshold_tau": 2,
}
STAGES = ("poison", "victim", "purify", "stage1", "finetune", "report")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SAME_BYTES = (
    "poisoned.npz",
    "purified.npz",
    "decisions.csv",
    "votes.npz",
    "victim.safetensors",
    "benign.safetensors",
)


@dataclass
class World:
    """A folder with images, a denoiser, a config, and room for records and caches.

    Args:
        folder: empty.
        classes, train, test: how many, and images of each.
    """

    folder: Path
    classes: int = CLASSES
    train: int = TRAIN
    test: int = TEST

    def __post_init__(self):
        images = np.random.default_rng(0).integers(
            0, 64, (self.classes, self.train + self.test, SIDE, SIDE), np.uint8
        )
        for label, k in np.ndindex(*images.shape[:2]):
            file = (
                self.folder
                / "data"
                / ("train" if k < self.train else "test")
                / f"{label:03d}"
                / f"{k:02d}.png"
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[label, k] + np.uint8(24 * label % 191)).save(file)
        torch.manual_seed(0)
        Denoiser(
            build_unet(DenoiserConfig(out="", channels="8", layers_per_block=1), SIDE), t_max=20
        ).save(self.folder / "ddpm")
        places = {"dataset_path": str(self.folder / "data"), "ddpm": str(self.folder / "ddpm")}
        (self.folder / "config.yaml").write_text(yaml.safe_dump(KEYS | places))

    def record(self, name: str) -> Path:
        """The folder of a record of this world."""
        return self.folder / "record" / name

    def start(self, name: str, *words: str, limit: Callable[[], None] = lambda: None) -> int:
        """Fork the command that fills record `name`; returns the process id. `limit` is called in the fork first."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            code = self._run(
                [
                    "--yaml_path",
                    str(self.folder / "config.yaml"),
                    "--save_folder_name",
                    name,
                    *words,
                ],
                limit,
            )
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _run(self, words: list[str], limit: Callable[[], None]) -> int:
        record.RECORDS, decoding.CACHE = self.folder / "record", self.folder / "cache"
        out = os.open(self.folder / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        limit()
        try:
            run_attack(BadNet, words)
        except SystemExit as ended:
            return ended.code or 0
        return 0

    def said(self) -> str:
        """What the last command printed."""
        return (self.folder / "out.txt").read_text(errors="replace")

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
    words = [
        line.rpartition("-- ")[2]
        for line in log.read_text(errors="replace").splitlines()
        if " -- " in line
    ]
    return words[-1] if words else "none"


def differences(one: Path, other: Path) -> list[str]:
    """Files in which two finished records differ, report.json without what it cost."""
    absent = [file for file in (*SAME_BYTES, "report.json") if not (other / file).exists()]
    if absent:
        return absent
    found = [
        file for file in SAME_BYTES if (one / file).read_bytes() != (other / file).read_bytes()
    ]
    if sorted((one / "metrics.csv").read_text().split()) != sorted(
        (other / "metrics.csv").read_text().split()
    ):
        found.append("metrics.csv")  # a stage that is run again puts its rows at the end
    reports = [
        {
            k: v
            for k, v in json.loads((folder / "report.json").read_text()).items()
            if k not in ("cost", "versions")
        }
        for folder in (one, other)
    ]
    return found + ["report.json"] * (reports[0] != reports[1])


def repeated(folder: Path) -> dict[str, int]:
    """How many blocks and epochs a finished record had to make more than once."""
    listed = checksums.read(folder)
    blocks = [hashes for name, hashes in listed.hashes.items() if name.startswith("purify/")]
    epochs = [
        len(hashes) for name, hashes in listed.hashes.items() if name.endswith(".checkpoint.pt")
    ]
    return {"blocks": sum(map(len, blocks)) - len(blocks), "epochs": sum(epochs) - (2 * EPOCHS + 2)}


def killed_in_every_stage(
    world: World, name: str, draw: random.Random, seconds: dict[str, float]
) -> dict:
    """One record, killed once in each stage and then left alone: what happened, as a dictionary."""
    hits, first = [], draw.randrange(len(SIGNALS))
    for k, stage in enumerate(STAGES):
        number = SIGNALS[(k + first + k // len(SIGNALS)) % len(SIGNALS)]
        code, hit = world.killed_in(name, stage, draw.uniform(0, seconds[stage]), number)
        hits.append({"signal": number.name, "aimed_at": stage, "hit": hit, "exit_code": code})
    code, memory = world.run(name)
    return {
        "record": name,
        "kills": hits,
        "exit_code": code,
        "repeated": repeated(world.record(name)),
        "peak_rss_bytes": memory,
    }


def warm_up(world: World) -> dict[str, float]:
    """Run record `whole` undisturbed; returns its seconds by stage."""
    for late in (
        "matplotlib.pyplot",
        "defense.dataelixir",
        "diffusers.models.unets.unet_2d",
        "scipy.stats",
    ):  # so that no fork has to import them
        importlib.import_module(late)
    code, _ = world.run("whole")
    assert code == 0, world.said()
    return {
        stage: notes["seconds"]
        for stage, notes in json.loads((world.record("whole") / "stages.json").read_text()).items()
    }


def main() -> None:
    """Kill, continue, compare, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args, folder = parser.parse_args(), Path(tempfile.mkdtemp())
    world, draw, rows = World(folder), random.Random(args.seed), []
    torch.set_num_threads(1)
    seconds = warm_up(world)
    for k in range(args.records):
        row = killed_in_every_stage(world, f"r{k}", draw, seconds)
        rows.append(
            row | {"differs_in": differences(world.record("whole"), world.record(row["record"]))}
        )
        print(json.dumps(rows[-1]))
    shutil.rmtree(folder)
    report(rows)
    sys.exit(any(row["differs_in"] or row["exit_code"] for row in rows))


def report(rows: list[dict]) -> None:
    """kills.json and kills.md."""
    kills = [kill for row in rows for kill in row["kills"]]
    count = lambda key, value: sum(kill[key] == value for kill in kills)
    lines = [
        "| stage hit | kills |",
        "|---|---|",
        *(f"| {stage} | {count('hit', stage)} |" for stage in STAGES),
    ]
    same, repeats = sum(not row["differs_in"] for row in rows), [row["repeated"] for row in rows]
    by_signal = ", ".join(f"{count('signal', each.name)} {each.name}" for each in SIGNALS)
    heading = (
        f"{len(kills)} kills ({by_signal}) of {len(rows)} records, one in each stage at a "
        f"random moment: {same} of {len(rows)} records ended with the same bytes as an undisturbed run. Blocks written twice: "
        f"{sum(r['blocks'] for r in repeats)}, checkpoints written twice: {sum(r['epochs'] for r in repeats)}."
    )
    write_results("kills", rows, heading + "\n\n" + "\n".join(lines))
    print(heading)


if __name__ == "__main__":
    main()
