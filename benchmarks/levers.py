"""What each way of sparing denoiser passes changes, by itself and together, against the exact process.

    python benchmarks/levers.py --records bench_badnet_digits_0 bench_badnet_digits_1 bench_badnet_digits_2 --name digits

Each record is defended again with every setting, by `defense/dataelixir.py --result_file`, in a process of its own;
what is there already is not made again. Writes benchmarks/results/levers_<name>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

from benchmarks.runs import ROOT, run_script, write_results

ALL = {"reverse_steps": "null", "target_first": "false"}
SETTINGS = {
    "exact": {},
    "fewer steps": {"reverse_steps": None},  # None: as the record's config has it
    "targets first": {"target_first": "true"},
    "fewer steps, targets first": {"reverse_steps": None, "target_first": "true"},
}
COLUMNS = {
    "C-Acc": ("benign", "c_acc"),
    "ASR": ("benign", "asr"),
    "TPR": ("detection", "tpr"),
    "FPR": ("detection", "fpr"),
    "relabelled right": ("relabel", "accuracy_on_poison"),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--records", nargs="+", required=True, help="names of records with a victim"
    )
    parser.add_argument("--name", required=True, help="of the results")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument(
        "extra", nargs="*", help="after --: flags for the defence, e.g. --dataset_path DIR"
    )
    return parser.parse_args()


def run(record: str, setting: str, extra: list[str]) -> dict:
    """The report of one record under one setting."""
    name = "lever_" + setting.replace(" ", "_").replace(",", "")
    flags = [
        word
        for key, value in (ALL | SETTINGS[setting]).items()
        if value is not None
        for word in (f"--{key}", value)
    ]
    run_script("defense/dataelixir.py", "--result_file", record, "--run_name", name, *flags, *extra)
    folder = ROOT / "record" / record / "defense" / name
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {"record": record, "setting": setting, "images": count_images(folder)} | report


def count_images(folder: Path) -> int:
    """Training images that a run decided on."""
    with open(folder / "decisions.csv", encoding="utf-8") as rows:
        return sum(1 for _ in rows) - 1


def spread(values: list[float | None]) -> str:
    """'mean (min..max)' of the numbers there are."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.4f} ({min(known):.4f}..{max(known):.4f})" if known else "n/a"


def table(rows: list[dict]) -> str:
    """Markdown, a row for each setting: mean and range over the records."""
    lines = [
        "| setting | passes an image | "
        + " | ".join(COLUMNS)
        + " | target found, no other | purify, s |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        passes = statistics.mean(row["cost"]["unet_passes"] / row["images"] for row in own)
        found = sum(row["target_labels"]["detected"] == row["target_labels"]["true"] for row in own)
        cells = [spread([row[stage][key] for row in own]) for stage, key in COLUMNS.values()]
        lines.append(
            f"| {setting} | {passes:.1f} | {' | '.join(cells)} | {found} of {len(own)} | {statistics.mean(row['cost']['seconds']['purify'] for row in own):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, write the table after every setting."""
    args, rows = arguments(), []
    for setting in args.settings:
        for record in args.records:
            rows.append(run(record, setting, args.extra))
        heading = f"Ways of sparing denoiser passes, {args.name}: {len(args.records)} records, mean and range; {os.cpu_count()} CPU cores"
        write_results(f"levers_{args.name}", rows, f"{heading}\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    main()
