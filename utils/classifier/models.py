"""Classifiers made, trained and kept: those of networks.py, and every architecture of timm."""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from utils.classifier.networks import MODELS, Classifier
from utils.classifier.training import Augmentation, Observer, Trainer
from utils.config import TrainConfig, UserError, nearest
from utils.images.data import Dataset, DatasetInfo, LabeledImages
from utils.randomness import global_stream
from utils.storage import checksums
from utils.storage.record import replacing, shortened


def build_classifier(
    name: str, num_classes: int, info: DatasetInfo, seed: tuple[int | str, ...]
) -> Classifier:
    """A freshly initialised classifier, the same for the same seed whatever ran before.

    All have their weights in channels_last, the fastest order to train in: in another one sums may
    have other last bits, and a model read from its file must be as the one that was just trained.

    Raises UserError where it is neither one of MODELS nor a timm model.
    """
    with global_stream(*seed):
        body, width = MODELS[name]() if name in MODELS else _timm_body(name)
        model = Classifier(body, width, num_classes, info)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def check_model(
    name: str, dataset: Dataset, batch_size: int = 2, advice: str = "another --image_size"
) -> None:
    """Fail early: UserError where there is no such classifier, or it cannot read such images.

    An untrained one reads black images of their size, as it would read a test image, and as it
    would be trained on `batch_size` of them; `advice` is what else may help.
    """
    model = build_classifier(name, dataset.num_classes, dataset.info, (0, "check"))
    try_reading(model.eval(), name, dataset, 1, f"take another --model, or {advice}")
    some = min(2, batch_size, len(dataset.train))
    try_reading(
        model.train(), name, dataset, some, "take another --model, or a larger --batch_size"
    )


def try_reading(model: nn.Module, name: str, dataset: Dataset, count: int, advice: str) -> None:
    """UserError where a classifier gives no logits (count, K) for `count` images of that size."""
    (h, w), classes = dataset.train.images.shape[-2:], dataset.num_classes
    try:
        with torch.no_grad(), global_stream(0, "check"):
            device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
            seen = tuple(model(torch.zeros(count, 3, h, w, device=device)).shape)
        if seen != (count, classes):
            raise ValueError(f"it gives {seen} where {(count, classes)} is needed")
    except Exception as error:  # noqa: BLE001 - each architecture says it in its own way
        words = f"{name} cannot read images of {h}x{w} ({shortened(error)})"
        raise UserError(f"model: {words}; {advice}") from None


def _timm_body(name: str) -> tuple[nn.Module, int]:
    import timm  # takes seconds, for few

    body: Any
    try:
        body = timm.create_model(name, num_classes=0) if timm.is_model(name) else None
    except RuntimeError:  # a known architecture with an unknown tag, such as resnet18.none
        body = None
    if body is None:
        hint = nearest(name, [*MODELS, *timm.list_models()])
        raise UserError(f"model: '{name}' is neither {', '.join(MODELS)} nor a timm model.{hint}")
    # the head of some widens what it pools
    return body, getattr(body, "head_hidden_size", body.num_features)


def save_classifier(model: Classifier, path: Path) -> None:
    """Write the weights as safetensors, complete or not at all."""
    weights = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, str(temporary))


def load_weights(model: Classifier, path: Path) -> Classifier:
    """Read weights into `model`; UserError where the file is damaged or of another model."""
    checksums.verify(path)
    try:
        model.load_state_dict(load_file(str(path)))
    except Exception as error:  # noqa: BLE001 - safetensors and torch each raise their own
        words = f"does not fit this model ({' '.join(str(error).split())[:160]})"
        raise UserError(f"{path}: {words}; delete it to have it made again") from None
    return model


def trained(
    name: str,
    data: LabeledImages,
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device,
    folder: Path,
    observer: Observer | None = None,
    start: Classifier | None = None,
    together: bool = True,
    augment: Augmentation | None = None,
) -> Classifier:
    """The model <name>.safetensors of `folder`, in eval mode; trained now where it is not there.

    Args:
        name: names the random stream as well.
        start: what is trained further, on a copy; None = from scratch.
        together: by all processes. What must not depend on their number is trained in one.
        augment: as in `Trainer`.

    Raises UserError as `Trainer.fit` does, where fewer than two samples are left to train on, or
    where the file is damaged.
    """
    if len(data) < 2:
        words = "training samples are left; loosen what this defence removes"
        raise UserError(f"{name}: {len(data)} {words}")
    key, info = (config.random_seed, name), dataset.info
    model = copy.deepcopy(start) or build_classifier(config.model, dataset.num_classes, info, key)
    model, file = model.to(device), folder / f"{name}.safetensors"
    if file.exists():
        return load_weights(model, file).eval()
    checkpoint = folder / f"{name}.checkpoint.pt"
    trainer = Trainer(model, config, name, info.flip, checkpoint, together, augment)
    trainer.fit(data, observer)
    save_classifier(model, file)
    return model
