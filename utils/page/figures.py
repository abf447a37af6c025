"""Charts and sheets of images by matplotlib: saved in a record, or embedded in its page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from torch import Tensor

from utils.storage.files import replacing

matplotlib.rcParams["text.parse_math"] = False  # a class may be called $\\frac{
ACCENT, MUTED, BLUE = "#c0392b", "#7f8c8d", "#2c6fbb"
# the groups of an accused class, in the order of their numbers
SIDES = {"clean": BLUE, "between": MUTED, "carriers": ACCENT}
PAGE_DPI = 150  # of an embedded picture, which is shown at half of that
BINS = 24
Target = Path | io.BytesIO  # where a picture goes, as PNG


def embedded(words: str, draw: Callable[..., None], *args: Any) -> Markup:
    """An <img> with the picture that `draw` makes of `args`; `words` stand for it if not seen."""
    buffer = io.BytesIO()
    draw(buffer, *args)
    png = buffer.getvalue()
    width = int.from_bytes(png[16:20], "big") // 2
    text = base64.b64encode(png).decode()
    source = f'src="data:image/png;base64,{text}"'
    return Markup(f'<img class="chart" width="{width}" alt="{escape(words)}" {source}>')


def _save(figure: Figure, target: Target) -> None:
    if isinstance(target, Path):
        with replacing(target) as temporary:
            figure.savefig(temporary, dpi=130, bbox_inches="tight")
    else:
        figure.savefig(target, format="png", dpi=PAGE_DPI, bbox_inches="tight")


def _subplots(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of `rows` x `columns` plots, in inches, and its axes (rows, columns)."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def image_grid(
    target: Target, rows: Sequence[tuple[str, Iterable[Tensor]]], columns: Sequence[str]
) -> None:
    """A sheet of uint8 images (3, H, W): a named row per entry, a captioned column per image."""
    width, height = 1.1 * len(columns) + 1.2, 1.25 * len(rows) + 0.4
    figure, axes = _subplots(len(rows), len(columns), width, height)
    for line, (name, images) in zip(axes, rows):
        for cell, image in zip(line, images):
            cell.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        for cell in line:
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for cell, caption in zip(axes[0], columns):
        cell.set_title(caption, fontsize=7)
    _save(figure, target)


def trigger_sheet(
    target: Target, clean: Tensor, triggered: Tensor, captions: Sequence[str]
) -> None:
    """Clean and triggered images uint8 (B, 3, H, W), and their amplified difference.

    The printed factor brings the changed pixels' 95th percentile to full contrast, so that a few
    strong pixels (a patch) do not hide a faint pattern on the others; stronger ones are cut off.
    """
    difference = triggered.int() - clean.int()
    changed = difference.abs()[difference != 0].double()
    factor = max(1, round(127 / changed.quantile(0.95).item())) if len(changed) else 1
    residual = (difference * factor + 128).clamp(0, 255).byte()
    rows = [("clean", clean), ("triggered", triggered), (f"residual x{factor}", residual)]
    image_grid(target, rows, captions)


def target_label_chart(
    target: Target,
    measures: dict[str, tuple[np.ndarray, float]],
    flagged: Sequence[int],
    classes: Sequence[str],
) -> None:
    """What target labels were found by: a bar for each class, flagged ones coloured.

    Args:
        measures: {name: (values of every class, threshold)}; what is infinite is drawn to the top,
            nan not at all.
    """
    width, height = max(5, 0.28 * len(classes) + 2), 2.8 * len(measures) + 0.4
    figure, axes = _subplots(len(measures), 1, width, height)
    colours = [ACCENT if k in flagged else MUTED for k in range(len(classes))]
    for axis, (name, (values, threshold)) in zip(axes[:, 0], measures.items()):
        finite = values[np.isfinite(values)]
        top = (finite.max() if len(finite) else 1.0) * 1.1 + 1e-3
        heights = np.where(np.isinf(values), top, np.nan_to_num(values))
        axis.bar(range(len(values)), heights, color=colours[: len(values)])
        if np.isfinite(threshold):
            label = f"threshold {threshold:.3g}"
            axis.axhline(threshold, color="black", linewidth=1, linestyle="--", label=label)
            axis.legend(frameon=False, fontsize=8)
        turn = 90 if len(values) > 12 else 0
        axis.set_xticks(range(len(values)), classes, rotation=turn, fontsize=7)
        axis.set(ylabel=name)
    found = ", ".join(classes[k] for k in flagged)
    axes[0, 0].set(title=f"Target labels: {found or 'none found'}")
    axes[-1, 0].set(xlabel="class")
    figure.tight_layout()
    _save(figure, target)


def suspicion_chart(
    target: Target, score: np.ndarray, poison: np.ndarray, flagged: np.ndarray
) -> None:
    """The suspicion (N,) of poisoned and of other samples by rank, and how many were flagged."""
    figure, axes = _subplots(1, 1, 5, 3.2)
    axis = axes[0, 0]
    rank = score.argsort(kind="stable").argsort(kind="stable") / max(1, len(score) - 1)
    for mask, colour, name in ((~poison, MUTED, "other"), (poison, ACCENT, "poisoned")):
        label = f"{name}: {int((flagged & mask).sum())} of {int(mask.sum())} flagged"
        bins = np.linspace(0, 1, 41)
        axis.hist(rank[mask], bins, color=colour, alpha=0.7, density=True, label=label)
    axis.set(xlabel="rank by suspicion (1 = most suspicious)", ylabel="density")
    axis.legend(frameon=False, fontsize=8)
    _save(figure, target)


def histograms(target: Target, measures: dict[str, np.ndarray]) -> None:
    """How often values of each size occur, {name: values in [0, 1]}; nan is left out."""
    figure, axes = _subplots(1, len(measures), 4.2 * len(measures), 2.6)
    for axis, (name, values) in zip(axes[0], measures.items()):
        known = values[np.isfinite(values)]
        top = max(float(known.max(initial=0)), 1e-3)
        axis.hist(known, BINS, range=(0, top), color=BLUE)
        axis.set(xlabel=name, ylabel="samples")
    figure.tight_layout()
    _save(figure, target)


def cause_chart(
    target: Target,
    view: np.ndarray,
    group: np.ndarray,
    witnesses: dict[str, np.ndarray],
    sized_by: str,
) -> None:
    """One accused class: its samples in the feature plane, and each witness by group.

    Args:
        view: float (S, 2), places of its samples.
        group: int (S,), places in SIDES.
        witnesses: {name: values (S,) in [0, 1]}; nan is left out.
        sized_by: the witness that a sample's mark is as large as.
    """
    figure, axes = _subplots(1, 1 + len(witnesses), 4.2 * (1 + len(witnesses)), 3.1)
    plane, sizes = axes[0, 0], 6 + 44 * np.nan_to_num(witnesses[sized_by])
    for side, (name, colour) in enumerate(SIDES.items()):
        own = group == side
        if not own.any():
            continue
        label = f"{name}: {int(own.sum()):,}"
        look = {"color": colour, "alpha": 0.5, "linewidths": 0}
        plane.scatter(*view[own].T, s=sizes[own], label=label, **look)
        for axis, values in zip(axes[0, 1:], witnesses.values()):
            known = values[own & np.isfinite(values)]
            share = np.full(len(known), 1 / max(1, len(known)))
            if name != "between":
                axis.hist(
                    known, BINS, range=(0, 1), weights=share, color=colour, alpha=0.6, label=name
                )
    plane.set(xlabel="score in the classifier's features", ylabel="component across")
    plane.set_title(f"each sample of the class; size: {sized_by}", fontsize=9)
    plane.legend(frameon=False, fontsize=8)
    for axis, name in zip(axes[0, 1:], witnesses):
        axis.set(xlabel=name, ylabel="share of the group", xlim=(0, 1))
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    _save(figure, target)


def training_curves(target: Target, rows: Sequence[dict[str, str]]) -> None:
    """C-Acc and ASR over the epochs of every training stage, from the rows of metrics.csv."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure, axes = _subplots(1, max(1, len(stages)), 3.2 * max(1, len(stages)), 2.8)
    for axis, stage in zip(axes[0], stages):
        own = [row for row in rows if row["stage"] == stage]
        for key, colour, name in (("c_acc", BLUE, "C-Acc"), ("asr", ACCENT, "ASR")):
            points = [(int(row["epoch"]), float(row[key])) for row in own if row.get(key)]
            marker = "." if len(points) < 3 else None
            axis.plot(
                *zip(*points) if points else ([], []), color=colour, label=name, marker=marker
            )
        axis.set(title=stage, xlabel="epoch", ylim=(-0.02, 1.02))
    axes[0, 0].legend(frameon=False, fontsize=8)
    _save(figure, target)
