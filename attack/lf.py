"""LF: Zeng et al., "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective",
arXiv 2104.03413.

x' = clip(x + T) with one smooth pattern T for all images, which is searched for beforehand with a
clean classifier (attack/poisoning/smooth_pattern.py), or drawn.
"""

from dataclasses import dataclass

from attack.poisoning.command import main
from attack.poisoning.trigger import Trigger
from utils.config import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Seed


@dataclass(frozen=True)
class LowFrequency(Trigger):
    """LF: a smooth pattern, if searched for one that a classifier is weak against, on all images.

    Args:
        lf_amplitude: the pattern runs from 0 to this, of [0, 1] pixels (0.2 = 51 levels).
        lf_blur: standard deviation of the Gaussian blur, in 32nds of the image's side.
        lf_epochs: passes of the search over its images; 0: the pattern that the search would start
            from, which depends on nothing but lf_pattern, and is not asked to fool anyone.
        lf_pattern: seed of the pattern to start from; null is random_seed.
        lf_lr: learning rate of the search.
        lf_min_fooling: share of held-out images that must change class, else it is refused.
        surrogate_epochs: epochs of the clean classifier that the search is made with.
        fit_images: training images that classifier and search use; 5000 keep a CPU at minutes.
    """

    name = "lf"
    lf_amplitude: Fraction = 0.2
    lf_blur: PositiveFloat = 6.0
    lf_epochs: NonNegativeInt = 30
    lf_pattern: Seed | None = None  # type: ignore[valid-type]  # as in TrainConfig
    lf_lr: PositiveFloat = 0.1
    lf_min_fooling: Fraction = 0.2
    surrogate_epochs: PositiveInt = 15
    fit_images: PositiveInt = 5000

    @property
    def images_fitted_on(self):
        return self.fit_images if self.lf_epochs else 0

    def prepare(self, context):
        from attack.poisoning import smooth_pattern
        from attack.poisoning.fitting import fit_once

        if not self.lf_epochs:
            return self.with_fitted(pattern=smooth_pattern.unsearched(self, context))
        return self.with_fitted(**fit_once(smooth_pattern.fit, self, context))

    def stamp(self, x, index, split):
        return x + self.fitted["pattern"].float() / 255


if __name__ == "__main__":
    main(LowFrequency)
