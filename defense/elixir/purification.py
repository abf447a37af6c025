"""A set through the purifier, block by block.

As published, every sample is purified. Only samples that carry a target label are ever changed,
though, so by default (ours) a sample of each class is purified until the target labels are known
(sampling.py), and after that only the classes that they name.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from defense.elixir.config import SAMPLE_ERROR, SAMPLE_FIRST, DataElixirConfig, TargetRule
from defense.elixir.forecast import announced_pace
from defense.elixir.noise_level import settled_level, warn_if_noise
from defense.elixir.paste_gap import FEWEST, TELLS, Obeyed, paste_evidence
from defense.elixir.purifier import open_denoiser
from defense.elixir.rounds import PurificationPlan, Rounds
from defense.elixir.sampling import expected_images, smallest, stratified, undecided
from defense.elixir.split import Groups, across, likeness, logit, split_in_two, trusted_half
from defense.elixir.store import Block, IntermediaryStore
from defense.elixir.target_label import Discrepancy, target_labels
from defense.elixir.verdict import UNKNOWN, Candidates, Kind, filter_candidates
from defense.elixir.workers import split_into_blocks, workers_for
from utils.classifier.networks import Classifier
from utils.classifier.training import extract_features
from utils.cost import format_duration
from utils.images.data import Dataset, LabeledImages
from utils.storage.record import Record
from utils.words import listed

log = logging.getLogger("dataelixir")
Deal = Callable[[Sequence[Tensor]], Iterable[Block]]  # index tensors -> their blocks, in this order


@dataclass
class Purification:
    """Purifies samples of a data set; what is in the store is not made again.

    Attributes:
        data: the training set as received.
        rounds: how a block is made.
        store: where votes and images of each block go.
        rule: how target labels are found.
        num_classes: K.
        deal: who makes the blocks; by default this process, one after the other.
        pace: seconds that an image takes, as far as known, for the progress bar.
        classes: names of the classes; empty to call them by their numbers.
        tell: told how many images of how many are purified.
    """

    data: LabeledImages
    rounds: Rounds
    store: IntermediaryStore
    rule: TargetRule
    num_classes: int
    deal: Deal | None = None
    pace: float | None = None
    classes: Sequence[str] = ()
    tell: Callable[[int, int], None] = lambda done, of: None

    @property
    def sizes(self) -> Tensor:
        """int64 (K,), samples of each class."""
        return self.data.labels.bincount(minlength=self.num_classes)

    @property
    def level(self) -> int:
        """The noise level T that images are purified at."""
        return self.rounds.purifier.steps[0] + 1

    def run(self, wanted: Tensor, name: str = "purify") -> None:
        """Purify those of the data set indices `wanted` (B,) that are not in the store yet."""
        missing = self.store.missing(wanted)
        parts = split_into_blocks(missing, self.rounds.purifier.config.purify_batch_size)
        name += f", about {format_duration(self.pace * len(missing))}" if self.pace else ""
        blocks = self.deal(parts) if self.deal else map(self.rounds, parts)
        done = len(wanted) - len(missing)
        for block in tqdm(blocks, name, len(parts), unit="block", leave=False, disable=None):
            self.store.write(block)
            done += len(block.index)
            self.tell(done, len(wanted))

    def votes(self) -> Tensor:
        """int64 (N, 1+nm), the victim's labels; UNKNOWN where a sample was not purified."""
        return self.store.votes(len(self.data))

    def target_labels(self, votes: Tensor, candidates: Candidates) -> Discrepancy:
        """Target labels as far as the samples that were purified show them; see `votes`."""
        seen = (votes[:, 0] != UNKNOWN).nonzero().flatten()
        return self._verdicts(seen, votes[seen], candidates[seen])

    def _verdicts(self, rows: Tensor, votes: Tensor, candidates: Candidates) -> Discrepancy:
        """What the samples `rows` (S,), whose votes and candidates these are, say of all classes."""
        k, sizes, labels = self.num_classes, self.sizes, self.data.labels[rows]
        found = target_labels(votes, candidates, labels, k, self.rule, sizes)
        if self.rounds.paster is None:
            return found
        rates, residuals = self.store.pasted(len(self.data))[rows], self.store.residuals(rows)[1]
        features = self.features[rows]
        leads_to = candidates.top.where(candidates.kind != Kind.UNANIMOUS, labels)
        explained, paster = found.judged.outlies, self.rounds.paster
        asked = explained, paster.obeyed, paster.imposed
        said = paste_evidence(rates, residuals, labels, features, leads_to, *asked)
        return replace(found, paste=said, too_small=sizes < FEWEST)

    def _named(self, classes: Tensor) -> str:
        """The classes of a mask bool (K,), by name."""
        names = self.classes or [str(k) for k in range(self.num_classes)]
        return listed([names[k] for k in classes.nonzero().flatten().tolist()])

    def groups(self, votes: Tensor, found: Discrepancy) -> Groups:
        """The samples of every target label in two: clean, and carriers of a trigger.

        A witness teaches the split, seen in the victim's features and in the residuals themselves:
        the paste rate wherever it tells the groups apart; else, of a class that the common pattern
        accuses, how like that a residual is. Otherwise the votes do, seen in the features alone.
        """
        n, rates = len(self.data), self.store.pasted(len(self.data))
        carrier, trusted = torch.full((n,), torch.nan, dtype=torch.float64), torch.ones(n) > 0
        view = torch.full((n, 2), torch.nan, dtype=torch.float64)
        said = found.paste
        assert said
        for k in found.targets:
            rows = (self.data.labels == k).nonzero().flatten()
            residuals = self.store.residuals(rows)[1].float()
            views = [self.features[rows], residuals]
            if said.by_own[k] or said.sure_gap[k] > TELLS:
                witness = logit(rates[rows].nan_to_num(0.5))
            elif said.by_common[k]:
                witness = likeness(residuals, said.common_pattern)
            else:
                views, witness = views[:1], (votes[rows, 1:] != k).double().mean(1)
            scores, carrier[rows] = split_in_two(views, witness)
            trusted[rows] = trusted_half(carrier[rows], scores)
            view[rows] = torch.stack([scores, across(views[0], witness)], 1)
        return Groups(carrier, trusted, view)

    def obedience(self, found: Discrepancy) -> Obeyed:
        """How far the victim obeys a pattern as an accused label (`Paster.obeyed`).

        Where not all classes obey, on images of one that does.
        """
        assert found.paste
        assert self.rounds.paster
        ask, source = self.rounds.paster.obeyed, found.paste.source.tolist()
        return lambda pattern, k: ask(pattern, k, source[k] if source[k] >= 0 else None)

    @cached_property
    def features(self) -> Tensor:
        """float32 (N, D), the victim's, of the images as received."""
        return extract_features(self.rounds.victim, self.data.images)

    def everything(self) -> None:
        """Purify every sample, as published."""
        self.run(torch.arange(len(self.data)))

    def targets_first(self, first: int, error: float = SAMPLE_ERROR) -> None:
        """Purify a sample until the target labels are known, then every sample that has one.

        Args:
            first: samples of each class in the first sample.
            error: share of resamples in which the verdict on a class may come out differently.
        """
        sizes, found = self._settled(torch.full_like(self.sizes, first), error, "sample")
        while (sizes < self.sizes)[found.is_target].any():
            wanted = torch.where(found.is_target, self.sizes.maximum(sizes), sizes)
            sizes, found = self._settled(wanted, error, "purify")

    def _settled(self, sizes: Tensor, error: float, name: str) -> tuple[Tensor, Discrepancy]:
        """Purify `sizes` (K,) samples of the classes, and more where the verdicts are undecided.

        Returns how many there are in the end, and the target labels.
        """
        seed = self.rounds.purifier.seed
        while True:
            rows = stratified(self.data.labels, sizes, seed)
            self.run(rows, name)
            votes, labels = self.votes()[rows], self.data.labels[rows]
            candidates = filter_candidates(votes, self.rounds.tau)
            found = self._verdicts(rows, votes, candidates)
            purified = votes, candidates, labels, self.sizes
            short = undecided(*purified, found, self.rule, error, seed)
            if found.paste:
                short |= found.paste.unsure & (sizes < self.sizes)
            log.info(
                f"sample: {len(rows)} of {len(self.data)} images purified, "
                f"target labels: {self._named(found.is_target)}; "
                f"undecided classes: {self._named(short)}"
            )
            if not short.any():
                return sizes, found
            sizes = torch.where(short, 2 * sizes, sizes)


