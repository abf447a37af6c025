"""The set as it is being purified: which label and which image each sample has so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from defense.elixir.config import SELECTION_RANK, Rules
from defense.elixir.decisions import Cause, Decisions
from defense.elixir.purifier import requantised
from defense.elixir.selection import choose, image_distances
from defense.elixir.settlement import COUNTS, Reading
from defense.elixir.split import Groups
from defense.elixir.store import IntermediaryStore
from defense.elixir.verdict import UNKNOWN, Candidates, Verdict
from utils.classifier.networks import Classifier
from utils.classifier.training import extract_features, predict
from utils.images.data import LabeledImages


@dataclass(frozen=True)
class Draft:
    """N samples under purification.

    Attributes:
        given: int64 (N,), labels as received.
        images: uint8 (N, 3, H, W), the images chosen so far.
        labels: int64 (N,), the labels decided so far.
        verdict: int64 (N,) of Verdict.
        column: int64 (N,), the chosen image among the intermediaries, 0 = the original.
        pixel, feature: float64 (N,), its distances from the original; nan where that stays.
    """

    given: Tensor
    images: Tensor
    labels: Tensor
    verdict: Tensor
    column: Tensor
    pixel: Tensor
    feature: Tensor

    @classmethod
    def unchanged(cls, data: LabeledImages, verdict: Tensor, truncate: bool = False) -> Draft:
        """Every sample as received; with `truncate`, its image as purified ones are quantised."""
        images = requantised(data.images) if truncate else data.images
        nan = torch.full((len(data),), torch.nan, dtype=torch.float64)
        original = torch.zeros_like(data.labels)
        return cls(data.labels, images, data.labels, verdict, original, nan, nan)

    @classmethod
    def settled(cls, data: LabeledImages, groups: Groups, reading: Reading) -> Draft:
        """Samples of accused classes as a benign model reads them, or left out; images as received.

        POISONED is who takes another label or carries a trigger under its own.
        """
        sure, accused = reading.sure(COUNTS), groups.accused
        labels = torch.where(sure, reading.labels, data.labels)
        poisoned = sure & ((labels != data.labels) | groups.carriers)
        verdict = torch.where(poisoned, int(Verdict.POISONED), int(Verdict.BENIGN))
        verdict[accused & ~sure] = Verdict.LEFT_OUT
        return replace(cls.unchanged(data, verdict), labels=labels)

    @property
    def left_out(self) -> Tensor:
        """bool (N,): the samples that are not given out."""
        return self.verdict == Verdict.LEFT_OUT

    def updated(self, parts: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> Draft:
        """A copy with new values in some rows; a column is copied once for all parts.

        A part is (rows int64 (B,), {attribute: its new values (B, ...)}).
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
        """bool (N,): the samples that the benign model is to settle."""
        return self.verdict == Verdict.SUSPICIOUS

    def decisions(
        self, votes: Tensor, is_target_class: Tensor, cause: Cause | None = None
    ) -> Decisions:
        """The table of what was decided, of votes int64 (N, 1+nm) and target labels bool (K,)."""
        unseen = votes[:, 0] == UNKNOWN
        count = lambda labels: torch.where(unseen, -1, (votes[:, 1:] == labels[:, None]).sum(1))
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
            cause,
        )


@dataclass(frozen=True)
class Selector:
    """Chooses purified images by their distance from the original, in pixels and the victim's
    features."""

    store: IntermediaryStore
    victim: Classifier
    rules: Rules

    def select(self, images: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Columns of a draft for samples whose image is chosen.

        Of `images` uint8 (B, 1+nm, 3, H, W), those that `kept` bool (B, 1+nm) names may be taken.
        """
        b, m = images.shape[:2]
        features = extract_features(self.victim, images.flatten(0, 1)).view(b, m, -1)
        distance = image_distances(images, features, self.rules.ssim_volume)
        eligible = self.rules.original_eligible
        column = choose(distance.total, kept, SELECTION_RANK, original_eligible=eligible)
        rows, moved = torch.arange(b), column > 0
        measured = lambda d: torch.where(moved, d[rows, column], torch.nan)
        pixel, feature = measured(distance.pixel), measured(distance.feature)
        chosen = images[rows, column]
        return {"images": chosen, "column": column, "pixel": pixel, "feature": feature}

    def take_poisoned(self, draft: Draft, candidates: Candidates) -> Draft:
        """POISONED samples get the label that their intermediaries agree on, and one of these."""
        wanted = (draft.verdict == Verdict.POISONED).nonzero().flatten()
        return draft.updated(
            (index, {"labels": candidates.top[index], **self.select(x, candidates.kept[index])})
            for index, x in self.store.fetch(wanted)
        )

    def take_as_read(self, draft: Draft, model: Classifier) -> Draft:
        """POISONED samples get one of their purified images that `model` reads as their label.

        Where there is none, the image stays as received.
        """

        def chosen() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
            wanted = (draft.verdict == Verdict.POISONED).nonzero().flatten()
            for index, images in self.store.fetch(wanted):
                read = predict(model, images.flatten(0, 1)).view(images.shape[:2])
                kept = read == draft.labels[index][:, None]
                some = kept[:, 1:].any(1)
                if some.any():
                    yield index[some], self.select(images[some], kept[some])

        return draft.updated(chosen())

    def settle_suspicious(
        self, draft: Draft, model: Classifier, candidates: Candidates
    ) -> tuple[Draft, Tensor]:
        """SUSPICIOUS samples get the label that `model`, trained without them, reads, and an image
        that it reads so; where there is none, one of all their images.

        Returns:
            The draft, and bool (N,): samples whose label is also the one that the victim saw most
            often among their intermediaries (consensus).
        """
        consensus = torch.zeros_like(draft.suspicious)

        def settlements() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
            for index, images in self.store.fetch(draft.suspicious.nonzero().flatten()):
                read = predict(model, images.flatten(0, 1)).view(images.shape[:2])
                labels = read[:, 0]
                consensus[index] = labels == candidates.top[index]
                yield index, {"labels": labels, **self.select(images, read == labels[:, None])}

        return draft.updated(settlements()), consensus
