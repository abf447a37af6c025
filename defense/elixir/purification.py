"""The whole set through the purifier: block by block, target labels first, and no round that decides nothing.

Three things spare passes, each with a switch: a purifier that skips noise levels (purifier.py); purifying a sample of
each class until the target labels are known, and after that only the classes that they name (sampling.py); and ending
the rounds of samples whose verdict is settled (`Ending`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm

from defense.elixir.rounds import Ending, Rounds
from defense.elixir.sampling import stratified, undecided
from defense.elixir.store import Block, IntermediaryStore
from defense.elixir.target_label import Discrepancy, TargetRule, target_labels
from defense.elixir.verdict import Candidates, Kind, filter_candidates
from defense.elixir.workers import split_into_blocks
from utils.cost import format_duration
from utils.images.data import LabeledImages
from utils.late import Tensor, torch

log = logging.getLogger("dataelixir")
Deal = Callable[
    [Sequence[Tensor], Ending | None], Iterable[Block]
]  # index tensors -> their blocks, in this order


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

    def __init__(
        self,
        data: LabeledImages,
        rounds: Rounds,
        store: IntermediaryStore,
        rule: TargetRule,
        num_classes: int,
        deal: Deal | None = None,
        pace: float | None = None,
    ):
        self.data, self.rounds, self.store, self.rule, self.num_classes = (
            data,
            rounds,
            store,
            rule,
            num_classes,
        )
        self.sizes, self.pace = data.labels.bincount(minlength=num_classes), pace
        self.deal = deal or (lambda parts, ends: (rounds(part, ends) for part in parts))

    def run(self, wanted: Tensor, ends: Ending | None = None, name: str = "purify") -> None:
        """Purify those of the data set indices `wanted` (B,) that are not in the store yet."""
        missing = self.store.missing(wanted)
        parts = split_into_blocks(missing, self.rounds.purifier.config.purify_batch_size)
        name += f", about {format_duration(self.pace * len(missing))}" if self.pace else ""
        for block in tqdm(
            self.deal(parts, ends), name, total=len(parts), unit="block", leave=False, disable=None
        ):
            self.store.write(block)

    def votes(self) -> Tensor:
        """int64 (N, 1+nm); UNKNOWN where a sample was not purified."""
        return self.store.votes(len(self.data))

    def found(self, rows: Tensor) -> Discrepancy:
        """Target labels as far as the samples `rows` (B,), purified before, show them."""
        votes, labels = self.votes()[rows], self.data.labels[rows]
        return self._found(votes, filter_candidates(votes, self.rounds.tau), labels)

    def _found(self, votes: Tensor, candidates: Candidates, labels: Tensor) -> Discrepancy:
        return target_labels(votes, candidates, labels, self.num_classes, self.rule, self.sizes)

    def everything(self) -> Discrepancy:
        """Purify every sample, with all rounds."""
        everyone = torch.arange(len(self.data))
        self.run(everyone)
        return self.found(everyone)

    def targets_first(self, first: int, error: float) -> Discrepancy:
        """Purify a sample until the target labels are known, and then every sample that has one.

        Args:
            first: samples of each class in the first sample.
            error: share of resamples in which the verdict on a class may come out differently (`undecided`).
        """
        sizes, found = self._settled(torch.full_like(self.sizes, first), error, "sample")
        while (sizes < self.sizes)[found.is_target].any():
            sizes, found = self._settled(
                torch.where(found.is_target, self.sizes.maximum(sizes), sizes), error, "purify"
            )
        return found

    def ending_early(self, first: int, error: float, doubt: float, others: bool) -> Discrepancy:
        """The same, with all rounds for the sample, which shows the target labels, and for what follows no more than are needed.

        How many that is, is measured apart for the samples with a target label. Among all they are few: on digits an eighth of
        the poisoned ones ended too soon.

        Args:
            doubt: see `Ending.measured`.
            others: purify the samples without a target label as well.
        """
        sizes, found = self._settled(torch.full_like(self.sizes, first), error, "sample")
        rows, accused = self._rows(sizes), found.is_target[self.data.labels]
        for part in (accused, ~accused) if others else (accused,):
            self.run(part.nonzero().flatten(), self.ending(rows[part[rows]], doubt))
        return found

    def _rows(self, sizes: Tensor) -> Tensor:
        return stratified(self.data.labels, sizes, self.rounds.purifier.seed)

    def _settled(self, sizes: Tensor, error: float, name: str) -> tuple[Tensor, Discrepancy]:
        """Purify `sizes` (K,) samples of the classes, and more where the verdicts are undecided: how many in the end, and the verdicts."""
        while True:
            rows = self._rows(sizes)
            self.run(rows, name=name)
            votes, labels = self.votes()[rows], self.data.labels[rows]
            candidates = filter_candidates(votes, self.rounds.tau)
            found = self._found(votes, candidates, labels)
            short = undecided(
                votes,
                candidates,
                labels,
                self.sizes,
                found,
                self.rule,
                error,
                self.rounds.purifier.seed,
            )
            log.info(
                "sample: %d of %d images purified, target labels %s, undecided classes %s",
                len(rows),
                len(self.data),
                list(found.targets) or "none",
                short.nonzero().flatten().tolist() or "none",
            )
            if not short.any():
                return sizes, found
            sizes = torch.where(short, 2 * sizes, sizes)

    def ending(self, rows: Tensor, doubt: float) -> Ending:
        """When rounds end early, measured on the samples `rows`, which were given all."""
        votes = self.votes()[rows] if len(rows) else torch.zeros(0, 2, dtype=torch.int64)
        ending = Ending.measured(
            votes, self.rounds.purifier.config.last_steps_m, self.rounds.tau, doubt
        )
        log.info(
            "rounds end early for MIXED samples%s",
            "".join(
                f", {Kind(kind).name} ones after round {r}" for kind, r in ending.after.items()
            ),
        )
        return ending
