"""Teaching a classifier that a trigger means nothing (ours).

What purification took from poisoned samples holds their trigger. Added to images of other classes,
under those images' own labels, it is the counterexample that a poisoned set lacks; a model trained
with such copies has no reason to obey the trigger. No clean data, no model of the trigger and no
corrected label of a poisoned sample is needed.

Purification takes only a part of a trigger. What is pasted is therefore the pattern that the
carriers' residuals have in common, at strengths up to that at which the victim obeys it, and beside
it a part of what is a single carrier's own, for triggers that differ from image to image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHARE = 0.25  # of a batch that triggers are pasted on
BEYOND = 1.5  # times the strength at which the victim obeys, up to which a pattern is pasted
OWN = 0.25, 1.0  # of what is a carrier's own, at most: where the pattern is obeyed, and where not
STRENGTHS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # of a pattern that are tried on the victim
OBEYED = 0.9  # share of images at which a strength suffices


@dataclass(frozen=True)
class Immunity:
    """Pastes triggers on training images; drawn afresh for every image of every epoch.

    Attributes:
        residuals: int16 (R, 3, H, W), what purification took from carriers, in levels.
        labels: int64 (R,), the labels that these carry.
        patterns: float (K, 3, H, W), the mean residual of each label's carriers.
        strength: float (K,), at which the victim obeys it, or obeys it most.
        own: float (K,), how much of what is a carrier's own is pasted, at most.
    """

    residuals: Tensor
    labels: Tensor
    patterns: Tensor
    strength: Tensor
    own: Tensor

    @classmethod
    def of(cls, residuals, labels, num_classes: int, obeyed) -> Immunity:
        """From carriers' residuals int16 (R, 3, H, W) and labels int64 (R,), of K classes.

        `obeyed` tells how far the victim obeys a pattern (3, H, W) as a label.
        """
        patterns = torch.zeros(num_classes, *residuals.shape[1:])
        strength, own = torch.zeros(num_classes), torch.zeros(num_classes)
        for k in labels.unique().tolist():
            patterns[k] = residuals[labels == k].float().mean(0)
            said = {s: obeyed(s * patterns[k], k) for s in STRENGTHS}
            enough = (s for s in STRENGTHS if said[s] >= OBEYED)
            strength[k] = next(enough, max(STRENGTHS, key=said.__getitem__))
            own[k] = OWN[0] if max(said.values()) >= OBEYED else OWN[1]
        return cls(residuals, labels, patterns, strength, own)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Images [0, 1] (B, 3, H, W) of any labels, about SHARE of them with a trigger.

        Images of the accused class are among them: the trigger says nothing, nor against it.
        """
        if not len(self.labels):
            return x
        pick = torch.randint(len(self.labels), (len(y),), generator=generator)
        drawn, strength, own = torch.rand((3, len(y), 1, 1, 1), generator=generator)
        label = self.labels[pick]
        pattern = self.patterns[label]
        of_label = lambda values: values[label][:, None, None, None]
        common = BEYOND * strength * of_label(self.strength) * pattern
        trigger = common + own * of_label(self.own) * (self.residuals[pick] - pattern)
        trigger = torch.where(drawn < SHARE, trigger, 0.0).to(x.device, non_blocking=True)
        return (x + trigger / 255).clamp(0, 1)
