"""The set that is to be cleaned, wherever it comes from, and the denoiser that fits it."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from defense.elixir.config import DataElixirConfig, PurifyConfig
from defense.elixir.paste_gap import FEWEST
from defense.elixir.power import refuse_few_classes
from defense.elixir.purifier import open_denoiser
from diffusion.card import CARDS
from diffusion.denoiser import Denoiser
from utils.classifier.models import check_model, try_reading
from utils.classifier.networks import Classifier
from utils.config import ReadConfig, UserError, candidate_paths
from utils.devices import pick_device
from utils.images.array_file import ArrayFile
from utils.images.data import Dataset
from utils.images.file_table import TABLES
from utils.images.layout import Keys, Layout
from utils.images.layouts import open_layout
from utils.storage.record import RECORDS, Record


@dataclass(frozen=True)
class Given:
    """A set as its owner keeps it.

    Attributes:
        path: never written to.
        dataset: name of the data set, for its denoiser and normalisation; empty if unknown.
    """

    path: Path
    layout: Layout
    dataset: str

    @property
    def side(self) -> int | None:
        """The side of all images; None where they differ in size or are no squares."""
        height, width = self.layout.sizes[0]
        return height if len(self.layout.sizes) == 1 and height == width else None

    @property
    def shown_sizes(self) -> str:
        shown = ", ".join(f"{height}x{width}" for height, width in self.layout.sizes[:3])
        return shown + (" and others" if len(self.layout.sizes) > 3 else "")

    def refuse_overlap(self, out: Path) -> None:
        """Raises UserError where `out` and the set lie in each other, or `out` is a file."""
        data = self.path.parent if self.path.suffix.lower() in TABLES else self.path
        a, b = data.resolve(), out.resolve()
        if b.is_relative_to(a) or a.is_relative_to(b):
            apart = "lie in each other; name a folder apart from the data"
            raise UserError(f"out: {out} and the data at {self.path} {apart}")
        if out.exists() and not out.is_dir():
            raise UserError(f"out: {out} is a file; name a new or an empty folder")


def open_given(text: str, keys: Keys = Keys(), how: ReadConfig | None = None) -> Given:  # noqa: B008 - it is frozen
    """The set that `--data` means: a path, or the name of a record (record/NAME is one, too).

    Args:
        how: how a folder of images is read.

    Raises:
        UserError: nothing there, nothing that can be read, or too few classes.
    """
    places = [*candidate_paths(text), RECORDS / text]
    path = next((place.resolve() for place in places if place.exists()), None)
    if path is None:
        raise UserError("data: nothing found at " + " or ".join(dict.fromkeys(map(str, places))))
    records, array_file = RECORDS.resolve(), path / "poisoned.npz"
    is_record = array_file.exists() and (path / "config.yaml").exists()
    if is_record and path.is_relative_to(records):
        record = Record(str(path.relative_to(records)), must_exist=True)
        given = Given(path, ArrayFile(array_file), str(record.config().get("dataset", "")))
    else:
        layout = open_layout(path, keys, how)
        is_cifar10 = layout.kind == "CIFAR python files" and len(layout.classes) == 10
        given = Given(path, layout, "cifar10" if is_cifar10 else "")
    refuse_few(given.layout.labels, len(given.layout.classes))
    return given


def refuse_few(labels: Tensor, count: int) -> None:
    """Raises UserError where fewer than two of `count` classes have samples."""
    present = len(labels.unique())
    if present < 2:
        found = f"only {present} of the {count} classes has samples" if count > 1 else "one class"
        raise UserError(
            f"data: {found}; a backdoor leads to one class from others: give two or more"
        )


def refuse_small(labels: Tensor, config: DataElixirConfig) -> None:
    """Raises UserError where no class has samples enough for a verdict, or too few are compared.

    Args:
        labels: int64 (N,), as given.
    """
    sizes = labels.bincount()
    if config.rules.pastes and (largest := int(sizes.max())) < FEWEST:
        found = f"{len(labels)} images, and the largest class has {largest}"
        reason = f"poisoned ones cannot be told from clean ones in a class of fewer than {FEWEST}"
        raise UserError(f"data: {found}; {reason}: give {FEWEST} or more of a class")
    if config.preset == "published":
        refuse_few_classes(len(sizes), "data")


def refuse_unfit(dataset: Dataset, config: DataElixirConfig, victim: Classifier | None) -> None:
    """Raises UserError where a network cannot do its part, so that no run begins in vain.

    That is: the classifier that is to be trained (or `victim`) cannot read images of this size, or
    there is no such device.
    """
    pick_device(config.device)
    advice = "--resize and a --ddpm for images of the size that it reads"
    check_model(config.model, dataset, config.batch_size, advice)
    if victim is not None:
        name = f"the given {type(victim).__name__}"
        try_reading(
            victim, name, dataset, 1, f"give one for {dataset.num_classes} classes, or none"
        )


def fitting_denoiser(given: Given, config: PurifyConfig, resize: bool) -> Denoiser:
    """The denoiser that `config.ddpm` names, if it serves this size or `resize` allows others.

    Raises:
        UserError: no denoiser named or known for the set, or images of other sizes.
    """
    side, card, known = given.side, CARDS.get(config.ddpm), CARDS.values()
    if config.ddpm == "auto" and not any(given.dataset in card.datasets for card in known):
        known_to = "only its owner knows what a set shows"
        told = f"name the denoiser, since {known_to}. {_cards(side)}\n{_advice(given)}"
        raise UserError(f"ddpm: {told}")
    if card and side and not resize and card.resolution != side:
        raise UserError(
            f"ddpm: the card {card.name} works on {card.resolution}x{card.resolution} images, "
            f"these are {side}x{side}; give --resize, or another denoiser. "
            f"{_cards(side)}\n{_advice(given)}"
        )
    denoiser = open_denoiser(config, None if resize else side, given.dataset)
    if not resize and side != denoiser.resolution:
        raise UserError(
            f"resize: the images are {given.shown_sizes}, the denoiser {denoiser.name} works on "
            f"{denoiser.resolution}x{denoiser.resolution}; give --resize to analyse them at that "
            f"size. {_cards(side)}"
        )
    return denoiser


def _cards(side: int | None) -> str:
    if side is None:
        return "The images differ in size."
    cards = (card for card in CARDS.values() if card.resolution == side)
    fitting = ", ".join(f"{card.name} (made for {card.purpose})" for card in cards)
    return f"Cards for {side}x{side}: {fitting or 'none'}."


def _advice(given: Given) -> str:
    """How a denoiser is trained on such images, and what it learns from the suspect set itself."""
    size = ["--image_size", str(given.side)] if given.side not in (None, 32) else []
    words = ["python", "diffusion/train.py", "--data", str(given.path), *size, "--out", "DENOISER"]
    return (
        f"Train one: {shlex.join(words)}   then --ddpm DENOISER. Give it other images of the same "
        "kind: one trained on the suspect set learns to redraw the trigger (docs/denoisers.md)."
    )
