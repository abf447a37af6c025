"""What several processes gain: one record purified by 1, 2, ... processes of one thread each, and whether the bytes agree.

    python benchmarks/processes.py --record bench_badnet_digits_0 [--processes 1 2] [--repeats 2] [-- --reverse_steps 34]

On a machine with nothing else to do. The runs alternate; writes benchmarks/results/processes.json and .md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys

from benchmarks.runs import ROOT, write_results

# the trainings are not what is measured
FIXED = ("--target_first", "false", "--epochs", "1", "--ft_epochs", "1")
COMPARED = ("votes.npz", "purified.npz")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", required=True, help="name of a record with a victim")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("extra", nargs="*", help="after --: flags for the defence")
    return parser.parse_args()


def run(record: str, processes: int, extra: list[str]) -> dict:
    """Seconds of purifying, U-Net passes, and the hashes of what came out."""
    name = f"processes_{processes}"
    out = ROOT / "record" / record / "defense" / name
    shutil.rmtree(out, ignore_errors=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(ROOT / "defense" / "dataelixir.py")
    command = [*torchrun, "--nproc_per_node", str(processes), script]
    subprocess.run(
        [*command, "--result_file", record, "--run_name", name, *FIXED, *extra],
        check=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
        },
    )
    cost = json.loads((out / "report.json").read_text(encoding="utf-8"))["cost"]
    return {
        "processes": processes,
        "seconds": cost["seconds"]["purify"],
        "unet_passes": cost["unet_passes"],
        "sha256": {
            name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in COMPARED
        },
    }


def table(rows: list[dict]) -> str:
    """Markdown: median passes a second for each number of processes, and the ratio to the first."""
    lines = [
        "| processes | purify, s (median of runs) | U-Net passes/s | ratio | same bytes as the first run |",
        "|---" * 5 + "|",
    ]
    first = None
    for processes in dict.fromkeys(row["processes"] for row in rows):
        own = [row for row in rows if row["processes"] == processes]
        seconds = statistics.median(row["seconds"] for row in own)
        speed = own[0]["unet_passes"] / seconds
        first = first or speed
        same = sum(row["sha256"] == rows[0]["sha256"] for row in own)
        lines.append(
            f"| {processes} | {seconds:.1f} ({len(own)}) | {speed:.0f} | {speed / first:.2f} | {same} of {len(own)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Alternate between the numbers of processes, then write the table."""
    args = arguments()
    rows = [
        run(args.record, processes, args.extra)
        for _ in range(args.repeats)
        for processes in args.processes
    ]
    heading = f"Purifying by several processes of one thread each, record {args.record} {' '.join(args.extra)}; {os.cpu_count()} CPU cores"
    write_results("processes", rows, f"{heading}\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    main()
