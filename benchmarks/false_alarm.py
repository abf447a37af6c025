"""How often a clean set is accused, and how much poison it takes to be found; writes benchmarks/results/false_alarm_<name>.json and .md.

    python benchmarks/false_alarm.py --yaml_path ../config/badnet/digits.yaml [--seeds 0 1 2 3 4] [--pratios 0 0.01 0.05 0.1]

Words after `--` go to the attack script (another data set: `-- --dataset imagefolder --dataset_path DIR --ddpm DENOISER`; give
--name then; `{seed}` in a word stands for the seed, for a subset of a larger set each). Each run is a process of its own in
record/false_alarm_<name>_<pratio>_<seed>/; what is there already is not made again. With --again NAME, the sets that are there are
defended again, in their defense/NAME/, and the words go to defense/dataelixir.py. Share 0 is the unpoisoned set. The rules
are compared on the same votes; where target labels come first, most samples have none, so `-- --target_first false` is what the
other rules are to be judged by.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.runs import run_script, shown, write_results
from defense.elixir.config import PUBLISHED_RULE
from defense.elixir.power import detection_power
from defense.elixir.target_label import TargetRule, target_labels
from defense.elixir.verdict import UNKNOWN, filter_candidates
from utils.page.source import Source
from utils.storage.record import RECORDS, load_arrays

RULES = {
    "default": TargetRule(),
    "discrepancy alone": TargetRule(inflow_threshold=None),
    "two-sided, as published": PUBLISHED_RULE,
    "discrepancy alone, no prior, no floor": TargetRule(
        evidence_prior=0.0, mad_floor=0.0, inflow_threshold=None
    ),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attack", default="badnet", help="attack/<name>.py")
    parser.add_argument("--yaml_path", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--pratios", type=float, nargs="+", default=[0, 0.01, 0.05, 0.1])
    parser.add_argument("--name", help="of the results; by default from attack and config")
    parser.add_argument(
        "--again", help="name of a run that defends each record again, with the words after --"
    )
    parser.add_argument("extra", nargs="*", help="after --: flags for the attack script")
    return parser.parse_args()


def run(args: argparse.Namespace, name: str, pratio: float, seed: int) -> dict[str, Any]:
    """One set poisoned at that share with that seed, defended: what was flagged and what changed."""
    record, words = (
        f"false_alarm_{name}_{pratio:g}_{seed}",
        [word.replace("{seed}", str(seed)) for word in args.extra],
    )
    if args.again:
        run_script(
            "defense/dataelixir.py", "--result_file", record, "--run_name", args.again, *words
        )
    else:
        run_script(
            f"attack/{args.attack}.py",
            "--yaml_path",
            args.yaml_path,
            "--save_folder_name",
            record,
            "--random_seed",
            str(seed),
            "--pratio",
            str(pratio),
            *words,
        )
    folder = RECORDS / record / "defense" / args.again if args.again else RECORDS / record
    return {"pratio": pratio, "seed": seed, **measured(Source(folder))}


def measured(source: Source) -> dict[str, Any]:
    """What a finished run says: classes flagged by the run and by every rule on its votes, labels changed, TPR and FPR."""
    report, table = source.report, source.decisions
    votes, labels, truth = (
        load_arrays(source.find(name)) for name in ("votes.npz", "poisoned.npz", "truth.npz")
    )
    votes, labels = votes["votes"].long(), labels["labels"]
    tau, classes, known = (
        source.config["threshold_tau"],
        len(source.classes["names"]),
        votes[:, 0] != UNKNOWN,
    )
    candidates = filter_candidates(votes[known], tau)
    sizes = labels.bincount(minlength=classes)
    found = {
        rule: target_labels(votes[known], candidates, labels[known], classes, RULES[rule], sizes)
        for rule in RULES
    }
    detected = report["target_labels"]["detected"]
    power = (
        None
        if detected
        else detection_power(
            votes, labels, found["default"], tau, RULES["default"], source.config["random_seed"]
        )
    )
    poisoned = int(truth["poison"].sum())
    return {
        "samples": len(labels),
        "purified": int(known.sum()),
        "poisoned": poisoned,
        "true": report["target_labels"]["true"] if poisoned else [],
        "detected": detected,
        "rules": {rule: list(each.targets) for rule, each in found.items()},
        "power": power,
        "labels_changed": float((table["given_label"] != table["new_label"]).mean()),
        "victim_asr": report["victim"]["asr"],
        "tpr": report["detection"]["tpr"],
        "fpr": report["detection"]["fpr"],
        "seconds": sum(report["cost"]["seconds"].values()),
    }


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: what the runs did at each share of poison, and what each rule would have flagged."""
    by_share = {
        share: [row for row in rows if row["pratio"] == share]
        for share in sorted({row["pratio"] for row in rows})
    }
    mean = lambda own, key: (
        sum(row[key] for row in own) / len(own)
        if all(row[key] is not None for row in own)
        else None
    )
    show = lambda value: "n/a" if value is None else f"{value:.4f}"
    lines = [
        "| poison | runs | poisoned samples | victim ASR | target found | a clean class accused | labels changed, mean (most) | TPR | FPR |",
        "|---" * 9 + "|",
    ]
    for share, own in by_share.items():
        found, accused = (
            _found(own, "detected"),
            sum(bool(set(row["detected"]) - set(row["true"])) for row in own),
        )
        most = max(row["labels_changed"] for row in own)
        lines.append(
            f"| {share:.0%} | {len(own)} | {own[0]['poisoned']} | {show(mean(own, 'victim_asr'))} | {found} | {accused} of {len(own)} | "
            f"{mean(own, 'labels_changed'):.4f} ({most:.4f}) | {show(mean(own, 'tpr'))} | {show(mean(own, 'fpr'))} |"
        )
    clean = [row["power"] for row in rows if row["power"] and not row["poisoned"]]
    if clean:
        foretold = ", ".join(
            f"{statistics.mean(power[size] for power in clean):.2f} at {float(size):.0%}"
            for size in clean[0]
        )
        lines += [
            "",
            f"Foretold by the unpoisoned runs (defense/elixir/power.py), if purification takes the trigger away: found in {foretold}.",
        ]
    lines += [
        "",
        "On the same votes, target found / runs that accuse a clean class:",
        "",
        "| rule | " + " | ".join(f"{share:.0%}" for share in by_share) + " |",
        "|---" * (len(by_share) + 1) + "|",
    ]
    for rule in RULES:
        cells = [
            f"{_found([row | {'by': row['rules'][rule]} for row in own], 'by')} / "
            f"{sum(bool(set(row['rules'][rule]) - set(row['true'])) for row in own)} of {len(own)}"
            for own in by_share.values()
        ]
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _found(rows: list[dict[str, Any]], key: str) -> str:
    return (
        "-"
        if not rows[0]["true"]
        else f"{sum(set(row['true']) <= set(row[key]) for row in rows)} of {len(rows)}"
    )


def main() -> None:
    """Run what is missing; the results are written after every run."""
    args, rows = arguments(), []
    name = args.name or f"{args.attack}_{Path(args.yaml_path).stem}"
    for seed in args.seeds:
        for pratio in args.pratios:
            rows.append(run(args, name, pratio, seed))
            heading = (
                f"False alarms and power: {args.attack}, {args.yaml_path}{' defended again' if args.again else ''}{shown(args.extra)}, "
                f"{rows[0]['samples']} samples, {os.cpu_count()} CPU cores, {sum(row['seconds'] for row in rows) / 60:.0f} minutes of stages in all"
            )
            write_results(f"false_alarm_{name}", rows, f"{heading}\n\n{tables(rows)}")
    print(tables(rows))


if __name__ == "__main__":
    main()
