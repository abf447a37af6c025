"""The set that is to be cleaned, wherever it comes from, and the denoiser that fits it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.elixir.config import PurifyConfig
from defense.elixir.purifier import open_denoiser
from diffusion.card import CARDS
from utils.config import UserError, candidate_paths
from utils.images.data import LabeledImages, to_uint8
from utils.images.decoding import as_rgb
from utils.images.layouts import ArrayFile, Layout, open_layout
from utils.late import torch
from utils.storage.files import shortened
from utils.storage.record import RECORDS, Record

if TYPE_CHECKING:
    from diffusion.denoiser import Denoiser

MOST_CLASSES = 100_000  # labels beyond are numbers of something else; tables of all pairs of classes would not fit into memory


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
    if (
        (path / "poisoned.npz").exists()
        and (path / "config.yaml").exists()
        and path.is_relative_to(RECORDS.resolve())
    ):
        record = Record(str(path.relative_to(RECORDS.resolve())), must_exist=True)
        return Given(
            path, ArrayFile(path / "poisoned.npz"), str(record.config().get("dataset", ""))
        )
    layout = open_layout(path)
    return Given(
        path,
        layout,
        "cifar10" if layout.kind == "CIFAR python files" and len(layout.classes) == 10 else "",
    )


def fitting_denoiser(given: Given, config: PurifyConfig, resize: bool) -> Denoiser:
    """The denoiser that `config.ddpm` names, if it serves images of this size or `resize` allows others.

    Raises:
        UserError: no denoiser named or known for the set, images of other sizes; says which cards fit and how one is trained.
    """
    sizes = given.layout.sizes
    side = sizes[0][0] if len(sizes) == 1 and sizes[0][0] == sizes[0][1] else None
    if config.ddpm == "auto" and not any(given.dataset in card.datasets for card in CARDS.values()):
        raise UserError(
            f"ddpm: name the denoiser, since only its owner knows what a set shows. {_cards(side)}\n{_advice(given, side)}"
        )
    denoiser = open_denoiser(
        config, None if resize or side is None else _same(side, config, given), given.dataset
    )
    if not resize and side != denoiser.resolution:
        shown = ", ".join(f"{h}x{w}" for h, w in sizes[:3])
        raise UserError(
            f"resize: the images are {shown}{' and others' if len(sizes) > 3 else ''}, the denoiser {denoiser.name} works on "
            f"{denoiser.resolution}x{denoiser.resolution}; give --resize to analyse them at that size. {_cards(side)}"
        )
    return denoiser


def _same(side: int, config: PurifyConfig, given: Given) -> int:
    """`side`, unless a card of another one is named."""
    card = CARDS.get(config.ddpm)
    if card and card.resolution != side:
        raise UserError(
            f"ddpm: the card {card.name} works on {card.resolution}x{card.resolution} images, these are {side}x{side}; "
            f"give --resize, or another denoiser. {_cards(side)}\n{_advice(given, side)}"
        )
    return side


def _cards(side: int | None) -> str:
    fitting = [
        f"{card.name} (made for {card.purpose})"
        for card in CARDS.values()
        if card.resolution == side
    ]
    return (
        f"Cards for {side}x{side}: {', '.join(fitting) or 'none'}."
        if side
        else "The images differ in size."
    )


def _advice(given: Given, side: int | None) -> str:
    """The command that trains a denoiser on images of this kind, and what is known about training it on the suspect set itself."""
    words = [
        "python",
        "diffusion/train.py",
        "--data",
        str(given.path),
        *(["--image_size", str(side)] if side and side != 32 else []),
        "--out",
        "DENOISER",
    ]
    return (
        f"Train one: {shlex.join(words)}   then --ddpm DENOISER. Give it other images of the same kind: one trained on the "
        'suspect set learns to redraw the trigger (README, "Denoisers").'
    )


def as_labeled(data: Any, labels: Any) -> LabeledImages:
    """A set that is in memory as uint8 (N, 3, H, W) and int64 (N,); see `defense.purify.clean` for what it may be.

    Raises:
        UserError: shapes, types or labels that do not fit.
    """
    if labels is None:
        data, labels = _columns(data)
    pixels, numbers = (
        _stacked(column, what) if isinstance(column, (list, tuple)) else _as_array(column, what)
        for column, what in ((data, "images"), (labels, "labels"))
    )
    pixels = (
        pixels.transpose(0, 3, 1, 2)
        if pixels.ndim == 4 and pixels.shape[1] != 3 and pixels.shape[3] == 3
        else pixels
    )
    floats, whole = pixels.dtype.kind == "f", numbers.dtype.kind in "iu"
    fits = (
        (floats or pixels.dtype == np.uint8)
        and pixels.ndim == 4
        and pixels.shape[1] == 3
        and pixels.size
    )
    if not fits or not whole or numbers.shape != pixels.shape[:1]:
        raise UserError(
            f"data: images must be uint8, or floats in [0, 1], (N, 3, H, W) or (N, H, W, 3), and labels integers (N,), "
            f"not {pixels.dtype} {tuple(pixels.shape)} and {numbers.dtype} {tuple(numbers.shape)}"
        )
    if numbers.min() < 0 or numbers.max() >= MOST_CLASSES or len(np.unique(numbers)) < 2:
        raise UserError(
            f"data: labels must be 0..K-1 with two or more classes present and K at most {MOST_CLASSES:,}, found {numbers.min()}..{numbers.max()}"
        )
    return LabeledImages(
        _rounded(pixels) if floats else torch.as_tensor(np.ascontiguousarray(pixels)),
        torch.as_tensor(numbers.astype(np.int64)),
    )


def class_names(labels: torch.Tensor, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes 0..K-1, by default their numbers.

    Args:
        labels: int64 (N,).

    Raises:
        UserError: fewer names than classes.
    """
    highest = int(labels.max())
    names = tuple(map(str, range(highest + 1) if classes is None else classes))
    if len(names) <= highest:
        raise UserError(
            f"classes: {len(names)} names, and labels up to {highest}; give {highest + 1} names or more, or none"
        )
    return names


