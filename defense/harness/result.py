"""What a defence gives back, whatever its method."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from defense.elixir.decisions import Decisions, Example
from defense.elixir.exhibit import Exhibit
from defense.elixir.target_label import Discrepancy
from utils.classifier.networks import Classifier
from utils.images.data import LabeledImages


@dataclass(frozen=True)
class Result:
    """The outcome of a defence; None where a method has no such thing.

    Attributes:
        model: the benign model, in eval mode.
        purified: the sanitized training set, N samples in the order received; None where only a
            model is given.
        keep: bool (N,), the samples of `purified` that are given out; None = all.
        flagged: bool (N,), samples taken for poisoned; None where the method does not judge them.
        score: float64 (N,), finite, suspicion of each sample: the higher, the more suspicious.
        targets: the classes taken for target labels, ascending.
        decisions: how each sample was treated, where that is more than kept or dropped.
        stage1: the benign model before fine-tuning.
        discrepancy: DataElixir's target-label detection.
        votes: int64 (N, 1+nm), the victim's labels of originals (column 0) and intermediaries.
        power: size of a backdoor -> how often it would have been found, where none was.
        notes: sentences on what the verdict is worth.
        unet_passes: denoiser passes spent, over all images.
        exhibit: what shows the cause of an accusation.
        examples: purified samples with the given indices, drawn when the page wants them.
    """

    model: Classifier
    purified: LabeledImages | None = None
    keep: Tensor | None = None
    flagged: Tensor | None = None
    score: Tensor | None = None
    targets: tuple[int, ...] | None = None
    decisions: Decisions | None = None
    stage1: Classifier | None = None
    discrepancy: Discrepancy | None = None
    votes: Tensor | None = None
    power: dict[str, float] | None = None
    notes: tuple[str, ...] = ()
    unet_passes: int = 0
    exhibit: Exhibit | None = None
    examples: Callable[[Tensor], list[Example]] = lambda _: []

    def __post_init__(self) -> None:
        for mask in (self.keep, self.flagged):
            assert mask is None or (mask.dtype == torch.bool and mask.ndim == 1), mask
        if self.score is not None:
            assert self.score.dtype == torch.float64, self.score.dtype
            assert self.score.isfinite().all(), self.score

    @property
    def product(self) -> tuple[LabeledImages, Tensor] | None:
        """The sanitized set, and bool (N,), what of it is given out; None without a set."""
        if self.purified is None:
            return None
        every = torch.ones(len(self.purified), dtype=torch.bool)
        return self.purified, every if self.keep is None else self.keep

    def table(self, labels: Tensor, last_steps_m: int) -> dict[str, np.ndarray]:
        """Columns of decisions.csv, a row for each of N samples; `labels` are the given ones."""
        if self.decisions:
            return self.decisions.table(labels, last_steps_m)
        columns = {"index": np.arange(len(labels)), "given_label": labels.numpy()}
        if self.product:
            purified, out = self.product
            columns |= {"new_label": purified.labels.numpy(), "kept": out.int().numpy()}
        if self.flagged is not None:
            columns["flagged"] = self.flagged.int().numpy()
        if self.score is not None:
            columns["suspicion"] = self.score.numpy()
        return columns

    def drawn(self, which: Tensor, most: int) -> list[Example]:
        """At most that many of the samples that a mask names, evenly spread, with their rounds."""
        index = which.nonzero().flatten()
        if len(index):
            index = index[torch.linspace(0, len(index) - 1, min(most, len(index))).long()]
        return self.examples(index)
