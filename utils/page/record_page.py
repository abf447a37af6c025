"""report.html: what a run did to its set and why, from what the record holds and nothing else.

The page is one file without any link to a network. What a record does not hold is left out, or said
to be missing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from utils.page import cause, figures, gallery
from utils.page.source import Source, dig, number
from utils.storage.files import replacing

PAGE = "report.html"
MODELS = {
    "victim": "before: victim",
    "benign_stage1": "before fine-tuning",
    "benign": "after: benign model",
}
LEFT_OUT = "LEFT_OUT"  # the verdict on samples that the benign model is not sure of
MEASURES = (
    *("evidence", "discrepancy", "score", "inflow", "inflow_score"),
    *("paste_rate", "pattern", "gap", "gap_error", "common", "pair"),
)
DISTANCES = ("pixel_distance", "feature_distance")


def write_page(folder: Path) -> Path:
    """Make report.html of a folder of results and return where it is.

    Raises:
        UserError: no report.json, or a damaged file.
    """
    return render(folder / PAGE, page=content(Source(folder)))


def write_unfinished(
    folder: Path, title: str, line: str, stages: list[tuple[str, str]], known: list[str]
) -> Path:
    """Make report.html of a run that is under way, which says so, and return where it is.

    Args:
        title: of the page.
        line: which stage of how many, and the time left.
        stages: each with its state, in words.
        known: sentences.
    """
    told = {"title": title, "line": line, "stages": stages, "known": known}
    return render(folder / PAGE, unfinished=told | {"time": time.strftime("%Y-%m-%d %H:%M:%S")})


def render(path: Path, **values: Any) -> Path:
    """Write the template, filled with a `page` (`content`), what is `unfinished`, or a `table`
    (benchmarks)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    template = environment.get_template("report.html.j2")
    with replacing(path) as temporary:
        temporary.write_text(template.render(dig=dig, **values), encoding="utf-8")
    return path


def content(source: Source) -> dict[str, Any]:
    """Everything that the template shows of one run."""
    table, changed = source.decisions, changes(source.decisions)
    names, counts = np.unique(table.get("verdict", []), return_counts=True)
    return {
        "title": source.folder.name,
        "report": source.report,
        "names": source.classes["names"],
        "config": source.config,
        "models": MODELS,
        "verdict": verdict(source, changed),
        "changed": changed,
        "accusations": list(cause.accusations(source)),
        "by_cause": "carrier" in table,
        "verdicts": dict(zip(names.tolist(), counts.tolist())),
        "gallery": pictures(source),
        "class_rows": class_rows(source),
        "transitions": transitions(table),
        "charts": draw(source),
        "has_truth": bool(source.find("truth.npz")),
    }


def changes(table: dict[str, np.ndarray]) -> dict[str, int]:
    """How many labels and images were changed, samples removed, and of these left out as the model
    is not sure of them; empty if not recorded."""
    if not table:
        return {}
    return {
        "labels": int((table["given_label"] != table["new_label"]).sum()),
        "images": int((table["round"] != -1).sum()),
        "removed": int((table["kept"] == 0).sum()),
        "left_out": int((table["verdict"] == LEFT_OUT).sum()),
        "of": len(table["index"]),
    }


def pictures(source: Source) -> gallery.Gallery | None:
    """The gallery, None where the record does not hold all that it takes."""
    table, given = source.decisions, source.arrays("poisoned.npz")
    new = source.arrays("purified.npz")
    if not (table and given and new and len(given["images"]) == len(table["index"])):
        return None
    chosen = given["images"].copy()  # of samples that were removed, the image as it was given
    chosen[new.get("index", np.arange(len(chosen)))] = new["images"]
    examples, truth = source.arrays("examples.npz"), source.arrays("truth.npz")
    return gallery.build(table, given["images"], chosen, examples, truth)


