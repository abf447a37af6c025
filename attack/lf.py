"""LF: Zeng et al., "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", arXiv 2104.03413.

x' = clip(x + T) with one smooth pattern T = 0.2 minmax(G(u)) for all images, G a wide Gaussian blur. u is searched for
with a clean classifier f: Adam on the cross-entropy of f(clip(x + T)) and the attack's label, over batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from attack.poisoning.fitting import batches, cached, fit_split, require, surrogate
from attack.poisoning.poison import LabelMap
from attack.poisoning.progress import Progress
from attack.poisoning.run import main
from attack.poisoning.trigger import FitContext, Trigger
from utils.classifier.training import predict
from utils.config import Fraction, PositiveFloat, PositiveInt, as_flat_dict
from utils.images.data import LabeledImages, to_uint8, to_unit
from utils.late import F, Tensor, torch
from utils.randomness import keyed_generator

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier


@dataclass(frozen=True)
class LowFrequency(Trigger):
    """LF: a smooth pattern that a clean classifier is already weak against, added to the whole image.

    Args:
        lf_amplitude: the pattern runs from 0 to this, of [0, 1] pixels (0.2 = 51 levels).
        lf_blur: standard deviation of the Gaussian blur, in 32nds of the image's side; smaller is less smooth.
        lf_epochs: passes of the search over its images.
        lf_lr: learning rate of the search.
        lf_min_fooling: the pattern is refused where fewer held-out images than this share change class.
        surrogate_epochs: epochs of the clean classifier that the search is made with.
        fit_images: training images that classifier and search use; 5000 keep a CPU at minutes.
    """

    name: ClassVar[str] = "lf"
    lf_amplitude: Fraction = 0.2
    lf_blur: PositiveFloat = 6.0
    lf_epochs: PositiveInt = 30
    lf_lr: PositiveFloat = 0.1
    lf_min_fooling: Fraction = 0.2
    surrogate_epochs: PositiveInt = 15
    fit_images: PositiveInt = 5000

    def prepare(self, context):
        keys = as_flat_dict(self) | {"target": context.target}
        return self.with_fitted(
            **cached(self.name, context, keys, lambda progress: self._search(context, progress))
        )

    def stamp(self, x, index, split):
        return x + self.fitted["pattern"].float() / 255

    def _search(self, context: FitContext, progress: Progress) -> dict[str, Tensor]:
        model = surrogate(context, self.fit_images, self.surrogate_epochs)
        data, held_out = fit_split(context, self.fit_images)
        pattern = self._optimise(
            model, data, LabelMap(context.dataset.num_classes, context.target), context, progress
        )
        others = (
            held_out.images[held_out.labels != context.target]
            if context.target is not None
            else held_out.images
        )
        rate = fooling_rate(model, others, pattern)
        require(
            self.name,
            rate >= self.lf_min_fooling,
            f"{rate:.3f} of {len(others)} held-out images change class, at least {self.lf_min_fooling:g} should",
            "raise lf_epochs or lf_amplitude, or lower lf_blur",
        )
        return {"pattern": pattern}

    def _optimise(
        self,
        model: Classifier,
        data: LabeledImages,
        labels_to: LabelMap,
        context: FitContext,
        progress: Progress,
    ) -> Tensor:
        """uint8 (3, H, W): the pattern after `lf_epochs` passes."""
        u = (
            torch.randn(data.images.shape[1:], generator=keyed_generator(context.seed, self.name))
            .to(model.device)
            .requires_grad_()
        )
        blur = blur_matrix(u.shape[-1], self.lf_blur).to(model.device)
        smooth = lambda: self.lf_amplitude * minmax(blur @ u @ blur.T)
        adam = torch.optim.Adam([u], self.lf_lr)
        for epoch in progress.epochs("search", self.lf_epochs, pattern=u, adam=adam):
            for batch in batches(data, context.config.batch_size, context.seed, self.name, epoch):
                x = (to_unit(batch.images.to(model.device)) + smooth()).clamp(0, 1)
                loss = F.cross_entropy(model(x), labels_to(batch.labels).to(model.device))
                adam.zero_grad()
                loss.backward()
                adam.step()
        return to_uint8(smooth().detach().cpu())


def blur_matrix(size: int, sigma: float) -> Tensor:
    """(size, size): a Gaussian of `sigma` 32nds of the side as a matrix on rows; zeros beyond the border, not normalised."""
    at = torch.arange(size) * (32 / size)
    return torch.exp(-((at[:, None] - at) ** 2) / (2 * sigma**2))


def minmax(pattern: Tensor) -> Tensor:
    """Scaled to 0..1 over all channels together, so that channels may differ in strength."""
    low = pattern.min()
    return (pattern - low) / (pattern.max() - low).clamp_min(1e-12)


def fooling_rate(model: Classifier, images: Tensor, pattern: Tensor) -> float:
    """Share of uint8 images (N, 3, H, W) whose predicted class the pattern uint8 (3, H, W) changes."""
    triggered = to_uint8(to_unit(images) + to_unit(pattern))
    return (predict(model, images) != predict(model, triggered)).double().mean().item()


if __name__ == "__main__":
    main(LowFrequency)
