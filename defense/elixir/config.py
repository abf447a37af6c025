"""What DataElixir can be told; imports no torch, so that --help and a mistaken key are answered at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt

from defense.elixir.target_label import PUBLISHED_RULE, TargetRule
from utils.config import Fraction, OpenFraction, TrainConfig


@dataclass(frozen=True)
class PurifyConfig:
    """How images are purified.

    Args:
        ddpm: the denoiser: auto (the card for the data set), a card, a diffusers folder, a checkpoint file, or a hub id.
        purify_batch_size: images purified at once; changes speed and memory, not results.
        steps_T: noise level each round goes up to, in steps of the 1000-step schedule; auto = the highest, in tens, at which the classifier still reads 75 % of a sample as before.
        rounds_n: rounds of forward and reverse diffusion.
        last_steps_m: last states of each round that are kept as intermediaries.
        reverse_steps: reverse steps a round takes, the last_steps_m last ones among them; null = all steps_T.
        sampler: ancestral (as published) or ddim (deterministic).
        noise_index: level of the added noise, T-1 (what the network is told) or T (as published, one more than that).
        quantise: round to the nearest grey level, or truncate (as published, which darkens levels 1..63 by one).
        compile: compile the denoiser: auto (where there is so much to do that it pays), on or off.
    """

    ddpm: str = "auto"
    purify_batch_size: PositiveInt = 256
    steps_T: PositiveInt | Literal["auto"] = 150
    rounds_n: PositiveInt = 5
    last_steps_m: PositiveInt = 10
    reverse_steps: PositiveInt | None = None
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    noise_index: Literal["T-1", "T"] = "T-1"
    quantise: Literal["round", "truncate"] = "round"
    compile: Literal["auto", "on", "off"] = "auto"


PUBLISHED = {
    "noise_index": "T",
    "quantise": "truncate",
    "index0": "requantised",
    "ssim": "volume",
    "outliers": "two_sided",
    "outlier_threshold": PUBLISHED_RULE.threshold,
    "evidence_prior": PUBLISHED_RULE.evidence_prior,
    "mad_floor": PUBLISHED_RULE.mad_floor,
    "inflow_threshold": PUBLISHED_RULE.inflow_threshold,
    "original_eligible": True,
    "selection_rank": 0.8,
    "relabel_source": "raw",
    "sampler": "ancestral",
    "reverse_steps": None,
    "amp": False,
    "compile": "off",
    "target_first": False,
    "end_early": None,
}


@dataclass(frozen=True)
class DataElixirConfig(TrainConfig, PurifyConfig):
    """The defence: purification, decisions, benign model.

    Args:
        threshold_tau: votes that a second label needs among the intermediaries to count as disagreement.
        ft_lr: learning rate of fine-tuning on the settled set.
        ft_epochs: epochs of fine-tuning; null = epochs.
        conform: decide exactly as the published code does with the given steps_T, rounds_n, last_steps_m and threshold_tau; overrides the keys from outliers to end_early, and noise_index, quantise, sampler, reverse_steps, amp, compile.
        outliers: a target label is an outlier on one_sided (more discrepant than the median class) or two_sided (as published; also flags unusually clean classes).
        outlier_threshold: robust standard deviations from the median class beyond which a class is a target label.
        evidence_prior: share of every class counted as extra samples that did not move, so that a class with hardly any moved sample is not flagged (published 0).
        mad_floor: least median absolute deviation in nats that the outlier test divides by (published 0).
        inflow_threshold: robust standard deviations from the median class beyond which the share of other classes' samples that a class has taken in makes it a target label too; null = never (as published).
        ssim: pixel distance by SSIM averaged over each channel, or over the image as a volume (as published under scikit-image 0.24).
        original_eligible: whether the original, possibly triggered image may be chosen as its own purified image (published true).
        selection_rank: the chosen image is farther from the original than this share of its candidates.
        index0: images that stay are kept as original bytes, or requantised like purified ones (as published).
        relabel_source: the benign model settles a doubtful sample by its raw image (as published), by its purified images (most common label), or by these where it reads the raw image as the given label.
        target_first: purify a sample of each class until the target labels are known, then only the classes that they name; else everything (as published).
        sample_first: images of each class in the first sample.
        sample_error: the sample grows while a class's verdict comes out differently in more than this share of bootstrap resamples.
        end_early: once the target labels are known, end a sample's rounds when its verdict cannot change any more (0), or would for at most this share of samples like it, as measured on the first sample; null = never (as published).
        keep_intermediaries: keep the intermediaries' files after the run (157 KB for each anomalous 32x32 image); otherwise only their votes stay.
    """

    threshold_tau: PositiveInt = 5
    ft_lr: PositiveFloat = 0.002
    ft_epochs: PositiveInt | None = None
    conform: bool = False
    outliers: Literal["one_sided", "two_sided"] = "one_sided"
    outlier_threshold: PositiveFloat = 2.0
    evidence_prior: NonNegativeFloat = 0.05
    mad_floor: NonNegativeFloat = 0.2
    inflow_threshold: PositiveFloat | None = 4.0
    ssim: Literal["channel", "volume"] = "channel"
    original_eligible: bool = False
    selection_rank: Fraction = 0.8
    index0: Literal["original", "requantised"] = "original"
    relabel_source: Literal["raw_then_purified", "purified", "raw"] = "raw_then_purified"
    target_first: bool = True
    sample_first: PositiveInt = 64
    sample_error: OpenFraction = 0.02
    end_early: Fraction | None = None
    keep_intermediaries: bool = False

    def resolved(self) -> DataElixirConfig:
        """This config with the published decisions in place where `conform` is set."""
        return replace(self, **PUBLISHED) if self.conform else self

    @property
    def of_fine_tuning(self) -> DataElixirConfig:
        """This config with the epochs and learning rate of the fine-tuning."""
        return replace(self, lr=self.ft_lr, epochs=self.ft_epochs or self.epochs)

    @property
    def target_rule(self) -> TargetRule:
        return TargetRule(
            self.outliers == "two_sided",
            self.outlier_threshold,
            self.evidence_prior,
            self.mad_floor,
            self.inflow_threshold,
        )
