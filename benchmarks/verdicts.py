"""How verdicts carry over: every attack and variant, defended blind, and what is left of the backdoor.

    python benchmarks/verdicts.py --config gtsrb_small [--names badnet patch_black ...] [--seeds 0 1 2] [-- --dataset_path DIR]

A name is an attack of attack/ or a variant of config/variants/, laid over config/<attack>/<config>.yaml; without --names, all.
A third of the names, by a hash, is held out: no constant of the method was chosen on them, and they are reported first. Those
in FAULTS were, until a fault that they showed was mended: what they show since says less, and stands apart. Each
run is a process of its own in record/verdicts_<config>_<name>_<seed>/; what is there already is not made again. Writes
benchmarks/results/verdicts_<config>.md and .json. Words after `--` go to the attack scripts.

Columns: of the poisoned samples the share that is still in the set under its target label, and that was given a wrong label;
of the clean samples the share whose label was changed or that was left out. Below the tables: how often the labels that the
defence gives are right, by how sure it says it is (reliability), and what each stage costs.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.runs import run_script, shown, write_results
from utils.config import ROOT
from utils.page.source import Source
from utils.storage.record import RECORDS
from utils.yaml_files import mapping

ATTACKS = [
    "badnet",
    "blended",
    "sig",
    "lc",
    "lf",
    "ssba",
    "inputaware",
    "wanet",
    "ftrojan",
    "bpp",
    "adaptive_blend",
]
CONFIG = ROOT / "config"
VARIANTS = CONFIG / "variants"
HELD_OUT, MENDED, TUNED_ON = "held out", "held out until a fault was mended on it", "tuned on"
FAULTS = (
    "smooth_1",  # a clean class was accused beside the true one: bounds of pattern and gap raised
    "patch_white",  # votes pointed the wrong way in the split (ASR .102): paste rates teach first
)


def kind(name: str) -> str:
    """Whether anything was tuned on this name; nothing on a third of all names."""
    if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 3:
        return TUNED_ON
    return MENDED if name in FAULTS else HELD_OUT


def run(config: str, name: str, seed: int, words: list[str]) -> dict[str, Any]:
    """One poisoned set, defended and measured."""
    variant, record = VARIANTS / f"{name}.yaml", f"verdicts_{config}_{name}_{seed}"
    attack = mapping(variant)["attack"] if variant.exists() else name
    files = [CONFIG / attack / f"{config}.yaml", *([variant] if variant.exists() else [])]
    keys = [word for file in files for word in ("--yaml_path", str(file))]
    where = ["--save_folder_name", record, "--random_seed", str(seed)]
    run_script(f"attack/{attack}.py", *keys, *where, *words)
    return {"name": name, "seed": seed, "kind": kind(name)} | measured(record)


def read(record: str) -> tuple[Source, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A finished run, its decisions, and the truth about it."""
    source = Source(RECORDS / record)
    truth = source.arrays("truth.npz")
    assert truth is not None
    return source, source.decisions, truth


def measured(record: str) -> dict[str, Any]:
    """What a finished run says."""
    source, table, truth = read(record)
    report = source.report
    poison, original = truth["poison"], truth["original_labels"]
    given, new = table["given_label"], table["new_label"]
    left = table["verdict"] == "LEFT_OUT"
    kept, changed = ~left & poison, (new != given) | left
    wrong = kept & (new != original) & (new != given)
    # a sample whose label was never changed is not under a wrong target
    stays = kept & (new == given) & (given != original)
    victim, benign = report["victim"], report["benign"]
    share = lambda mask, of: float(mask.sum() / max(1, of.sum()))
    return {
        "victim_c_acc": victim["c_acc"],
        "victim_asr": victim["asr"],
        "c_acc": benign["c_acc"],
        "asr": benign["asr"],
        "r_acc": benign["r_acc"],
        "targets": report["target_labels"]["true"],
        "found": report["target_labels"]["detected"],
        "under_target": share(stays, poison),
        "wrong_label": share(wrong, poison),
        "poison_left_out": share(left & poison, poison),
        "clean_changed": share(changed & ~poison, ~poison),
        "seconds": {stage: round(s) for stage, s in report["cost"]["seconds"].items()},
    }


