"""What was decided about each sample, with a confidence and a reason in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from defense.elixir.verdict import Verdict


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


def confidence(votes_new: Tensor, intermediaries: Tensor) -> Tensor:
    """float64 (N,) in [0, 1]: the share of a sample's intermediaries that the classifier reads as its new label.

    It says how far the purified images agree with the decision; it is no calibrated probability. nan where a sample was
    not purified.

    Args:
        votes_new: int64 (N,), intermediaries read as the new label; -1 where there are none.
        intermediaries: int64 (N,), those that were made of each sample.
    """
    share = votes_new.double() / intermediaries.clamp(min=1)
    return torch.where(votes_new >= 0, share, torch.nan)


def reason(
    verdict: int, is_target: bool, relabelled: bool, moved: bool, old: int, new: int, total: int
) -> str:
    """One sample's decision in words.

    Args:
        verdict: of Verdict.
        is_target: the given label is a detected target label.
        relabelled, moved: the label, the image was changed.
        old, new, total: intermediaries read as the given label, as the new one, and all; old is -1 where it was not purified.
    """
    if old < 0:
        return "kept: its class is no target label; it was not purified"
    if verdict == Verdict.BENIGN:
        return (
            f"kept: {old} of {total} purified images are read as the given label"
            if is_target
            else "kept: its class is no target label"
        )
    if verdict == Verdict.POISONED:
        return (
            f"the given label is a target label, and {new} of {total} purified images are read as the new one"
            if relabelled
            else f"the given label is a target label; the image as given is misread, {new} of {total} purified images confirm the label"
        )
    judged = "reads another label" if relabelled else "confirms the given one"
    return f"the given label is a target label and purified images disagree ({old} of {total} keep it); the benign model {judged}"


def reasons(
    verdict: Tensor,
    is_target: Tensor,
    relabelled: Tensor,
    moved: Tensor,
    old: Tensor,
    new: Tensor,
    total: Tensor,
) -> np.ndarray:
    """`reason` of N samples, each argument a tensor (N,)."""
    columns = (
        column.tolist() for column in (verdict, is_target, relabelled, moved, old, new, total)
    )
    return np.array([reason(*row) for row in zip(*columns)], dtype=str)
