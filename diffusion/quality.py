# Ho et al., DDPM, 2020: https://arxiv.org/abs/2006.11239
"""How good a denoiser is on unseen images: its error at each noise level, and samples."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

from diffusion.denoiser import Denoiser
from diffusion.sampler import Sampler, Schedule, subset_steps

LEVELS = (0, 5, 10, 20, 40, 60, 100, 149, 299, 599, 999)
SHEET_LEVELS = (20, 60, 149)
BATCH = 128
HELD_OUT, SHOWN = 512, 10  # test images that the error is measured on, and on the sheet

log = logging.getLogger("dataelixir")


def evaluate(denoiser: Denoiser, images: Tensor, folder: Path) -> dict[str, Any]:
    """Measure the error on test images uint8 (N,3,H,W), write samples.png; {"images", "errors"}."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    some, shown = images[order[:HELD_OUT]], images[order[:SHOWN]]
    errors, count = denoising_error(denoiser, some), len(some)
    log.info("squared error of the predicted noise on %d held-out images:", count)
    log.info("   t      network   pixel by pixel")
    for row in errors:
        log.info("%4d   %10.4f   %14.4f", row["t"], row["mse"], row["trivial"])
    rows = sample_sheet(denoiser, shown, folder / "samples.png")
    log.info("%s, rows from the top: %s", folder / "samples.png", "; ".join(rows))
    return {"images": count, "errors": errors}


def denoising_error(denoiser: Denoiser, images: Tensor) -> list[dict[str, float]]:
    """Per level below the denoiser's t_max {"t", "mse", "trivial"}, on uint8 (N,3,H,W).

    "mse" is the mean squared error of the predicted noise; predicting zero has an error of 1.
    "trivial" is the error of the best linear guess from each pixel alone, ab v / (ab v + 1 - ab)
    with v the pixel's variance: a network must stay below.
    """
    variance = (images.double() / 127.5 - 1).var(dim=0, correction=0)
    rows = []
    for t in (t for t in LEVELS if t < denoiser.t_max):
        ab = Schedule().alpha_bar(t)
        trivial = (ab * variance / (ab * variance + 1 - ab)).mean().item()
        total = torch.zeros(())
        for x, noise in _noised(denoiser, images, t):
            total = total + ((denoiser(x, t) - noise) ** 2).mean(dim=(1, 2, 3)).sum()
        rows.append({"t": t, "mse": total.item() / len(images), "trivial": trivial})
    return rows


def _noised(denoiser: Denoiser, images: Tensor, t: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (x_t, noise) on the denoiser's device, without gradients; the same for each."""
    device, draw = next(denoiser.parameters()).device, _noise_source(0)
    with torch.no_grad():
        for batch in images.split(BATCH):
            x0 = batch.to(device).float() / 127.5 - 1
            noise = draw(x0)
            yield Sampler(denoiser).q_sample(x0, t, noise), noise


def _noise_source(seed: int) -> Callable[[Tensor], Tensor]:
    """x -> N(0,I) like x; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator).to(x.device)


def sample_sheet(denoiser: Denoiser, images: Tensor, path: Path) -> list[str]:
    """Save a PNG with a column per image of uint8 (N,3,H,W); returns what its rows show.

    From the top: clean; noised and the clean guess, per level; the end of a reverse run.
    """
    sampler, top = Sampler(denoiser), denoiser.t_max - 1
    rows, names = [images.float() / 127.5 - 1], ["clean"]
    for t in sorted({min(t, top) for t in (*SHEET_LEVELS, top)}):
        x, _ = next(_noised(denoiser, images[:BATCH], t))
        step = sampler.plan([t])[0]
        with torch.no_grad():
            rows += [x, step.x_scale * x - step.e_scale * denoiser(x, t)]
        names += [f"noised to t = {t}", f"its clean guess at t = {t}"]
    *_, final = sampler.reverse(x, subset_steps(top + 1), _noise_source(1))
    sheet = torch.cat([row.cpu() for row in [*rows, final]])
    save_image(((sheet + 1) / 2).clamp(0, 1), str(path), nrow=len(images))
    return [*names, f"reverse run from t = {top}"]
