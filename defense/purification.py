"""The whole set through the purifier: block by block, target labels first, and no round that decides nothing.

Three things spare passes, each with a switch: a purifier that skips noise levels (purifier.py); purifying a sample of
each class until the target labels are known, and after that only the classes that they name (sampling.py); and ending
the rounds of samples whose verdict is settled (`Ending`).
"""
from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Callable, Optional

import torch
from scipy.stats import beta
from torch import Tensor
from tqdm import tqdm

from defense.purifier import KeyedNoise, Purifier
from defense.sampling import stratified, undecided
from defense.store import Block, IntermediaryStore
from defense.target_label import Discrepancy, TargetRule, target_labels
from defense.verdict import Kind, filter_candidates
from utils.data import LabeledImages
from utils.models import Classifier
from utils.training import predict

log = logging.getLogger("dataelixir")
CONFIDENCE = 0.95   # of the bound on how often an early verdict would still have changed
Rule = Callable[[Tensor, int], Tensor]   # votes so far int64 (B, 1+rm), r -> bool (B,): needs no further round


@dataclass(frozen=True)
class Ending:
    """Which samples need no further round.

    A MIXED sample stays MIXED: votes for a second label are never taken back. A sample whose votes have all been one
    label may still change; after how many rounds it does so rarely enough is measured on samples that were given all.

    Attributes:
        tau: votes that a second label needs to count as disagreement.
        after: kind -> the round after which samples of that kind, with all votes alike, end; kinds that never do are absent.
    """

    tau: int
    after: dict[int, int]

    def __call__(self, votes: Tensor, rounds: int) -> Tensor:
        """bool (B,): whose rounds end, given the votes int64 (B, 1 + r m) of the first r rounds."""
        kind, alike = _kind_so_far(votes, self.tau)
        ended = kind == Kind.MIXED
        for which, first in self.after.items():
            ended |= (kind == which) & alike & (rounds >= first)
        return ended

    @classmethod
    def measured(cls, votes: Tensor, last_steps_m: int, tau: int, doubt: float) -> "Ending":
        """The earliest rounds after which, with 95 % confidence, at most a share `doubt` of the samples would change their kind.

        Args:
            votes: int64 (S, 1 + n m) of samples that were given all rounds.
            last_steps_m: votes of one round.
            tau: see above.
            doubt: 0 ends MIXED samples alone.
        """
        final, after = filter_candidates(votes, tau).kind if len(votes) else votes[:, 0], {}
        for rounds in range((votes.shape[1] - 1) // last_steps_m - 1, 0, -1) if doubt and len(votes) else ():
            kind, alike = _kind_so_far(votes[:, :1 + rounds * last_steps_m], tau)
            for which in (Kind.UNANIMOUS, Kind.TRANSITION):
                changed = final[(kind == which) & alike] != which
                if _upper_bound(int(changed.sum()), len(changed)) <= doubt:
                    after[int(which)] = rounds
        return cls(tau, after)


def _kind_so_far(votes: Tensor, tau: int) -> tuple[Tensor, Tensor]:
    alike = (votes[:, 1:] == votes[:, 1:2]).all(1)
    return filter_candidates(votes, tau).kind, alike


def _upper_bound(hits: int, n: int) -> float:
    """Clopper and Pearson's one-sided bound on a share of which `hits` of n were seen."""
    return 1.0 if hits == n else float(beta.ppf(CONFIDENCE, hits + 1, n - hits))


class Purification:
    """Purifies samples of one data set and has the victim vote on them; what is in the store is not made again.

    Args:
        data: the training set as received.
        victim: a classifier trained on it, in eval mode.
        purifier: makes the intermediaries.
        store: where votes and images of each block go.
        tau: votes that a second label needs to count as disagreement.
        rule: how target labels are found.
        num_classes: K.
    """

    def __init__(self, data: LabeledImages, victim: Classifier, purifier: Purifier, store: IntermediaryStore, tau: int,
                 rule: TargetRule, num_classes: int):
        self.data, self.victim, self.purifier, self.store = data, victim, purifier, store
        self.tau, self.rule, self.num_classes = tau, rule, num_classes

    def run(self, wanted: Tensor, ends: Optional[Ending] = None, name: str = "purify") -> None:
        """Purify those of the data set indices `wanted` (B,) that are not in the store yet."""
        parts = self.store.missing(wanted).split(self.purifier.config.purify_batch_size) if len(wanted) else ()
        for index in tqdm(parts, name, unit="block", leave=False, disable=None):
            if len(index):
                self.store.write(self.block(index, ends))

    @torch.inference_mode()
    def block(self, index: Tensor, ends: Optional[Ending] = None) -> Block:
        """Rounds and votes of the samples `index` (B,); of a sample that ends early, the last round stands for those not made."""
        m, n, images = self.purifier.config.last_steps_m, self.purifier.config.rounds_n, self.data.images[index]
        x, noise, left = self.purifier.start(images), KeyedNoise(index, self.purifier.seed, self.purifier.device), torch.arange(len(index))
        states = self.purifier.original(images).to(x.device)[:, None].repeat(1, 1 + n * m, 1, 1, 1)
        votes, passes = self._read(states[:, 0])[:, None].repeat(1, 1 + n * m), 0
        for r in range(n):
            made, x = self.purifier.one_round(x, noise)
            columns, passes = slice(1 + r * m, None), passes + len(left) * len(self.purifier.steps)
            states[left, columns] = made.repeat(1, n - r, 1, 1, 1)
            votes[left, columns] = self._read(made.flatten(0, 1)).view(len(left), m).repeat(1, n - r)
            going = ~ends(votes[left, :1 + (r + 1) * m], r + 1) if ends else torch.ones_like(left, dtype=torch.bool)
            if r + 1 == n or not going.any():
                break
            if not going.all():
                left, x = left[going], x[going.to(x.device)]
                noise.keep(going)
        anomalous = (filter_candidates(votes, self.tau).kind != Kind.UNANIMOUS).nonzero().flatten()
        return Block(index, votes, index[anomalous], states[anomalous.to(states.device)].cpu(), passes)

    def _read(self, images: Tensor) -> Tensor:
        return predict(self.victim, images, self.purifier.amp)

    def votes(self) -> Tensor:
        """int64 (N, 1+nm); UNKNOWN where a sample was not purified."""
        return self.store.votes(len(self.data))

    def found(self, rows: Tensor) -> Discrepancy:
        """Target labels as far as the samples `rows` (B,), purified before, show them."""
        votes = self.votes()[rows]
        return target_labels(votes, filter_candidates(votes, self.tau), self.data.labels[rows], self.num_classes, self.rule)

    def everything(self, doubt: Optional[float], first: int) -> Discrepancy:
        """Purify every sample; where rounds may end early, `first` samples of each class come first and are given all."""
        everyone, ends = torch.arange(len(self.data)), None
        if doubt is not None:
            sizes = torch.full((self.num_classes,), first if doubt else 0)
            sample = stratified(self.data.labels, sizes, self.purifier.seed)
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
        ending = Ending.measured(votes, self.purifier.config.last_steps_m, self.tau, doubt)
        log.info("rounds end early for MIXED samples%s", "".join(f", {Kind(kind).name} ones after round {r}" for kind, r in ending.after.items()))
        return ending

    def _labelled(self, rows: Tensor, found: Discrepancy) -> Tensor:
        """bool (B,): which of `rows` carry a target label."""
        return found.is_target[self.data.labels[rows]]

    def _sample_until_settled(self, first: int, error: float) -> Tensor:
        labels, seed = self.data.labels, self.purifier.seed
        counts = labels.bincount(minlength=self.num_classes)
        sizes = torch.full_like(counts, first)
        while True:
            rows = stratified(labels, sizes, seed)
            self.run(rows, name="sample")
            votes, found = self.votes()[rows], self.found(rows)
            open_ = undecided(votes, filter_candidates(votes, self.tau), labels[rows], sizes >= counts, found, self.rule, error, seed)
            log.info("sample: %d of %d images purified, target labels %s, undecided classes %s", len(rows), len(labels),
                     list(found.targets) or "none", open_.nonzero().flatten().tolist() or "none")
            if not open_.any():
                return rows
            sizes = torch.where(open_, 2 * sizes, sizes)
