"""STRIP: Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019,
https://arxiv.org/abs/1902.06531, used on a training set

A trigger that holds under superimposed images keeps the prediction where it is. So every image is overlaid with clean
ones, and the mean entropy of the predictions is low for triggered images (Section IV). The threshold is the entropy that
a given share of clean images falls below: that share of the clean samples is lost, by construction.

By default overlays are added and a tenth of the clean samples may be lost, as in the benchmarks that use STRIP on training sets;
the paper mixes half and half and loses 1 % (overlay_mode: mix, false_alarms: 0.01).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import OpenUnitInterval as OpenFraction
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from defense.harness.baseline import CleanImagesConfig, Findings, Recipe, drop_and_retrain
from defense.harness.knowledge import CLEAN_IMAGES, clean_images
from defense.harness.result import Result
from utils.classifier.training import EVAL_BATCH, Observer
from utils.config import UserError
from utils.devices import autocast
from utils.images.data import Dataset, LabeledImages, to_unit
from utils.late import Tensor, inference_mode, torch
from utils.randomness import keyed_generator
from utils.storage.record import Record

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

log = logging.getLogger("dataelixir")
KNOWLEDGE = (CLEAN_IMAGES,)


@dataclass(frozen=True)
class Config(CleanImagesConfig):
    """STRIP.

    Args:
        overlays: clean images that each image is overlaid with; at most half of the given clean images, the others calibrate.
        overlay_mode: add the overlay to the normalised image (as in the benchmarks), or mix both half and half (as in the paper).
        false_alarms: share of clean samples that may be flagged; sets the entropy threshold.
    """

    overlays: PositiveInt = 100
    overlay_mode: Literal["add", "mix"] = "add"
    false_alarms: OpenFraction = 0.1


@inference_mode
def mean_entropies(
    victim: Classifier, images: Tensor, overlays: Tensor, mean: Tensor, config: Config
) -> Tensor:
    """Mean entropy in nats, float64 (N,), of the victim's predictions on each image under each overlay.

    Args:
        images: uint8 (N, 3, H, W).
        overlays: uint8 (M, 3, H, W).
        mean: (3,), which normalisation subtracts: adding normalised images is adding images less one mean.
    """
    over = to_unit(overlays.to(victim.device))
    means = []
    for part in tqdm(
        images.split(max(1, EVAL_BATCH // len(overlays))), "strip", leave=False, disable=None
    ):
        x = to_unit(part.to(victim.device))[:, None]
        both = (
            (x + over) / 2
            if config.overlay_mode == "mix"
            else x + over - mean.to(over).view(3, 1, 1)
        )
        with autocast(victim.device, config.amp):
            logits = victim(both.flatten(0, 1)).float()
        entropy = torch.special.entr(logits.double().softmax(1)).sum(1)
        means.append(entropy.view(len(part), -1).mean(1).cpu())
    return torch.cat(means)


def overlay_count(clean: int, config: Config) -> int:
    """How many of so many clean images overlay; the others, half of them or more, calibrate."""
    return min(config.overlays, clean // 2)


def inspect(
    images: Tensor, clean: Tensor, victim: Classifier, mean: Tensor, config: Config
) -> Findings:
    """Flag the images uint8 (N, 3, H, W) whose predictions vary less than most clean images' (M, 3, H, W) do.

    Raises:
        UserError: fewer than two clean images.
    """
    if len(clean) < 2:
        raise UserError(f"clean_share: {len(clean)} clean image is given; STRIP needs two or more")
    clean = clean[
        torch.randperm(len(clean), generator=keyed_generator(config.random_seed, "strip"))
    ]
    count = overlay_count(len(clean), config)
    calibration = mean_entropies(victim, clean[count:], clean[:count], mean, config)
    threshold = calibration.quantile(config.false_alarms)
    entropy = mean_entropies(victim, images, clean[:count], mean, config)
    log.info(
        "%d overlays, entropy threshold %.4f nats from %d clean images",
        count,
        threshold,
        len(calibration),
    )
    return Findings(entropy < threshold, -entropy)


def defend(
    data: LabeledImages,
    victim: Classifier,
    config: Config,
    dataset: Dataset,
    record: Record,
    observer: Observer | None = None,
) -> Result:
    """Remove images whose prediction survives overlays, and train on the rest."""
    with record.stage("inspect"):
        clean = clean_images(dataset, config.clean_share, config.random_seed)
        found = inspect(data.images, clean.images, victim, torch.tensor(dataset.info.mean), config)
    return drop_and_retrain(
        found, data, victim, Recipe(config, dataset, victim.device, record, observer)
    )


if __name__ == "__main__":
    from defense.harness.run import main

    main("strip")
