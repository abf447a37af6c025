"""Runs one config with several seeds and writes what came out: benchmarks/results/<name>.json and .md.

    python benchmarks/seeds.py --attack badnet --yaml_path ../config/badnet/digits.yaml --seeds 0 1 2

Words after `--` go to the attack script. Each run is a process of its own in record/bench_<name>_<seed>/, so runs that
are there already are not made again. With `--stop_after victim` only the victim's last epoch is reported.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
from pathlib import Path

from benchmarks.runs import ROOT, run_script, shown, write_results

COLUMNS = {
    "victim C-Acc": ("victim", "c_acc"),
    "victim ASR": ("victim", "asr"),
    "C-Acc": ("benign", "c_acc"),
    "ASR": ("benign", "asr"),
    "R-Acc": ("benign", "r_acc"),
    "TPR": ("detection", "tpr"),
    "FPR": ("detection", "fpr"),
    "relabel on poison": ("relabel", "accuracy_on_poison"),
    "collateral": ("relabel", "collateral"),
    "DER": ("der",),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attack", default="badnet", help="attack/<name>.py")
    parser.add_argument("--yaml_path", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", help="of the results; by default from attack and config")
    parser.add_argument("extra", nargs="*", help="after --: flags for the attack script")
    return parser.parse_args()


def run(args: argparse.Namespace, name: str, seed: int) -> dict:
    """One seed: its report."""
    record = f"bench_{name}_{seed}"
    run_script(
        f"attack/{args.attack}.py",
        "--yaml_path",
        args.yaml_path,
        "--save_folder_name",
        record,
        "--random_seed",
        str(seed),
        *args.extra,
    )
    return {"seed": seed, **read(ROOT / "record" / record)}


def read(record: Path) -> dict:
    """The report of a finished run, or the victim's last epoch of one that was stopped after it."""
    if (record / "report.json").exists():
        return json.loads((record / "report.json").read_text())
    with open(record / "metrics.csv", newline="") as source:
        last = [row for row in csv.DictReader(source) if row["stage"] == "victim"][-1]
    return {"victim": {key: float(last[key]) for key in ("c_acc", "asr", "r_acc")}}


def value(report: dict, path: tuple[str, ...]):
    """The number at a path of keys, None where there is none."""
    for key in path:
        report = (report or {}).get(key)
    return report


def table(reports: list[dict]) -> str:
    """Markdown: a row per seed, then mean and range."""
    rows = [
        [str(r["seed"]), *(show(value(r, path)) for path in COLUMNS.values()), targets(r)]
        for r in reports
    ]
    columns = [
        [v for r in reports if (v := value(r, path)) is not None] for path in COLUMNS.values()
    ]
    rows.append(["mean", *(show(statistics.mean(c) if c else None) for c in columns), ""])
    rows.append(["range", *(f"{min(c):.3f}..{max(c):.3f}" if c else "n/a" for c in columns), ""])
    lines = [["seed", *COLUMNS, "target labels found / true"], ["---"] * (len(COLUMNS) + 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def targets(report: dict) -> str:
    found = report.get("target_labels")
    return f"{found['detected']} / {found['true']}" if found else "n/a"


def show(number: float | None) -> str:
    return "n/a" if number is None else f"{number:.4f}"


def main() -> None:
    """Run all seeds, then write the results."""
    args = arguments()
    name = args.name or f"{args.attack}_{Path(args.yaml_path).stem}"
    reports = [run(args, name, seed) for seed in args.seeds]
    minutes = sum(sum(r.get("cost", {}).get("seconds", {}).values()) for r in reports) / 60
    heading = (
        f"{args.attack}, {args.yaml_path}{shown(args.extra)}: {len(reports)} seeds, "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {minutes:.1f} minutes of stages in all"
    )
    write_results(name, reports, f"{heading}\n\n{table(reports)}")
    print(f"{heading}\n\n{table(reports)}")


if __name__ == "__main__":
    main()
