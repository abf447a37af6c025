"""Trigger: uint8 images in, uint8 images out.

The way to [0, 1], clamping and rounding are written here once, so that every attack is only its formula: a frozen
dataclass whose fields are its config keys, with a `stamp`. Rounding (never truncation) keeps poisoned images free of
the half-a-level darkening by which truncated ones could be told apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from utils.config import TrainConfig
from utils.images.data import Dataset, to_uint8, to_unit
from utils.late import Tensor, no_grad, torch

Split = Literal["train", "test"]
BATCH = 512


@dataclass(frozen=True)
class FitContext:
    """What a trigger may use to prepare itself.

    Attributes:
        dataset: the clean data set; only its training images may shape a trigger.
        target: the attack's class, None for all2all.
        seed: key of every random choice.
        config: how classifiers are trained, and on which device.
    """

    dataset: Dataset
    target: int | None
    seed: int
    config: TrainConfig


@dataclass(frozen=True)
class Trigger:
    """Base of all attacks.

    Class attributes:
        name: the attack's name in configs and records.
        label_mode: "dirty" changes labels to the target, "clean" poisons the target class and leaves labels alone.
        cross_ratio: cover samples per poisoned sample; an attack that has them makes it a config field.
    """

    name: ClassVar[str] = ""
    label_mode: ClassVar[Literal["dirty", "clean"]] = "dirty"
    cross_ratio: ClassVar[float] = 0.0
    fitted: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def prepare(self, context: FitContext) -> Trigger:
        """The trigger ready for use on this data: loads or fits what it needs; most need nothing.

        Raises:
            UserError: a file is missing or does not fit.
        """
        return self

    def with_fitted(self, **tensors: Tensor) -> Trigger:
        """A copy that holds what was prepared (patterns, masks, weights) as `self.fitted[name]`."""
        ready = copy.copy(self)
        object.__setattr__(ready, "fitted", tensors)
        return ready

    def stamp(self, x: Tensor, index: Tensor, split: Split) -> Tensor:
        """Put the trigger on images.

        Args:
            x: (B, 3, H, W) in [0, 1]; not to be modified.
            index: (B,) original data set index of each image, the key of all per-sample randomness.
            split: "train" or "test", for attacks whose strength differs.

        Returns:
            (B, 3, H, W), any range; `apply` clamps and rounds.
        """
        raise NotImplementedError

    def stamp_cover(self, x: Tensor, index: Tensor) -> Tensor:
        """Put on training images what cover samples, which keep their labels, carry: the trigger, unless overridden."""
        return self.stamp(x, index, "train")

    def apply(self, images: Tensor, index: Tensor, split: Split = "train") -> Tensor:
        """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W) with the trigger; the input is left as it is."""
        return _rounded(lambda x, i: self.stamp(x, i, split), images, index)

    def apply_cover(self, images: Tensor, index: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W) as cover samples; the input is left as it is."""
        return _rounded(self.stamp_cover, images, index)


@no_grad
def _rounded(stamp: Callable[[Tensor, Tensor], Tensor], images: Tensor, index: Tensor) -> Tensor:
    if not len(images):
        return images.clone()
    return torch.cat(
        [to_uint8(stamp(to_unit(x), i)) for x, i in zip(images.split(BATCH), index.split(BATCH))]
    )
