"""Kills a small run in every stage, lets it go on, and compares the end with that of a run nobody disturbed.

    python benchmarks/kills.py [--records 5] [--seed 0]

A record is killed once in each stage, at a random moment, by SIGKILL, SIGTERM or Ctrl-C in turn, and each time continued by
the same command. The small run is that of tests/world.py. Writes benchmarks/results/kills.json and .md; exit code 1 where a
result differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.runs import write_results
from tests.world import STAGES, World, differences, repeated, warm_up

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


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
