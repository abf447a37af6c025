"""Denoisers known by name. How a shipped one was made says the denoiser.json beside its weights."""

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
    """

    name: str
    source: str
    sha256: str | None
    datasets: tuple[str, ...]
    resolution: int = 32

    @property
    def purpose(self) -> str:
        """What it is for, in a word or two."""
        return ", ".join(self.datasets) or "photographs of many kinds"


DIGITS = "9d37587d94f968ddbd49efb0359af3dcc2bc6d3361f02b500d6365ca3c642603"
GTSRB_SMALL = "38ed09b3350c07526957d2de880422b79eefb05531ca9a750dcab36ffa6929de"
SMALL32 = "f2eca582576b477d0a76d6901be5a556e54bb8103dc75b13418d41869ec972a7"
CARDS = {
    "digits": Card("digits", "digits", DIGITS, ("digits",)),
    "gtsrb_small": Card("gtsrb_small", "gtsrb_small", GTSRB_SMALL, ("gtsrb",)),
    "small32": Card("small32", "small32", SMALL32, ()),
    "cifar10": Card("cifar10", "google/ddpm-cifar10-32", None, ("cifar10",)),
}
