"""One table of case x defence from the reports of many runs: as CSV, as Markdown, and as a page
with heat maps."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.page.figures import embedded
from utils.page.record_page import render
from utils.page.source import dig
from utils.storage.record import RUNTIME_KEYS, replacing

BEFORE = ("poison", "victim")  # stages that are no part of a defence
NOT_THE_CASE = (
    "random_seed",
    "save_folder_name",
    "defense",
    "stop_after",
    "export",
    "environment",
    *RUNTIME_KEYS,
)


@dataclass(frozen=True)
class Run:
    """One defence of one record: the record's name and keys, the defence as it was asked for, the
    seed, and report.json."""

    record: str
    config: dict[str, Any]
    defense: str
    seed: int
    report: dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A number of the table: its name, how it is found in a report, and its digits."""

    name: str
    read: Callable[[dict[str, Any]], float | None]
    digits: int = 4


def at(*path: str) -> Callable[[dict[str, Any]], float | None]:
    """The number at a path of keys; None where there is none."""
    return lambda report: dig(report, path)


def own_seconds(report: dict[str, Any]) -> float:
    """What the defence took, without the making of poison and victim."""
    return sum(
        seconds for stage, seconds in report["cost"]["seconds"].items() if stage not in BEFORE
    )


COLUMNS = (
    Column("C-Acc", at("benign", "c_acc")),
    Column("ASR", at("benign", "asr")),
    Column("R-Acc", at("benign", "r_acc")),
    Column("DER", at("der")),
    Column("TPR", at("detection", "tpr")),
    Column("FPR", at("detection", "fpr")),
    Column("relabel acc.", at("relabel", "accuracy_on_poison")),
    Column("label acc.", at("relabel", "label_accuracy")),
    Column("AUROC", at("suspicion", "auroc")),
    Column("AUPRC", at("suspicion", "auprc")),
    Column("TPR at 1% FPR", at("suspicion", "tpr_at_fpr1")),
    Column("removed", at("removed"), 0),
    Column("epochs", at("training_epochs"), 0),
    Column("seconds", own_seconds, 0),
)
DRAWN = (
    ("C-Acc", "YlGnBu"),
    ("ASR", "YlGnBu_r"),
    ("R-Acc", "YlGnBu"),
    ("DER", "YlGnBu"),
)  # darker is better


@dataclass(frozen=True)
class Cell:
    """A number over the n of `runs` runs that have it: mean and, from two on, sample standard
    deviation; None where it is undefined."""

    mean: float | None
    deviation: float | None
    n: int
    runs: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Cell:
        known = [value for value in values if value is not None]
        return cls(
            statistics.mean(known) if known else None,
            statistics.stdev(known) if len(known) > 1 else None,
            len(known),
            len(values),
        )

    def show(self, digits: int) -> str:
        if self.mean is None:
            return "n/a"
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        some = "" if self.n == self.runs else f" ({self.n} of {self.runs})"
        return f"{self.mean:.{digits}f}{spread}{some}"


@dataclass(frozen=True)
class Line:
    """All runs of one defence on one case."""

    case: str
    defense: str
    runs: int
    knowledge: str
    cells: dict[str, Cell]


def case_names(runs: Sequence[Run]) -> dict[str, str]:
    """{record: name of its case}. Records that differ in nothing but their seed share a case."""
    keys = {run.record: run.config for run in runs}
    short = {
        record: f"{c.get('attack') or '?'} {c.get('pratio', math.nan):g}, {c.get('dataset', '?')}"
        for record, c in keys.items()
    }
    essence = {
        record: repr(sorted((k, repr(v)) for k, v in c.items() if k not in NOT_THE_CASE))
        for record, c in keys.items()
    }
    kinds = Counter(name for name, _ in {(short[record], essence[record]) for record in keys})
    first = {essence[record]: record for record in reversed(list(keys))}
    return {
        record: short[record]
        if kinds[short[record]] == 1
        else f"{short[record]} ({first[essence[record]]})"
        for record in keys
    }


def lines(runs: Sequence[Run]) -> list[Line]:
    """A line for each case and defence, in the order of their first runs; the victim of each case
    comes first."""
    cases, found = case_names(runs), []
    for case in dict.fromkeys(cases[run.record] for run in runs):
        of_case = [run for run in runs if cases[run.record] == case]
        for defense in dict.fromkeys(run.defense for run in of_case):
            own = [run.report for run in of_case if run.defense == defense]
            knowledge = (
                ", ".join(dict.fromkeys(word for report in own for word in report["knowledge"]))
                or "-"
            )
            found.append(
                Line(
                    case,
                    defense,
                    len(own),
                    knowledge,
                    {c.name: Cell.of([c.read(report) for report in own]) for c in COLUMNS},
                )
            )
    return found


