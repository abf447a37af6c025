"""What a run will cost, from a little of it measured on the spot: passes, minutes and memory."""

import logging
from dataclasses import replace
from typing import Any

import torch

from defense.elixir.config import DataElixirConfig
from defense.elixir.paste import DRAWS, PASTED
from defense.elixir.purifier import AUTO_TOP, Purifier, open_denoiser, purifier_for
from defense.elixir.sampling import expected_images, smallest
from utils.classifier.models import build_classifier
from utils.classifier.networks import Classifier
from utils.classifier.training import Trainer, predict
from utils.compiled import ROWS
from utils.cost import format_duration
from utils.devices import pick_device, seconds
from utils.images.data import Dataset, LabeledImages
from utils.memory import Halving
from utils.overall import Stage
from utils.processes import world_size
from utils.storage.environment import peak_rss_bytes

MEASURED, VOTE_BYTES = 512, 50  # images that are timed; bytes of a vote with its resamples


@torch.inference_mode()
def purifying(
    purifier: Purifier, victim: Classifier, data: LabeledImages, least: int, pastes: bool
) -> tuple[float, str]:
    """Seconds of an image that is given all rounds, and a line for `least` to all images.

    Where it `pastes`, the expected image takes passes and the pasted images are read as well.
    """
    config, device, n = purifier.config, purifier.device, len(data)
    batch, each = config.purify_batch_size, config.images_each
    rows = torch.arange(min(n, batch, ROWS if device.type == "cpu" else batch))
    one_pass = lambda x, t: seconds(lambda: purifier.predict_noise(x, t), device) / len(x)
    work = lambda i: one_pass(purifier.start(data.images[i]), torch.zeros_like(i, device=device))
    passes, slow = purifier.passes_per_image, next(Halving("purify_batch_size")(work, rows))
    passes, read = passes + DRAWS * pastes, each + PASTED * pastes
    pace = (passes * slow + read * vote_pace(victim, data, purifier.amp)) / world_size()
    span = lambda say, unit: " to ".join(say(k * unit) for k in sorted({least, n}))
    count, time = span("{:,}".format, passes), span(format_duration, pace)
    pictures = 3 * (n + batch * each) * data.images[:1].numel()
    memory = (peak_rss_bytes() + pictures + VOTE_BYTES * n * each) / 1e9
    level = f"{n:,} images at T = {config.steps_T}, {passes} denoiser passes for each purified"
    return pace, f"purify: {level}: {count} passes, {time} on {device}, about {memory:.1f} GB"


def announced_pace(rounds: Any, least: int) -> float:
    """Seconds of an image; logged, with what follows, before the purification of a Rounds."""
    pastes = bool(getattr(rounds, "paster", None))
    pace, line = purifying(rounds.purifier, rounds.victim, rounds.data, least, pastes)
    logging.getLogger("dataelixir").info(line)
    return pace


def purifying_line(data: LabeledImages, config: Any, dataset: Dataset) -> str:
    """What purifying takes; `auto` counts as the highest level that it may find."""
    return before_purifying(data, config, dataset)[1]


def before_purifying(data: LabeledImages, config: Any, dataset: Dataset) -> tuple[float, str]:
    """Seconds of an image and that line, without a trained victim."""
    denoiser = open_denoiser(config, data.images.shape[-1], dataset.name)
    level = min(AUTO_TOP, denoiser.t_max) if config.steps_T == "auto" else config.steps_T
    config, model = replace(config, steps_T=level), untrained(config, dataset)
    purifier = purifier_for(denoiser, config, 0, 0, model.device, config.amp)
    pastes = isinstance(config, DataElixirConfig) and config.rules.pastes
    return purifying(purifier, model, data, smallest(data.labels, config), pastes)


def vote_pace(model: Classifier, data: LabeledImages, amp: bool) -> float:
    """Seconds that a classifier takes to read an image."""
    images = data.images[:MEASURED]
    return seconds(lambda: predict(model, images, amp), model.device) / len(images)


def untrained(config: Any, dataset: Dataset) -> Classifier:
    """A classifier to be measured."""
    shape = (config.model, dataset.num_classes, dataset.info, (0, "forecast"))
    return build_classifier(*shape).to(pick_device(config.device)).eval()


def training_line(name: str, data: LabeledImages, config: Any, dataset: Dataset, epochs=0) -> str:
    """What training a classifier takes, measured on an epoch of a few images."""
    epochs = epochs or config.epochs
    total = format_duration(epoch_seconds(data, config, dataset) * epochs)
    images, device = f"{epochs} epochs of {len(data):,} images", pick_device(config.device)
    return f"{name}: {config.model}, {images}, about {total} on {device}"


def epoch_seconds(data: LabeledImages, config: Any, dataset: Dataset) -> float:
    """Seconds of an epoch, measured on one of a few images."""
    model, recipe = untrained(config, dataset), replace(config, frequency_save=0)
    trainer = Trainer(model, recipe, "forecast", dataset.info.flip, together=False)
    some = data[:MEASURED].to(model.device)
    return seconds(lambda: trainer.one_epoch(some, 0), model.device) / len(some) * len(data)


def planned(data: LabeledImages, config: Any, dataset: Dataset, has_victim: bool) -> list[Stage]:
    """The stages of a run of DataElixir with `config`, as `Defense` has its keys, and what each may take.

    The last two trainings are needed only where a class is accused, except as published.
    """
    epoch, settled = epoch_seconds(data, config, dataset), config.resolved()
    images, pace = (
        expected_images(data.labels, settled),
        before_purifying(data, settled, dataset)[0],
    )
    training = lambda name, epochs, optional: Stage(
        name, "training", epoch * epochs, epochs, optional
    )
    rarely = config.rules.pastes
    return [
        *([] if has_victim else [training("victim", config.epochs, False)]),
        Stage("purify", "purify", pace * images, images),
        training("stage1", config.epochs, rarely),
        training("finetune", settled.of_fine_tuning.epochs, rarely),
        Stage("report", "report", 0.0),
    ]
