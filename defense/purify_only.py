"""Purification alone: every image is replaced by its purified version, every label stays; no detection, no relabelling.

DataElixir's own purification without its decisions, which is how diffusion is used by Nie et al., "DiffPure", ICML 2022,
https://arxiv.org/abs/2205.07460 (at test time) and Bhat et al., "PureGen", NeurIPS 2024,
https://arxiv.org/abs/2405.18627 (on training sets, one round). Of a dirty-label attack it leaves label noise.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tqdm import tqdm

from defense.elixir.config import PurifyConfig
from defense.elixir.noise_level import settled_level
from defense.elixir.purifier import Purifier, open_denoiser, purifier_for
from defense.elixir.store import Block, IntermediaryStore
from defense.elixir.verdict import reads_as_before
from defense.elixir.workers import split_into_blocks, workers_for
from defense.harness.baseline import BaselineConfig, Recipe
from defense.harness.knowledge import DENOISER
from defense.harness.result import Result
from utils.classifier.training import Observer, predict
from utils.images.data import Dataset, LabeledImages
from utils.late import Tensor, torch
from utils.storage.record import Record

if TYPE_CHECKING:
    from diffusion.denoiser import Denoiser
    from utils.classifier.networks import Classifier

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


@dataclass(frozen=True)
class Purified:
    """Makes blocks of samples and their last states, with the victim's votes on both, which tell whether denoiser and noise level match."""

    data: LabeledImages
    victim: Classifier
    purifier: Purifier

    def __call__(self, index: Tensor, _: None) -> Block:
        images = self.purifier.intermediaries(self.data.images[index], index)[:, [0, -1]]
        votes = predict(self.victim, images.flatten(0, 1)).view(-1, 2)
        return Block(index, votes, index, images, self.purifier.passes_per_image * len(index))


@dataclass(frozen=True)
class PurifyOnlyPlan:
    """What every process of a run needs to purify."""

    data: LabeledImages
    victim: Classifier
    denoiser: Denoiser
    config: Config

    def prepared(self) -> Purified:
        """Networks on this process's device, compiled where that pays."""
        device = self.victim.device
        purifier = purifier_for(
            self.denoiser,
            self.config,
            len(self.data),
            self.config.random_seed,
            device,
            self.config.amp,
        )
        return Purified(self.data, self.victim, purifier)


def purified(
    data: LabeledImages, victim: Classifier, config: Config, dataset: Dataset, record: Record
) -> tuple[LabeledImages, int]:
    """The set with every image purified, block by block, and the denoiser passes that this costs."""
    denoiser = open_denoiser(config, data.images.shape[-1], dataset.name).to(victim.device)
    store, every = IntermediaryStore(record / "purify"), torch.arange(len(data))
    level = settled_level(
        config,
        denoiser,
        data,
        victim,
        dataset.num_classes,
        config.random_seed,
        config.amp,
        store.folder,
    )
    parts = split_into_blocks(store.missing(every), config.purify_batch_size)
    with workers_for(
        PurifyOnlyPlan(data, victim, denoiser, replace(config, steps_T=level))
    ) as workers:
        log.info(
            "purifying with %s at T = %d: %d passes an image",
            denoiser.name,
            level,
            workers.work.purifier.passes_per_image,
        )
        for block in tqdm(
            workers.blocks(parts, None),
            "purify",
            total=len(parts),
            unit="block",
            leave=False,
            disable=None,
        ):
            store.write(block)
    votes = store.votes(len(data))
    log.info("prediction survives purification: %.3f", reads_as_before(votes, 1).double().mean())
    images = torch.empty_like(data.images)
    for index, both in store.fetch(every):
        images[index] = both[:, 1]
    return LabeledImages(images, data.labels), store.passes


def defend(
    data: LabeledImages,
    victim: Classifier,
    config: Config,
    dataset: Dataset,
    record: Record,
    observer: Observer | None = None,
) -> Result:
    """Purify every image and train on the result."""
    with record.stage("purify"):
        images, passes = purified(data, victim, config, dataset, record)
    model = Recipe(config, dataset, victim.device, record, observer).train("benign", images)
    return Result(model, images, unet_passes=passes)


if __name__ == "__main__":
    from defense.harness.run import main

    main("purify_only")
