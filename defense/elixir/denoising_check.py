"""Whether a denoiser denoises the images at hand: asked before hours are spent with it."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from diffusion.sampler import Sampler, Schedule
from utils.randomness import keyed_generator

log = logging.getLogger("dataelixir")
SAMPLE = 32


@torch.inference_mode()
def denoising_check(
    denoiser, images: Tensor, level: int, seed: int, device: torch.device
) -> tuple[float, float]:
    """(mean squared error of the noise predicted at level - 1, that of a guess from single pixels).

    The guess is ab v / (ab v + 1 - ab), with v the variance of the images' pixels: what a network
    that has learned anything about these images stays below.

    Args:
        denoiser: [-1, 1] (B, 3, H, W), t (B,) -> predicted noise.
        images: uint8 (N, 3, H, W); a few of them are looked at.
        level: noise level of the purification, in steps of the schedule.
        seed: key of the choice and the noise.
        device: where the denoiser is.
    """
    generator = keyed_generator(seed, "denoising")
    x0 = images[torch.randperm(len(images), generator=generator)[:SAMPLE]].float() / 127.5 - 1
    noise, t = torch.randn(x0.shape, generator=generator), level - 1
    ab, variance = Schedule().alpha_bar(t), x0.var(correction=0).item()
    x_t = Sampler(denoiser).q_sample(x0, t, noise).to(device)
    predicted = denoiser(x_t, torch.full((len(x0),), t, device=device)).float().cpu()
    return (predicted - noise).square().mean().item(), ab * variance / (ab * variance + 1 - ab)


def warn_if_noise(denoiser, images: Tensor, level: int, seed: int, device: torch.device) -> None:
    """Log the denoiser's error; warn where it is no better than a guess (`denoising_check`)."""
    error, guess = denoising_check(denoiser, images, level, seed, device)
    if not error < guess:
        log.warning(
            "ddpm: at T = %d the denoiser's error on these images is %.3f, and a guess from each "
            "pixel alone has %.3f: it does not know such images, and what it makes of them means "
            "nothing; take another --ddpm, or train one (diffusion/train.py)",
            level,
            error,
            guess,
        )
    else:
        log.info(
            "denoising error at T = %d: %.4f (from each pixel alone: %.4f)", level, error, guess
        )
