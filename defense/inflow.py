"""How many samples of the other classes a class has taken in, estimated from where its votes go.

A backdoor takes its samples from every class alike, and without the trigger each goes back to where it came from: the
votes that leave the target class reach all classes, in proportion to their sizes. Clean images that purification harms
drift to the few classes that look like them. So the votes that a class loses are set against the size of the class that
gets them, the classes that get most for their size are left out, and what the others get is the estimate: a number
between 0 and the share of poison among the other classes' samples. The discrepancy asks how many of the votes of those
samples that moved stayed; it cannot tell a class that lost a twentieth of its samples from one that lost half.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DRIFT = 1 / 3   # of the classes that a class's votes go to, those left out: where its own images drift


@dataclass(frozen=True)
class Leaving:
    """Those votes of S samples that left their given label.

    Attributes:
        row: int64 (M,), the sample, 0..S-1.
        cell: int64 (M,), given label * K + the label voted for.
        weight: float64 (M,), 1 / votes cast by the sample's intermediaries.
        num_classes: K.
    """

    row: Tensor
    cell: Tensor
    weight: Tensor
    num_classes: int

    @classmethod
    def of(cls, votes: Tensor, labels: Tensor, num_classes: int) -> "Leaving":
        """Of votes int64 (S, 1+nm), given labels int64 (S,), 0..K-1. Votes outside 0..K-1 were not cast; the original's does not count."""
        votes, labels = votes[:, 1:].cpu(), labels.cpu()
        cast = (votes >= 0) & (votes < num_classes)
        row, column = (cast & (votes != labels[:, None])).nonzero(as_tuple=True)
        return cls(row, labels[row] * num_classes + votes[row, column], 1 / cast.sum(1)[row].double(), num_classes)

    def flow(self, counts: Tensor) -> Tensor:
        """float64 (K, K): samples' worth of votes from the given label to another, where sample i is counted counts[i] times, float64 (S,)."""
        cells = torch.zeros(self.num_classes**2, dtype=torch.float64)
        return cells.index_add_(0, self.cell, self.weight * counts[self.row]).view(self.num_classes, -1)


def inflow(flow: Tensor, sizes: Tensor) -> Tensor:
    """The share of the other classes' samples that each class is estimated to have taken in.

    Args:
        flow: float64 (K, K), samples of the whole set that left a class for each other class; the diagonal does not count.
        sizes: int64 (K,), samples of each class.

    Returns:
        float64 (K,), 0 or more; 0 where no other class has samples.
    """
    others = (sizes > 0) & ~torch.eye(len(sizes), dtype=torch.bool)
    rate = torch.where(others, flow / sizes.clamp(min=1), torch.inf)
    order = rate.argsort(dim=1, stable=True)
    kept = torch.arange(len(sizes)) < ((1 - DRIFT) * others.sum(1, keepdim=True)).round().clamp(min=1)
    kept &= others.gather(1, order)
    base = (sizes.expand_as(order).gather(1, order) * kept).sum(1)
    return (flow.gather(1, order) * kept).sum(1) / base.clamp(min=1)
