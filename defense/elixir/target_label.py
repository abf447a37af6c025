"""Target-label detection, after DataElixir (https://arxiv.org/abs/2312.11057).

Samples that were poisoned into class c carry the label c and leave it when they are purified;
benign samples mostly keep theirs. So among the votes of the class's samples that moved, the share
q_c of votes for c is small for a target class. The discrepancy KL(onehot_c || q) = -ln q_c is
compared with the other classes' by the median absolute deviation; so is, beyond what was published,
the share of the other classes that a class has taken in (inflow.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.elixir.config import TargetRule
from defense.elixir.inflow import FEW, Inflow, LabelFlow, inflow_scores
from defense.elixir.outliers import Scores, robust_scores
from defense.elixir.paste_gap import PasteEvidence
from defense.elixir.verdict import Candidates, Kind

DRIFT = 0.02  # share of the other classes taken in, above which no clean class came


@dataclass(frozen=True)
class LabelShares:
    """How much of each class's moved votes stayed with the class.

    Attributes:
        share: float64 (K,) in [0, 1], q_c; 1 for a class without evidence.
        evidence: int64 (K,), samples of the class that are not unanimous.
        size: int64 (K,), all samples of the class.
    """

    share: Tensor
    evidence: Tensor
    size: Tensor


@dataclass(frozen=True)
class Judged:
    """What both measures say of K classes; a class that outlies by either is a target label."""

    discrepancy: Scores
    inflow: Scores

    @property
    def outlies(self) -> Tensor:
        """bool (K,)."""
        return self.discrepancy.outlies | self.inflow.outlies


@dataclass(frozen=True)
class Discrepancy:
    """The result of target-label detection.

    Attributes:
        metric: float64 (K,), -ln q_c in nats, 0 or more; inf where q_c is 0.
        share, evidence: as in `LabelShares`.
        inflow: what each class has taken in.
        judged: scores and thresholds of metric and inflow; without a limit, the inflow's is inf.
        paste: what pasting says (ours); None where nothing was pasted.
        too_small: bool (K,), classes of too few samples to be split, which are never accused;
            None where nothing was pasted.
    """

    metric: Tensor
    share: Tensor
    evidence: Tensor
    inflow: Inflow
    judged: Judged
    paste: PasteEvidence | None = None
    too_small: Tensor | None = None

    @property
    def is_target(self) -> Tensor:
        """bool (K,): whether a class is a detected target label, by any of the measures.

        Where something was pasted, the votes alone accuse no class (see `unconfirmed`).
        """
        found = self.judged.outlies & ~self.unconfirmed
        found = found if self.paste is None else found | self.paste.accused
        return found if self.too_small is None else found & ~self.too_small

    @property
    def inflow_speaks(self) -> bool:
        """Whether the inflow is asked, and there are classes enough for it to say something."""
        asked = self.judged.inflow.threshold < float("inf")
        return asked and int(self.inflow.seen.sum()) > FEW

    @property
    def unconfirmed(self) -> Tensor:
        """bool (K,): classes that stand out by the votes alone, which is not enough (ours).

        Clean classes that look alike to the classifier drift into one another, so votes are to be
        confirmed: by pasting, at a lower bound than where it accuses by itself, or by an inflow
        larger than any drift that was seen. Votes need no confirmation where nothing was pasted,
        or where there are too few classes for the inflow to speak.
        """
        if self.paste is None or not self.inflow_speaks:
            return torch.zeros_like(self.judged.outlies)
        large = self.judged.inflow.outlies & (self.inflow.share > DRIFT)
        confirmed = self.paste.confirms | large
        return self.judged.outlies & ~confirmed & ~self.paste.accused

    @property
    def targets(self) -> tuple[int, ...]:
        """The detected target labels, ascending."""
        return tuple(self.is_target.nonzero().flatten().tolist())

    @property
    def undecided(self) -> tuple[int, ...]:
        """The classes that have samples, but too few to be judged, ascending."""
        if self.too_small is None:
            return ()
        return tuple((self.too_small & self.inflow.seen).nonzero().flatten().tolist())


def label_shares(
    votes: Tensor, candidates: Candidates, labels: Tensor, num_classes: int, evidence_prior: float
) -> LabelShares:
    """The share q_c of label c among the kept votes of class c's non-unanimous samples.

    The original's own vote counts, votes outside 0..K-1 do not. Arguments and errors as in
    `target_labels`; for `evidence_prior` see `TargetRule`.
    """
    own, total = support(votes, candidates, labels, num_classes)
    moved = candidates.kind != Kind.UNANIMOUS
    zeros = torch.zeros(num_classes, dtype=torch.int64)
    own, total, evidence = (zeros.index_add(0, labels, v.long()) for v in (own, total, moved))
    size = labels.bincount(minlength=num_classes)
    share = class_share(own, total, size, votes.shape[1], evidence_prior)
    return LabelShares(share, evidence, size)


def support(
    votes: Tensor, candidates: Candidates, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """How many of each sample's kept votes are for its given label, and for any class.

    int64 (N,) each, 0 for unanimous samples. Arguments and errors as in `target_labels`.
    """
    _check(votes, candidates, labels, num_classes)
    moved = candidates.kind != Kind.UNANIMOUS
    pool = candidates.kept & moved[:, None] & (votes >= 0) & (votes < num_classes)
    return (pool & (votes == labels[:, None])).sum(1), pool.sum(1)


def class_share(
    own: Tensor, total: Tensor, size: Tensor, width: int, evidence_prior: float
) -> Tensor:
    """q_c in [0, 1], float64 (..., K), drawn towards 1 by the prior; 1 without evidence.

    Args:
        own, total: (..., K), votes for the class and all votes of its moved samples.
        size: (..., K), samples of the class.
        width: 1+nm, votes of one sample.
        evidence_prior: see `TargetRule`.
    """
    prior = evidence_prior * size.double() * width
    return torch.where(total > 0, (own + prior) / (total + prior), 1.0)


def target_labels(
    votes: Tensor,
    candidates: Candidates,
    labels: Tensor,
    num_classes: int,
    rule: TargetRule,
    sizes: Tensor | None = None,
) -> Discrepancy:
    """Find the classes that poisoned samples were labelled as (DataElixir, target-label detection).

    Any number of classes may be flagged, none included; a class without samples never is.

    Args:
        votes: int64 (N, 1+nm), predicted labels, N >= 1.
        candidates: the same N samples' candidates.
        labels: int64 (N,), the given labels, 0..K-1.
        num_classes: K.
        rule: `PUBLISHED_RULE` decides as the published code does, except that a class without any
            non-unanimous sample, where that stops with a division by zero, has metric 0 here.
        sizes: int64 (K,), samples of each class in the whole set, of which the N are a part; None =
            the N are all.

    Raises:
        ValueError: shapes do not fit, a label lies outside 0..K-1, or there are no samples.
    """
    if not len(labels):
        raise ValueError("target labels cannot be detected without samples")
    shares = label_shares(votes, candidates, labels, num_classes, rule.evidence_prior)
    metric = discrepancy(shares.share)
    taken = LabelFlow.of(votes, labels, num_classes).inflow(shares.size if sizes is None else sizes)
    return Discrepancy(metric, shares.share, shares.evidence, taken, judge(metric, taken, rule))


def judge(metric: Tensor, taken: Inflow, rule: TargetRule) -> Judged:
    """Scores of discrepancies float64 (K,) and inflows, among the classes that have samples."""
    by_metric = robust_scores(metric, taken.seen, rule.threshold, rule.mad_floor, rule.two_sided)
    return Judged(by_metric, inflow_scores(taken, rule.inflow_threshold))


def discrepancy(share: Tensor) -> Tensor:
    """KL(onehot_c || q) = -ln q_c in nats of shares in [0, 1]."""
    # 0 - x: a share of 1 gives 0 and not -0.
    return 0.0 - share.log()


def _check(votes: Tensor, candidates: Candidates, labels: Tensor, num_classes: int) -> None:
    seen, kept, given = tuple(votes.shape), tuple(candidates.kept.shape), tuple(labels.shape)
    if seen != kept or given != candidates.kind.shape or len(votes) != len(labels):
        raise ValueError(
            f"votes {seen}, candidates {kept} and labels {given} must describe the same samples"
        )
    if ((labels < 0) | (labels >= num_classes)).any():
        found = f"{labels.min()}..{labels.max()}"
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, found {found}")
