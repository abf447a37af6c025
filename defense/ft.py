"""Fine-tuning: the victim is trained further, by its own recipe, on a few clean images.

Nothing is detected. The simplest repair of a model, a baseline of Liu, Dolan-Gavitt, Garg,
"Fine-Pruning", RAID 2018, https://arxiv.org/abs/1805.12185

Epochs, rate, schedule and augmentation are those that the victim was trained with, where benchmarks
choose others for this step.
"""

from __future__ import annotations

from dataclasses import dataclass

from defense.harness.command import main
from defense.harness.defense import ToldCleanImages
from defense.harness.knowledge import clean_images


@dataclass(frozen=True)
class FineTuning(ToldCleanImages):
    """Fine-tuning on clean images."""

    def defend(self, data, victim, run):
        from defense.harness.result import Result

        clean = clean_images(run.dataset, self.clean_share, self.random_seed)
        return Result(run.train("benign", clean, victim))


if __name__ == "__main__":
    main("ft")
