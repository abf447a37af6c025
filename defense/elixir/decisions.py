"""What was decided about each sample, with a confidence and a reason in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from defense.elixir.verdict import Verdict


@dataclass(frozen=True)
class Cause:
    """What was seen of the cause, of N samples; nan where it was not asked.

    Attributes:
        paste_rate: float (N,) in [0, 1], how far the victim obeys what purification took (paste.py).
        carrier: float64 (N,) in [0, 1], probability that the sample carries a trigger (split.py).
        confidence: float64 (N,) in [0, 1], calibrated probability of the new label (settlement.py).
    """

    paste_rate: Tensor
    carrier: Tensor
    confidence: Tensor

    @classmethod
    def unread(cls, paste_rate: Tensor) -> Cause:
        """Of a set in which no class is accused."""
        nobody = torch.full_like(paste_rate, torch.nan, dtype=torch.float64)
        return cls(paste_rate, nobody, nobody)


@dataclass(frozen=True)
class Decisions:
    """One row for each of N samples; what a method does not know is nan or -1.

    Attributes:
        verdict: int64 (N,) of Verdict.
        new_labels: int64 (N,).
        is_target: bool (N,), the given label is a detected target label.
        votes_old, votes_new: int64 (N,), intermediaries read as the given and as the new label; -1
            where a sample was not purified.
        pixel, feature: float64 (N,), distances of the chosen image from the original; nan where the
            original stayed.
        column: int64 (N,), the chosen image among the intermediaries; 0 = the original.
        intermediaries: int64 (N,), how many of each sample the victim read.
        cause: what was seen of the cause; None under the published preset.
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
    cause: Cause | None = None

    def table(self, labels: Tensor, last_steps_m: int) -> dict[str, np.ndarray]:
        """Columns of decisions.csv, given the labels int64 (N,) as received.

        round counts from 1, step is the noise level left (0 = none); -1 stands for the original.
        """
        moved, place = self.column > 0, self.column - 1
        step = last_steps_m - 1 - place % last_steps_m
        told = (self.verdict, self.is_target, self.new_labels != labels)
        counts = (self.votes_old, self.votes_new, self.intermediaries)
        columns = {
            "index": torch.arange(len(labels)),
            "given_label": labels,
            "new_label": self.new_labels,
            "verdict": np.array([verdict.name for verdict in Verdict])[self.verdict.numpy()],
            "target_class": self.is_target.int(),
            "votes_old": self.votes_old,
            "votes_new": self.votes_new,
            "pixel_distance": self.pixel,
            "feature_distance": self.feature,
            "round": torch.where(moved, place // last_steps_m + 1, -1),
            "step": torch.where(moved, step, -1),
            "confidence": confidence(self.votes_new, self.intermediaries),
        }
        in_words: Callable[..., str] = reason
        seen: tuple[Tensor, ...] = (*told, *counts)
        if cause := self.cause:
            in_words = reason_of
            seen = (self.verdict, told[2], cause.carrier, cause.confidence)
        rows = zip(*(column.tolist() for column in seen))
        columns["reason"] = np.array([in_words(*row) for row in rows], dtype=str)
        if cause:
            columns |= {"kept": (self.verdict != Verdict.LEFT_OUT).int(), **vars(cause)}
        return {name: np.asarray(column) for name, column in columns.items()}


@dataclass(frozen=True)
class Example:
    """One purified sample for the report: its index, all its intermediaries (1+nm, 3, H, W)."""

    index: int
    images: Tensor


def confidence(votes_new: Tensor, intermediaries: Tensor) -> Tensor:
    """float64 (N,) in [0, 1]: the share of intermediaries that are read as the new label.

    It says how far the purified images agree with the decision; it is no calibrated probability.
    nan where a sample was not purified. Arguments as in `Decisions`.
    """
    share = votes_new.double() / intermediaries.clamp(min=1)
    return torch.where(votes_new >= 0, share, torch.nan)


def reason(verdict: int, is_target: bool, relabelled: bool, old: int, new: int, total: int) -> str:
    """One sample's decision in words.

    Args:
        verdict, is_target: as in `Decisions`.
        relabelled: the label was changed.
        old, new, total: its `votes_old`, `votes_new` and `intermediaries`.
    """
    images, accused = f"of {total} purified images", "the given label is a target label"
    if old < 0:
        return "kept: its class is no target label; it was not purified"
    if verdict == Verdict.BENIGN and not is_target:
        return "kept: its class is no target label"
    if verdict == Verdict.BENIGN:
        return f"kept: {old} {images} are read as the given label"
    if verdict == Verdict.POISONED and relabelled:
        return f"{accused}, and {new} {images} are read as the new one"
    if verdict == Verdict.POISONED:
        return f"{accused}; the image as given is misread, {new} {images} confirm the label"
    judged = "reads another label" if relabelled else "confirms the given one"
    kept = f"{old} of {total} keep it"
    return f"{accused} and purified images disagree ({kept}); the benign model {judged}"


def reason_of(verdict: int, relabelled: bool, carrier: float, confidence: float) -> str:
    """One sample's decision by its cause in words; arguments as in `Decisions` and `Cause`."""
    if math.isnan(carrier):
        return "kept: its class is not accused"
    seen = f"its class is accused; it carries the trigger with probability {carrier:.2f}"
    read = f"the benign model reads the given image as the {'new' if relabelled else 'given'} label"
    if verdict == Verdict.LEFT_OUT:
        return f"left out: {seen}, and the benign model is not sure of any label ({confidence:.2f})"
    if verdict == Verdict.BENIGN:
        return f"kept: {seen}, and {read} ({confidence:.2f})"
    return f"{seen}, and {read} ({confidence:.2f})"