def reliability(records: list[str]) -> str:
    """How often labels read with so much confidence are right, over all samples of accused classes."""
    sure, right = [], []
    for record in records:
        _, table, truth = read(record)
        confidence = table["confidence"].astype(float)
        told = np.isfinite(confidence)
        sure.append(confidence[told])
        right.append((table["new_label"] == truth["original_labels"])[told])
    confidence, correct = np.concatenate(sure), np.concatenate(right)
    lines = ["| confidence | samples | mean confidence | right |", "|---" * 4 + "|"]
    for low, high in pairwise([0, 0.6, 0.8, 0.9, 0.95, 0.99, 1 + 1e-9]):
        inside = (confidence >= low) & (confidence < high)
        if n := int(inside.sum()):
            means = f"{confidence[inside].mean():.3f} | {correct[inside].mean():.3f}"
            lines.append(f"| {low:.2f} to {min(high, 1):.2f} | {n} | {means} |")
    return "\n".join(lines)


def costs(rows: list[dict[str, Any]]) -> str:
    """Median seconds of each stage."""
    stages = dict.fromkeys(stage for row in rows for stage in row["seconds"])
    medians = (
        statistics.median(row["seconds"][stage] for row in rows if stage in row["seconds"])
        for stage in stages
    )
    return "\n".join(
        [
            "| " + " | ".join(stages) + " |",
            "|---" * len(stages) + "|",
            "| " + " | ".join(f"{s:.0f}" for s in medians) + " |",
        ]
    )


COLUMNS = [
    "victim_c_acc",
    "victim_asr",
    "c_acc",
    "asr",
    "r_acc",
    "under_target",
    "wrong_label",
    "poison_left_out",
    "clean_changed",
]


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds of each name."""
    lines = ["| attack | seeds | target found | " + " | ".join(COLUMNS) + " |", "|---" * 12 + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        found = sum(row["found"] == row["targets"] for row in own)
        shown_ = []
        for column in COLUMNS:
            values = [row[column] for row in own if row[column] is not None]
            shown_.append(f"{statistics.mean(values):.4f}" if values else "-")
        lines.append(
            f"| {name} | {len(own)} | {found} of {len(own)} | " + " | ".join(shown_) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and write the tables after every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*ATTACKS, *sorted(file.stem for file in VARIANTS.glob("*.yaml"))]
    parser.add_argument("--config", default="gtsrb_small", help="config/<attack>/<config>.yaml")
    parser.add_argument("--names", nargs="+", choices=known, default=known)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("extra", nargs="*", help="after --: flags for the attack scripts")
    args = parser.parse_args()
    for seed in args.seeds:
        for name in args.names:
            run(args.config, name, seed, args.extra)
            write(args.config, args.extra)


def write(config: str, words: list[str]) -> None:
    """Both tables, of all records that are finished."""
    rows = []
    for folder in sorted(RECORDS.glob(f"verdicts_{config}_*")):
        if (folder / "report.json").exists():
            name, _, seed = folder.name.removeprefix(f"verdicts_{config}_").rpartition("_")
            head = {"name": name, "seed": int(seed), "kind": kind(name)}
            rows.append(head | measured(folder.name))
    asr = [row["asr"] for row in rows if (row["victim_asr"] or 0) >= 0.5]
    command = (
        f"python benchmarks/verdicts.py --config {config}{' --' if words else ''}{shown(words)}"
    )
    text = [
        f"`{command}`",
        "",
        (
            f"{len(rows)} runs; where the victim's ASR was .5 or more ({len(asr)} runs), the ASR after is "
            f"{np.mean(asr):.4f} on average and at most {max(asr, default=0):.4f}."
        ),
        "",
        *(
            line
            for which in (HELD_OUT, MENDED, TUNED_ON)
            for line in (
                which.capitalize() + ":",
                "",
                table([row for row in rows if row["kind"] == which]),
                "",
            )
        ),
        "Labels that were read in accused classes (those below .60 are left out):",
        "",
        reliability([f"verdicts_{config}_{row['name']}_{row['seed']}" for row in rows]),
        "",
        "Median seconds of each stage:",
        "",
        costs(rows),
    ]
    write_results(f"verdicts_{config}", rows, "\n".join(text))


if __name__ == "__main__":
    main()
