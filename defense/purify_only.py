"""Purification alone: every image is replaced by its purified version, every label stays; no detection, no relabelling.

DataElixir's own purification without its decisions, which is how diffusion is used by Nie et al., "DiffPure", ICML 2022,
https://arxiv.org/abs/2205.07460 (at test time) and Bhat et al., "PureGen", NeurIPS 2024,
https://arxiv.org/abs/2405.18627 (on training sets, one round). Of a dirty-label attack it leaves label noise.
"""
from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Optional

import torch
from tqdm import tqdm

from defense.baseline import BaselineConfig, Recipe
from defense.knowledge import DENOISER
from defense.purifier import PurifyConfig, Purifier, open_denoiser
from defense.result import Result
from defense.store import IntermediaryStore
from utils.data import Dataset, LabeledImages
from utils.models import Classifier
from utils.record import Record
from utils.training import Observer, predict

log = logging.getLogger("dataelixir")
KNOWLEDGE = (DENOISER,)


@dataclass(frozen=True)
class Config(BaselineConfig, PurifyConfig):
    """Purification of every image; the last state of the last round is the purified image."""


def check(config: Config, dataset: Dataset) -> None:
    """Fail early: raises UserError where the denoiser cannot serve this data set and noise level."""
    open_denoiser(config, dataset.train.images.shape[-1], dataset.name)


def clean_up(config: Config, record: Record) -> None:
    """After a complete run the blocks go; purified.npz holds the images."""
    if (record / "purify").exists():
        IntermediaryStore(record / "purify").discard()


def purified(data: LabeledImages, victim: Classifier, config: Config, dataset: Dataset, record: Record) -> tuple[LabeledImages, int]:
    """The set with every image purified, block by block, and the denoiser passes that this costs.

    The log says how often the victim reads the purified image as it read the original, which tells whether denoiser and
    noise level match.
    """
    denoiser = open_denoiser(config, data.images.shape[-1], dataset.name).to(victim.device)
    purifier = Purifier(denoiser, config, config.random_seed, victim.device, config.amp)
    store, every = IntermediaryStore(record / "purify"), torch.arange(len(data))
    for start, stop in tqdm(list(store.missing(len(data), config.purify_batch_size)), "purify", unit="block", leave=False, disable=None):
        images = purifier.intermediaries(data.images[start:stop], every[start:stop])[:, [0, -1]]
        store.write(start, predict(victim, images.flatten(0, 1)).view(-1, 2), every[start:stop], images)
    votes = store.votes()
    log.info("prediction survives purification: %.3f", (votes[:, 0] == votes[:, 1]).double().mean())
    images = torch.cat([images[:, 1] for _, images in store.fetch(every)])
    return LabeledImages(images, data.labels), purifier.passes_per_image * len(data)


def defend(data: LabeledImages, victim: Classifier, config: Config, dataset: Dataset, record: Record,
           observer: Optional[Observer] = None) -> Result:
    """Purify every image and train on the result."""
    with record.stage("purify"):
        images, passes = purified(data, victim, config, dataset, record)
    model = Recipe(config, dataset, victim.device, record, observer).train("benign", images)
    return Result(model, images, unet_passes=passes)


if __name__ == "__main__":
    from defense.run import main

    main("purify_only")
