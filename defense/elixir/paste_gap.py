"""Which classes are accused by what pasting does (ours).

What the residuals of a class have in common is its pattern: their mean, from which everything that
belongs to single images has gone. The pattern of a class that holds a trigger makes the victim read
images of other classes as that class; the pattern of a clean class does not. It needs no other
class to compare with, so any number of classes can be accused, and a class that is poisoned through
and through is accused like one that is poisoned in part.

Where few samples of a class are poisoned their pattern drowns in the mean of all. So the class is
also split in two by the victim's features (split.py): the pattern of the upper group is tried, and
the gap between the groups' paste rates is measured, with its standard error.

A trigger that leads every class to another one (all to all) moves one class in so many to each
label. What it looks like is found from all classes at once: the common pattern is the mean residual
of all samples that the votes move, of whatever label that nothing else accuses (a trigger that one
class explains would push images to classes that look like it). Pasted, it makes images of one class
read as another, as no clean set's does; every class that they come to be read as is accused.

A trigger that works on one class only is not obeyed elsewhere. So of the samples of a class that
the votes lead elsewhere those with the most frequent new label are a pair with it: their pattern is
pasted on images of that label's class alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from defense.elixir.split import left_out_scores, logit, upper_group

FEWEST = 20  # samples of a class, below which it cannot be split and is undecided
GROUP = 5  # samples of a group at least
PATTERN_OF = 10  # residuals that a pattern is the mean of, at least
PATTERN = 0.3  # rate that the pattern of an accused class exceeds; clean classes stay below
GAP, ERRORS = 0.3, 3.0  # bound that a gap exceeds by so many standard errors
TELLS = 0.05  # gap less its errors, from which on paste rates tell the groups of a class apart
CONFIRMS = 0.2  # bound of pattern and gap in a class that the votes accuse
COMMON = 0.2  # rise that the common pattern causes on images of one class; clean sets stay below
PAIR = 0.7  # rate that the pattern of a pair exceeds; that of classes which look alike stays below
STRENGTH = 2.0  # of the common pattern; many samples that the votes move carry nothing
Obeyed = Callable[..., float]  # pattern (3, H, W), label and perhaps source: `Paster.obeyed`
Imposed = Callable[[Tensor], Tensor]  # pattern (3, H, W) -> rises (K, K), as `Paster.imposed`


@dataclass(frozen=True)
class PasteEvidence:
    """What pasting says of K classes.

    Attributes:
        rate: float64 (K,), mean paste rate of the class's samples; nan where it was not asked.
        pattern: float64 (K,), how far the victim obeys the class's pattern, or its upper group's;
            nan as there.
        gap, error: float64 (K,), difference between the groups' paste rates, and its standard
            error; nan as there.
        common: float64 (K,), by how much the common pattern raises the probability of the class on
            images of that other class which obeys it most.
        common_source: int64 (K,), that other class.
        pair: float64 (K,), how far images of the class that most moved samples are led to obey
            their pattern; nan where fewer than GROUP are.
        pair_source: int64 (K,), that class; -1 as there.
        pair_count: int64 (K,), those samples.
        common_pattern: float32 (3, H, W), in levels, at the strength at which it was pasted.
    """

    rate: Tensor
    pattern: Tensor
    gap: Tensor
    error: Tensor
    common: Tensor
    common_source: Tensor
    pair: Tensor
    pair_source: Tensor
    pair_count: Tensor
    common_pattern: Tensor

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
    def by_common(self) -> Tensor:
        """bool (K,): classes that the common pattern leads to."""
        return self.common > COMMON

    @property
    def by_pair(self) -> Tensor:
        """bool (K,): classes that images of one other class come to be read as."""
        return (self.pair > PAIR) & (self.pair_count >= PATTERN_OF)

    @property
    def by_own(self) -> Tensor:
        """bool (K,): classes that pattern or gap accuses: their own residuals."""
        return self.by_pattern | self.by_gap

    @property
    def accused(self) -> Tensor:
        """bool (K,): classes that any of these accuses."""
        return self.by_own | self.by_common | self.by_pair

    @property
    def source(self) -> Tensor:
        """int64 (K,): the class that obeys where not all do; -1 where there is none such."""
        common = self.common_source.where(self.by_common, -1)
        return self.pair_source.where(self.by_pair, common).where(~self.by_own, -1)

    @property
    def confirms(self) -> Tensor:
        """bool (K,): classes that pasting speaks against, if others do so too."""
        return self.accused | (self.sure_gap > CONFIRMS) | (self.pattern > CONFIRMS)

    @property
    def unsure(self) -> Tensor:
        """bool (K,): classes that more samples might accuse, by their gap or their pair."""
        few = (self.pair > PAIR) & (self.pair_count < PATTERN_OF)
        return ~self.accused & (few | (self.gap - self.error > GAP))


def paste_evidence(
    rates: Tensor,
    residuals: Tensor,
    labels: Tensor,
    features: Tensor,
    leads_to: Tensor,
    explained: Tensor,
    obeyed: Obeyed,
    imposed: Imposed,
) -> PasteEvidence:
    """What pasting says of every class of which FEWEST samples or more were pasted.

    Args:
        rates: float (S,), paste rates; nan where there was nothing to paste on.
        residuals: int16 (S, 3, H, W), in levels.
        labels: int64 (S,), given labels.
        features: float (S, D), the victim's, of the images as given.
        leads_to: int64 (S,), the label that a sample's votes lead to; its given one if it stays.
        explained: bool (K,), classes that the votes accuse.
        obeyed, imposed: paste a pattern.
    """
    num_classes = len(explained)
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
    pairs = _pairs(residuals, labels, leads_to, num_classes, obeyed)
    nothing, zeros = torch.zeros(residuals.shape[1:]), torch.zeros(num_classes).double()
    rate, pattern, gap, error = found
    said = PasteEvidence(rate, pattern, gap, error, zeros, zeros.long(), *pairs, nothing)
    moved = (leads_to != labels) & ~(explained | said.by_own)[labels]
    if not moved.any():
        return said
    shared = STRENGTH * residuals[moved].float().mean(0)
    common, source = imposed(shared).max(0)
    return replace(said, common=common, common_source=source, common_pattern=shared)


def _pairs(
    residuals: Tensor, labels: Tensor, leads_to: Tensor, num_classes: int, obeyed: Obeyed
) -> tuple[Tensor, Tensor, Tensor]:
    """`pair`, `pair_source` and `pair_count` of a `PasteEvidence`."""
    obeys = torch.full((num_classes,), torch.nan, dtype=torch.float64)
    source, count = torch.full((2, num_classes), -1)
    for k in range(num_classes):
        to = leads_to[(labels == k) & (leads_to != k)]
        count[k], most = to.bincount(minlength=1).max(0)
        if count[k] >= GROUP:
            source[k] = most
            rows = (labels == k) & (leads_to == most)
            obeys[k] = obeyed(residuals[rows].float().mean(0), k, int(most))
    return obeys, source, count


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
