"""report.html: one page that shows what a run did to its set and why, made from what the record holds and nothing else.

    python utils/report.py record/NAME              makes the page of a record again
    python utils/report.py record/A record/B ...    compares runs in one table: record/comparison.html, or --out FILE

The page is one file without any link to a network. What a record does not hold is left out, or said to be missing.
"""

from __future__ import annotations

import argparse
import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from utils.config import UserError, command_line
from utils.page import charts, gallery
from utils.page.source import Source, dig, number
from utils.storage.record import RECORDS, replacing

PAGE, COMPARISON = "report.html", "comparison.html"
MODELS = ("victim", "benign_stage1", "benign")
COMPARED = {  # column of the comparison -> (path in report.json, +1 if more is better, -1 if less is)
    "victim C-Acc": (("victim", "c_acc"), 0),
    "victim ASR": (("victim", "asr"), 0),
    "C-Acc": (("benign", "c_acc"), 1),
    "ASR": (("benign", "asr"), -1),
    "R-Acc": (("benign", "r_acc"), 1),
    "DER": (("der",), 1),
    "TPR": (("detection", "tpr"), 1),
    "FPR": (("detection", "fpr"), -1),
    "relabelled right": (("relabel", "accuracy_on_poison"), 1),
    "collateral": (("relabel", "collateral"), -1),
}


def write_page(folder: Path) -> Path:
    """Make report.html of a folder of results and return where it is.

    Raises:
        UserError: no report.json, or a damaged file.
    """
    return _write(folder / PAGE, page=content(Source(folder)))


def content(source: Source) -> dict[str, Any]:
    """Everything that the template shows of one run."""
    table = source.decisions
    changed = (
        {
            "labels": int((table["given_label"] != table["new_label"]).sum()),
            "images": int((table["round"] != -1).sum()),
            "removed": int((table["kept"] == 0).sum()),
            "samples": int(gallery.is_changed(table).sum()),
            "of": len(table["index"]),
        }
        if table
        else {}
    )
    verdicts = (
        dict(zip(*(part.tolist() for part in np.unique(table["verdict"], return_counts=True))))
        if table
        else {}
    )
    return {
        "title": source.folder.name,
        "report": source.report,
        "names": source.classes["names"],
        "config": source.config,
        "models": MODELS,
        "verdict": verdict(source, changed),
        "changed": changed,
        "verdicts": verdicts,
        "gallery": pictures(source),
        "class_rows": class_rows(source),
        "transitions": transitions(table),
        "charts": draw(source),
        "has_truth": bool(source.find("truth.npz")),
    }


def pictures(source: Source) -> gallery.Gallery | None:
    """The gallery, None where the record does not hold all that it takes."""
    table, given, new = (
        source.decisions,
        source.arrays("poisoned.npz"),
        source.arrays("purified.npz"),
    )
    if not (table and given and new and len(given["images"]) == len(table["index"])):
        return None
    chosen = given["images"].copy()  # of samples that were removed, the image as it was given
    chosen[new.get("index", np.arange(len(chosen)))] = new["images"]
    return gallery.build(
        table, given["images"], chosen, source.arrays("examples.npz"), source.arrays("truth.npz")
    )


def verdict(source: Source, changed: dict[str, int]) -> str:
    """The outcome in a sentence or two."""
    names, detected = source.classes["names"], dig(source.report, ("target_labels", "detected"))
    counts = (
        f"{changed['labels']:,} of {changed['of']:,} labels and {changed['images']:,} images were changed."
        if changed
        else ""
    )
    counts += f" {changed['removed']:,} samples were removed." if changed.get("removed") else ""
    if detected:
        words = " and ".join(names[k] if k < len(names) else str(k) for k in detected)
        said = f"A backdoor was found: samples seem to be poisoned so that a model reads the trigger as class {words}."
        taken = {
            names[k]: source.classes["inflow"][k]
            for k in detected
            if source.classes.get("by_inflow", {k: False})[k]
        }
        said += "".join(
            f" About {share:.1%} of the other classes' samples seem to carry the label {name}."
            for name, share in taken.items()
        )
        return f"{said} {counts}"
    if detected is None:
        return counts or "Nothing is recorded about single samples."
    return f"No backdoor was found: no class stands out from the others. {counts}"


def class_rows(source: Source) -> list[dict[str, Any]]:
    """One row for each class: samples, how many were purified, samples that moved, discrepancy and inflow with their scores, whether it is a detected target label."""
    kept, given = source.classes, source.decisions.get("given_label", np.zeros(0, np.int64))
    detected = dig(source.report, ("target_labels", "detected")) or []
    at = lambda key, k: kept[key][k] if kept.get(key) else None
    purified = source.decisions.get("votes_old", np.zeros_like(given)) >= 0
    return [
        {
            "name": name,
            "samples": int((given == k).sum()),
            "purified": int(((given == k) & purified).sum()),
            "flagged": k in detected,
            **{
                key: at(key, k)
                for key in ("evidence", "discrepancy", "score", "inflow", "inflow_score")
            },
        }
        for k, name in enumerate(kept["names"])
    ]


