"""How well every attack works: poison, train the victim, measure; writes benchmarks/results/attacks_<name>.json and .md.

    python benchmarks/attacks.py --config gtsrb_small --dataset_path DIR [--attacks badnet sig ...] [--seeds 0] [--name NAME] [-- FLAGS]

Each victim is a process of its own in record/bench_<attack>_<name>_<seed>/, by default named after the config; what is there
already is not made again. Words after `--` go to the attack scripts. The
row "clean" is BadNets with no poison at all: its ASR is what a clean model gives the triggered images by chance.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics

import torch

from benchmarks.runs import ROOT, run_script, shown, write_results
from utils.config import DataConfig
from utils.images.data import load_dataset
from utils.storage.record import Record, load_arrays

NO_ATTACK = "clean"
GATES = {"sig": 0.8, "lc": 0.8}  # ASR aimed at; the dirty-label attacks at 0.9


def arguments() -> argparse.Namespace:
    """The command line."""
    known = sorted(path.parent.name for path in (ROOT / "config").glob("*/gtsrb_small.yaml"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="gtsrb_small", help="config/<attack>/<config>.yaml")
    parser.add_argument("--dataset_path", default="../data")
    parser.add_argument("--attacks", nargs="+", default=[NO_ATTACK, *known])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--name", help="of the results; by default the config")
    parser.add_argument("extra", nargs="*", help="after --: flags for the attack scripts")
    args = parser.parse_args()
    args.name = args.name or args.config
    return args


def train_victim(args: argparse.Namespace, attack: str, seed: int) -> Record:
    """The record of one attack and seed, with its victim trained."""
    script = "badnet" if attack == NO_ATTACK else attack
    record = Record(f"bench_{attack}_{args.name}_{seed}")
    run_script(
        f"attack/{script}.py",
        "--yaml_path",
        f"../config/{script}/{args.config}.yaml",
        "--dataset_path",
        args.dataset_path,
        "--save_folder_name",
        record.name,
        "--random_seed",
        str(seed),
        "--stop_after",
        "victim",
        *args.extra,
        *(["--pratio", "0"] if attack == NO_ATTACK else []),
    )
    return record


def measure(args: argparse.Namespace, attack: str, record: Record) -> dict:
    """C-Acc, ASR and R-Acc after the victim's last epoch, PSNR of the triggered test images, seconds, poisoned samples."""
    with open(record / "metrics.csv", newline="") as source:
        last = [row for row in csv.DictReader(source) if row["stage"] == "victim"][-1]
    triggered, keys = load_arrays(record / "asr_test.npz"), record.config()
    clean = load_dataset(DataConfig(keys["dataset"], args.dataset_path)).test.images[
        triggered["index"]
    ]
    error = (clean.double() - triggered["images"].double()).square().mean((1, 2, 3))
    truth, seconds = load_arrays(record / "truth.npz"), record.finished()
    return {
        "attack": attack,
        "seed": keys["random_seed"],
        **{key: float(last[key]) for key in ("c_acc", "asr", "r_acc")},
        "psnr": (10 * torch.log10(255**2 / error)).median().item(),
        "poisoned": int(truth["poison"].sum()),
        "cover": int(truth["cover"].sum()),
        "n_triggered": len(clean),
        "epochs": int(last["epoch"]),
        "seconds": {stage: seconds[stage]["seconds"] for stage in ("poison", "victim")},
    }


def table(rows: list[dict]) -> str:
    """Markdown, a row per attack: means over seeds, ASR with its range."""
    lines = [
        "| attack | seeds | poisoned + cover | C-Acc | ASR (range) | R-Acc | PSNR, dB | making it, s | victim, s | gate |",
        "|---" * 10 + "|",
    ]
    for attack in dict.fromkeys(row["attack"] for row in rows):
        own = [row for row in rows if row["attack"] == attack]
        mean = lambda key, own=own: statistics.mean(row[key] for row in own)
        spent = lambda stage, own=own: statistics.mean(row["seconds"][stage] for row in own)
        asr, gate = [row["asr"] for row in own], GATES.get(attack, 0.9)
        met = "-" if attack == NO_ATTACK else f"{gate} {'met' if mean('asr') >= gate else 'missed'}"
        lines.append(
            f"| {attack} | {len(own)} | {own[0]['poisoned']} + {own[0]['cover']} | {mean('c_acc'):.4f} | {mean('asr'):.4f} "
            f"({min(asr):.3f}..{max(asr):.3f}) | {mean('r_acc'):.4f} | {mean('psnr'):.1f} | {spent('poison'):.0f} | {spent('victim'):.0f} | {met} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, measure all, write the table."""
    args, rows = arguments(), []
    for attack in args.attacks:
        for seed in args.seeds:
            rows.append(measure(args, attack, train_victim(args, attack, seed)))
        heading = f"Victims of every attack, config {args.config}{shown(args.extra)}, n = {rows[0]['n_triggered']} triggered test images, {os.cpu_count()} CPU cores"
        write_results(f"attacks_{args.name}", rows, f"{heading}\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    main()
