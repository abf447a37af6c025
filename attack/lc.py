"""LC: Turner et al., "Label-Consistent Backdoor Attacks", arXiv 1912.02771.

Training images of the target class keep their label: x' = patch(clip(x + d)), where d (PGD within eps, against the
image's own class) makes the class hard to see, so that the victim must read the patch. Test images: the patch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from attack.poisoning.fitting import cached, require, surrogate
from attack.poisoning.progress import Progress
from attack.poisoning.run import main
from attack.poisoning.trigger import FitContext, Trigger
from utils.classifier.training import EVAL_BATCH, predict
from utils.config import Fraction, PositiveFloat, PositiveInt
from utils.images.data import LabeledImages, to_uint8, to_unit
from utils.late import F, Tensor, enable_grad, torch

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

SIGNS = (-1, -1, 1), (-1, 1, -1), (1, -1, 1)  # lower right corner; the other corners mirror it
MISREAD = {
    "standard": 0.2,
    "robust": 0.6,
}  # PGD is refused where the surrogate still reads more than this


@dataclass(frozen=True)
class LabelConsistent(Trigger):
    """LC: target-class images made hard by PGD, and a checkered patch.

    Args:
        lc_eps: bound of the perturbation per pixel, in levels of 255.
        lc_step: step of PGD, in levels of 255.
        lc_steps: steps of PGD, without a random start.
        lc_amplitude: what the patch adds or subtracts, of [0, 1] pixels; 1 is a checker of black and white.
        lc_corners: 1 (lower right) or 4, which random crops cannot cut off altogether.
        lc_surrogate: the classifier that PGD attacks: robust (FGSM training within lc_eps) or standard.
        surrogate_epochs: epochs of that classifier.
        fit_images: training images that it is trained on; 5000 keep a CPU at minutes.
    """

    name: ClassVar[str] = "lc"
    label_mode: ClassVar[Literal["dirty", "clean"]] = "clean"
    lc_eps: PositiveInt = 8
    lc_step: PositiveFloat = 1.5
    lc_steps: PositiveInt = 100
    lc_amplitude: Fraction = 1.0
    lc_corners: Literal[1, 4] = 1
    lc_surrogate: Literal["robust", "standard"] = "robust"
    surrogate_epochs: PositiveInt = 15
    fit_images: PositiveInt = 5000

    def prepare(self, context):
        keys = {"target": context.target} | {
            key: getattr(self, key)
            for key in (
                "lc_eps",
                "lc_step",
                "lc_steps",
                "lc_surrogate",
                "surrogate_epochs",
                "fit_images",
            )
        }
        return self.with_fitted(
            patch=checker(context.dataset.train.images.shape[-1], self.lc_corners),
            **cached(self.name, context, keys, lambda progress: self._perturb(context, progress)),
        )

    def stamp(self, x, index, split):
        if split == "train":
            x = x + self._perturbation(index)
        return x.clamp(0, 1) + self.lc_amplitude * self.fitted["patch"]

    def _perturbation(self, index: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] units of the training images `index`; 0 for images of other classes."""
        row = torch.searchsorted(self.fitted["pool"], index).clamp_max(len(self.fitted["pool"]) - 1)
        known = self.fitted["pool"][row] == index
        return self.fitted["perturbation"][row].float() / 255 * known[:, None, None, None]

    def _perturb(self, context: FitContext, progress: Progress) -> dict[str, Tensor]:
        eps = self.lc_eps / 255
        model = surrogate(
            context,
            self.fit_images,
            self.surrogate_epochs,
            eps if self.lc_surrogate == "robust" else 0.0,
        )
        pool = (context.dataset.train.labels == context.target).nonzero().flatten()
        data = context.dataset.train[pool]
        hard, parts = data.images.clone(), torch.arange(len(data)).split(EVAL_BATCH)
        for number in progress.epochs("pgd", len(parts), hard=hard):
            hard[parts[number]] = to_uint8(
                pgd(model, data[parts[number]], eps, self.lc_step / 255, self.lc_steps)
            )
        before, after = (
            predict(model, images).eq(data.labels).double().mean().item()
            for images in (data.images, hard)
        )
        require(
            self.name,
            after <= MISREAD[self.lc_surrogate],
            f"the {self.lc_surrogate} surrogate reads {before:.3f} of the class before PGD and {after:.3f} after, "
            f"at most {MISREAD[self.lc_surrogate]:g} allowed",
            "raise lc_eps or lc_steps, or set lc_surrogate: standard",
        )
        perturbation = hard.short() - data.images.short()
        assert perturbation.abs().max() <= self.lc_eps, "PGD left its bound"
        return {"pool": pool, "perturbation": perturbation}


def checker(size: int, corners: int) -> Tensor:
    """(3, size, size) of -1, 0 and 1: the signs in the lower right corner, or mirrored into all four."""
    patch = torch.zeros(3, size, size)
    patch[:, -3:, -3:] = torch.tensor(SIGNS)
    return patch + patch.flip(1) + patch.flip(2) + patch.flip(1, 2) if corners == 4 else patch


@enable_grad
def pgd(model: Classifier, data: LabeledImages, eps: float, step: float, steps: int) -> Tensor:
    """[0, 1] (N, 3, H, W): a batch moved away from its labels by sign steps, never more than eps per pixel."""
    data = data.to(model.device)
    clean = x = to_unit(data.images)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(model(x), data.labels, reduction="sum"), x
        )
        x = (x + step * gradient.sign()).clamp(clean - eps, clean + eps).clamp(0, 1)
    return x.detach().cpu()


if __name__ == "__main__":
    main(LabelConsistent)
