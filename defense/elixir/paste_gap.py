"""Which classes are accused by what pasting does (ours).

What the residuals of a class have in common is its pattern: their mean, from which everything that
belongs to single images has gone. The pattern of a class that holds a trigger makes the victim read
images of other classes as that class; the pattern of a clean class does not. It needs no other
class to compare with, so any number of classes can be accused, and a class that is poisoned through
and through is accused like one that is poisoned in part.

Where few samples of a class are poisoned their pattern drowns in the mean of all. So the class is
also split in two by the victim's features (split.py): the pattern of the upper group is tried, and
the gap between the groups' paste rates is measured, with its standard error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from defense.elixir.split import left_out_scores, logit, upper_group

FEWEST = 20  # samples of a class, below which it cannot be split and is undecided
GROUP = 5  # samples of a group at least
PATTERN_OF = 10  # residuals that a pattern is the mean of, at least
PATTERN = 0.3  # rate that the pattern of an accused class exceeds; clean classes stay below
GAP, ERRORS = 0.3, 3.0  # bound that a gap exceeds by so many standard errors
Obeyed = Callable[[Tensor, int], float]  # pattern (3, H, W), label -> share read as it


@dataclass(frozen=True)
class PasteEvidence:
    """What pasting says of K classes, float64 (K,) each; nan where it was not asked.

    Attributes:
        rate: mean paste rate of the class's samples.
        pattern: how far the victim obeys the class's pattern, or its upper group's.
        gap, error: difference between the groups' paste rates, and its standard error.
    """

    rate: Tensor
    pattern: Tensor
    gap: Tensor
    error: Tensor

    @property
    def sure_gap(self) -> Tensor:
        """float64 (K,): the gap less ERRORS standard errors, which is what its bound is for."""
        return self.gap - ERRORS * self.error

    @property
    def by_pattern(self) -> Tensor:
        """bool (K,): classes whose pattern exceeds its bound."""
        return self.pattern > PATTERN

    @property
    def by_gap(self) -> Tensor:
        """bool (K,): classes whose gap exceeds its bound."""
        return self.sure_gap > GAP

    @property
    def accused(self) -> Tensor:
        """bool (K,): classes that either accuses."""
        return self.by_pattern | self.by_gap

    @property
    def unsure(self) -> Tensor:
        """bool (K,): classes whose gap would accuse them if it had no error."""
        return ~self.accused & (self.gap - self.error > GAP)


def paste_evidence(
    rates: Tensor,
    residuals: Tensor,
    labels: Tensor,
    features: Tensor,
    num_classes: int,
    obeyed: Obeyed,
) -> PasteEvidence:
    """What pasting says of every class of which FEWEST samples or more were pasted.

    Args:
        rates: float (S,), paste rates; nan where there was nothing to paste on.
        residuals: int16 (S, 3, H, W), in levels.
        labels: int64 (S,), given labels.
        features: float (S, D), the victim's, of the images as given.
        num_classes: K.
        obeyed: pastes a pattern.
    """
    found = torch.full((4, num_classes), torch.nan, dtype=torch.float64)
    for k in labels.unique().tolist():
        rows = ((labels == k) & rates.isfinite()).nonzero().flatten()
        if len(rows) < FEWEST:
            continue
        own = rates[rows].double()
        upper = upper_group(left_out_scores(features[rows], logit(own))) > 0.5
        patterns = [residuals[rows].float().mean(0)]
        if int(upper.sum()) >= PATTERN_OF:
            patterns.append(residuals[rows[upper]].float().mean(0))
        obeys = max(obeyed(pattern, k) for pattern in patterns)
        found[:, k] = torch.tensor([own.mean(), obeys, *_gap(own[upper], own[~upper])])
    return PasteEvidence(*found)


def _gap(upper: Tensor, lower: Tensor) -> tuple[float, float]:
    """The groups' difference and its standard error; nan where a group is too small."""
    if min(len(upper), len(lower)) < GROUP:
        return torch.nan, torch.nan
    squares = sum(_error(group).square() for group in (upper, lower))
    return (upper.mean() - lower.mean()).item(), float(squares) ** 0.5


def _error(values: Tensor) -> Tensor:
    """Standard error of a mean; at least that of one sample in so many that differs by a half."""
    n = len(values)
    return (values.var(correction=0) / n + 0.25 / n**2).sqrt()
