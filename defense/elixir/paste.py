"""What purification takes away, pasted on other images: does the victim obey it? (ours)

A trigger makes any image read as its label, and purification takes a part of it away: the residual
r_i = strength (x_i - E[x_0 | x_t]), an image less what the denoiser expects behind noise at level
t. Added to images of other classes, the residual of a poisoned sample makes the victim read that
sample's label; what is taken from a clean image does not. The mean probability of that label is the
sample's paste rate. It is causal: it asks for no comparison with other classes, and it sees samples
whose label was never changed.

E[x_0 | x_t] is one denoiser pass, averaged over a few draws of the noise: nobody has to recognise
the image, so the level can be higher than where votes are taken, and no reverse steps are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.elixir.purifier import Purifier
from defense.elixir.sampling import stratified
from utils.classifier.networks import Classifier
from utils.classifier.training import batched, predict
from utils.images.data import LabeledImages
from utils.randomness import keyed_generator, per_sample

LEVEL = 150  # noise level of the expected image, where the denoiser was trained so far
DRAWS = 4  # of noise, whose expected images are averaged
STRENGTH = 2.0  # of a residual; less than the whole trigger is taken away
PASTED = 16  # images that a residual is pasted on
PATTERN_ON = 128  # images that a pattern, the mean of many residuals, is pasted on
BANK = 32  # images of each class that these are drawn from
AT_ONCE = 32  # residuals that are pasted together


def pasted(images: Tensor, residuals: Tensor) -> Tensor:
    """uint8 images (..., 3, H, W) with residuals, in levels, added: clamped and rounded."""
    return (images + residuals).clamp(0, 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Paster:
    """Takes residuals and pastes them.

    Attributes:
        data: the training set as received.
        victim: a classifier trained on it, in eval mode.
        purifier: whose denoiser and noise are used.
        bank: int64 (M,), places in `data` of images that the victim reads as their label.
        seed: key of the draws.
    """

    data: LabeledImages
    victim: Classifier
    purifier: Purifier
    bank: Tensor
    seed: int

    @classmethod
    def of(cls, data: LabeledImages, victim: Classifier, purifier: Purifier) -> Paster:
        """With a bank of BANK images of each class; all of them where the victim reads none right."""
        seed, classes = purifier.seed, int(data.labels.max()) + 1
        bank = stratified(data.labels, torch.full((classes,), BANK), seed)
        right = predict(victim, data.images[bank], purifier.amp) == data.labels[bank]
        return cls(data, victim, purifier, bank[right] if right.any() else bank, seed)

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals int16 (B, 3, H, W) in levels and paste rates float32 (B,) of samples (B,).

        The rate is nan where no image of another class is there to paste on.
        """
        images = self.data.images[index]
        taken = images.float() - self.purifier.expected(images, index, LEVEL, DRAWS)
        residuals = (STRENGTH * taken).round().to(torch.int16)
        return residuals, self.rates(residuals, index)

    def obeyed(self, pattern: Tensor, label: int, source: int | None = None) -> float:
        """Mean probability of `label` where a pattern float (3, H, W), in levels, is pasted.

        On PATTERN_ON images of other classes, the same for every pattern, or on those of the class
        `source` alone; 0 where there are none.
        """
        of_bank = self.data.labels[self.bank]
        others = self.bank[of_bank != label if source is None else of_bank == source]
        generator = keyed_generator(self.seed, "pattern")
        onto = others[torch.randperm(len(others), generator=generator)[:PATTERN_ON]]
        if not len(onto):
            return 0.0
        return self._probabilities(pasted(self.data.images[onto], pattern))[:, label].mean().item()

    def imposed(self, pattern: Tensor) -> Tensor:
        """By how much the probability of each class rises where a pattern (3, H, W) is pasted.

        float64 (K, K), mean over the bank's images of the class of the row; 0 where the row's class
        has none, and on the diagonal.
        """
        images, labels = self.data.images[self.bank], self.data.labels[self.bank]
        before, after = map(self._probabilities, (images, pasted(images, pattern)))
        rise = (after - before).double()
        total = rise.new_zeros(rise.shape[1], rise.shape[1]).index_add(0, labels, rise)
        count = labels.bincount(minlength=len(total)).clamp(min=1)
        return (total / count[:, None]).fill_diagonal_(0)

    def _probabilities(self, images: Tensor) -> Tensor:
        """float32 (B, K), as the victim reads uint8 images (B, 3, H, W)."""
        probability = lambda x: self.victim(x).float().softmax(1)
        return batched(probability, images, self.victim.device, self.purifier.amp)

    def rates(self, residuals: Tensor, index: Tensor) -> Tensor:
        """Paste rates float32 (B,) of residuals int16 (B, 3, H, W) of the samples `index` (B,)."""
        own, of_bank = self.data.labels[index], self.data.labels[self.bank]
        draws = per_sample(
            lambda g: torch.rand(len(self.bank), generator=g), index, self.seed, "paste"
        )
        draws[own[:, None] == of_bank] = torch.inf
        order = draws.argsort(dim=1, stable=True)[:, :PASTED]
        usable = draws.gather(1, order).isfinite()
        read = []
        for part in torch.arange(len(index)).split(AT_ONCE):
            onto = self.data.images[self.bank[order[part]]]
            seen = self._probabilities(pasted(onto, residuals[part, None]).flatten(0, 1))
            label = own[part].repeat_interleave(onto.shape[1])
            read.append(seen.gather(1, label[:, None]).view(onto.shape[:2]))
        hits = torch.cat(read)
        return torch.where(usable, hits, torch.nan).nanmean(1)
