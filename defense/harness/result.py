"""What a defence gives back, whatever its method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from defense.elixir.target_label import Discrepancy
from utils.images.data import LabeledImages
from utils.late import Tensor, torch

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier


@dataclass(frozen=True)
class Decisions:
    """One row for each of N samples; what a method does not know is nan or -1.

    Attributes:
        verdict: int64 (N,) of Verdict.
        new_labels: int64 (N,).
        is_target: bool (N,), the given label is a detected target label.
        votes_old, votes_new: int64 (N,), intermediaries read as the given and as the new label; -1 where a sample was not purified.
        pixel, feature: float64 (N,), distances of the chosen image from the original; nan where the original stayed.
        column: int64 (N,), the chosen image among the intermediaries; 0 = the original.
        intermediaries: int64 (N,), how many of each sample the victim read.
    """

    verdict: Tensor
    new_labels: Tensor
    is_target: Tensor
    votes_old: Tensor
    votes_new: Tensor
    pixel: Tensor
    feature: Tensor
    column: Tensor
    intermediaries: Tensor

    def table(self, labels: Tensor, last_steps_m: int) -> dict[str, np.ndarray]:
        """Columns of decisions.csv; round counts from 1, step is the noise level left (0 = none), -1 = the original."""
        from defense.elixir.verdict import Verdict
        from defense.harness.evidence import confidence, reasons

        moved = self.column > 0
        round_ = torch.where(moved, (self.column - 1) // last_steps_m + 1, -1)
        step = torch.where(moved, last_steps_m - 1 - (self.column - 1) % last_steps_m, -1)
        names = np.array([verdict.name for verdict in Verdict])
        return {
            "index": np.arange(len(labels)),
            "given_label": labels.numpy(),
            "new_label": self.new_labels.numpy(),
            "verdict": names[self.verdict.numpy()],
            "target_class": self.is_target.int().numpy(),
            "votes_old": self.votes_old.numpy(),
            "votes_new": self.votes_new.numpy(),
            "pixel_distance": self.pixel.numpy(),
            "feature_distance": self.feature.numpy(),
            "round": round_.numpy(),
            "step": step.numpy(),
            "confidence": confidence(self.votes_new, self.intermediaries).numpy(),
            "reason": reasons(
                self.verdict,
                self.is_target,
                self.new_labels != labels,
                moved,
                self.votes_old,
                self.votes_new,
                self.intermediaries,
            ),
        }


@dataclass(frozen=True)
class Example:
    """One purified sample for the report: its index and all its intermediaries uint8 (1+nm, 3, H, W)."""

    index: int
    images: Tensor


@dataclass(frozen=True)
class Result:
    """The outcome of a defence; None where a method has no such thing.

    Attributes:
        model: the benign model, in eval mode.
        purified: the sanitized training set, N samples in the order received; None where only a model is given.
        keep: bool (N,), the samples of `purified` that are given out; None = all.
        flagged: bool (N,), samples taken for poisoned; None where the method does not judge samples.
        score: float64 (N,), finite, suspicion of each sample: the higher, the more suspicious.
        targets: the classes taken for target labels, ascending.
        decisions: how each sample was treated, where that is more than kept or dropped.
        stage1: the benign model before fine-tuning.
        discrepancy: DataElixir's target-label detection.
        votes: int64 (N, 1+nm), the victim's labels of originals (column 0) and intermediaries.
        power: size of a backdoor -> how often it would have been found, where none was (power.py).
        notes: sentences on what the verdict is worth (doubt.py).
        unet_passes: denoiser passes spent, over all images.
        examples: a few purified samples, drawn when the report wants them.
    """

    model: Classifier
    purified: LabeledImages | None = None
    keep: Tensor | None = None
    flagged: Tensor | None = None
    score: Tensor | None = None
    targets: tuple[int, ...] | None = None
    decisions: Decisions | None = None
    stage1: Classifier | None = None
    discrepancy: Discrepancy | None = None
    votes: Tensor | None = None
    power: dict[str, float] | None = None
    notes: tuple[str, ...] = ()
    unet_passes: int = 0
    examples: Callable[[Tensor], list[Example]] = lambda _: []

    def __post_init__(self):
        for mask in (self.keep, self.flagged):
            assert mask is None or mask.dtype == torch.bool and mask.ndim == 1, mask
        assert (
            self.score is None or self.score.dtype == torch.float64 and self.score.isfinite().all()
        ), self.score

    @property
    def given_out(self) -> Tensor:
        """bool (N,): the samples of `purified` that are in the sanitized set."""
        return (
            torch.ones_like(self.purified.labels, dtype=torch.bool)
            if self.keep is None
            else self.keep
        )

    def table(self, labels: Tensor, last_steps_m: int) -> dict[str, np.ndarray]:
        """Columns of decisions.csv, a row for each of N samples; `labels` are the given ones."""
        if self.decisions:
            return self.decisions.table(labels, last_steps_m)
        columns = {"index": np.arange(len(labels)), "given_label": labels.numpy()}
        if self.purified:
            columns |= {
                "new_label": self.purified.labels.numpy(),
                "kept": self.given_out.int().numpy(),
            }
        if self.flagged is not None:
            columns["flagged"] = self.flagged.int().numpy()
        return columns | ({} if self.score is None else {"suspicion": self.score.numpy()})
