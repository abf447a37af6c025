"""Trigger: uint8 images in, uint8 images out.

Clamping and rounding are written here once, so that every attack is only its formula: a frozen
dataclass whose fields are its config keys, with a `stamp`. Truncation instead of rounding would
darken poisoned images by half a level, which gives them away.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from utils.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from utils.images.data import Dataset

Split = Literal["train", "test"]
BATCH = 512


@dataclass(frozen=True)
class FitContext:
    """What a trigger may use to prepare itself.

    Attributes:
        dataset: the clean data set; only its training images may shape a trigger.
        target: the attack's class, several of them, or None for all2all.
        seed: key of every random choice.
        config: how classifiers are trained, and on which device.
    """

    dataset: Dataset
    target: int | tuple[int, ...] | None
    seed: int
    config: TrainConfig

    @property
    def side(self) -> int:
        """Width and height of the images in pixels."""
        return self.dataset.train.images.shape[-1]


@dataclass(frozen=True)
class Trigger:
    """Base of all attacks.

    Class attributes:
        name: the attack's name in configs and records.
        label_mode: "dirty" changes labels to the target, "clean" poisons the target class alone
            and leaves its labels as they are.
    """

    name: ClassVar[str] = ""
    label_mode: ClassVar[Literal["dirty", "clean"]] = "dirty"
    # the tensors that `prepare` made
    fitted: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def cross_ratio(self) -> float:
        """Cover samples per poisoned sample; an attack that has them makes it a config field."""
        return 0.0

    @property
    def images_fitted_on(self) -> int:
        """At most so many training images are what `prepare` trains on; 0 where it only draws."""
        return getattr(self, "fit_images", 0)

    def prepare(self, context: FitContext) -> Self:
        """The trigger ready for this data; raises UserError where a file is missing or unfit."""
        return self

    def with_fitted(self, **tensors: Tensor) -> Self:
        """A copy that holds what was prepared (patterns, masks, weights) as `self.fitted[name]`."""
        ready = copy.copy(self)
        object.__setattr__(ready, "fitted", tensors)
        return ready

    def stamp(self, x: Tensor, index: Tensor, split: Split) -> Tensor:
        """Put the trigger on images.

        Args:
            x: (B, 3, H, W) in [0, 1]; not to be modified.
            index: (B,) each image's original index in the data set: the key of its randomness.
            split: "train" or "test", for attacks whose strength differs.

        Returns:
            (B, 3, H, W), any range; `apply` clamps and rounds.
        """
        raise NotImplementedError

    def stamp_cover(self, x: Tensor, index: Tensor) -> Tensor:
        """What cover samples, which keep their labels, carry: the trigger, unless overridden."""
        return self.stamp(x, index, "train")

    def apply(self, images: Tensor, index: Tensor, split: Split = "train") -> Tensor:
        """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W) with the trigger; the input stays as it is."""
        return _rounded(lambda x, i: self.stamp(x, i, split), images, index)

    def apply_cover(self, images: Tensor, index: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W) as cover samples; the input stays as it is."""
        return _rounded(self.stamp_cover, images, index)


def _rounded(stamp: Callable[[Tensor, Tensor], Tensor], images: Tensor, index: Tensor) -> Tensor:
    import torch

    from utils.images.data import to_uint8, to_unit

    if not len(images):
        return images.clone()
    parts = zip(images.split(BATCH), index.split(BATCH))
    with torch.no_grad():
        return torch.cat([to_uint8(stamp(to_unit(x), i)) for x, i in parts])
