"""Which noise level to purify at, found from the set itself (ours; published: a number).

A level must be high enough that triggers are lost and low enough that what the classifier reads is
not. The second can be measured without any truth: the share of images whose predicted label is the
same after one round. `steps_T: auto` takes the highest level at which it is at least AGREEMENT,
over a sample with the same number of images of every class (so that a class full of poison, whose
labels should change, weighs little).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from defense.elixir.config import PurifyingConfig
from defense.elixir.purifier import AUTO_TOP, Purifier, purifier_for
from defense.elixir.sampling import stratified
from defense.elixir.verdict import UNKNOWN, reads_as_before
from diffusion.denoiser import Denoiser
from utils.classifier.networks import Classifier
from utils.classifier.training import predict
from utils.images.data import LabeledImages
from utils.memory import Halving
from utils.storage.record import load_arrays, save_arrays

log = logging.getLogger("dataelixir")
# Share of predictions that must survive a round; a tenth of poison, which should move, takes a
# tenth of them.
AGREEMENT = 0.75
SAMPLE, GRAIN = 256, 10
KEPT = "level.npz"


def settled_level(
    config: PurifyingConfig,
    denoiser: Denoiser,
    data: LabeledImages,
    victim: Classifier,
    num_classes: int,
    folder: Path | None = None,
) -> int:
    """`config.steps_T`, or where that is "auto" the level found by bisection over multiples of 10.

    Args:
        config: also seeds the sample and the noise, and says whether the network runs in mixed
            precision.
        denoiser: predicts the noise in [-1, 1] (B, 3, H, W) at levels (B,).
        data: the training set as received.
        victim: a classifier trained on it, in eval mode.
        num_classes: K.
        folder: where the level found is kept, and taken from the next time: all blocks of a set
            are to be made at one level.
    """
    if config.steps_T != "auto":
        return config.steps_T
    if folder and (folder / KEPT).exists():
        return int(load_arrays(folder / KEPT)["level"])
    sizes = torch.full((num_classes,), max(1, SAMPLE // num_classes))
    index = stratified(data.labels, sizes, config.random_seed)

    def survives(level: int) -> float:
        at_level, seed = replace(config, steps_T=level, rounds_n=1), config.random_seed
        purifier = purifier_for(denoiser, at_level, 0, seed, victim.device, config.amp)
        share = survival(purifier, victim, data.images[index], index, config.purify_batch_size)
        told = "steps_T: at %d the classifier reads %.3f of %d images as before"
        log.info(told, level, share, len(index))
        return share

    lowest = max(GRAIN, config.reverse_steps or 0, config.last_steps_m + 1)
    highest_known = min(AUTO_TOP, denoiser.t_max)
    levels = range(-(-lowest // GRAIN) * GRAIN, highest_known + 1, GRAIN)
    found = highest(list(levels) or [min(lowest, denoiser.t_max)], survives)
    if folder:
        save_arrays(folder / KEPT, level=found)
    return found


def survival(
    purifier: Purifier, victim: Classifier, images: Tensor, index: Tensor, batch: int
) -> float:
    """Share of uint8 images (B, 3, H, W) that the victim reads alike before and after purifying."""
    last = lambda rows: purifier.intermediaries(images[rows], index[rows])[:, -1]
    halving, parts = Halving("purify_batch_size"), torch.arange(len(index)).split(batch)
    ends = torch.cat([end for part in parts for end in halving(last, part)])
    return (predict(victim, images) == predict(victim, ends)).double().mean().item()


def highest(levels: Sequence[int], survives: Callable[[int], float]) -> int:
    """The last of the rising `levels` at which `survives`, which falls, is at least AGREEMENT.

    The first level where it is at none.
    """
    # survives(levels[low]) is taken for granted, survives(levels[high]) is too little.
    low, high = 0, len(levels)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if survives(levels[middle]) >= AGREEMENT else (low, middle)
    return levels[low]


def rounds_survived(votes: Tensor, labels: Tensor, last_steps_m: int, is_target: Tensor) -> Tensor:
    """float64 (n,): share of predictions that survive each round.

    It is taken over the samples that were purified and carry no target label: the predictions of
    those that do should change, and with targets first they are a good part of what is purified.

    Args:
        votes: int64 (N, 1+nm), UNKNOWN where a sample was not purified.
        labels: int64 (N,), as given.
        is_target: bool (K,), the detected target labels.
    """
    known = votes[:, 0] != UNKNOWN
    rows = known & ~is_target[labels]
    return reads_as_before(votes[rows if rows.any() else known], last_steps_m).double().mean(0)
