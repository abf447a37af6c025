"""Why classes are accused, for the page: in a sentence, a chart and pictures, from the record."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from utils.page import figures
from utils.page.source import Source

TILE = 80  # pixels that a picture is wide on the page
STRONG = 99  # percentile of a residual's strength that is brought to full contrast
RATE, MOVED = "paste rate", "votes that leave the label"
SIDES = ("clean group", "carriers")


@dataclass(frozen=True)
class Tile:
    """A picture with its caption; `obeyed`: it is read as the accused class."""

    picture: Markup
    caption: str
    obeyed: bool = False


@dataclass(frozen=True)
class Pasting:
    """An image of another class with a carrier's residual on it; `words` say of which samples."""

    tiles: list[Tile]
    words: str


@dataclass(frozen=True)
class Accusation:
    """What the page shows of one accused class.

    Attributes:
        name: the class's.
        by_pasting: pasting accuses it, so that what was taken away is the trigger.
        sentences: why it is accused, in words.
        chart: its samples in the feature plane, paste rates and votes.
        means: mean residual of the carriers and of the clean group.
        rates: how often single residuals of each are obeyed, in words.
        pastings: a few images of other classes with a carrier's residual.
        factor: how far single residuals are amplified.
    """

    name: str
    by_pasting: bool
    sentences: list[str]
    chart: Markup
    means: list[Tile]
    rates: str
    pastings: list[Pasting]
    factor: int


BY_PASTING = ("by_pattern", "by_gap", "by_common", "by_pair")  # in classes.json


def accusations(source: Source) -> Iterator[Accusation]:
    """One for each accused class; none where the record keeps no cause."""
    seen, table = source.arrays("cause.npz"), source.decisions
    if not seen or "paste_rate" not in table:
        return
    names, given = source.classes["names"], table["given_label"]
    for place, k in enumerate(seen["labels"].tolist()):
        own = given[seen["index"]] == k
        group, rows = seen["group"][own], seen["index"][own]
        rates = table["paste_rate"][rows].astype(float)
        witnesses = {RATE: rates, MOVED: seen["moved"][own].astype(float)}
        pasting = by_pasting(source.classes, k)
        sized_by = RATE if pasting else MOVED
        words = f"Samples of class {names[k]}: feature plane, paste rates and votes by group"
        drawn = (figures.cause_chart, seen["view"][own], group, witnesses, sized_by)
        shown = given[seen["carriers"]] == k
        yield Accusation(
            names[k],
            pasting,
            [*reasons(source.classes, k), _counts(group)],
            figures.embedded(words, *drawn),
            _means(seen["means"][place], seen["obeyed"][place]),
            _rates(rates, group),
            list(_pastings(seen, shown, k, names, table.get("path"))),
            _factor(seen["residuals"][shown]),
        )


def by_pasting(kept: dict[str, Any], k: int) -> bool:
    """Whether pasting accuses class k, by what classes.json holds."""
    return any(kept[key][k] for key in BY_PASTING if key in kept)


def accusers(kept: dict[str, Any], k: int) -> str:
    """Which measures accuse class k: "pasting", "votes", both, or nothing at all."""
    votes = any(kept[key][k] for key in ("by_discrepancy", "by_inflow") if key in kept)
    measures = {"pasting": by_pasting(kept, k), "votes": votes}
    return " and ".join(name for name, accuses in measures.items() if accuses)


