"""The pictures of a record, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.late import Tensor
from utils.storage.record import replacing

ACCENT, MUTED = "#c0392b", "#7f8c8d"


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _subplots(rows: int, columns: int, size: tuple[float, float]):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a class may be called $\\frac{
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, squeeze=False)


def image_grid(
    path: Path, rows: Sequence[tuple[str, Sequence[Tensor]]], columns: Sequence[str]
) -> None:
    """A sheet of uint8 images (3, H, W): one named row per entry, one captioned column per image."""
    figure, axes = _subplots(
        len(rows), len(columns), (1.1 * len(columns) + 1.2, 1.25 * len(rows) + 0.4)
    )
    for line, (name, images) in zip(axes, rows):
        for cell, image in zip(line, images):
            cell.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        for cell in line:
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for cell, caption in zip(axes[0], columns):
        cell.set_title(caption, fontsize=7)
    _save(figure, path)


def trigger_sheet(path: Path, clean: Tensor, triggered: Tensor, captions: Sequence[str]) -> None:
    """Clean and triggered images uint8 (B, 3, H, W), and what differs around mid-grey, amplified by the printed factor.

    The factor brings the changed pixels' 95th percentile to full contrast, so that a few strong pixels (a patch) do not
    hide a faint pattern on the others; stronger ones are cut off.
    """
    difference = triggered.int() - clean.int()
    changed = difference.abs()[difference != 0].double()
    factor = max(1, round(127 / changed.quantile(0.95).item())) if len(changed) else 1
    residual = (difference * factor + 128).clamp(0, 255).byte()
    image_grid(
        path,
        [("clean", clean), ("triggered", triggered), (f"residual x{factor}", residual)],
        captions,
    )


def target_label_chart(
    path: Path,
    measures: dict[str, tuple[np.ndarray, float]],
    flagged: Sequence[int],
    classes: Sequence[str],
) -> None:
    """What target labels were found by, {name: (values of every class, threshold)}, as bars, flagged ones coloured, thresholds as lines."""
    figure, axes = _subplots(
        len(measures), 1, (max(5, 0.28 * len(classes) + 2), 2.8 * len(measures) + 0.4)
    )
    for axis, (name, (values, threshold)) in zip(axes[:, 0], measures.items()):
        finite = values[np.isfinite(values)]
        top = (finite.max() if len(finite) else 1.0) * 1.1 + 1e-3
        axis.bar(
            range(len(values)),
            np.where(np.isfinite(values), values, top),
            color=[ACCENT if k in flagged else MUTED for k in range(len(values))],
        )
        if np.isfinite(threshold):
            axis.axhline(
                threshold,
                color="black",
                linewidth=1,
                linestyle="--",
                label=f"threshold {threshold:.3g}",
            )
            axis.legend(frameon=False, fontsize=8)
        axis.set_xticks(
            range(len(values)), classes, rotation=90 if len(values) > 12 else 0, fontsize=7
        )
        axis.set(ylabel=name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set(
        title="Target labels: " + (", ".join(classes[k] for k in flagged) or "none found")
    )
    axes[-1, 0].set(xlabel="class")
    _save(figure, path)


def suspicion_chart(path: Path, score: np.ndarray, poison: np.ndarray, flagged: np.ndarray) -> None:
    """How the suspicion (N,) of poisoned and of other samples is distributed, by rank, and how many of each were flagged."""
    figure, axes = _subplots(1, 1, (5, 3.2))
    axis, rank = (
        axes[0, 0],
        score.argsort(kind="stable").argsort(kind="stable") / max(1, len(score) - 1),
    )
    for mask, colour, name in ((~poison, MUTED, "other"), (poison, ACCENT, "poisoned")):
        label = f"{name}: {int((flagged & mask).sum())} of {int(mask.sum())} flagged"
        axis.hist(
            rank[mask], np.linspace(0, 1, 41), color=colour, alpha=0.7, density=True, label=label
        )
    axis.set(xlabel="rank by suspicion (1 = most suspicious)", ylabel="density")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def training_curves(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """C-Acc and ASR over the epochs of every training stage, side by side."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure, axes = _subplots(1, max(1, len(stages)), (3.2 * max(1, len(stages)), 2.8))
    for axis, stage in zip(axes[0], stages):
        own = [row for row in rows if row["stage"] == stage]
        for key, colour, name in (("c_acc", "#2c6fbb", "C-Acc"), ("asr", ACCENT, "ASR")):
            points = [(int(row["epoch"]), float(row[key])) for row in own if row[key]]
            axis.plot(
                *zip(*points) if points else ([], []),
                color=colour,
                label=name,
                marker="." if len(points) < 3 else None,
            )
        axis.set(title=stage, xlabel="epoch", ylim=(-0.02, 1.02))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    _save(figure, path)
