"""Where intermediaries wait between the passes of a purification.

Each block of samples leaves one file: the votes of all, the images of those that are not unanimous.
Memory holds one block, and an interrupted purification goes on with the first one that is missing.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from defense.elixir.decisions import Example
from defense.elixir.verdict import UNKNOWN
from utils.storage.record import load_arrays, save_arrays

NO_RESIDUALS, NO_RATES = torch.empty(0, dtype=torch.int16), torch.empty(0)


@dataclass(frozen=True)
class Block:
    """What one batch of a purification gives.

    Attributes:
        index: int64 (B,), data set indices.
        votes: int64 (B, 1+nm), the victim's labels of originals (column 0) and intermediaries.
        anomalous: int64 (A,), data set indices of the samples whose images are kept.
        images: uint8 (A, 1+nm, 3, H, W), the original and the intermediaries of those.
        passes: denoiser passes spent on the block, over all its images.
        residuals: int16 (B, 3, H, W), what purification took (paste.py); empty where not asked.
        pasted: float32 (B,), paste rates; empty where not asked.
    """

    index: Tensor
    votes: Tensor
    anomalous: Tensor
    images: Tensor
    passes: int
    residuals: Tensor = NO_RESIDUALS
    pasted: Tensor = NO_RATES


class IntermediaryStore:
    """Files block-NUMBER.npz in `folder`, one for each `Block`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("block-*.npz"))

    def write(self, block: Block) -> None:
        """Keep one block; its name is that of its first sample."""
        file = self.folder / f"block-{int(block.index[0]):08d}.npz"
        save_arrays(file, **vars(block) | {"votes": block.votes.to(torch.int16)})

    def missing(self, wanted: Tensor) -> Tensor:
        """Those of the data set indices `wanted` (B,), in their order, that are in no block yet."""
        done = [load_arrays(path, "index")["index"] for path in self._files()]
        return wanted[~torch.isin(wanted, torch.cat(done))] if done else wanted

    def votes(self, total: int) -> Tensor:
        """int64 (total, 1+nm) in data set order; rows of samples in no block are UNKNOWN.

        Raises:
            ValueError: there is no block.
        """
        blocks = [load_arrays(path, "index", "votes") for path in self._files()]
        if not blocks:
            raise ValueError(f"{self.folder} holds no block")
        votes = torch.full((total, blocks[0]["votes"].shape[1]), UNKNOWN, dtype=torch.int64)
        for block in blocks:
            votes[block["index"]] = block["votes"].long()
        return votes

    def pasted(self, total: int) -> Tensor:
        """float32 (total,) in data set order, paste rates; nan where there is none."""
        rates = torch.full((total,), torch.nan)
        for path in self._files():
            block = load_arrays(path, "index", "pasted")
            rates[block["index"][: len(block["pasted"])]] = block["pasted"]
        return rates

    def residuals(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted indices (R,) and residuals int16 (R, 3, H, W) of those `wanted` that have one."""
        index, residuals = [], []
        for path in self._files():
            block = load_arrays(path, "index", "residuals")
            at = torch.isin(block["index"][: len(block["residuals"])], wanted)
            index.append(block["index"][: len(at)][at])
            residuals.append(block["residuals"][at])
        order = torch.cat(index).argsort()
        return torch.cat(index)[order], torch.cat(residuals)[order]

    @property
    def passes(self) -> int:
        """Denoiser passes that all blocks cost, over all images."""
        return sum(int(load_arrays(path, "passes")["passes"]) for path in self._files())

    def fetch(self, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices (B,) and images uint8 (B, 1+nm, 3, H, W) of the wanted samples, file by file."""
        for path in self._files():
            anomalous = load_arrays(path, "anomalous")["anomalous"]
            at = torch.isin(anomalous, wanted)
            if at.any():
                yield anomalous[at], load_arrays(path, "images")["images"][at]

    def examples(self, index: Tensor) -> list[Example]:
        """All intermediaries of the given samples."""
        fetched = self.fetch(index)
        return [Example(int(i), x) for rows, images in fetched for i, x in zip(rows, images)]

    def discard(self) -> None:
        """Delete the folder, with anything that a killed run left half-written in it."""
        shutil.rmtree(self.folder)
