"""What a run will cost, from a small batch measured on the spot: passes, minutes, memory and disk."""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Optional

from defense.purifier import AUTO_TOP, Purifier, PurifyConfig
from utils.compiled import ROWS
from utils.config import TrainConfig
from utils.cost import clock, seconds
from utils.data import Dataset, LabeledImages
from utils.late import torch
from utils.models import build_classifier
from utils.record import peak_rss_bytes
from utils.training import Trainer, predict

if TYPE_CHECKING:
    from diffusion.denoiser import Denoiser
    from utils.networks import Classifier

PURIFIED, VOTED, TRAINED = ROWS, 512, 512   # images that are measured on


def purifying_pace(purifier: Purifier, victim: Classifier, data: LabeledImages) -> float:
    """Seconds that an image takes which is given all rounds, measured on one denoiser pass and one vote of a few images."""
    some = data[:VOTED].images
    x = purifier.start(some[:min(PURIFIED, purifier.config.purify_batch_size)])
    t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    with torch.inference_mode():
        one_pass = seconds(lambda: purifier.predict_noise(x, t), purifier.device) / len(x)
    one_vote = seconds(lambda: predict(victim, some, purifier.amp), victim.device) / len(some)
    return purifier.passes_per_image * one_pass + images_each(purifier.config) * one_vote


def training_pace(model: Classifier, config: TrainConfig, data: LabeledImages, flip: bool) -> float:
    """Seconds for an image and an epoch, measured on an epoch of a few images; `model` is trained by it."""
    sample = data[:TRAINED].to(model.device)
    trainer = Trainer(model, replace(config, frequency_save=0), "forecast", flip, together=False)
    return seconds(lambda: trainer.one_epoch(sample, 0), model.device) / len(sample)


def span(least: int, most: int, pace: float) -> str:
    """How long `least` to `most` images take, in words."""
    return clock(pace * most) if least == most else f"{clock(pace * least)} to {clock(pace * most)}"


def images_each(config: PurifyConfig) -> int:
    """The original and its intermediaries."""
    return 1 + config.rounds_n * config.last_steps_m


def purifying_bytes(config: PurifyConfig, data: LabeledImages) -> int:
    """Memory about: what this process has held so far, the set once more, a block of intermediaries three times."""
    return peak_rss_bytes() + data.images[0].numel() * 3 * (len(data) + config.purify_batch_size * images_each(config))


def classifier_lines(name: str, data: LabeledImages, config: TrainConfig, dataset: Dataset, device: torch.device, epochs: Optional[int] = None) -> str:
    """A line that says what training a classifier takes."""
    model = build_classifier(config.model, dataset.num_classes, dataset.info, (0, "forecast")).to(device)
    epochs = epochs or config.epochs
    total = training_pace(model, config, data, dataset.info.flip) * len(data) * epochs
    return f"{name}: {config.model}, {epochs} epochs of {len(data):,} images, about {clock(total)} on {device}"


def purifying_lines(data: LabeledImages, denoiser: Denoiser, config: Any, dataset: Dataset, device: torch.device) -> list[str]:
    """Lines that say what purifying takes.

    Args:
        config: keys of DataElixir, or of another defence that purifies.
    """
    config = replace(config, steps_T=min(AUTO_TOP, denoiser.t_max)) if config.steps_T == "auto" else config   # the dearest that auto may find
    purifier = Purifier(denoiser.to(device), config, 0, device, config.amp)
    model = build_classifier(config.model, dataset.num_classes, dataset.info, (0, "forecast")).to(device).eval()
    n, pace, passes, least = len(data), purifying_pace(purifier, model, data), purifier.passes_per_image, smallest(data.labels, config)
    images, picture = images_each(config), data.images[0].numel()
    count = f"{n * passes:,} passes" if least == n else f"from {least * passes:,} passes (a sample shows that nothing stands out) to {n * passes:,} (all)"
    return [
        f"purify: {n:,} images of {dataset.num_classes} classes, {passes} denoiser passes for each that is purified with {denoiser.name}: {count}",
        f"purify: time {span(least, n, pace)} on {device}, memory about {purifying_bytes(config, data) / 1e9:.1f} GB"
        f"{' beside that of the GPU' if device.type == 'cuda' else f', more where the denoiser needs much for a batch of {config.purify_batch_size}'}, "
        f"disk at most {n * (images + 4) * picture / 1e9:.2f} GB while it runs",
    ]


def defense_lines(name: str, data: LabeledImages, denoiser: Optional[Denoiser], config: Any, dataset: Dataset, device: torch.device) -> list[str]:
    """Lines that say what the defence `name` takes.

    Args:
        denoiser: the one it purifies with, if it does.
    """
    lines = purifying_lines(data, denoiser, config, dataset, device) if denoiser else []
    tuning = getattr(config, "ft_epochs", None) or config.epochs if hasattr(config, "ft_epochs") else 0
    if name == "none":
        return ["none: nothing"]
    if name == "dataelixir":
        return lines + [classifier_lines("stage1 and finetune, if a backdoor is found", data, config, dataset, device, config.epochs + tuning)]
    return lines + [classifier_lines(f"{name}: at most", data, config, dataset, device, config.epochs + tuning)]


def smallest(labels: torch.Tensor, config: Any) -> int:
    """The images that are purified at least."""
    return int(labels.bincount().clamp(max=config.sample_first).sum()) if getattr(config, "target_first", False) else len(labels)
