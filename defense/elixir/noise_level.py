"""Which noise level to purify at, found from the set itself (ours; published: a number).

A level must be high enough that triggers are lost and low enough that what the classifier reads is
not. The second can be measured without any truth: the share of images whose predicted label is the
same after one round. `steps_T: auto` takes the highest level at which it is at least AGREEMENT,
over as many images of every class (so that a class full of poison weighs little).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from defense.elixir.config import PurifyingConfig
from defense.elixir.purifier import AUTO_TOP, Network, Purifier, purifier_for
from defense.elixir.sampling import stratified
from defense.elixir.verdict import UNKNOWN, reads_as_before
from diffusion.denoiser import Denoiser
from diffusion.sampler import Sampler, Schedule
from utils.classifier.networks import Classifier
from utils.classifier.training import predict
from utils.images.data import LabeledImages
from utils.memory import Halving
from utils.randomness import keyed_generator
from utils.storage.record import load_arrays, save_arrays

log = logging.getLogger("dataelixir")
# Share of predictions that must survive a round; a tenth of poison takes a tenth of them.
AGREEMENT = 0.75
SAMPLE, GRAIN = 256, 10
DENOISED = 32  # images that the denoiser is tried on
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
        config: also seeds the sample and the noise.
        denoiser: predicts the noise in [-1, 1] (B, 3, H, W) at levels (B,).
        data: the training set as received.
        victim: a classifier trained on it, in eval mode.
        num_classes: K.
        folder: keeps the level found: all blocks of a set are to be made at one level.
    """
    if config.steps_T != "auto":
        return config.steps_T
    if folder and (folder / KEPT).exists():
        return int(load_arrays(folder / KEPT)["level"])
    sizes, seed = torch.full((num_classes,), max(1, SAMPLE // num_classes)), config.random_seed
    index = stratified(data.labels, sizes, seed)

    def survives(level: int) -> float:
        at_level = replace(config, steps_T=level, rounds_n=1)
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

    It is taken over the samples that were purified and carry no target label, as the predictions
    of those that do should change.

    Args:
        votes: int64 (N, 1+nm), UNKNOWN where a sample was not purified.
        labels: int64 (N,), as given.
        is_target: bool (K,), the detected target labels.
    """
    known = votes[:, 0] != UNKNOWN
    rows = known & ~is_target[labels]
    return reads_as_before(votes[rows if rows.any() else known], last_steps_m).double().mean(0)


@torch.inference_mode()
def denoising_check(
    denoiser: Network, images: Tensor, level: int, seed: int, device: torch.device
) -> tuple[float, float]:
    """(mean squared error of the noise predicted at level - 1, that of a guess from single pixels).

    The guess is ab v / (ab v + 1 - ab), with v the variance of the images' pixels: what a network
    that has learned anything about these images, uint8 (N, 3, H, W), stays below.
    """
    generator = keyed_generator(seed, "denoising")
    x0 = images[torch.randperm(len(images), generator=generator)[:DENOISED]].float() / 127.5 - 1
    noise, t = torch.randn(x0.shape, generator=generator), level - 1
    ab, variance = Schedule().alpha_bar(t), x0.var(correction=0).item()
    x_t = Sampler(denoiser).q_sample(x0, t, noise).to(device)
    predicted = denoiser(x_t, torch.full((len(x0),), t, device=device)).float().cpu()
    return (predicted - noise).square().mean().item(), ab * variance / (ab * variance + 1 - ab)


def warn_if_noise(
    denoiser: Network, images: Tensor, level: int, seed: int, device: torch.device
) -> None:
    """Log the denoiser's error; warn where it is no better than a guess (`denoising_check`)."""
    error, guess = denoising_check(denoiser, images, level, seed, device)
    if error < guess:
        told = "denoising error at T = %d: %.4f (from each pixel alone: %.4f)"
        log.info(told, level, error, guess)
        return
    log.warning(
        "ddpm: at T = %d the denoiser's error on these images is %.3f, and a guess from each "
        "pixel alone has %.3f: it does not know such images, and what it makes of them means "
        "nothing; take another --ddpm, or train one (diffusion/train.py)",
        level,
        error,
        guess,
    )
