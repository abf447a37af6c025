"""What a purification will cost, from a small batch measured on the spot: passes, minutes, memory and disk."""
from __future__ import annotations

import time
from dataclasses import replace
from typing import Callable

import torch

from defense.dataelixir import DataElixirConfig
from defense.level import TOP
from defense.purifier import Purifier
from diffusion.denoiser import Denoiser
from utils.data import Dataset, LabeledImages
from utils.models import build_classifier
from utils.record import peak_rss_bytes
from utils.training import Trainer, autocast, predict

PURIFIED, TRAINED = 16, 512   # images that are measured on


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes the second time; the first one warms up."""
    for _ in range(2):
        started = time.monotonic()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.monotonic() - started


def forecast(data: LabeledImages, denoiser: Denoiser, config: DataElixirConfig, dataset: Dataset, device: torch.device, own_victim: bool) -> list[str]:
    """Lines that say what `defend` will cost on `data`; nothing is written.

    Args:
        own_victim: a classifier is trained first.
    """
    config = replace(config, steps_T=min(TOP, denoiser.t_max)) if config.steps_T == "auto" else config   # the dearest that auto may find
    n, passes = len(data), Purifier(denoiser, config, 0, device).passes_per_image
    sample, model = data[:TRAINED], build_classifier(config.model, dataset.num_classes, dataset.info, (0, "forecast")).to(device)
    x = sample.images[:PURIFIED].to(device).float() / 127.5 - 1
    t = torch.full((len(x),), config.steps_T - 1, device=device)
    denoiser = denoiser.to(device)
    with torch.inference_mode(), autocast(device, config.amp):
        one_pass = seconds(lambda: denoiser(x, t)) / len(x)
    one_vote = seconds(lambda: predict(model.eval(), sample.images)) / len(sample)
    once = lambda: Trainer(model, replace(config, epochs=1, frequency_save=0), "forecast", dataset.info.flip).fit(sample)
    one_step = seconds(once) / len(sample)
    images = 1 + config.rounds_n * config.last_steps_m
    training, purifying = one_step * n * config.epochs, passes * one_pass + images * one_vote
    again = training + one_step * n * (config.ft_epochs or config.epochs)
    picture, least = sample.images[0].numel(), smallest(data.labels, config)
    return [
        f"{n:,} images of {dataset.num_classes} classes, {passes} denoiser passes for each that is purified with {denoiser.name}: "
        f"from {least * passes:,} passes (a sample shows that nothing stands out) to {n * passes:,} (all)",
        f"time on {device}: {'classifier ' + clock(training) + ', ' if own_victim else ''}purification {clock(least * purifying)} to "
        f"{clock(n * purifying)}, and if a backdoor is found the benign model {clock(again)}",
        f"memory about {(peak_rss_bytes() + 3 * n * picture + 3 * config.purify_batch_size * images * picture) / 1e9:.1f} GB"
        f"{' beside that of the GPU' if device.type == 'cuda' else f', more where the denoiser needs much for a batch of {config.purify_batch_size}'}",
        f"disk at most {n * (images + 4) * picture / 1e9:.2f} GB while it runs",
    ]


def smallest(labels: torch.Tensor, config: DataElixirConfig) -> int:
    """The images that are purified at least."""
    return int(labels.bincount().clamp(max=config.sample_first).sum()) if config.target_first else len(labels)


def clock(span: float) -> str:
    """Seconds in words: 45 s, 12 min, 3.4 h."""
    return f"{span:.0f} s" if span < 100 else f"{span / 60:.0f} min" if span < 6000 else f"{span / 3600:.1f} h"
