"""Target-label detection, after DataElixir (https://arxiv.org/abs/2312.11057).

Samples that were poisoned into class c carry the label c and leave it when they are purified;
benign samples mostly keep theirs. So among the votes of the class's samples that moved, the share
q_c of votes for c is small for a target class. The discrepancy KL(onehot_c || q) = -ln q_c is
compared with the other classes' by the median absolute deviation (1.4826 MAD estimates a standard
deviation under normality). So is, beyond what was published, the share of the other classes that a
class has taken in (inflow.py): where purification harms clean images too, the discrepancies of all
classes are alike, while poison comes from everywhere and drift goes to a few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.elixir.config import TargetRule
from defense.elixir.inflow import Inflow, LabelFlow, inflow_scores
from defense.elixir.outliers import Scores, robust_scores
from defense.elixir.verdict import Candidates, Kind


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
class Discrepancy:
    """The result of target-label detection; all tensors lie on the CPU.

    Attributes:
        metric: float64 (K,), -ln q_c in nats, 0 or more; inf where q_c is 0, 0 for a class without
            evidence.
        score: float64 (K,), robust standard deviations from the median class (absolute values if
            two-sided); 0 for a class without samples, all nan where the median itself is infinite.
        targets: the detected target labels, ascending.
        evidence: int64 (K,), samples of the class that are not unanimous.
        share: float64 (K,), q_c in [0, 1].
        threshold: the metric above which a class is flagged, in nats; inf or nan where the median
            is.
        inflow: the share of the other classes' samples that each class is estimated to have taken
            in.
        inflow_score: float64 (K,), as `score`.
        inflow_limit: the inflow that a class must exceed to be flagged for it (`inflow_scores` says
            what else); inf where none is.
        by_inflow: bool (K,), whether it is flagged for it.
    """

    metric: Tensor
    score: Tensor
    targets: tuple[int, ...]
    evidence: Tensor
    share: Tensor
    threshold: float
    inflow: Inflow
    inflow_score: Tensor
    inflow_limit: float
    by_inflow: Tensor

    @property
    def is_target(self) -> Tensor:
        """bool (K,): whether a class is a detected target label."""
        flags = torch.zeros(len(self.metric), dtype=torch.bool)
        flags[list(self.targets)] = True
        return flags


def label_shares(
    votes: Tensor, candidates: Candidates, labels: Tensor, num_classes: int, evidence_prior: float
) -> LabelShares:
    """The share q_c of label c among the kept votes of class c's non-unanimous samples.

    The original's own vote counts. Votes outside 0..K-1 are left out: there is no class that they
    could support.

    Args:
        votes: int64 (N, 1+nm), predicted labels.
        candidates: the same N samples' candidates.
        labels: int64 (N,), the given labels, 0..K-1.
        num_classes: K.
        evidence_prior: see `TargetRule`.

    Raises:
        ValueError: shapes do not fit, or a label lies outside 0..K-1.
    """
    own, total = support(votes, candidates, labels, num_classes)
    moved = candidates.kind != Kind.UNANIMOUS
    own, total, evidence, size = (
        _per_class(v, labels, num_classes) for v in (own, total, moved, moved | True)
    )
    share = class_share(own, total, size, votes.shape[1], evidence_prior)
    return LabelShares(share, evidence, size)


def support(
    votes: Tensor, candidates: Candidates, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """How many of each sample's kept votes are for its given label, and for any class.

    int64 (N,) each, 0 for unanimous samples.
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


def class_scores(metric: Tensor, present: Tensor, rule: TargetRule) -> Scores:
    """Robust scores of the discrepancies float64 (K,); `present`: see `robust_scores`."""
    return robust_scores(metric, present, rule.threshold, rule.mad_floor, rule.two_sided)


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
    judged = judge(metric, taken, shares.size > 0, rule)
    targets = tuple(judged.outlies.nonzero().flatten().tolist())
    return Discrepancy(
        metric,
        judged.discrepancy.score,
        targets,
        shares.evidence,
        shares.share,
        judged.discrepancy.threshold,
        taken,
        judged.inflow.score,
        judged.inflow.threshold,
        judged.inflow.outlies,
    )


@dataclass(frozen=True)
class Judged:
    """What both measures say of K classes; a class that outlies by either is a target label."""

    discrepancy: Scores
    inflow: Scores

    @property
    def outlies(self) -> Tensor:
        """bool (K,)."""
        return self.discrepancy.outlies | self.inflow.outlies


def judge(metric: Tensor, taken: Inflow, present: Tensor, rule: TargetRule) -> Judged:
    """Scores of discrepancies float64 (K,) and inflows; `present`: see `robust_scores`."""
    return Judged(
        class_scores(metric, present, rule), inflow_scores(taken, present, rule.inflow_threshold)
    )


def discrepancy(share: Tensor) -> Tensor:
    """KL(onehot_c || q) = -ln q_c in nats of shares in [0, 1]."""
    # 0 - x: a share of 1 gives 0 and not -0.
    return 0.0 - share.log()


def _check(votes: Tensor, candidates: Candidates, labels: Tensor, num_classes: int) -> None:
    if (
        votes.shape != candidates.kept.shape
        or labels.shape != candidates.kind.shape
        or len(votes) != len(labels)
    ):
        raise ValueError(
            f"votes {tuple(votes.shape)}, candidates {tuple(candidates.kept.shape)} and labels "
            f"{tuple(labels.shape)} must describe the same samples"
        )
    if ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1}, found {labels.min()}..{labels.max()}"
        )


def _per_class(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """int64 (K,) on the CPU: `values` (N,) summed over the samples of each class."""
    sums = torch.zeros(num_classes, dtype=torch.int64, device=labels.device)
    return sums.index_add_(0, labels, values.long()).cpu()