def transitions(table: dict[str, np.ndarray]) -> dict[str, Any]:
    """How many samples went from which given label to which new one: rows and columns where anything did, and counts."""
    if not table:
        return {}
    moved = table["given_label"] != table["new_label"]
    pairs, counts = np.unique(
        np.stack([table["given_label"][moved], table["new_label"][moved]]),
        axis=1,
        return_counts=True,
    )
    return {
        "rows": np.unique(pairs[0]).tolist(),
        "columns": np.unique(pairs[1]).tolist(),
        "most": int(counts.max(initial=0)),
        "counts": {(int(a), int(b)): int(n) for (a, b), n in zip(pairs.T, counts)},
    }


def draw(source: Source) -> dict[str, Any]:
    """The charts that the record has the numbers for."""
    kept, table, drawn = source.classes, source.decisions, {}
    if kept.get("discrepancy"):
        flagged = dig(source.report, ("target_labels", "detected")) or []
        bars = lambda key, limit, *words: charts.class_bars(
            kept[key], kept["names"], flagged, charts.finite(kept.get(limit)), *words
        )
        drawn["classes"] = bars("discrepancy", "threshold", "Discrepancy of each class", " nats")
        drawn["inflow"] = (
            bars("inflow", "inflow_limit", "Share of the other classes taken in")
            if kept.get("inflow")
            else None
        )
    elif picture := source.find("discrepancy.png"):
        drawn["classes_png"] = base64.b64encode(picture.read_bytes()).decode()
    for key, words in (
        ("pixel_distance", "pixel distance"),
        ("feature_distance", "feature distance"),
    ):
        if key in table and np.isfinite(table[key]).any():
            drawn[key] = charts.histogram(table[key], f"{words} of chosen images")
    above = (
        [row for row in Source(source.above).rows("metrics.csv") if row["stage"] == "victim"]
        if source.above
        else []
    )
    drawn["curves"] = training_curves(above + source.rows("metrics.csv"))
    return drawn


def training_curves(rows: list[dict[str, str]]) -> list[Any]:
    """C-Acc and ASR over the epochs of every stage that was measured."""
    points = lambda stage, key: [
        (int(r["epoch"]), float(r[key])) for r in rows if r["stage"] == stage and r.get(key)
    ]
    stages = dict.fromkeys(row["stage"] for row in rows)
    return [
        charts.curves(
            stage, {kind: points(stage, key) for kind, key in (("cacc", "c_acc"), ("asr", "asr"))}
        )
        for stage in stages
    ]


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """The comparison of several runs: a row for each, the best of a column marked where one is."""
    reports = [Source(folder).report for folder in folders]
    shown = lambda path: [charts.finite(dig(report, path)) for report in reports]
    columns = {
        name: (shown(path), _best(shown(path), sign)) for name, (path, sign) in COMPARED.items()
    }
    rows = [
        {
            "name": folder.name
            if folder.parent.name != "defense"
            else f"{folder.parent.parent.name}/{folder.name}",
            "report": report,
            "cells": [(name, values[k], k in best) for name, (values, best) in columns.items()],
            "minutes": sum((dig(report, ("cost", "seconds")) or {}).values()) / 60,
        }
        for k, (folder, report) in enumerate(zip(folders, reports))
    ]
    return {"title": f"{len(folders)} runs", "rows": rows, "columns": list(columns)}


def _best(values: list[float | None], sign: int) -> set[int]:
    """Rows that hold the best value; nobody is marked where all are equal, or where more is neither better nor worse."""
    known = {sign * value for value in values if value is not None}
    return (
        {k for k, value in enumerate(values) if value is not None and sign * value == max(known)}
        if len(known) > 1
        else set()
    )


def _write(path: Path, **values: Any) -> Path:
    template = (Path(__file__).parent / "page" / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number}
    with replacing(path) as temporary:
        temporary.write_text(
            environment.from_string(template).render(dig=dig, **values), encoding="utf-8"
        )
    return path


def _folder(text: str) -> Path:
    """The folder that a person means: as given, or below record/."""
    found = next(
        (path for path in (Path(os.path.expanduser(text)), RECORDS / text) if path.is_dir()), None
    )
    if found is None:
        raise UserError(f"{text}: no such folder, and no such record in {RECORDS}")
    return found.resolve()


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Make the page of one record, or compare several."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="record/NAME, NAME, or an output folder of defense/purify.py",
    )
    parser.add_argument("--out", help="comparison only: file to write")
    words = parser.parse_args(argv)
    folders = [_folder(text) for text in words.folders]
    if len(folders) == 1:
        print(write_page(folders[0]))
        return
    print(
        _write(Path(words.out) if words.out else RECORDS / COMPARISON, comparison=compare(folders))
    )


if __name__ == "__main__":
    main()