def notes(runs: Sequence[Run], absent: Sequence[str]) -> list[str]:
    """What a reader must know beside the numbers."""
    cases, told = case_names(runs), []
    for case in dict.fromkeys(cases.values()):
        own = {run.record: run for run in runs if cases[run.record] == case}
        seeds = {(run.record, run.seed) for run in runs if cases[run.record] == case}
        victims = [run.report["victim"] for run in own.values()]
        clean, n = victims[0]["n_clean"], victims[0]["n_triggered"]
        mean = {key: Cell.of([v[key] for v in victims]).show(4) for key in ("c_acc", "asr")}
        failed = any(run.report["status"] == "attack-failed" for run in own.values())
        told.append(
            f"{case}: {len(own)} record(s), {len(seeds)} run(s) of each defence; "
            f"victim C-Acc {mean['c_acc']}, ASR {mean['asr']}; "
            f"{clean} clean and {n} triggered test images (95 % half-width of a share near one half: "
            f"{98 / math.sqrt(clean):.1f} and {98 / math.sqrt(max(1, n)):.1f} points)."
            + (" The attack failed here: what a defence reaches means little." if failed else "")
        )
    devices = dict.fromkeys(
        f"{run.report['cost']['device']}, {run.report['versions'].get('threads')} thread(s)"
        for run in runs
    )
    told.append(
        "Mean ± sample standard deviation over runs, or over those that have the number (1 of 2); "
        "one run has none. TPR and FPR are over training samples. "
        f"The last epoch of every training counts. Device: {'; '.join(devices)}."
    )
    return told + ([f"Absent: {'; '.join(absent)}."] if absent else [])


def write_results(stem: Path, runs: Sequence[Run], absent: Sequence[str]) -> None:
    """STEM.csv, STEM_runs.csv, STEM.md and STEM.html."""
    table, told = lines(runs), notes(runs, absent)
    spread = [f"{c.name} {part}" for c in COLUMNS for part in ("mean", "sd", "n")]
    _write_csv(
        stem.with_name(f"{stem.name}.csv"),
        ["case", "defense", "runs", "knowledge", *spread],
        [
            [
                line.case,
                line.defense,
                line.runs,
                line.knowledge,
                *(_plain(v) for c in line.cells.values() for v in (c.mean, c.deviation, c.n)),
            ]
            for line in table
        ],
    )
    _write_csv(
        stem.with_name(f"{stem.name}_runs.csv"),
        ["record", "defense", "seed", "status", "knowledge", *(c.name for c in COLUMNS)],
        [
            [
                run.record,
                run.defense,
                run.seed,
                run.report["status"],
                ", ".join(run.report["knowledge"]),
                *(_plain(c.read(run.report)) for c in COLUMNS),
            ]
            for run in runs
        ],
    )
    heads = ["case", "defense", "runs", *(c.name for c in COLUMNS), "knowledge"]
    short = "C-Acc / ASR in %, means:\n\n" + _markdown(overview(table))
    cells = [
        [
            line.case,
            line.defense,
            str(line.runs),
            *(line.cells[c.name].show(c.digits) for c in COLUMNS),
            line.knowledge,
        ]
        for line in table
    ]
    _write_text(
        stem.with_name(f"{stem.name}.md"),
        "\n\n".join([*told, short, _markdown([heads, *cells])]) + "\n",
    )
    words = "Heat maps of C-Acc, ASR, R-Acc and DER: a row for each defence, a column for each case"
    content = {"title": f"Defences compared: {stem.name}", "notes": told, "heads": heads}
    content |= {"lines": cells, "picture": embedded(words, heat_maps, table)}
    render(stem.with_name(f"{stem.name}.html"), table=content)


def _in_order(table: Sequence[Line]) -> tuple[list[str], list[str]]:
    """The cases and the defences, each in the order in which they come."""
    cases, defenses = (
        list(dict.fromkeys(getattr(line, key) for line in table)) for key in ("case", "defense")
    )
    return cases, defenses


def overview(table: Sequence[Line]) -> list[list[str]]:
    """Heads and rows: defences down, cases across, mean C-Acc / mean ASR in percent; "-" where
    there is no run."""
    cases, defenses = _in_order(table)
    percent = lambda mean: "n/a" if mean is None else f"{100 * mean:.1f}"
    shown = {
        (line.defense, line.case): " / ".join(
            percent(line.cells[name].mean) for name in ("C-Acc", "ASR")
        )
        for line in table
    }
    told = {line.defense: line.knowledge for line in table}
    return [
        ["defense", *cases, "knowledge"],
        *(
            [defense, *(shown.get((defense, case), "-") for case in cases), told[defense]]
            for defense in defenses
        ),
    ]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])
    )


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _write_csv(path: Path, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([heads, *rows])


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def heat_maps(target: io.BytesIO, table: Sequence[Line]) -> None:
    """Write a PNG: a map for each of DRAWN, defences down, cases across, each cell's mean in
    percent, blank where there is none."""
    cases, defenses = _in_order(table)
    across = len(DRAWN) if len(cases) <= 3 else 2  # maps side by side
    down = len(DRAWN) // across
    width = across * max(1.6, 0.75 * len(cases) + 0.4) + 2.6
    figure = Figure(figsize=(width, (0.34 * len(defenses) + 1.9) * down), layout="constrained")
    axes = figure.subplots(down, across, sharey=True, squeeze=False)
    for axis, (name, colours) in zip(axes.flat, DRAWN):
        values = np.full((len(defenses), len(cases)), np.nan)
        for line in table:
            mean = line.cells[name].mean
            place = defenses.index(line.defense), cases.index(line.case)
            values[place] = np.nan if mean is None else mean
        least = 0.5 if name == "DER" else 0
        axis.imshow(values, cmap=colours, vmin=least, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            shade = (value - least) / (1 - least)
            dark = (1 - shade if colours.endswith("_r") else shade) > 0.6
            text, colour = f"{100 * value:.1f}", "white" if dark else "black"
            if not np.isnan(value):
                axis.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(cases)), cases, rotation=35, ha="right", fontsize=7)
        axis.set_yticks(range(len(defenses)), defenses, fontsize=8)
        better = "lower" if name == "ASR" else "higher"
        axis.set_title(f"{name}, % ({better} is better)", fontsize=8)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.savefig(target, format="png", dpi=150, bbox_inches="tight")
