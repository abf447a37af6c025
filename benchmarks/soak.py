"""A run many times over, killed at random moments and held to a memory limit.

    python benchmarks/soak.py [--on digits] [--runs 50] [--minutes 30] [--megabytes 1500] [--seed 0]

`toy` is the small run of tests/world.py, `digits` that of config/badnet/digits.yaml with
fewer epochs and rounds, with the published preset, such that every stage is run. Each record is killed
up to three times at random moments, whatever it is doing, and then finished. Writes
benchmarks/results/soak_<on>.json and .md after every run, so that it may be stopped; exit code 1 where
a result differs or memory grows.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from benchmarks.kills import SIGNALS
from benchmarks.runs import ROOT, write_results
from tests.world import World, differences, warm_up

SHORTENED = {
    "epochs": 3,
    "ft_epochs": 1,
    "rounds_n": 1,
    "steps_T": 11,
    "preset": "published",  # which trains a benign model whatever it finds
    "purify_batch_size": 64,
    "device": "cpu",
}


class Digits(World):
    """The digits run, shortened."""

    def __post_init__(self):
        self.place = self.folder
        digits = (ROOT / "config" / "badnet" / "digits.yaml").read_text(encoding="utf-8")
        shortened = yaml.safe_load(digits) | SHORTENED
        (self.folder / "config.yaml").write_text(yaml.safe_dump(shortened))


def soaked(world: World, name: str, draw: random.Random, seconds: float, limit) -> dict:
    """One record, killed up to three times and finished: exit codes, most memory held, files that differ."""
    codes, memory = [], 0
    for _ in range(draw.randrange(4)):
        child = world.start(name, limit=limit)
        time.sleep(draw.uniform(0, seconds))
        code, most = world.end(child, draw.choice(SIGNALS))
        codes, memory = [*codes, code], max(memory, most)
    code, most = world.run(name, limit=limit)
    row = {
        "exit_codes": [*codes, code],
        "peak_rss_bytes": max(memory, most),
        "differs_in": differences(world.record("whole"), world.record(name)),
    }
    shutil.rmtree(world.record(name), ignore_errors=True)
    return row


def growth(rows: list[dict]) -> float:
    """Bytes that the median peak of the last third lies above that of the first third."""
    third = max(1, len(rows) // 3)
    middle = lambda part: statistics.median(row["peak_rss_bytes"] for row in part)
    return middle(rows[-third:]) - middle(rows[:third])


def report(rows: list[dict], on: str, megabytes: int, started: float) -> str:
    """The results' files; returns what is in the .md."""
    kills, same = (
        sum(len(row["exit_codes"]) - 1 for row in rows),
        sum(not row["differs_in"] for row in rows),
    )
    peaks = [row["peak_rss_bytes"] / 1e6 for row in rows]
    text = (
        f"{on}: {len(rows)} records, {kills} kills at random moments, data limited to {megabytes} MB a process, {(time.monotonic() - started) / 60:.1f} minutes: "
        f"{same} of {len(rows)} ended with the same bytes as an undisturbed run. Peak memory {min(peaks):.0f} to {max(peaks):.0f} MB a record, "
        f"median of the last third less that of the first: {growth(rows) / 1e6:+.1f} MB."
    )
    write_results(f"soak_{on}", rows, text)
    return text


def main() -> None:
    """Soak until the runs or the minutes are over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default in (("--runs", 50), ("--minutes", 30), ("--megabytes", 1500), ("--seed", 0)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--on", choices=["toy", "digits"], default="toy")
    args, folder, rows = parser.parse_args(), Path(tempfile.mkdtemp()), []
    torch.set_num_threads(1)
    world, draw, started = (
        (Digits if args.on == "digits" else World)(folder),
        random.Random(args.seed),
        time.monotonic(),
    )
    seconds = sum(warm_up(world).values())
    limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (args.megabytes << 20,) * 2)
    while len(rows) < args.runs and time.monotonic() - started < 60 * args.minutes:
        rows.append(soaked(world, f"r{len(rows)}", draw, seconds, limit))
        text = report(rows, args.on, args.megabytes, started)
    shutil.rmtree(folder)
    print(text)
    sys.exit(any(row["differs_in"] or row["exit_codes"][-1] for row in rows) or growth(rows) > 20e6)


if __name__ == "__main__":
    main()
