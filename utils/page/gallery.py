"""The changed samples of a record, for the gallery of its page: columns, and sprite sheets.

A sheet is one picture with many samples' tiles, embedded as base64 text. The page decodes a sheet
only when a sample on it is looked at, so ten thousand samples cost a browser no more than reading.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, features

MOST = 10_000  # samples that a page shows
PER_SHEET = 256  # samples on one sheet
LOSSLESS_UP_TO = 2_000
COLUMNS = 32  # tiles side by side


@dataclass(frozen=True)
class Sheets:
    """Sprite sheets: base64 `texts`, each of at most `per_sheet` samples of `tiles` tiles."""

    texts: list[str]
    per_sheet: int
    tiles: int
    across: int
    mime: str


def is_changed(table: dict[str, np.ndarray]) -> np.ndarray:
    """bool (N,): rows of decisions.csv whose label or image changed or whose sample went."""
    return (
        (table["given_label"] != table["new_label"])
        | (table.get("round", -1) != -1)
        | (table.get("kept", 1) == 0)
    )


def changed_rows(table: dict[str, np.ndarray]) -> np.ndarray:
    """int64: the changed rows, the most confident first, MOST of them at most."""
    rows = np.flatnonzero(is_changed(table))
    confidence = table.get("confidence", np.full(len(table["index"]), np.nan))[rows]
    return rows[np.argsort(-np.nan_to_num(confidence, nan=-1.0), kind="stable")][:MOST]


def sheets(images: np.ndarray, lossless: bool = True) -> Sheets | None:
    """Sheets of uint8 images (S, T, 3, H, W): S samples of T tiles; None where S is 0."""
    if not len(images):
        return None
    tiles, (h, w) = images.shape[1], images.shape[-2:]
    across = max(tiles, COLUMNS // tiles * tiles)
    per_sheet = max(1, PER_SHEET * 2 // tiles)
    kind = "WEBP" if features.check("webp") else "PNG"
    texts = [
        _encoded(images[k : k + per_sheet].reshape(-1, 3, h, w), across, kind, lossless)
        for k in range(0, len(images), per_sheet)
    ]
    return Sheets(texts, per_sheet, tiles, across, f"image/{kind.lower()}")


def _encoded(tiles: np.ndarray, across: int, kind: str, lossless: bool) -> str:
    count, _, h, w = tiles.shape
    rows = -(-count // across)
    padded = np.concatenate([tiles, np.zeros((rows * across - count, 3, h, w), np.uint8)])
    sheet = (
        padded.reshape(rows, across, 3, h, w)
        .transpose(0, 3, 1, 4, 2)
        .reshape(rows * h, across * w, 3)
    )
    file = io.BytesIO()
    options = (
        {"lossless": lossless, "quality": 60 if lossless else 92, "method": 3}
        if kind == "WEBP"
        else {}
    )
    Image.fromarray(sheet).save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def truth_words(
    rows: np.ndarray, table: dict[str, np.ndarray], truth: dict[str, np.ndarray]
) -> list[str]:
    """What each of the samples `rows` is in truth, and whether its new label is right."""
    kinds = np.where(truth["poison"], "poisoned", np.where(truth["cover"], "cover", "clean"))[rows]
    right = (table["new_label"] == truth["original_labels"])[rows]
    return [f"{kind}, new label {'right' if ok else 'wrong'}" for kind, ok in zip(kinds, right)]


@dataclass(frozen=True)
class Gallery:
    """What the page's script is given.

    Attributes:
        samples: columns of equal length, in gallery order.
        pairs: given and chosen image of each sample.
        strips: given image and the last of every round, for the samples whose `strip` is not -1.
        size: (H, W) of a tile.
        total: changed samples, of which `samples` may hold only the first.
    """

    samples: dict[str, list[Any]]
    pairs: Sheets | None
    strips: Sheets | None
    size: tuple[int, int]
    total: int


def build(
    table: dict[str, np.ndarray],
    given: np.ndarray,
    chosen: np.ndarray,
    examples: dict[str, np.ndarray] | None,
    truth: dict[str, np.ndarray] | None,
) -> Gallery:
    """The gallery of a record.

    Args:
        table: columns of decisions.csv, N rows.
        given, chosen: uint8 (N, 3, H, W), the images before and after.
        examples: `index` int64 (E,) and `images` uint8 (E, 1+n, 3, H, W) of a few of them, if kept.
        truth: of a made-up case: `poison`, `cover` bool (N,) and `original_labels` int64 (N,).
    """
    rows, total = changed_rows(table), int(is_changed(table).sum())
    place = {int(index): k for k, index in enumerate(examples["index"])} if examples else {}
    samples = {
        "index": rows.tolist(),
        "given": table["given_label"][rows].tolist(),
        "new": table["new_label"][rows].tolist(),
        "verdict": table["verdict"][rows].tolist(),
        "strip": [place.get(int(row), -1) for row in rows],
        "confidence": [
            None if np.isnan(c) else round(float(c), 4)
            for c in table.get("confidence", np.full(len(given), np.nan))[rows]
        ],
    }
    samples["out"] = (table.get("kept", np.ones(len(given)))[rows] == 0).tolist()
    samples |= {key: table[key][rows].tolist() for key in ("reason", "path") if key in table}
    samples |= {"truth": truth_words(rows, table, truth)} if truth else {}
    pairs = np.stack([given[rows], chosen[rows]], axis=1)
    strips = sheets(examples["images"]) if examples else None
    return Gallery(
        samples, sheets(pairs, len(rows) <= LOSSLESS_UP_TO), strips, tuple(given.shape[-2:]), total
    )
