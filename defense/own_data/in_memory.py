"""A set in memory, as tensors, arrays, pictures or a torch Dataset, as uint8 and int64 tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.config import UserError
from utils.images.data import LabeledImages, to_uint8
from utils.images.decoding import as_rgb
from utils.images.encoded import LABEL_COLUMNS, PICTURE_COLUMNS, known_column
from utils.storage.files import shortened

# labels beyond are numbers of something else, and tables of all pairs of classes fit no memory
MOST_CLASSES = 100_000


def as_labeled(data: Any, labels: Any) -> LabeledImages:
    """A set as uint8 (N, 3, H, W) and int64 (N,); `defense.purify.clean` says what it may be.

    Raises:
        UserError: shapes, types or labels that do not fit.
    """
    if labels is None:
        data, labels = _columns(data)
    pixels, numbers = _as_array(data, "images"), _as_array(labels, "labels")
    if pixels.ndim == 4 and pixels.shape[1] != 3 and pixels.shape[3] == 3:
        pixels = pixels.transpose(0, 3, 1, 2)
    floats = pixels.dtype.kind == "f"
    images = pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.size > 0
    integers = numbers.dtype.kind in "iu" and numbers.shape == pixels.shape[:1]
    if not images or not integers or not (floats or pixels.dtype == np.uint8):
        raise UserError(
            "data: images must be uint8, or floats in [0, 1], (N, 3, H, W) or (N, H, W, 3), and "
            f"labels integers (N,), not {pixels.dtype} {tuple(pixels.shape)} and "
            f"{numbers.dtype} {tuple(numbers.shape)}"
        )
    low, high = numbers.min(), numbers.max()
    if low < 0 or high >= MOST_CLASSES or len(np.unique(numbers)) < 2:
        raise UserError(
            "data: labels must be 0..K-1 with two or more classes present and K at most "
            f"{MOST_CLASSES:,}, found {low}..{high}"
        )
    levels = _rounded(pixels) if floats else torch.as_tensor(np.ascontiguousarray(pixels))
    return LabeledImages(levels, torch.as_tensor(numbers.astype(np.int64)))


def class_names(labels: Tensor, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes 0..K-1, by default their numbers; UserError where they are too few."""
    count = int(labels.max()) + 1
    names = tuple(map(str, range(count) if classes is None else classes))
    if len(names) < count:
        found = f"{len(names)} names, and labels up to {count - 1}"
        raise UserError(f"classes: {found}; give {count} names or more, or none")
    return names


def _columns(data: Any) -> tuple[list[Any], list[Any]]:
    """Images and labels of a Dataset; what its own code raises is left as it is."""
    if isinstance(data, (Tensor, np.ndarray)):
        reason = "only a Dataset of (image, label) pairs brings its own"
        raise UserError(f"labels: give integers (N,) with these images; {reason}")
    if isinstance(data, Mapping):
        advice = f"give one of them, data[{next(iter(data), 'train')!r}]"
        raise UserError(f"data: {type(data).__name__} holds parts, {', '.join(data)}; {advice}")
    if not hasattr(data, "__len__"):
        advice = "give a Dataset that has one, or images and labels"
        raise UserError(f"data: {type(data).__name__} has no length; {advice}")
    columns = _named_columns(data)
    images, labels = [], []
    for k in range(len(data)):
        pair = [data[k][name] for name in columns] if columns else data[k]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            advice = "give a Dataset of such pairs, or images and labels"
            raise UserError(f"data: sample {k} is no pair of image and label; {advice}")
        images.append(_item(pair[0], f"image {k}"))
        labels.append(pair[1])
    return images, labels


def _named_columns(data: Any) -> list[str]:
    """The columns of images and labels of a Dataset of Hugging Face; empty where it is none."""
    if not hasattr(data, "features"):
        return []
    names = list(data.features)
    wanted = {"image": PICTURE_COLUMNS, "label": LABEL_COLUMNS}
    places = {kind: known_column(names, known) for kind, known in wanted.items()}
    for kind, place in places.items():
        if place is None:
            advice = f"rename it to {kind} (data.rename_column)"
            raise UserError(f"data: no column for each {kind} among {', '.join(names)}; {advice}")
    return [names[place] for place in places.values() if place is not None]


def names_in(data: Any) -> Sequence[str] | None:
    """What a Dataset of Hugging Face calls its classes; None where it does not say."""
    columns = _named_columns(data)
    return getattr(data.features[columns[1]], "names", None) if columns else None


def _as_array(column: Any, what: str) -> np.ndarray:
    if not isinstance(column, (list, tuple)):
        return _item(column, what)
    arrays = [_item(item, what) for item in column]
    if not arrays:
        raise UserError(f"data: no {what}; give two samples or more")
    kinds = {(array.shape, array.dtype.kind.replace("u", "i")): array.dtype for array in arrays}
    if len(kinds) > 1:
        shown = " and ".join(f"{dtype} {shape}" for (shape, _), dtype in list(kinds.items())[:2])
        found = f"{what} of different shapes or types, {shown}"
        raise UserError(f"data: {found}; bring them all to one")
    return np.stack(arrays)


def _item(value: Any, what: str) -> np.ndarray:
    """A tensor, an array, a number or a PIL image, read as an image file is, as an array."""
    try:
        if hasattr(value, "convert"):
            return np.asarray(as_rgb(value))
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OSError) as error:  # BadImage is a ValueError
        advice = "give tensors, arrays or PIL images, and integers for labels"
        raise UserError(f"data: {what} cannot be used ({shortened(error)}); {advice}") from None


def _rounded(pixels: np.ndarray) -> Tensor:
    """uint8 of floats in [0, 1]; up to half a level outside is the rounding of a resize."""
    kind = np.float32 if pixels.dtype.itemsize <= 4 else np.float64
    known = torch.as_tensor(np.ascontiguousarray(pixels, dtype=kind))
    low, high = (bound.item() for bound in known.aminmax())
    if not (low > -0.5 / 255 and high < 255.5 / 255):
        advice = "give uint8 where they are 0..255, or undo a normalisation first"
        raise UserError(f"data: floats from {low:.4g} to {high:.4g}, expected [0, 1]; {advice}")
    return to_uint8(known)
