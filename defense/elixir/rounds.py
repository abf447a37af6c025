"""A block of samples through all rounds: purified, read by the victim, and let go as soon as its verdicts are settled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from defense.elixir.purifier import KeyedNoise, Purifier, purifier_for
from defense.elixir.store import Block
from defense.elixir.verdict import UNKNOWN, Kind, filter_candidates
from utils.classifier.training import predict
from utils.images.data import LabeledImages
from utils.late import Tensor, inference_mode, torch

if TYPE_CHECKING:
    from defense.elixir.config import DataElixirConfig
    from diffusion.denoiser import Denoiser
    from utils.classifier.networks import Classifier

CONFIDENCE = 0.95  # of the bound on how often an early verdict would still have changed


@dataclass(frozen=True)
class Ending:
    """Which samples need no further round.

    A MIXED sample stays MIXED: votes for a second label are never taken back. A sample whose votes have all been one
    label may still change; after how many rounds it does so rarely enough is measured on samples that were given all.
    What a class is must be decided on such samples too: the rounds that are left out would have voted.

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
    def measured(cls, votes: Tensor, last_steps_m: int, tau: int, doubt: float) -> Ending:
        """The earliest rounds after which, with 95 % confidence, at most a share `doubt` of the samples would change their kind.

        Args:
            votes: int64 (S, 1 + n m) of samples that were given all rounds.
            last_steps_m: votes of one round.
            tau: see above.
            doubt: 0 ends MIXED samples alone.
        """
        final, after = filter_candidates(votes, tau).kind if len(votes) else votes[:, 0], {}
        for rounds in (
            range((votes.shape[1] - 1) // last_steps_m - 1, 0, -1) if doubt and len(votes) else ()
        ):
            kind, alike = _kind_so_far(votes[:, : 1 + rounds * last_steps_m], tau)
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
    from scipy.stats import beta  # half a second that --help need not wait for

    return 1.0 if hits == n else float(beta.ppf(CONFIDENCE, hits + 1, n - hits))


class Rounds:
    """Purifies blocks of samples and has the victim vote on them.

    Args:
        data: the training set as received.
        victim: a classifier trained on it, in eval mode.
        purifier: makes the intermediaries.
        tau: votes that a second label needs to count as disagreement.
    """

    def __init__(self, data: LabeledImages, victim: Classifier, purifier: Purifier, tau: int):
        self.data, self.victim, self.purifier, self.tau = data, victim, purifier, tau

    @inference_mode
    def __call__(self, index: Tensor, ends: Ending | None = None) -> Block:
        """Rounds and votes of the samples `index` (B,); votes of rounds that a sample was not given are UNKNOWN, its last image stands in for theirs."""
        m, n, images = (
            self.purifier.config.last_steps_m,
            self.purifier.config.rounds_n,
            self.data.images[index],
        )
        x, noise, left = (
            self.purifier.start(images),
            KeyedNoise(index, self.purifier.seed, self.purifier.device),
            torch.arange(len(index)),
        )
        states = self.purifier.original(images).to(x.device)[:, None].repeat(1, 1 + n * m, 1, 1, 1)
        votes, passes = torch.full((len(index), 1 + n * m), UNKNOWN), 0
        votes[:, 0] = self._read(states[:, 0])
        for r in range(n):
            made, x = self.purifier.one_round(x, noise)
            passes += len(left) * len(self.purifier.steps)
            states[left, 1 + r * m :] = made.repeat(1, n - r, 1, 1, 1)
            votes[left, 1 + r * m : 1 + (r + 1) * m] = self._read(made.flatten(0, 1)).view(
                len(left), m
            )
            going = (
                ~ends(votes[left, : 1 + (r + 1) * m], r + 1)
                if ends
                else torch.ones_like(left, dtype=torch.bool)
            )
            if r + 1 == n or not going.any():
                break
            if not going.all():
                left, x = left[going], x[going.to(x.device)]
                noise.keep(going)
        anomalous = (filter_candidates(votes, self.tau).kind != Kind.UNANIMOUS).nonzero().flatten()
        return Block(
            index, votes, index[anomalous], states[anomalous.to(states.device)].cpu(), passes
        )

    def _read(self, images: Tensor) -> Tensor:
        return predict(self.victim, images, self.purifier.amp)


@dataclass(frozen=True)
class PurificationPlan:
    """What every process of a run needs to make blocks.

    Attributes:
        config: keys of DataElixir, steps_T a number.
        expected: about how many images will be purified.
    """

    data: LabeledImages
    victim: Classifier
    denoiser: Denoiser
    config: DataElixirConfig
    expected: int

    def prepared(self) -> Rounds:
        """Networks on this process's device, compiled where that pays."""
        config, device = self.config, self.victim.device
        purifier = purifier_for(
            self.denoiser, config, self.expected, config.random_seed, device, config.amp
        )
        return Rounds(self.data, self.victim, purifier, config.threshold_tau)
