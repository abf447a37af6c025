"""The set as it is being purified: which label and which image each sample has so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from defense.elixir.decisions import Decisions, Example
from defense.elixir.selection import choose, image_distances
from defense.elixir.store import IntermediaryStore
from defense.elixir.verdict import UNKNOWN, Candidates, Verdict
from utils.classifier.training import extract_features, predict
from utils.images.data import LabeledImages
from utils.late import F, Tensor, torch

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier


@dataclass(frozen=True)
class Draft:
    """N samples under purification.

    Attributes:
        given: int64 (N,), labels as received.
        images: uint8 (N, 3, H, W), the images chosen so far.
        labels: int64 (N,), the labels decided so far.
        verdict: int64 (N,) of Verdict.
        column: int64 (N,), the chosen image among the intermediaries, 0 = the original.
        pixel, feature: float64 (N,), its distances from the original; nan where the original stays.
    """

    given: Tensor
    images: Tensor
    labels: Tensor
    verdict: Tensor
    column: Tensor
    pixel: Tensor
    feature: Tensor

    @classmethod
    def unchanged(cls, data: LabeledImages, verdict: Tensor) -> Draft:
        """Every sample as received."""
        nan = torch.full((len(data),), torch.nan, dtype=torch.float64)
        return cls(
            data.labels, data.images, data.labels, verdict, torch.zeros_like(data.labels), nan, nan
        )

    def updated(self, parts: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> Draft:
        """A copy with new values in some rows; a column is copied once, however many parts there are.

        Args:
            parts: (rows int64 (B,), {attribute: its new values (B, ...)}), one after the other.
        """
        own: dict[str, Tensor] = {}
        for index, columns in parts:
            for key, value in columns.items():
                if key not in own:
                    own[key] = getattr(self, key).clone()
                own[key][index] = value.to(own[key].dtype)
        return replace(self, **own)

    def rows(self, which: Tensor) -> LabeledImages:
        """The samples that a mask names, as a training set."""
        return LabeledImages(self.images[which], self.labels[which])

    @property
    def suspicious(self) -> Tensor:
        return self.verdict == Verdict.SUSPICIOUS

    def decisions(self, votes: Tensor, is_target_class: Tensor) -> Decisions:
        """The table of what was decided, with the votes int64 (N, 1+nm) behind it (all UNKNOWN: the sample was not purified)."""
        count = lambda labels: torch.where(
            votes[:, 0] == UNKNOWN, -1, (votes[:, 1:] == labels[:, None]).sum(1)
        )
        return Decisions(
            self.verdict,
            self.labels,
            is_target_class[self.given],
            count(self.given),
            count(self.labels),
            self.pixel,
            self.feature,
            self.column,
            (votes[:, 1:] != UNKNOWN).sum(1),
        )


@dataclass(frozen=True)
class Selector:
    """Chooses purified images by their distance from the original, as the victim's features and SSIM see it.

    Attributes:
        store: the intermediaries.
        victim: its features measure distance.
        volume, rank, original_eligible: see `image_distances` and `choose`.
    """

    store: IntermediaryStore
    victim: Classifier
    volume: bool
    rank: float
    original_eligible: bool

    def select(self, images: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Draft columns for samples with intermediaries uint8 (B, 1+nm, 3, H, W), of which `kept` bool (B, 1+nm) may be taken."""
        b, m = images.shape[:2]
        features = extract_features(self.victim, images.flatten(0, 1)).view(b, m, -1)
        distance = image_distances(images, features, self.volume)
        column = choose(distance.total, kept, self.rank, original_eligible=self.original_eligible)
        rows, moved = torch.arange(b), column > 0
        measured = lambda d: torch.where(moved, d[rows, column], torch.nan)
        return {
            "images": images[rows, column],
            "column": column,
            "pixel": measured(distance.pixel),
            "feature": measured(distance.feature),
        }

    def take_poisoned(self, draft: Draft, candidates: Candidates) -> Draft:
        """POISONED samples get the label that the intermediaries agree on, and one of these (algorithm.md 3.6)."""
        wanted = (draft.verdict == Verdict.POISONED).nonzero().flatten()
        return draft.updated(
            (
                index,
                {"labels": candidates.top[index], **self.select(images, candidates.kept[index])},
            )
            for index, images in self.store.fetch(wanted)
        )

    def settle_suspicious(
        self, draft: Draft, model: Classifier, candidates: Candidates, source: str
    ) -> tuple[Draft, Tensor]:
        """SUSPICIOUS samples get the label that `model` reads, and one of the images that it reads the same way, or of all, where it reads none so.

        Args:
            model: a model trained without them.
            source: whose label they get: raw, the raw image's; purified, the most common among the intermediaries; raw_then_purified, the raw
                image's, unless that is the given label, which a trigger may have said.

        Returns:
            The draft, and bool (N,): samples whose label is also the one that the victim saw most often (consensus).
        """
        consensus = torch.zeros_like(draft.suspicious)

        def settlements() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
            for index, images in self.store.fetch(draft.suspicious.nonzero().flatten()):
                read = predict(model, images.flatten(0, 1)).view(images.shape[:2])
                read = torch.where(
                    candidates.kept[index], read, UNKNOWN
                )  # all are kept that were made
                labels = settled_labels(read, draft.given[index], source)
                consensus[index] = labels == candidates.top[index]
                yield index, {"labels": labels, **self.select(images, read == labels[:, None])}

        return draft.updated(settlements()), consensus

    def examples(self, index: Tensor) -> list[Example]:
        """All intermediaries of the given samples."""
        return [
            Example(int(i), x)
            for indices, images in self.store.fetch(index)
            for i, x in zip(indices, images)
        ]


def settled_labels(read: Tensor, given: Tensor, source: str) -> Tensor:
    """int64 (B,): one label for each sample whose images a model reads as `read` int64 (B, 1+nm), UNKNOWN: not made; see `Selector.settle_suspicious`."""
    raw, purified = (
        read[:, 0],
        F.one_hot(read[:, 1:] - UNKNOWN).sum(1)[:, 1:].argmax(1),
    )  # of equals the smallest label
    return {
        "raw": raw,
        "purified": purified,
        "raw_then_purified": torch.where(raw == given, purified, raw),
    }[source]
