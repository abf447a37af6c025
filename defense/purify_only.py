"""Purification alone: every image is replaced by its purified version, every label stays.

DataElixir's own purification without its decisions, which is how diffusion is used by Nie et al.,
"DiffPure", ICML 2022, https://arxiv.org/abs/2205.07460 (at test time) and Bhat et al., "PureGen",
NeurIPS 2024, https://arxiv.org/abs/2405.18627 (on training sets, one round). Of a dirty-label
attack it leaves label noise.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from defense.elixir.config import PurifyingConfig
from defense.harness.command import main
from defense.harness.defense import Defense
from defense.harness.knowledge import DENOISER

log = logging.getLogger("dataelixir")


@dataclass(frozen=True)
class PurifyOnly(PurifyingConfig, Defense):
    """Purification of every image; the last state of the last round is the purified image."""

    KNOWLEDGE = (DENOISER,)

    def check(self, dataset):
        from defense.elixir.purifier import open_denoiser

        open_denoiser(self, dataset.train.images.shape[-1], dataset.name)

    def costs(self, data, dataset):
        from defense.elixir.forecast import purifying_line

        return [purifying_line(data, self, dataset), *super().costs(data, dataset)]

    def defend(self, data, victim, run):
        from defense.harness.result import Result

        with run.record.stage("purify"):
            images, passes = purified(data, victim, self, run)
        return Result(run.train("benign", images), images, unet_passes=passes)

    def clean_up(self, record):
        """After a complete run the blocks go; purified.npz holds the images."""
        from defense.elixir.store import IntermediaryStore

        if (record / "purify").exists():
            IntermediaryStore(record / "purify").discard()


@dataclass(frozen=True)
class LastStates:
    """Makes blocks of samples and their last states, with the victim's votes on both.

    The votes tell whether denoiser and noise level match.
    """

    data: Any
    victim: Any
    purifier: Any

    def __call__(self, index):
        from defense.elixir.store import Block
        from utils.classifier.training import predict

        images = self.purifier.intermediaries(self.data.images[index], index)[:, [0, -1]]
        votes = predict(self.victim, images.flatten(0, 1)).view(-1, 2)
        return Block(index, votes, index, images, self.purifier.passes_per_image * len(index))


@dataclass(frozen=True)
class PurifyOnlyPlan:
    """What every process of a run needs to purify."""

    data: Any
    victim: Any
    denoiser: Any
    config: PurifyOnly

    def prepared(self) -> LastStates:
        """Networks on this process's device, compiled where that pays."""
        from defense.elixir.purifier import purifier_for

        config, count, device = self.config, len(self.data), self.victim.device
        purifier = purifier_for(
            self.denoiser, config, count, config.random_seed, device, config.amp
        )
        return LastStates(self.data, self.victim, purifier)


def purified(data, victim, config: PurifyOnly, run):
    """The set with every image purified, block by block, and the denoiser passes of that."""
    import torch

    from defense.elixir.noise_level import settled_level
    from defense.elixir.purifier import open_denoiser
    from defense.elixir.store import IntermediaryStore
    from defense.elixir.verdict import reads_as_before
    from defense.elixir.workers import split_into_blocks, workers_for
    from utils.images.data import LabeledImages

    dataset, every = run.dataset, torch.arange(len(data))
    denoiser = open_denoiser(config, data.images.shape[-1], dataset.name).to(victim.device)
    store = IntermediaryStore(run.record / "purify")
    level = settled_level(config, denoiser, data, victim, dataset.num_classes, store.folder)
    parts = split_into_blocks(store.missing(every), config.purify_batch_size)
    plan = PurifyOnlyPlan(data, victim, denoiser, replace(config, steps_T=level))
    with workers_for(plan) as workers:
        assert isinstance(workers.work, LastStates)
        passes = workers.work.purifier.passes_per_image
        log.info("purifying with %s at T = %d: %d passes an image", denoiser.name, level, passes)
        blocks = workers.blocks(parts)
        for block in tqdm(blocks, "purify", len(parts), unit="block", leave=False, disable=None):
            store.write(block)
    survived = reads_as_before(store.votes(len(data)), 1).double().mean()
    log.info("prediction survives purification: %.3f", survived)
    images = torch.empty_like(data.images)
    for index, both in store.fetch(every):
        images[index] = both[:, 1]
    return LabeledImages(images, data.labels), store.passes


if __name__ == "__main__":
    main("purify_only")
