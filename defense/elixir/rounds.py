"""A block of samples through all rounds: purified, and read by the victim."""

from dataclasses import dataclass

from torch import Tensor

from defense.elixir.config import DataElixirConfig
from defense.elixir.paste import DRAWS, Paster
from defense.elixir.purifier import Purifier, purifier_for
from defense.elixir.store import Block
from defense.elixir.verdict import Kind, filter_candidates
from diffusion.denoiser import Denoiser
from utils.classifier.networks import Classifier
from utils.classifier.training import predict
from utils.images.data import LabeledImages

IMPOSED = 0.1  # paste rate from which on a sample's images are kept, though its votes agree


@dataclass(frozen=True)
class Rounds:
    """Purifies blocks of samples and has the victim vote on them.

    Attributes:
        data: the training set as received.
        victim: a classifier trained on it, in eval mode.
        purifier: makes the intermediaries.
        tau: votes that a second label needs to count as disagreement.
        paster: takes residuals and pastes them; None under the published preset.
    """

    data: LabeledImages
    victim: Classifier
    purifier: Purifier
    tau: int
    paster: Paster | None = None

    def __call__(self, index: Tensor) -> Block:
        """The votes of the samples `index` (B,), and the images of those that may be changed.

        Those are not unanimous, or what purification took from them imposes their label.
        """
        images = self.purifier.intermediaries(self.data.images[index], index)
        read = predict(self.victim, images.flatten(0, 1), self.purifier.amp)
        votes = read.view(images.shape[:2])
        anomalous = filter_candidates(votes, self.tau).kind != Kind.UNANIMOUS
        passes = self.purifier.passes_per_image + (DRAWS if self.paster else 0)
        taken = self.paster(index) if self.paster else ()
        if taken:
            anomalous |= taken[1] > IMPOSED
        return Block(index, votes, index[anomalous], images[anomalous], passes * len(index), *taken)


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
        config, seed, device = self.config, self.config.random_seed, self.victim.device
        purifier = purifier_for(self.denoiser, config, self.expected, seed, device, config.amp)
        paster = Paster.of(self.data, self.victim, purifier) if config.rules.pastes else None
        return Rounds(self.data, self.victim, purifier, config.threshold_tau, paster)