def _columns(data: Any) -> tuple[list[Any], list[Any]]:
    """Images and labels of a Dataset; what its own code raises is left as it is.

    Raises:
        UserError: no Dataset with a length, or of other things than pairs.
    """
    if isinstance(data, (torch.Tensor, np.ndarray)):
        raise UserError(
            "labels: give integers (N,) with these images; only a Dataset of (image, label) pairs brings its own"
        )
    if not hasattr(data, "__len__"):
        raise UserError(
            f"data: {type(data).__name__} has no length; give a Dataset that has one, or images and labels"
        )
    images, labels = [], []
    for k in range(len(data)):
        pair = data[k]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise UserError(
                f"data: sample {k} is no pair of image and label; give a Dataset of such pairs, or images and labels"
            )
        images.append(_as_array(pair[0], f"image {k}"))
        labels.append(pair[1])
    return images, labels


def _stacked(items: Sequence[Any], what: str) -> np.ndarray:
    """Things of one shape, and of one kind of number, as one array.

    Raises:
        UserError: none at all, or things that differ.
    """
    arrays = [_as_array(item, what) for item in items]
    if not arrays:
        raise UserError(f"data: no {what}; give two samples or more")
    kinds = {(array.shape, array.dtype.kind.replace("u", "i")): array.dtype for array in arrays}
    if len(kinds) > 1:
        shown = " and ".join(f"{dtype} {shape}" for (shape, _), dtype in list(kinds.items())[:2])
        raise UserError(
            f"data: {what} of different shapes or types, {shown}; bring them all to one"
        )
    return np.stack(arrays)


def _rounded(pixels: np.ndarray) -> torch.Tensor:
    """uint8 of floats in [0, 1]; what lies outside by less than half a level is rounding of whoever made them.

    Raises:
        UserError: floats of another range, or nan.
    """
    known = torch.as_tensor(
        np.ascontiguousarray(pixels, dtype=np.float32 if pixels.dtype.itemsize <= 4 else np.float64)
    )
    low, high = (bound.item() for bound in known.aminmax())
    if not (low > -0.5 / 255 and high < 255.5 / 255):
        raise UserError(
            f"data: floats from {low:.4g} to {high:.4g}, expected [0, 1]; give uint8 where they are 0..255, or undo a normalisation first"
        )
    return to_uint8(known)


def _as_array(value: Any, what: str) -> np.ndarray:
    """A tensor, an array, a number or a PIL image, read as an image file is, as an array.

    Raises:
        UserError: something that cannot be one.
    """
    try:
        if hasattr(value, "convert"):
            return np.asarray(as_rgb(value))
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return np.asarray(value)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        OSError,
    ) as error:  # BadImage among them, and what PIL raises of a file cut short
        raise UserError(
            f"data: {what} cannot be used ({shortened(error)}); give tensors, arrays or PIL images, and integers for labels"
        ) from None