def reasons(kept: dict[str, Any], k: int) -> list[str]:
    """Sentences: which measures accuse class k, and by how much."""
    said = [f"Accused by {accusers(kept, k) or 'no measure'}."]
    told = lambda key: bool(kept.get(key)) and kept[key][k]
    if told("by_pattern"):
        said.append(
            "What purification took from its samples has a pattern in common; where that is pasted "
            "on images of other classes, the classifier reads this class with a probability of "
            f"{kept['pattern'][k]:.2f} (bound {kept['pattern_limit']:.2f})."
        )
    if told("by_common"):
        source = kept["names"][kept["common_source"][k]]
        said.append(
            "Samples that the votes move, of all classes, have a pattern in common; pasted on "
            f"images of class {source}, it raises this class's probability by "
            f"{kept['common'][k]:.2f} (bound {kept['common_limit']:.2f})."
        )
    if told("by_pair"):
        source = kept["names"][kept["pair_source"][k]]
        said.append(
            f"Of its samples, those that the votes lead to class {source} have a pattern in common; "
            "pasted on images of that class, it makes the classifier read this one with a "
            f"probability of {kept['pair'][k]:.2f} (bound {kept['pair_limit']:.2f})."
        )
    gap, error = (kept[key][k] if kept.get(key) else None for key in ("gap", "gap_error"))
    if gap is not None and error is not None:
        least, above = gap - kept["gap_errors"] * error, "above" if told("by_gap") else "not above"
        said.append(
            f"Its two groups' paste rates are {gap:.2f} \u00b1 {error:.2f} apart: at least "
            f"{least:.2f}, {above} the bound of {kept['gap_limit']:.2f}."
        )
    elif "gap" in kept:
        said.append("There is no second group to compare paste rates with.")
    if told("by_inflow"):
        limit = kept["inflow_limit"]
        bound = "" if limit is None else f" (bound {limit:.1%})"
        share = f"{kept['inflow'][k]:.1%} of the other classes' samples"
        said.append(f"By the votes it seems to have taken in {share}{bound}.")
    if told("by_discrepancy"):
        value, limit = kept["discrepancy"][k], kept["threshold"]
        said.append(
            "Purified, its samples lose the label more than other classes' do: discrepancy "
            f"{'infinite' if value is None else f'{value:.2f}'} (bound {limit:.2f})."
        )
    return said


def _counts(group: np.ndarray) -> str:
    clean, between, carriers = (int((group == side).sum()) for side in range(3))
    said = f"Of its {len(group):,} samples {carriers:,} are taken to carry a trigger, {clean:,} not"
    return f"{said}, {between:,} cannot be told." if between else f"{said}."


def _factor(residuals: np.ndarray) -> int:
    """How far residuals are amplified so that strong pixels have full contrast; 1 or more."""
    strength = np.abs(residuals[np.isfinite(residuals)])
    strong = np.percentile(strength, STRONG) if strength.size else 0
    return max(1, round(127 / strong)) if strong else 1


def _amplified(residual: np.ndarray, factor: int) -> np.ndarray:
    """uint8 (3, H, W) of a residual in levels; grey = 0."""
    return np.clip(128 + factor * residual, 0, 255).round().astype(np.uint8)


def _means(means: np.ndarray, obeyed: np.ndarray) -> list[Tile]:
    """Pictures of the mean residuals (2, 3, H, W), amplified alike; carriers first."""
    factor, shown = _factor(means), []
    for side in (1, 0):
        if not np.isnan(means[side]).any():
            words = f"{SIDES[side]}: mean residual \u00d7{factor}, obeyed {obeyed[side]:.2f}"
            shown.append(Tile(picture(_amplified(means[side], factor), words, 2 * TILE), words))
    return shown


def _rates(rates: np.ndarray, group: np.ndarray) -> str:
    """The mean paste rate of carriers and of the clean group, in words."""
    told = []
    for number, side in ((2, "carrier"), (0, "clean sample")):
        own = rates[(group == number) & np.isfinite(rates)]
        if len(own):
            told.append(f"{own.mean():.2f} where it is a {side}'s")
    return "On average a residual is obeyed with a probability of " + ", ".join(told) + "."


def _pastings(
    seen: dict[str, np.ndarray],
    shown: np.ndarray,
    k: int,
    names: list[str],
    paths: np.ndarray | None,
) -> Iterator[Pasting]:
    """The pastings of class k; `shown` bool (E,) names them, `paths` (N,) the samples."""
    sample = lambda i: f"sample {i}" if paths is None else str(paths[i])
    factor = _factor(seen["residuals"][shown])
    for row in np.flatnonzero(shown):
        residual = _amplified(seen["residuals"][row].astype(float), factor)
        tiles = [Tile(picture(residual, "residual"), "+ residual")]
        said = ("reads", "= reads", "mean: reads")
        for words, image, label in zip(said, seen["pasted"][row], seen["read"][row].tolist()):
            words = f"{words} {names[label]}"
            tiles.append(Tile(picture(image, words), words, label == k))
        onto, carrier = (sample(seen[key][row]) for key in ("onto", "carriers"))
        of = f"{onto} with the residual of {carrier}"
        yield Pasting([tiles[1], tiles[0], *tiles[2:]], of)


def picture(image: np.ndarray, words: str, width: int = TILE) -> Markup:
    """An <img> of uint8 (3, H, W), as PNG; `words` stand for it if not seen."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    source = f'src="data:image/png;base64,{text}"'
    return Markup(f'<img class="pixels" width="{width}" alt="{escape(words)}" {source}>')
