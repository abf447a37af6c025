"""The whole set through the purifier: block by block, target labels first, and no round that decides nothing.

Three things spare passes, each with a switch: a purifier that skips noise levels (purifier.py); purifying a sample of
each class until the target labels are known, and after that only the classes that they name (sampling.py); and ending
the rounds of samples whose verdict is settled (`Ending`).
"""
from __future__ import annotations

import logging
from typing import Callable, Iterable, Optional, Sequence

from tqdm import tqdm

from defense.crew import shares
from defense.rounds import Ending, Rounds
from defense.sampling import stratified, undecided
from defense.store import Block, IntermediaryStore
from defense.target_label import Discrepancy, TargetRule, target_labels
from defense.verdict import Kind, filter_candidates
from utils.cost import clock
from utils.data import LabeledImages
from utils.late import Tensor, torch

log = logging.getLogger("dataelixir")
Deal = Callable[[Sequence[Tensor], Optional[Ending]], Iterable[Block]]   # index tensors -> their blocks, in this order


class Purification:
    """Purifies as many samples of a data set as its verdicts need; what is in the store is not made again.

    Args:
        data: the training set as received.
        rounds: how a block is made.
        store: where votes and images of each block go.
        rule: how target labels are found.
        num_classes: K.
        deal: who makes the blocks; by default this process, one after the other.
        pace: seconds that an image takes, as far as known, for the progress bar.
    """

    def __init__(self, data: LabeledImages, rounds: Rounds, store: IntermediaryStore, rule: TargetRule, num_classes: int,
                 deal: Optional[Deal] = None, pace: Optional[float] = None):
        self.data, self.rounds, self.store, self.rule, self.num_classes = data, rounds, store, rule, num_classes
        self.sizes, self.pace = data.labels.bincount(minlength=num_classes), pace
        self.deal = deal or (lambda parts, ends: (rounds(part, ends) for part in parts))

    def run(self, wanted: Tensor, ends: Optional[Ending] = None, name: str = "purify") -> None:
        """Purify those of the data set indices `wanted` (B,) that are not in the store yet."""
        missing = self.store.missing(wanted)
        parts = shares(missing, self.rounds.purifier.config.purify_batch_size)
        name += f", about {clock(self.pace * len(missing))}" if self.pace else ""
        for block in tqdm(self.deal(parts, ends), name, total=len(parts), unit="block", leave=False, disable=None):
            self.store.write(block)

    def votes(self) -> Tensor:
        """int64 (N, 1+nm); UNKNOWN where a sample was not purified."""
        return self.store.votes(len(self.data))

    def found(self, rows: Tensor) -> Discrepancy:
        """Target labels as far as the samples `rows` (B,), purified before, show them."""
        return self._found(self.votes()[rows], self.data.labels[rows])

    def _found(self, votes: Tensor, labels: Tensor) -> Discrepancy:
        return target_labels(votes, filter_candidates(votes, self.rounds.tau), labels, self.num_classes, self.rule, self.sizes)

    def everything(self, doubt: Optional[float], first: int) -> Discrepancy:
        """Purify every sample; where rounds may end early, `first` samples of each class come first and are given all."""
        everyone, ends = torch.arange(len(self.data)), None
        if doubt is not None:
            sizes = torch.full((self.num_classes,), first if doubt else 0)
            sample = stratified(self.data.labels, sizes, self.rounds.purifier.seed)
            self.run(sample, name="sample")
            ends = self.ending(sample, doubt)
        self.run(everyone, ends)
        return self.found(everyone)

    def targets_first(self, doubt: Optional[float], first: int, error: float) -> Discrepancy:
        """Purify a sample until the target labels are known, and then every sample that has one."""
        rows = self._sample_until_settled(first, error)
        found = self.found(rows)
        ends = None if doubt is None else self.ending(rows[self._labelled(rows, found)], doubt)
        while True:
            everyone = torch.arange(len(self.data))
            more = torch.cat([rows, everyone[self._labelled(everyone, found)]]).unique()
            self.run(more, ends)
            if len(more) == len(rows):
                return found
            rows, found = more, self.found(more)

    def ending(self, rows: Tensor, doubt: float) -> Ending:
        """When rounds end early, measured on the samples `rows`, which were given all."""
        votes = self.votes()[rows] if len(rows) else torch.zeros(0, 2, dtype=torch.int64)
        ending = Ending.measured(votes, self.rounds.purifier.config.last_steps_m, self.rounds.tau, doubt)
        log.info("rounds end early for MIXED samples%s", "".join(f", {Kind(kind).name} ones after round {r}" for kind, r in ending.after.items()))
        return ending

    def _labelled(self, rows: Tensor, found: Discrepancy) -> Tensor:
        """bool (B,): which of `rows` carry a target label."""
        return found.is_target[self.data.labels[rows]]

    def _sample_until_settled(self, first: int, error: float) -> Tensor:
        labels, seed = self.data.labels, self.rounds.purifier.seed
        sizes = torch.full_like(self.sizes, first)
        while True:
            rows = stratified(labels, sizes, seed)
            self.run(rows, name="sample")
            votes = self.votes()[rows]
            found = self._found(votes, labels[rows])
            open_ = undecided(votes, filter_candidates(votes, self.rounds.tau), labels[rows], self.sizes, sizes >= self.sizes, found, self.rule, error, seed)
            log.info("sample: %d of %d images purified, target labels %s, undecided classes %s", len(rows), len(labels),
                     list(found.targets) or "none", open_.nonzero().flatten().tolist() or "none")
            if not open_.any():
                return rows
            sizes = torch.where(open_, 2 * sizes, sizes)
