"""Which noise level to purify at, found from the set itself.

A level must be high enough that triggers are lost and low enough that what the classifier reads is not. The second can
be measured without any truth: the share of images whose predicted label is the same after one round. `steps_T: auto`
takes the highest level at which it is at least AGREEMENT, over a sample with the same number of images of every class
(so that a class full of poison, whose labels should change, weighs little).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from defense.elixir.config import PurifyConfig
from defense.elixir.purifier import AUTO_TOP, Purifier, purifier_for
from defense.elixir.sampling import stratified
from defense.elixir.verdict import UNKNOWN, reads_as_before
from utils.classifier.training import predict
from utils.images.data import LabeledImages
from utils.late import Tensor, torch
from utils.memory import Halving
from utils.storage.record import load_arrays, save_arrays

if TYPE_CHECKING:
    from diffusion.denoiser import Denoiser
    from utils.classifier.networks import Classifier

log = logging.getLogger("dataelixir")
AGREEMENT = 0.75  # share of predictions that must survive a round; a tenth of poison that moves, as it should, takes a tenth of them
SAMPLE, GRAIN = 256, 10
KEPT = "level.npz"


def settled_level(
    config: PurifyConfig,
    denoiser: Denoiser,
    data: LabeledImages,
    victim: Classifier,
    num_classes: int,
    seed: int,
    amp: bool,
    folder: Path | None = None,
) -> int:
    """`config.steps_T`, or where that is "auto" the level found by bisection over multiples of 10.

    Args:
        denoiser: [-1, 1] (B, 3, H, W), t (B,) -> predicted noise.
        data: the training set as received.
        victim: a classifier trained on it, in eval mode.
        seed: key of the sample and the noise.
        amp: run the network in mixed precision.
        folder: where the level found is kept, and taken from the next time: all blocks of a set are to be made at one level.
    """
    if config.steps_T != "auto":
        return config.steps_T
    if folder and (folder / KEPT).exists():
        return int(load_arrays(folder / KEPT)["level"])
    sizes = torch.full((num_classes,), max(1, SAMPLE // num_classes))
    index = stratified(data.labels, sizes, seed)

    def survives(level: int) -> float:
        purifier = purifier_for(
            denoiser,
            replace(config, steps_T=level, rounds_n=1, compile="off"),
            len(index),
            seed,
            victim.device,
            amp,
        )
        share = survival(purifier, victim, data.images[index], index, config.purify_batch_size)
        log.info(
            "steps_T: at %d the classifier reads %.3f of %d images as before",
            level,
            share,
            len(index),
        )
        return share

    lowest = max(GRAIN, config.reverse_steps or 0, config.last_steps_m + 1)
    levels = list(range(-(-lowest // GRAIN) * GRAIN, min(AUTO_TOP, denoiser.t_max) + 1, GRAIN)) or [
        min(lowest, denoiser.t_max)
    ]
    found = highest(levels, survives)
    if folder:
        save_arrays(folder / KEPT, level=found)
    return found


def survival(
    purifier: Purifier, victim: Classifier, images: Tensor, index: Tensor, batch: int
) -> float:
    """Share of uint8 images (B, 3, H, W) that the victim reads alike before and after the purifier's rounds."""
    last = lambda rows: purifier.intermediaries(images[rows], index[rows])[:, -1]
    halving, parts = Halving("purify_batch_size"), torch.arange(len(index)).split(batch)
    ends = torch.cat([end for part in parts for end in halving(last, part)])
    return (predict(victim, images) == predict(victim, ends)).double().mean().item()


def highest(levels: Sequence[int], survives: Callable[[int], float]) -> int:
    """The last of the rising `levels` at which `survives`, which falls, is at least AGREEMENT; the first where it is at none."""
    low, high = (
        0,
        len(levels),
    )  # survives(levels[low]) is taken for granted, survives(levels[high]) is too little
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if survives(levels[middle]) >= AGREEMENT else (low, middle)
    return levels[low]


def rounds_survived(votes: Tensor, labels: Tensor, last_steps_m: int, is_target: Tensor) -> Tensor:
    """float64 (n,): share of predictions that survive each round.

    It is taken over the samples that were purified and carry no target label: the predictions of those that do should
    change, and where target labels come first they are a good part of what is purified.

    Args:
        votes: int64 (N, 1+nm), UNKNOWN where a sample was not purified.
        labels: int64 (N,), as given.
        is_target: bool (K,), the detected target labels.
    """
    known = votes[:, 0] != UNKNOWN
    rows = known & ~is_target[labels]
    return reads_as_before(votes[rows if rows.any() else known], last_steps_m).double().mean(0)


def self_agreement(
    votes: Tensor, labels: Tensor, last_steps_m: int, is_target: Tensor
) -> list[str]:
    """How often the victim still reads a purified image as it read the original: per round, and per given label.

    Needs no truth. Low shares say that T, denoiser and classifier do not match; one class far below the others is
    what a backdoor looks like. Arguments as in `rounds_survived`.
    """
    overall = rounds_survived(votes, labels, last_steps_m, is_target).tolist()
    known = votes[:, 0] != UNKNOWN
    last, labels = reads_as_before(votes[known], last_steps_m)[:, -1].double(), labels[known]
    lines = [
        "prediction survives round "
        + ", ".join(f"{r + 1}: {share:.3f}" for r, share in enumerate(overall))
        + (" (samples without a target label)" if is_target.any() else "")
    ]
    shares = [f"{label}: {last[labels == label].mean():.2f}" for label in labels.unique().tolist()]
    return lines + ["prediction survives the last round, by given label: " + ", ".join(shares)]
