"""Votes to verdicts, after DataElixir (Zhou et al., AAAI 2024), https://arxiv.org/abs/2312.11057

A sample and its nm intermediaries each get the victim's predicted label: 1+nm votes, column 0 being
the original's. Labels that only a few intermediaries hold are purification noise and are dropped.
What stays is one of three kinds. A sample whose given label is no target label is benign whatever
its kind; the victim's mistakes look like label transitions too.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

UNKNOWN = -1  # the vote of an intermediary that was never made


class Verdict(IntEnum):
    """What the defence decides about one sample."""

    BENIGN = 0  # no label transition, or no target label: image and label stay
    POISONED = 1  # the intermediaries agree on another label: take it, and one of them
    SUSPICIOUS = 2  # the intermediaries disagree: the benign model decides
    LEFT_OUT = 3  # of an accused class, and the benign model is not sure (ours)


class Kind(IntEnum):
    """How the kept votes of one sample relate to each other; its given label plays no part."""

    UNANIMOUS = 0  # all are one label, the original's included
    TRANSITION = 1  # the intermediaries agree on a label that is not the original's
    MIXED = 2  # two labels or more have tau votes or more among the intermediaries


@dataclass(frozen=True)
class Candidates:
    """The intermediaries that may stand in for each of N samples.

    Attributes:
        kept: bool (N, 1+nm); column 0, the original, is always True.
        kind: int64 (N,), values of `Kind`.
        top: int64 (N,), the most common label among columns 1..nm of the votes; of equals, the
            first to appear.
    """

    kept: Tensor
    kind: Tensor
    top: Tensor

    def __getitem__(self, rows: Tensor) -> Candidates:
        """Those of the samples that a mask or an index names."""
        return Candidates(self.kept[rows], self.kind[rows], self.top[rows])


def filter_candidates(votes: Tensor, tau: int) -> Candidates:
    """Drop the intermediaries whose label too few others share (DataElixir, threshold tau).

    Where the second most common label among the intermediaries has `tau` votes or more, all are
    kept. Otherwise the original and the intermediaries with the most common label are. A sample
    without any intermediaries is unanimous.

    Args:
        votes: int64 (N, 1+nm), nm >= 1, predicted labels; column 0 is the original's; UNKNOWN
            where none was made.
        tau: votes that a second label needs in order to count as disagreement.

    Raises:
        ValueError: `votes` is not int64 of shape (N, 2 or more).
    """
    if votes.ndim != 2 or votes.shape[1] < 2 or votes.dtype != torch.int64:
        shape = tuple(votes.shape)
        raise ValueError(f"votes must be int64 (N, 1+nm) with nm >= 1, not {votes.dtype} {shape}")
    original, moved = votes[:, :1], votes[:, 1:]
    support = _support(moved)
    # argmax returns the first of equals.
    top = moved.gather(1, support.argmax(dim=1, keepdim=True))
    second = support.masked_fill(moved == top, 0).amax(dim=1, keepdim=True)
    mixed = (second >= tau) & (second > 0)
    kept_moved = (mixed | (moved == top)) & (moved != UNKNOWN)
    kept = torch.cat([torch.ones_like(mixed), kept_moved], dim=1)
    agreed = torch.where(top == original, int(Kind.UNANIMOUS), int(Kind.TRANSITION))
    kind = torch.where(mixed, int(Kind.MIXED), agreed)
    return Candidates(kept, kind.squeeze(1), top.squeeze(1))


def first_verdicts(kind: Tensor, labels: Tensor, is_target_class: Tensor) -> Tensor:
    """Decide each sample before a benign model exists (DataElixir, purification).

    Args:
        kind: int64 (N,), values of `Kind`.
        labels: int64 (N,), the given labels, 0..K-1.
        is_target_class: bool (K,), True for the detected target labels.

    Returns:
        int64 (N,), values of `Verdict`. A transition may lead to the given label itself (the victim
        misread the original); as published, that is POISONED too: its image is replaced.
    """
    if kind.shape != labels.shape or is_target_class.dtype != torch.bool:
        raise ValueError("kind and labels must both be (N,) and is_target_class bool (K,)")
    # By Kind, for target labels.
    table = kind.new_tensor([Verdict.BENIGN, Verdict.POISONED, Verdict.SUSPICIOUS])
    return torch.where(is_target_class.to(labels.device)[labels], table[kind], int(Verdict.BENIGN))


def _support(labels: Tensor) -> Tensor:
    """int64 (N, M): how many entries of a row hold the same label as each of `labels` (N, M).

    0 where that is UNKNOWN.
    """
    support = torch.zeros_like(labels)
    for column in labels.split(1, dim=1):
        support += labels == column
    return support.masked_fill(labels == UNKNOWN, 0)


def share_moved(votes: Tensor, labels: Tensor) -> Tensor:
    """float64 (N,): share of intermediaries that are not read as the given label int64 (N,).

    Of votes int64 (N, 1+nm); 0 where nothing was purified.
    """
    cast = votes[:, 1:] != UNKNOWN
    moved = (cast & (votes[:, 1:] != labels[:, None])).sum(1).double()
    return moved / cast.sum(1).clamp(min=1)


def round_ends(votes: Tensor, last_steps_m: int) -> Tensor:
    """int64 (S, 1+n): of votes (S, 1+nm), those on the original and the image after each round."""
    return torch.cat([votes[:, :1], votes[:, last_steps_m::last_steps_m]], dim=1)


def reads_as_before(votes: Tensor, last_steps_m: int) -> Tensor:
    """bool (S, n): whether the victim reads the image after each round as it read the original."""
    ends = round_ends(votes, last_steps_m)
    return ends[:, 1:] == ends[:, :1]
