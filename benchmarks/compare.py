"""Defends records with several defences and writes one table that compares them.

    python benchmarks/compare.py --records badnet_0 badnet_1 --defenses none spectral --name badnet

A record is a folder below record/ that an attack script made, with its victim; records that differ
in nothing but their seed count as repetitions of one case. A defence is a name; with keys of its
own it is NAME:KEY=VALUE,KEY=VALUE, and random_remove@NAME removes as many samples as NAME did. Each
run is a process of its own in record/RECORD/defense/, so runs that are finished are not made again
(delete a folder to have it made again), and one that fails stops no other. A finished run that was
made with other keys than are asked for stops the comparison; a damaged report counts as absent.

Seeds count up from the record's own. They repeat a defence's random choices and trainings on one
and the same victim; what another poison or victim would change, only more records tell. Words after
`--` go to every defence.

The last epoch of every training counts. Results, in --out: NAME.csv (mean, deviation and number of
runs of each case and defence), NAME_runs.csv (each run), NAME.md and NAME.html.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.comparison import Run, write_results
from benchmarks.runs import RESULTS
from utils.config import ROOT, UserError, command_line
from utils.storage import checksums
from utils.storage.record import RUNTIME_KEYS, Record

DEFENSES = (
    "none",
    "oracle_remove",
    "oracle_relabel",
    "train_longer",
    "purify_only",
    "spectral",
    "spectral:budget=share",
    "random_remove@spectral:budget=share",
    "spectre",
    "activation_clustering",
    "scan",
    "strip",
    "abl",
    "ft",
    "dataelixir",
)


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
    alike: Spec | None = None

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read NAME, NAME:KEY=VALUE,KEY=VALUE or random_remove@SPEC.

        Raises:
            UserError: it is none of these.
        """
        name, at, other = text.partition("@")
        if at and name == "random_remove":
            return cls(text, name, {}, cls.parse(other))
        matched = re.fullmatch(r"(\w+)(?::(\w+=[^=,]+(?:,\w+=[^=,]+)*))?", text)
        if not matched or not (ROOT / "defense" / f"{matched[1]}.py").exists():
            raise UserError(
                f"defenses: '{text}' is neither NAME, NAME:KEY=VALUE,KEY=VALUE nor "
                "random_remove@NAME for a NAME in defense/"
            )
        return cls(
            text,
            matched[1],
            dict(pair.split("=") for pair in (matched[2] or "").split(",") if pair),
        )

    def folder(self, seed: int) -> str:
        """Name of a run's folder below record/RECORD/defense/."""
        return f"{re.sub('[^A-Za-z0-9_.-]+', '-', self.text)}-seed{seed}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", nargs="+", required=True, help="names below record/")
    parser.add_argument(
        "--defenses", nargs="+", default=DEFENSES, help=f"default: {' '.join(DEFENSES)}"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each defence on each record")
    parser.add_argument("--name", default="compare", help="of the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--only_finished", action="store_true", help="run nothing, tabulate what is there"
    )
    parser.add_argument(
        "extra", nargs="*", help="after --: flags for every defence, such as --device cpu"
    )
    return parser.parse_args()


@functools.lru_cache(None)
def complain(line: str) -> None:
    """Say on stderr, once, what is wrong."""
    print(line, file=sys.stderr, flush=True)


def read_report(file: Path) -> dict[str, Any]:
    """A report.json; empty where there is none, or (which is told) where it is damaged."""
    try:
        checksums.verify(file)
        report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if isinstance(report, dict):
            return report
    except (UserError, OSError, ValueError, RecursionError):
        pass
    complain(f"{file}: damaged, it counts as absent")
    return {}


def own_keys(record: Record, spec: Spec, seed: int, extra: Sequence[str]) -> dict[str, str]:
    """Keys that only this defence is told; of one that removes as many samples as another, none
    where that one has not run."""
    if not spec.alike:
        return spec.keys
    removed = (finished(record, spec.alike, seed, extra) or {}).get("removed")
    return {} if removed is None else {"remove_count": str(removed)}


def told(keys: dict[str, str], extra: Sequence[str]) -> dict[str, str]:
    """{key: word} of all that a run is told: `keys`, and then the words after `--`, as --KEY WORD
    or --KEY=WORD."""
    keys = dict(keys)
    for word, following in zip(extra, [*extra[1:], "--"]):
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            keys[key] = value if equals else "true" if following.startswith("--") else following
    return keys


def is_meant(word: str, value: Any) -> bool:
    """Whether a word of the command line gives that value of a config."""
    with contextlib.suppress(ValueError, yaml.YAMLError):
        return (
            word == str(value)
            or (float(word) if isinstance(value, float) else yaml.safe_load(word)) == value
        )
    return False


def other_key(config: dict[str, Any], keys: dict[str, str]) -> str | None:
    """A key that a run was not made with: the first of `keys` whose value in its config is another;
    None where there is none."""
    return next(
        (
            key
            for key, word in keys.items()
            if key in config and key not in RUNTIME_KEYS and not is_meant(word, config[key])
        ),
        None,
    )


def finished(
    record: Record, spec: Spec, seed: int, extra: Sequence[str] = ()
) -> dict[str, Any] | None:
    """The report of a run that is complete, from its folder or, for the record's own defence, from
    the record; else None.

    Raises:
        UserError: the run in that folder was made with other keys than are asked for now.
    """
    complete = lambda report: report.get("defense") == spec.name and "training_epochs" in report
    keys, run = (
        told(own_keys(record, spec, seed, extra), extra),
        record / "defense" / spec.folder(seed),
    )
    if complete(report := read_report(run / "report.json")):
        config = (
            Record(f"{record.name}/defense/{run.name}").config()
            if (run / "config.yaml").exists()
            else {}
        )
        if key := other_key(config, keys):
            own = f"{spec.text}{',' if spec.keys else ':'}{key}={keys[key]}"
            apart = "" if spec.alike else f", or give the other run keys of its own: {own}"
            made = f"{run} was made with {config[key]!r}, and {keys[key]} is asked for now"
            raise UserError(f"{key}: {made};\ndelete that folder{apart}")
        return report
    own = (
        record.config().get("random_seed") == seed
        and not spec.keys
        and not spec.alike
        and not other_key(record.config(), keys)
    )
    return report if own and complete(report := read_report(record / "report.json")) else None


def command(record: Record, spec: Spec, seed: int, extra: Sequence[str]) -> list[str]:
    """The words that defend a record.

    Raises:
        UserError: the run whose count is taken over is not there.
    """
    keys = own_keys(record, spec, seed, extra)
    if spec.alike and not keys:
        raise UserError(
            f"defenses: {spec.text} needs a run of {spec.alike.text} before it that gives out a training set"
        )
    return [
        sys.executable,
        str(ROOT / "defense" / f"{spec.name}.py"),
        "--result_file",
        record.name,
        "--run_name",
        spec.folder(seed),
        "--random_seed",
        str(seed),
        *(word for key, value in keys.items() for word in (f"--{key}", value)),
        *extra,
    ]


def defend(
    record: Record, spec: Spec, seed: int, args: argparse.Namespace
) -> dict[str, Any] | None:
    """The report of one run, made now if it is not there; None where it could not be made."""
    try:
        report = finished(record, spec, seed, args.extra)
        if report or args.only_finished:
            return report
        print(f"== {record.name}: {spec.text}, seed {seed}", flush=True)
        words = command(record, spec, seed, args.extra)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    code = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    ).returncode
    if code == 130:
        raise KeyboardInterrupt
    return finished(record, spec, seed, args.extra)


