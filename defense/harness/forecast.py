"""What a run will cost, from a small batch measured on the spot: passes, minutes, memory and disk."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from defense.elixir.config import PurifyConfig
from defense.elixir.purifier import AUTO_TOP, Purifier, purifier_for
from utils.classifier.models import build_classifier
from utils.classifier.training import Trainer, predict
from utils.compiled import ROWS
from utils.config import TrainConfig
from utils.cost import format_duration
from utils.devices import seconds
from utils.images.data import Dataset, LabeledImages
from utils.late import Tensor, torch
from utils.memory import Halving
from utils.processes import world_size
from utils.storage.record import peak_rss_bytes

if TYPE_CHECKING:
    from defense.elixir.rounds import Rounds
    from diffusion.denoiser import Denoiser
    from utils.classifier.networks import Classifier

log = logging.getLogger("dataelixir")
VOTED, TRAINED = 512, 512  # images that are measured on
VOTE_BYTES = 50  # of a vote while target labels are looked for: it, its support, and what resamples take of it


def purifying_pace(purifier: Purifier, victim: Classifier, data: LabeledImages) -> float:
    """Seconds that an image takes which is given all rounds, measured on one denoiser pass and one vote of a few images."""

    def one_pass(index: Tensor) -> float:
        x = purifier.start(data.images[index])
        t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        with torch.inference_mode():
            return seconds(lambda: purifier.predict_noise(x, t), purifier.device) / len(x)

    rows = torch.arange(min(len(data), rows_at_once(purifier.config, purifier.device)))
    each = next(
        Halving("purify_batch_size")(one_pass, rows)
    )  # the first part, as large as memory allows
    return purifier.passes_per_image * each + images_each(purifier.config) * vote_pace(
        victim, data, purifier.amp
    )


def rows_at_once(config: PurifyConfig, device: torch.device) -> int:
    """Images of a batch that a call of the denoiser works on: all, or ROWS of them at a time on a CPU."""
    return min(ROWS, config.purify_batch_size) if device.type == "cpu" else config.purify_batch_size


def vote_pace(model: Classifier, data: LabeledImages, amp: bool) -> float:
    """Seconds that a classifier takes to read an image, measured on a few."""
    some = data[:VOTED].images
    return seconds(lambda: predict(model, some, amp), model.device) / len(some)


def announced_pace(rounds: Rounds, least: int) -> float:
    """Seconds that an image takes, with all processes at work; said, with what follows from it, before a purification of `least` images or more."""
    purifier, data = rounds.purifier, rounds.data
    pace = purifying_pace(purifier, rounds.victim, data) / world_size()
    log.info(
        "purifying at T = %d: %d passes an image that is purified, %d images, %s, memory about %.1f GB",
        purifier.config.steps_T,
        purifier.passes_per_image,
        len(data),
        span(least, len(data), pace),
        purifying_bytes(purifier.config, data) / 1e9,
    )
    return pace


def training_pace(model: Classifier, config: TrainConfig, data: LabeledImages, flip: bool) -> float:
    """Seconds for an image and an epoch, measured on an epoch of a few images; `model` is trained by it."""
    sample = data[:TRAINED].to(model.device)
    trainer = Trainer(model, replace(config, frequency_save=0), "forecast", flip, together=False)
    return seconds(lambda: trainer.one_epoch(sample, 0), model.device) / len(sample)


def span(least: int, most: int, pace: float) -> str:
    """How long `least` to `most` images take, in words."""
    return (
        format_duration(pace * most)
        if least == most
        else f"{format_duration(pace * least)} to {format_duration(pace * most)}"
    )


def images_each(config: PurifyConfig) -> int:
    """The original and its intermediaries."""
    return 1 + config.rounds_n * config.last_steps_m


def purifying_bytes(config: PurifyConfig, data: LabeledImages) -> int:
    """Memory about: what this process has held so far, the set and a block of intermediaries three times more, and all votes."""
    pictures, votes = (
        3 * (len(data) + config.purify_batch_size * images_each(config)),
        len(data) * images_each(config),
    )
    return peak_rss_bytes() + data.images[0].numel() * pictures + VOTE_BYTES * votes


def classifier_lines(
    name: str,
    data: LabeledImages,
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device,
    epochs: int | None = None,
) -> str:
    """A line that says what training a classifier takes."""
    model = build_classifier(config.model, dataset.num_classes, dataset.info, (0, "forecast")).to(
        device
    )
    epochs = epochs or config.epochs
    total = training_pace(model, config, data, dataset.info.flip) * len(data) * epochs
    return f"{name}: {config.model}, {epochs} epochs of {len(data):,} images, about {format_duration(total)} on {device}"


def purifying_lines(
    data: LabeledImages, denoiser: Denoiser, config: Any, dataset: Dataset, device: torch.device
) -> list[str]:
    """Lines that say what purifying takes.

    Args:
        config: keys of DataElixir, or of another defence that purifies.
    """
    config = (
        replace(config, steps_T=min(AUTO_TOP, denoiser.t_max))
        if config.steps_T == "auto"
        else config
    )  # the dearest that auto may find
    purifier = purifier_for(
        denoiser, replace(config, compile="off"), len(data), 0, device, config.amp
    )
    model = (
        build_classifier(config.model, dataset.num_classes, dataset.info, (0, "forecast"))
        .to(device)
        .eval()
    )
    n, pace, passes, least = (
        len(data),
        purifying_pace(purifier, model, data),
        purifier.passes_per_image,
        smallest(data.labels, config),
    )
    images, picture = images_each(config), data.images[0].numel()
    count = (
        f"{n * passes:,} passes"
        if least == n
        else f"from {least * passes:,} passes (a sample shows that nothing stands out) to {n * passes:,} (all)"
    )
    return [
        f"purify: {n:,} images of {dataset.num_classes} classes, {passes} denoiser passes for each that is purified with {denoiser.name}: {count}",
        f"purify: time {span(least, n, pace)} on {device}, memory about {purifying_bytes(config, data) / 1e9:.1f} GB"
        f"{' beside that of the GPU' if device.type == 'cuda' else f', more where the denoiser needs much for a batch of {config.purify_batch_size}'}, "
        f"disk at most {n * (images + 4) * picture / 1e9:.2f} GB while it runs",
    ]


def defense_lines(
    name: str,
    data: LabeledImages,
    denoiser: Denoiser | None,
    config: Any,
    dataset: Dataset,
    device: torch.device,
) -> list[str]:
    """Lines that say what the defence `name` takes.

    Args:
        denoiser: the one it purifies with, if it does.
    """
    lines = purifying_lines(data, denoiser, config, dataset, device) if denoiser else []
    tuning = (
        getattr(config, "ft_epochs", None) or config.epochs if hasattr(config, "ft_epochs") else 0
    )
    if name == "none":
        return ["none: nothing"]
    if name == "dataelixir":
        return lines + [
            classifier_lines(
                "stage1 and finetune, if a backdoor is found",
                data,
                config,
                dataset,
                device,
                config.epochs + tuning,
            )
        ]
    if name == "strip":
        lines.append(strip_line(data, config, dataset, device))
    beside = (
        "inspection, which takes minutes more than this; then at most"
        if name == "spectre"
        else "at most"
    )
    return lines + [
        classifier_lines(f"{name}: {beside}", data, config, dataset, device, config.epochs + tuning)
    ]


def strip_line(data: LabeledImages, config: Any, dataset: Dataset, device: torch.device) -> str:
    """A line that says what STRIP's inspection takes: predictions on every image under every overlay."""
    from defense.harness.knowledge import clean_images

    model = (
        build_classifier(config.model, dataset.num_classes, dataset.info, (0, "forecast"))
        .to(device)
        .eval()
    )
    clean = len(clean_images(dataset, config.clean_share, config.random_seed))
    overlays = config.overlay_count(clean)
    votes = overlays * (len(data) + clean - overlays)
    took = format_duration(vote_pace(model, data, config.amp) * votes)
    return f"strip: inspection, {overlays} overlays on each of {len(data):,} images and {clean - overlays:,} clean ones, about {took} on {device}"


def smallest(labels: torch.Tensor, config: Any) -> int:
    """The images that are purified at least."""
    return (
        int(labels.bincount().clamp(max=config.sample_first).sum())
        if getattr(config, "target_first", False)
        else len(labels)
    )
