"""What DataElixir is told: its keys, and the two rule sets that `preset` chooses between.

This module imports no torch, so that --help and a mistaken key are answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from utils.config import TrainConfig
from utils.old_keys import Alias, RemovedKey

if TYPE_CHECKING:
    from typing_extensions import Self  # part of typing from Python 3.11 on

SAMPLE_FIRST = 64  # images of each class in the first sample of targets first
SAMPLE_ERROR = 0.02  # share of resamples in which the verdict on a class may come out differently
SELECTION_RANK = 0.8  # a chosen image is farther from its original than this share of candidates


@dataclass(frozen=True)
class TargetRule:
    """When a class counts as a target label.

    Attributes:
        two_sided: also flag classes whose discrepancy is unusually *small*, which are merely clean.
        threshold: robust standard deviations from the median that a score must exceed, strictly.
        evidence_prior: share of every class, 0 or more, that is counted as extra samples that did
            not move: a class with hardly any moved sample is drawn towards discrepancy 0, and no
            discrepancy is infinite.
        mad_floor: least median absolute deviation, in nats, that is divided by: where all classes
            agree, small differences are noise.
        inflow_threshold: as `threshold`, for the inflow; None: the inflow flags no class.

    Raises:
        ValueError: `evidence_prior` or `mad_floor` is negative.
    """

    two_sided: bool = False
    threshold: float = 2.0
    evidence_prior: float = 0.05
    mad_floor: float = 0.2
    inflow_threshold: float | None = 4.0

    def __post_init__(self) -> None:
        if self.evidence_prior < 0 or self.mad_floor < 0:
            raise ValueError(f"evidence_prior and mad_floor must be 0 or more: {self}")


PUBLISHED_RULE = TargetRule(
    two_sided=True, evidence_prior=0.0, mad_floor=0.0, inflow_threshold=None
)


@dataclass(frozen=True)
class Rules:
    """How DataElixir decides where the published code and the default differ (docs/method.md).

    Attributes:
        target: when a class counts as a target label.
        extra_noise: add noise up to level T, one more than the network is told, instead of T - 1.
        truncate: cut float images to whole grey levels, which darkens levels 1 to 63 by one,
            instead of rounding them; images that stay are then cut as well.
        ssim_volume: take the SSIM of an image as a volume over rows, columns and channels instead
            of the mean over channels.
        original_eligible: let the original, possibly triggered image be chosen as its own
            purified image.
        pastes: accuse classes by what pasting does, too, and settle samples by cause (ours).
    """

    target: TargetRule = TargetRule()
    extra_noise: bool = False
    truncate: bool = False
    ssim_volume: bool = False
    original_eligible: bool = False
    pastes: bool = True


DEFAULT = Rules()
PUBLISHED = Rules(PUBLISHED_RULE, True, True, True, True, pastes=False)


def _by_preset(**harmless: Any) -> dict[str, RemovedKey]:
    """Switches of earlier versions, each with the value that the default has today."""
    advice = "preset: default or published decides it (docs/method.md)"
    return {key: RemovedKey(advice, (value,)) for key, value in harmless.items()}


@dataclass(frozen=True)
class PurifyConfig:
    """How images are purified.

    Args:
        ddpm: the denoiser: auto (the card for the data set), a card, a diffusers folder, a
            checkpoint file, or a hub id.
        purify_batch_size: images purified at once; changes speed and memory, not results.
        steps_T: noise level each round goes up to, in steps of the 1000-step schedule; auto = the
            highest, in tens, at which the classifier still reads 75 % of a sample as before.
        rounds_n: rounds of forward and reverse diffusion.
        last_steps_m: last states of each round that are kept as intermediaries.
        reverse_steps: reverse steps a round takes, the last_steps_m last ones among them; null =
            all steps_T.
    """

    REMOVED_KEYS: ClassVar[dict[str, Any]] = {
        **_by_preset(noise_index="T-1", quantise="round", sampler="ancestral"),
        "compile": RemovedKey("the denoiser is compiled where that pays"),
    }

    ddpm: str = "auto"
    purify_batch_size: PositiveInt = 256
    steps_T: PositiveInt | Literal["auto"] = 150
    rounds_n: PositiveInt = 5
    last_steps_m: PositiveInt = 10
    reverse_steps: PositiveInt | None = None

    @property
    def rules(self) -> Rules:
        """How images are noised and quantised."""
        return DEFAULT

    @property
    def images_each(self) -> int:
        """The original and its intermediaries: 1 + n m."""
        return 1 + self.rounds_n * self.last_steps_m


@dataclass(frozen=True)
class PurifyingConfig(TrainConfig, PurifyConfig):
    """What any defence is told that purifies and trains."""


@dataclass(frozen=True)
class DataElixirConfig(PurifyingConfig):
    """The defence: purification, decisions, benign model.

    Args:
        preset: default, or published: decide exactly as the published code does with the given
            steps_T, rounds_n, last_steps_m and threshold_tau (every image is purified, with all
            steps, in float32).
        threshold_tau: votes that a second label needs among the intermediaries to count as
            disagreement.
        ft_lr: learning rate of fine-tuning on the settled set.
        ft_epochs: epochs of fine-tuning; null = epochs.
        target_first: purify a sample of each class until the target labels are known, then only the
            classes that they name; false = everything (as published).
        keep_intermediaries: keep the intermediaries' files after the run (157 KB for each anomalous
            32x32 image); otherwise only their votes stay.
    """

    ALIASES: ClassVar[dict[str, Any]] = {
        "conform": Alias("preset", {True: "published", False: "default"})
    }
    REMOVED_KEYS: ClassVar[dict[str, Any]] = {
        **_by_preset(
            outliers="one_sided",
            outlier_threshold=2.0,
            evidence_prior=0.05,
            mad_floor=0.2,
            inflow_threshold=4.0,
            ssim="channel",
            original_eligible=False,
            selection_rank=0.8,
            index0="original",
            relabel_source="raw_then_purified",
        ),
        "sample_first": RemovedKey("the first sample has 64 images of each class", (64,)),
        "sample_error": RemovedKey("the sample grows until 2 % of resamples differ", (0.02,)),
        "end_early": RemovedKey("target_first saves more (docs/tried.md)", (None,)),
    }

    preset: Literal["default", "published"] = "default"
    threshold_tau: PositiveInt = 5
    ft_lr: PositiveFloat = 0.002
    ft_epochs: PositiveInt | None = None
    target_first: bool = True
    keep_intermediaries: bool = False

    @property
    def rules(self) -> Rules:
        """What the preset stands for."""
        return PUBLISHED if self.preset == "published" else DEFAULT

    def resolved(self) -> Self:
        """This config as it runs: published takes every step of every image, in float32."""
        if self.preset == "default":
            return self
        return replace(self, reverse_steps=None, amp=False, target_first=False)

    @property
    def of_fine_tuning(self) -> Self:
        """This config with the epochs and learning rate of the fine-tuning."""
        return replace(self, lr=self.ft_lr, epochs=self.ft_epochs or self.epochs)


# What a YAML file may hold for DataElixir although the defence that reads it is another one.
DATAELIXIR_KEYS = frozenset(
    {field.name for field in fields(DataElixirConfig)}
    | {*DataElixirConfig.ALIASES, *DataElixirConfig.REMOVED_KEYS, *PurifyConfig.REMOVED_KEYS}
)
