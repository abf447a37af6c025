"""What a defence can be told beyond the data and the victim.

Whoever takes something from here declares it in KNOWLEDGE.
DataElixir's reading of the problem gives a defence a training set and no more. Other methods ask
for a few images that are surely clean, or for the share of poison; oracles, which mark what is
reachable at all, ask for everything. Every report and table prints what a method was told, since
methods that were told different things do not compete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.config import UserError

if TYPE_CHECKING:  # no torch at module level: every defence takes its words from here
    from torch import Tensor

    from utils.images.data import Dataset, LabeledImages
    from utils.storage.record import Record

TRUTH = "truth (oracle)"
POISON_RATE = "poison rate"
CLEAN_IMAGES = "clean images"
DENOISER = "clean-trained denoiser"


@dataclass(frozen=True)
class OracleTruth:
    """What an oracle knows: poison bool (N,), and the labels int64 (N,) before poisoning."""

    poison: Tensor
    original_labels: Tensor


def oracle_truth(record: Record) -> OracleTruth:
    """TRUTH: which samples of this record's training set are poisoned, and what they were.

    Raises:
        UserError: the record holds no truth.
    """
    from utils.storage.files import load_arrays

    for folder in (record.path, record.path.parent.parent):
        if (folder / "truth.npz").exists():
            content = load_arrays(folder / "truth.npz")
            return OracleTruth(content["poison"], content["original_labels"])
    raise UserError(
        f"{record.path}: holds no truth.npz, and this defence is an oracle; "
        "give a record that an attack script made"
    )


def poison_rate(record: Record) -> float:
    """POISON_RATE: the share of the training set that is poisoned, in [0, 1]."""
    return oracle_truth(record).poison.double().mean().item()


def clean_images(dataset: Dataset, share: float, seed: int) -> LabeledImages:
    """CLEAN_IMAGES: `share` of every class of the clean training set, drawn by `seed`.

    One or more of each class, but none of a class with a single image. The test images stay out of
    it, so that accuracy is measured on images that no defence has seen. An image of which the
    poisoned set holds a triggered copy may be among them.
    """
    import torch

    from utils.images.loaders import stratified_split
    from utils.randomness import key_seed

    _, drawn = stratified_split(dataset.train.labels.numpy(), share, key_seed(seed, "clean images"))
    return dataset.train[torch.as_tensor(drawn)]
