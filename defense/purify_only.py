"""Purification alone: every image is replaced by its purified version, every label stays; no detection, no relabelling.

DataElixir's own purification without its decisions, which is how diffusion is used by Nie et al., "DiffPure", ICML 2022,
https://arxiv.org/abs/2205.07460 (at test time) and Bhat et al., "PureGen", NeurIPS 2024,
https://arxiv.org/abs/2405.18627 (on training sets, one round). Of a dirty-label attack it leaves label noise.
"""
from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Optional

import torch
from tqdm import tqdm

from defense.baseline import BaselineConfig, Recipe
from defense.knowledge import DENOISER
from defense.level import settled_level
from defense.purifier import PurifyConfig, open_denoiser, purifier_for
from defense.result import Result
from defense.store import Block, IntermediaryStore
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

    Blocks hold the victim's votes on each image before and after, which tell whether denoiser and noise level match.
    """
    denoiser = open_denoiser(config, data.images.shape[-1], dataset.name).to(victim.device)
    level = settled_level(config, denoiser, data, victim, dataset.num_classes, config.random_seed, config.amp)
    purifier = purifier_for(denoiser, replace(config, steps_T=level), len(data), config.random_seed, victim.device, config.amp)
    log.info("purifying with %s at T = %d: %d passes an image", denoiser.name, level, purifier.passes_per_image)
    store, every = IntermediaryStore(record / "purify"), torch.arange(len(data))
    for index in tqdm(store.missing(every).split(config.purify_batch_size), "purify", unit="block", leave=False, disable=None):
        if len(index):
            images = purifier.intermediaries(data.images[index], index)[:, [0, -1]]
            votes = predict(victim, images.flatten(0, 1)).view(-1, 2)
            store.write(Block(index, votes, index, images, purifier.passes_per_image * len(index)))
    votes = store.votes(len(data))
    log.info("prediction survives purification: %.3f", (votes[:, 0] == votes[:, 1]).double().mean())
    images = torch.empty_like(data.images)
    for index, both in store.fetch(every):
        images[index] = both[:, 1]
    return LabeledImages(images, data.labels), store.passes


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
