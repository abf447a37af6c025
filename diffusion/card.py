"""Denoisers known by name: where their weights are, what they are for, and how they were made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CARD_FOLDER = Path(__file__).parent / "cards"


@dataclass(frozen=True)
class Card:
    """One set of weights that is known by name.

    Attributes:
        name: What the user calls it.
        source: A folder below diffusion/cards/, or a Hugging Face hub id.
        sha256: Of the weights file; None where it could not be pinned.
        datasets: The data sets that it was trained for; 'auto' finds it by these.
        resolution: Side of its images in pixels.
        note: Where the weights come from, with the command that trained them.
    """

    name: str
    source: str
    sha256: str | None
    datasets: tuple[str, ...]
    resolution: int
    note: str

    @property
    def purpose(self) -> str:
        """What it is for, in a word or two."""
        return ", ".join(self.datasets) or "photographs of many kinds"


CARDS = {
    "digits": Card(
        "digits",
        "digits",
        "9d37587d94f968ddbd49efb0359af3dcc2bc6d3361f02b500d6365ca3c642603",
        ("digits",),
        32,
        "Scikit-learn's digits (1.1M parameters, noise levels below 400), made by: "
        "python diffusion/train.py --dataset digits --out DIR --ddpm_T 400 --channels 32,64,64 "
        "--layers_per_block 1 --patch 2 --dropout 0 --batch_size 64 --lr 0.002 --steps 6000 "
        "--minutes 14 --ema_decay 0.998 --half true (the time limit ended it after 1,914 steps)",
    ),
    "gtsrb_small": Card(
        "gtsrb_small",
        "gtsrb_small",
        "38ed09b3350c07526957d2de880422b79eefb05531ca9a750dcab36ffa6929de",
        ("gtsrb",),
        32,
        "A 13,070-image subset of GTSRB (every third frame of each training track; 3.5M "
        "parameters, noise levels below 150), made by: python diffusion/train.py --dataset gtsrb "
        "--out DIR --channels 48,96,128 --layers_per_block 1 --patch 2 --dropout 0 "
        "--batch_size 64 --lr 0.001 --steps 8000 --minutes 42 --ema_decay 0.998 --half true "
        "(on one busy CPU core; the time limit ended it after 3,684 steps)",
    ),
    "small32": Card(
        "small32",
        "small32",
        "f2eca582576b477d0a76d6901be5a556e54bb8103dc75b13418d41869ec972a7",
        (),
        32,
        "For photographs of many kinds: CIFAR-10's 50,000 training images (as JPEG) and the "
        "13,070-image subset of GTSRB in one image folder (3.5M parameters, noise levels below "
        "250), made by: python diffusion/train.py --dataset imagefolder --dataset_path BOTH "
        "--out DIR --ddpm_T 250 --channels 48,96,128 --layers_per_block 1 --patch 2 --dropout 0 "
        "--batch_size 64 --lr 0.001 --steps 15000 --minutes 75 --ema_decay 0.999 --half true "
        "(on one busy CPU core; the time limit ended it after 10,701 steps)",
    ),
    "cifar10": Card(
        "cifar10",
        "google/ddpm-cifar10-32",
        None,
        ("cifar10",),
        32,
        "Ho et al.'s CIFAR-10 network (35.7M parameters, all 1000 noise levels), downloaded from "
        "the Hugging Face hub once. Its hash could not be pinned; the sha256 of what was loaded "
        "is logged and kept in Denoiser.sha256.",
    ),
}
