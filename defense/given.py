"""The set that is to be cleaned, wherever it comes from, and the denoiser that fits it."""
from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.purifier import PurifyConfig, open_denoiser
from diffusion.card import CARDS
from utils.config import UserError, candidate_paths
from utils.data import LabeledImages, to_uint8
from utils.late import torch
from utils.layouts import ArrayFile, Layout, open_layout
from utils.record import RECORDS, Record

if TYPE_CHECKING:
    from diffusion.denoiser import Denoiser


@dataclass(frozen=True)
class Given:
    """A set as its owner keeps it.

    Attributes:
        path: where it is; never written to.
        layout: its samples.
        dataset: name of the data set where that is known, for its denoiser and normalisation; else empty.
    """

    path: Path
    layout: Layout
    dataset: str


def open_given(text: str) -> Given:
    """The set that `--data` means: a path, or the name of a record (record/NAME is a path to one, too).

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    places = [*candidate_paths(text), RECORDS / text]
    path = next((place.resolve() for place in places if place.exists()), None)
    if path is None:
        raise UserError("data: nothing found at " + " or ".join(map(str, places)))
    if (path / "poisoned.npz").exists() and (path / "config.yaml").exists() and path.is_relative_to(RECORDS.resolve()):
        record = Record(str(path.relative_to(RECORDS.resolve())), must_exist=True)
        return Given(path, ArrayFile(path / "poisoned.npz"), str(record.config().get("dataset", "")))
    layout = open_layout(path)
    return Given(path, layout, "cifar10" if layout.kind == "CIFAR python files" and len(layout.classes) == 10 else "")


def fitting_denoiser(given: Given, config: PurifyConfig, resize: bool) -> Denoiser:
    """The denoiser that `config.ddpm` names, if it serves images of this size or `resize` allows others.

    Raises:
        UserError: no denoiser named or known for the set, images of other sizes; says which cards fit and how one is trained.
    """
    sizes = given.layout.sizes
    side = sizes[0][0] if len(sizes) == 1 and sizes[0][0] == sizes[0][1] else None
    if config.ddpm == "auto" and not any(given.dataset in card.datasets for card in CARDS.values()):
        raise UserError(f"ddpm: name the denoiser, since only its owner knows what a set shows. {_cards(side)}\n{_advice(given, side)}")
    denoiser = open_denoiser(config, None if resize or side is None else _same(side, config, given), given.dataset)
    if not resize and side != denoiser.resolution:
        shown = ", ".join(f"{h}x{w}" for h, w in sizes[:3])
        raise UserError(f"resize: the images are {shown}{' and others' if len(sizes) > 3 else ''}, the denoiser {denoiser.name} works on "
                        f"{denoiser.resolution}x{denoiser.resolution}; give --resize to analyse them at that size. {_cards(side)}")
    return denoiser


def _same(side: int, config: PurifyConfig, given: Given) -> int:
    """`side`, unless a card of another one is named."""
    card = CARDS.get(config.ddpm)
    if card and card.resolution != side:
        raise UserError(f"ddpm: the card {card.name} works on {card.resolution}x{card.resolution} images, these are {side}x{side}; "
                        f"give --resize, or another denoiser. {_cards(side)}\n{_advice(given, side)}")
    return side


def _cards(side: int | None) -> str:
    fitting = [f"{card.name} (made for {card.purpose})" for card in CARDS.values() if card.resolution == side]
    return f"Cards for {side}x{side}: {', '.join(fitting) or 'none'}." if side else "The images differ in size."


def _advice(given: Given, side: int | None) -> str:
    """The command that trains a denoiser on images of this kind, and what is known about training it on the suspect set itself."""
    words = ["python", "diffusion/train.py", "--data", str(given.path), *(["--image_size", str(side)] if side and side != 32 else []), "--out", "DENOISER"]
    return (f"Train one: {shlex.join(words)}   then --ddpm DENOISER. Give it other images of the same kind: one trained on the "
            "suspect set learns to redraw the trigger (README, \"Denoisers\").")


def as_labeled(data: Any, labels: Any) -> LabeledImages:
    """A set that is in memory as uint8 (N, 3, H, W) and int64 (N,); see `defense.purify.clean` for what it may be.

    Raises:
        UserError: shapes, types or labels that do not fit.
    """
    if labels is None:
        pairs = [(_as_array(image), int(label)) for image, label in (data[k] for k in range(len(data)))]
        data, labels = np.stack([image for image, _ in pairs]), [label for _, label in pairs]
    pixels, numbers = torch.as_tensor(np.ascontiguousarray(_as_array(data))), torch.as_tensor(_as_array(labels))
    pixels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 and pixels.shape[1] != 3 and pixels.shape[3] == 3 else pixels
    floats = pixels.is_floating_point()
    whole = not (numbers.is_floating_point() or numbers.dtype == torch.bool)
    fits = (floats or pixels.dtype == torch.uint8) and pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.numel()
    if not fits or not whole or numbers.shape != pixels.shape[:1]:
        raise UserError(f"data: images must be uint8, or floats in [0, 1], (N, 3, H, W) or (N, H, W, 3), and labels integers (N,), "
                        f"not {pixels.dtype} {tuple(pixels.shape)} and {numbers.dtype} {tuple(numbers.shape)}")
    if numbers.min() < 0 or len(numbers.unique()) < 2:
        raise UserError(f"data: labels must be 0..K-1 with two or more classes present, found {numbers.min()}..{numbers.max()}")
    return LabeledImages((_rounded(pixels) if floats else pixels).contiguous(), numbers.long())


def _rounded(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 of floats in [0, 1]; what lies outside by less than half a level is rounding of whoever made them.

    Raises:
        UserError: floats of another range, or nan.
    """
    low, high = (bound.item() for bound in pixels.aminmax())
    if not (low > -0.5 / 255 and high < 255.5 / 255):
        raise UserError(f"data: floats from {low:.4g} to {high:.4g}, expected [0, 1]; give uint8 where they are 0..255, or undo a normalisation first")
    return to_uint8(pixels)


def _as_array(image: Any) -> np.ndarray:
    """A tensor, an array or a PIL image as an array."""
    if hasattr(image, "convert"):
        return np.asarray(image.convert("RGB"))
    return image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