def verdict(source: Source, changed: dict[str, int]) -> str:
    """The outcome in a sentence or two."""
    kept, detected = source.classes, dig(source.report, ("target_labels", "detected"))
    names, counts = kept["names"], ""
    if changed:
        labels, images = f"{changed['labels']:,} of {changed['of']:,} labels", changed["images"]
        counts = f"{labels} and {images:,} images were changed."
    unsure = changed.get("left_out", 0)
    if unsure:
        one = "sample was left out, as the model is not sure of it."
        several = "samples were left out, as the model is not sure of them."
        counts += f" {unsure:,} {one if unsure == 1 else several}"
    if removed := changed.get("removed", 0) - unsure:
        counts += f" {removed:,} samples were removed."
    if detected is None:
        return counts or "Nothing is recorded about single samples."
    if not detected:
        return f"No backdoor was found: no class stands out from the others. {counts}"
    words = " and ".join(names[k] if k < len(names) else str(k) for k in detected)
    said = "A backdoor was found: samples seem to be poisoned so that a model reads the trigger"
    said += f" as class {words}."
    for k in detected:
        if "by_inflow" in kept and kept["by_inflow"][k]:
            share = f"About {kept['inflow'][k]:.1%} of the other classes' samples"
            said += f" {share} seem to carry the label {names[k]}."
    return f"{said} {counts}"


def class_rows(source: Source) -> list[dict[str, Any]]:
    """A row for each class: its samples, discrepancy, inflow, scores, what pasting says, whether it
    is a target label and by which measures, or too small to tell."""
    kept, given = source.classes, source.decisions.get("given_label", np.zeros(0, np.int64))
    detected = dig(source.report, ("target_labels", "detected")) or []
    purified = source.decisions.get("votes_old", np.zeros_like(given)) >= 0
    rows = []
    for k, name in enumerate(kept["names"]):
        row = {"name": name, "flagged": k in detected}
        row |= {
            "samples": int((given == k).sum()),
            "purified": int(((given == k) & purified).sum()),
        }
        for key in MEASURES:
            row[key] = kept[key][k] if kept.get(key) else None
        row["by"] = cause.accusers(kept, k) if k in detected else ""
        row["told"] = "yes" if k in detected else "no"
        if k in kept.get("undecided", ()):
            row["told"] = "undecided (too small)"
        rows.append(row)
    return rows


def transitions(table: dict[str, np.ndarray]) -> dict[str, Any]:
    """{(given, new label): samples} where labels changed, and the labels that did."""
    if not table:
        return {}
    moved = table["given_label"] != table["new_label"]
    moves = np.stack([table["given_label"][moved], table["new_label"][moved]])
    pairs, counts = np.unique(moves, axis=1, return_counts=True)
    return {
        "rows": np.unique(pairs[0]).tolist(),
        "columns": np.unique(pairs[1]).tolist(),
        "most": int(counts.max(initial=0)),
        "counts": {(int(a), int(b)): int(n) for (a, b), n in zip(pairs.T, counts)},
    }


def draw(source: Source) -> dict[str, Markup]:
    """The charts that the record has the numbers for, as <img> elements."""
    kept, table, drawn = source.classes, source.decisions, {}
    measures = {"discrepancy (nats)": ("discrepancy", "threshold")}
    measures["share of others taken in"] = ("inflow", "inflow_limit")
    bars = {
        name: (_numbers(kept[values]), _numbers([kept.get(threshold)])[0])
        for name, (values, threshold) in measures.items()
        if kept.get(values)
    }
    if kept.get("pattern"):
        gaps, errors = (_numbers(kept[key], np.nan) for key in ("gap", "gap_error"))
        bars["pattern obeyed"] = _numbers(kept["pattern"], np.nan), kept["pattern_limit"]
        least = gaps - kept["gap_errors"] * errors
        bars["gap of paste rates"] = least, kept["gap_limit"]
    if kept.get("common"):
        bars["common pattern"] = _numbers(kept["common"]), kept["common_limit"]
        bars["pair"] = _numbers(kept["pair"], np.nan), kept["pair_limit"]
    if bars:
        words = "Of each class: " + ", ".join(bars)
        flagged = dig(source.report, ("target_labels", "detected")) or []
        chart = figures.target_label_chart
        drawn["classes"] = figures.embedded(words, chart, bars, flagged, kept["names"])
    distances = {
        f"{key.replace('_', ' ')} of chosen images": table[key]
        for key in DISTANCES
        if key in table and np.isfinite(table[key]).any()
    }
    if distances:
        words = " and ".join(distances)
        drawn["distances"] = figures.embedded(words, figures.histograms, distances)
    rows = source.victim_rows + source.rows("metrics.csv")
    if rows:
        words = "C-Acc and ASR over the epochs of each training stage"
        drawn["curves"] = figures.embedded(words, figures.training_curves, rows)
    return drawn


def _numbers(values: list[float | None], unknown: float = np.inf) -> np.ndarray:
    """float64, None as `unknown`."""
    return np.array([unknown if value is None else value for value in values], float)