def knowledge(
    record: Record, spec: Spec, seed: int, report: dict[str, Any], extra: Sequence[str]
) -> list[str]:
    """What a run was told: as its report says, or where it took a count over, what the other was
    told, and that."""
    if not spec.alike:
        return report["knowledge"]
    other = finished(record, spec.alike, seed, extra)
    return [
        *(knowledge(record, spec.alike, seed, other, extra) if other else []),
        f"as many as {spec.alike.text}",
    ]


@command_line
def main() -> None:
    """Run what is missing, write the table after each record, and say what is absent."""
    args = arguments()
    specs, records = (
        [Spec.parse(text) for text in args.defenses],
        [Record(name, must_exist=True) for name in args.records],
    )
    first = [int(record.config().get("random_seed", 0)) for record in records]
    wanted = [
        [(record, spec, seed + k) for spec in specs for k in range(args.seeds)]
        for record, seed in zip(records, first)
    ]
    for case in itertools.chain(*wanted):
        finished(*case, args.extra)  # runs with other keys are told of now, not after hours
    args.out.mkdir(exist_ok=True)
    runs, absent = [], []
    for cases in wanted:
        for record, spec, seed in cases:
            if report := defend(record, spec, seed, args):
                report |= {"knowledge": knowledge(record, spec, seed, report, args.extra)}
                runs.append(Run(record.name, record.config(), spec.text, seed, report))
            else:
                absent.append(f"{record.name}: {spec.text}, seed {seed}")
        if runs:
            write_results(args.out / args.name, runs, absent)
    print(
        (args.out / f"{args.name}.md").read_text(encoding="utf-8") if runs else "no run is finished"
    )
    if absent:
        raise UserError(
            f"{len(absent)} runs are absent, the first is {absent[0]}; what is there is tabulated"
        )


if __name__ == "__main__":
    main()
