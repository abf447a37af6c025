"""Where intermediaries wait between the two passes of a purification.

Target labels are known only when every sample has been voted on, and only samples that carry one need their images
again. So each block of samples leaves one file: the votes of all, the images of those that are not unanimous. Memory
holds one block, and an interrupted purification goes on with the first block that is missing.
"""
from __future__ import annotations

import shutil
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from utils.record import load_arrays, save_arrays


class IntermediaryStore:
    """Files block-START-STOP.npz in `folder`, each with `votes` int16 (B, 1+nm), `anomalous` int64 (A,) data set indices
    and `images` uint8 (A, 1+nm, 3, H, W)."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _files(self) -> dict[int, tuple[int, Path]]:
        spans = {}
        for path in self.folder.glob("block-*-*.npz"):
            _, start, stop = path.stem.split("-")
            spans[int(start)] = (int(stop), path)
        return dict(sorted(spans.items()))

    def missing(self, total: int, batch: int) -> Iterator[tuple[int, int]]:
        """Spans of at most `batch` samples of 0..total-1 that have no file yet."""
        start, files = 0, self._files()
        while start < total:
            if start in files:
                start = files[start][0]
                continue
            later = [s for s in files if s > start]
            stop = min([start + batch, total, *later])
            yield start, stop
            start = stop

    def write(self, start: int, votes: Tensor, anomalous: Tensor, images: Tensor) -> None:
        """Keep one block: votes (B, 1+nm), and indices and images of its anomalous samples."""
        stop = start + len(votes)
        save_arrays(self.folder / f"block-{start:07d}-{stop:07d}.npz", votes=votes.to(torch.int16),
                    anomalous=anomalous, images=images)

    def votes(self) -> Tensor:
        """int64 (N, 1+nm) of all samples, in data set order."""
        return torch.cat([load_arrays(path)["votes"] for _, path in self._files().values()]).long()

    def fetch(self, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices (B,), images uint8 (B, 1+nm, 3, H, W)) of the wanted anomalous samples, a file at a time, ascending."""
        for start, (stop, path) in self._files().items():
            inside = wanted[(wanted >= start) & (wanted < stop)]
            if len(inside):
                block = load_arrays(path)
                at = torch.isin(block["anomalous"], inside)
                yield block["anomalous"][at], block["images"][at]

    def discard(self) -> None:
        """Delete the folder, with anything that a killed run left half-written in it."""
        shutil.rmtree(self.folder)
