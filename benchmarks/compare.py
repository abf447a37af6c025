"""Defends records with several defences and writes one table that compares them.

    python benchmarks/compare.py --records badnet_0 badnet_1 --defenses none spectral dataelixir --seeds 3 --name badnet

A record is a folder below record/ that an attack script made, with its victim; records that differ in nothing but their
seed count as repetitions of one case. A defence is a name; with keys of its own it is NAME:KEY=VALUE,KEY=VALUE, and
random_remove@NAME removes as many samples as NAME did. Each run is a process of its own in record/RECORD/defense/, so
runs that are finished are not made again (delete a folder to have it made again), and one that fails stops no other.

Seeds count up from the record's own. They repeat a defence's random choices and trainings on one and the same victim;
what another poison or victim would change, only more records tell. Words after `--` go to every defence.

The last epoch of every training counts. Results: benchmarks/results/NAME.csv (mean, deviation and number of runs of each
case and defence), NAME_runs.csv (each run), NAME.md and NAME.html.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Sequence

from benchmarks.comparison import Run, write_results
from benchmarks.runs import RESULTS
from utils.config import ROOT, UserError, command_line
from utils.record import Record

DEFENSES = ("none", "oracle_remove", "oracle_relabel", "train_longer", "purify_only", "spectral", "spectral:budget=share", "random_remove@spectral:budget=share",
            "spectre", "activation_clustering", "scan", "strip", "abl", "ft", "dataelixir")


@dataclass(frozen=True)
class Spec:
    """A defence as the command line names it.

    Attributes:
        text: what was written.
        name: module of defense/.
        keys: {key: value} that differ from the record's and the defence's own.
        alike: the defence whose number of removed samples is taken over; None for most.
    """

    text: str
    name: str
    keys: dict[str, str]
    alike: Optional["Spec"] = None

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Read NAME, NAME:KEY=VALUE,KEY=VALUE or random_remove@SPEC.

        Raises:
            UserError: it is none of these.
        """
        name, at, other = text.partition("@")
        if at and name == "random_remove":
            return cls(text, name, {}, cls.parse(other))
        matched = re.fullmatch(r"(\w+)(?::(\w+=[^=,]+(?:,\w+=[^=,]+)*))?", text)
        if not matched or not (ROOT / "defense" / f"{matched[1]}.py").exists():
            raise UserError(f"defenses: '{text}' is neither NAME, NAME:KEY=VALUE,KEY=VALUE nor random_remove@NAME for a NAME in defense/")
        return cls(text, matched[1], dict(pair.split("=") for pair in (matched[2] or "").split(",") if pair))

    def folder(self, seed: int) -> str:
        """Name of a run's folder below record/RECORD/defense/."""
        return f"{re.sub('[^A-Za-z0-9_.-]+', '-', self.text)}-seed{seed}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", nargs="+", required=True, help="names below record/")
    parser.add_argument("--defenses", nargs="+", default=DEFENSES, help=f"default: {' '.join(DEFENSES)}")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each defence on each record")
    parser.add_argument("--name", default="compare", help="of the results")
    parser.add_argument("--only_finished", action="store_true", help="run nothing, tabulate what is there")
    parser.add_argument("extra", nargs="*", help="after --: flags for every defence, such as --device cpu")
    return parser.parse_args()


def finished(record: Record, spec: Spec, seed: int) -> Optional[dict[str, Any]]:
    """The report of a run that is complete, from its folder or, for the record's own defence, from the record; else None."""
    own = record.config().get("random_seed") == seed and not spec.keys
    for file in (record / "defense" / spec.folder(seed) / "report.json", *([record / "report.json"] if own else [])):
        report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if report.get("defense") == spec.name and "training_epochs" in report:
            return report
    return None


def removed_by(record: Record, spec: Spec, seed: int) -> int:
    """How many samples a finished run dropped.

    Raises:
        UserError: it has not run.
    """
    report = finished(record, spec, seed)
    if report is None or report.get("removed") is None:
        raise UserError(f"defenses: random_remove@{spec.text} needs a run of {spec.text} before it that gives out a training set")
    return report["removed"]


def command(record: Record, spec: Spec, seed: int, extra: Sequence[str]) -> list[str]:
    """The words that defend a record."""
    keys = {"remove_count": str(removed_by(record, spec.alike, seed))} if spec.alike else spec.keys
    return [sys.executable, str(ROOT / "defense" / f"{spec.name}.py"), "--result_file", record.name, "--run_name", spec.folder(seed),
            "--random_seed", str(seed), *(word for key, value in keys.items() for word in (f"--{key}", value)), *extra]


def defend(record: Record, spec: Spec, seed: int, args: argparse.Namespace) -> Optional[dict[str, Any]]:
    """The report of one run, made now if it is not there; None where it could not be made."""
    report = finished(record, spec, seed)
    if report or args.only_finished:
        return report
    print(f"== {record.name}: {spec.text}, seed {seed}", flush=True)
    try:
        words = command(record, spec, seed, args.extra)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    code = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
    if code == 130:
        raise KeyboardInterrupt
    return finished(record, spec, seed)


@command_line
def main() -> None:
    """Run what is missing, write the table after each record, and say what is absent."""
    args = arguments()
    specs, records = [Spec.parse(text) for text in args.defenses], [Record(name, must_exist=True) for name in args.records]
    RESULTS.mkdir(exist_ok=True)
    runs, absent = [], []
    for record in records:
        first = int(record.config().get("random_seed", 0))
        for spec in specs:
            for seed in range(first, first + args.seeds):
                report = defend(record, spec, seed, args)
                runs += [Run(record.name, record.config(), spec.text, seed, report)] if report else []
                absent += [] if report else [f"{record.name}: {spec.text}, seed {seed}"]
        if runs:
            write_results(RESULTS / args.name, runs, absent)
    print((RESULTS / f"{args.name}.md").read_text(encoding="utf-8") if runs else "no run is finished")
    if absent:
        raise UserError(f"{len(absent)} runs are absent, the first is {absent[0]}; what is there is tabulated")


if __name__ == "__main__":
    main()