def purify(
    data: LabeledImages,
    victim: Classifier,
    config: DataElixirConfig,
    dataset: Dataset,
    record: Record,
) -> Purification:
    """Intermediaries and votes of as many samples as the decisions need, kept in the record.

    Args:
        data: the training set as received.
        victim: a classifier trained on it, in eval mode.
        config: keys of DataElixir, resolved.
        dataset: its name finds the denoiser; its images are not looked at.
        record: holds the blocks, so that an interrupted purification goes on.

    Raises:
        UserError: no such denoiser, or one that cannot serve these images or this noise level.
    """
    n, m, tau = config.rounds_n, config.last_steps_m, config.threshold_tau
    if n * m // 2 < tau:
        log.warning(
            f"threshold_tau: of {n} x {m} intermediaries no two labels can have {tau} votes each, "
            f"so no sample will be SUSPICIOUS; take at most {max(1, n * m // 2)}"
        )
    denoiser = open_denoiser(config, data.images.shape[-1], dataset.name).to(victim.device)
    store, unfinished = IntermediaryStore(record / "purify"), "purify" not in record.finished()
    level = settled_level(config, denoiser, data, victim, dataset.num_classes, store.folder)
    if unfinished:
        warn_if_noise(denoiser, data.images, level, config.random_seed, victim.device)
    least, expected = smallest(data.labels, config), expected_images(data.labels, config)
    at_level = replace(config, steps_T=level)
    with workers_for(PurificationPlan(data, victim, denoiser, at_level, expected)) as workers:
        pace = announced_pace(workers.work, least) if unfinished else None
        rule, k = config.rules.target, dataset.num_classes
        deal, names = workers.blocks, dataset.classes
        tell = lambda done, of: record.advance(done, max(of, expected))
        purification = Purification(data, workers.work, store, rule, k, deal, pace, names, tell)
        if config.target_first:
            purification.targets_first(SAMPLE_FIRST, SAMPLE_ERROR)
        else:
            purification.everything()
    return purification
