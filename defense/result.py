"""What a defence gives back, whatever its method."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional

import numpy as np
import torch
from torch import Tensor

from defense.target_label import Discrepancy
from utils.data import LabeledImages
from utils.models import Classifier


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
        intermediaries: of each sample, n m; 0 where the method has none.
    """

    verdict: Tensor
    new_labels: Tensor
    is_target: Tensor
    votes_old: Tensor
    votes_new: Tensor
    pixel: Tensor
    feature: Tensor
    column: Tensor
    intermediaries: int = 0

    def table(self, labels: Tensor, last_steps_m: int) -> dict[str, np.ndarray]:
        """Columns of decisions.csv; round counts from 1, step is the noise level left (0 = none), -1 = the original."""
        from defense.evidence import confidence, reasons
        from defense.verdict import Verdict

        moved = self.column > 0
        round_ = torch.where(moved, (self.column - 1) // last_steps_m + 1, -1)
        step = torch.where(moved, last_steps_m - 1 - (self.column - 1) % last_steps_m, -1)
        names = np.array([verdict.name for verdict in Verdict])
        return {"index": np.arange(len(labels)), "given_label": labels.numpy(), "new_label": self.new_labels.numpy(),
                "verdict": names[self.verdict.numpy()], "target_class": self.is_target.int().numpy(),
                "votes_old": self.votes_old.numpy(), "votes_new": self.votes_new.numpy(),
                "pixel_distance": self.pixel.numpy(), "feature_distance": self.feature.numpy(),
                "round": round_.numpy(), "step": step.numpy(), "confidence": confidence(self.votes_new, self.intermediaries).numpy(),
                "reason": reasons(self.verdict, self.is_target, self.new_labels != labels, moved, self.votes_old, self.votes_new, self.intermediaries)}


@dataclass(frozen=True)
class Example:
    """One purified sample for the report: its index and all its intermediaries uint8 (1+nm, 3, H, W)."""

    index: int
    images: Tensor


@dataclass(frozen=True)
class Result:
    """The outcome of a defence.

    Attributes:
        purified: the sanitized training set, N samples.
        decisions: how each sample was treated.
        model: the benign model.
        stage1: the benign model before fine-tuning; None where there was no such stage.
        discrepancy: target-label detection.
        votes: int64 (N, 1+nm), the victim's labels of originals (column 0) and intermediaries.
        unet_passes: denoiser passes spent, over all images.
        examples: a few purified samples, drawn when the report wants them.
    """

    purified: LabeledImages
    decisions: Decisions
    model: Classifier
    stage1: Optional[Classifier]
    discrepancy: Discrepancy
    votes: Tensor
    unet_passes: int
    examples: Callable[[int], list[Example]]
