"""Classifiers, made and kept: those of utils/classifier/networks.py, and every other architecture from timm, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import UserError, nearest
from utils.late import nn, torch
from utils.randomness import global_stream
from utils.storage import checksums
from utils.storage.record import replacing, shortened

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier
    from utils.images.data import Dataset, DatasetInfo


def build_classifier(
    name: str, num_classes: int, info: DatasetInfo, seed: Sequence[int]
) -> Classifier:
    """A freshly initialised classifier, the same for the same seed whatever ran before.

    Its weights lie in channels_last, the fastest order to train in. It is given here, to all alike: in another one sums may come out with other
    last bits, and a model that is read back from its file must not differ from the one that was just trained.

    Raises:
        UserError: neither one of MODELS nor a timm model.
    """
    from utils.classifier.networks import MODELS, Classifier

    with global_stream(*seed):
        body, width = MODELS[name]() if name in MODELS else _timm_body(name)
        return Classifier(body, width, num_classes, info).to(memory_format=torch.channels_last)


def check_model(name: str, dataset: Dataset) -> None:
    """Fail early: raises UserError where there is no such classifier, or it cannot read images of this size."""
    from utils.classifier.networks import MODELS

    if name in MODELS:  # ours read every size
        return
    model = build_classifier(name, dataset.num_classes, dataset.info, (0, "check")).eval()
    try:
        with torch.no_grad():
            model(dataset.train.images[:1].float() / 255)
    except Exception as error:  # each architecture says it in its own way
        h, w = dataset.train.images.shape[-2:]
        raise UserError(
            f"model: {name} cannot read images of {h}x{w} ({shortened(error)}); take another, or another --image_size"
        ) from None


def _timm_body(name: str) -> tuple[nn.Module, int]:
    import timm

    from utils.classifier.networks import MODELS

    try:
        body = (
            timm.create_model(name, pretrained=False, num_classes=0)
            if timm.is_model(name)
            else None
        )
    except RuntimeError:  # a known architecture with an unknown tag, such as resnet18.none
        body = None
    if body is None:
        known = [*MODELS, *timm.list_models()]
        raise UserError(
            f"model: '{name}' is neither {', '.join(MODELS)} nor a timm model.{nearest(name, known)}"
        )
    return body, getattr(
        body, "head_hidden_size", body.num_features
    )  # of some, the head widens what it pools


def save_classifier(model: Classifier, path: Path) -> None:
    """Write the weights as safetensors, complete or not at all."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(
            {key: value.contiguous().cpu() for key, value in model.state_dict().items()},
            str(temporary),
        )


def load_weights(model: Classifier, path: Path) -> Classifier:
    """Read weights into `model`.

    Raises:
        UserError: not a safetensors file, or one of another architecture or number of classes.
    """
    from safetensors.torch import load_file

    checksums.verify(path)
    try:
        model.load_state_dict(load_file(str(path)))
    except Exception as error:  # safetensors raises its own type, torch RuntimeError
        raise UserError(
            f"{path}: does not fit this model ({' '.join(str(error).split())[:160]}); "
            "delete it to have it made again"
        ) from None
    return model
