"""Input-aware: Nguyen & Tran, "Input-Aware Dynamic Backdoor Attack", arXiv 2010.08138.

x' = x + M(x) (P(x) - x): two generators draw a small mask and a pattern for each image. M is trained first, alone, to
be small and different for different images; then P together with a throw-away classifier that must obey an image's own
trigger and not another's. Both are then frozen, and the attack becomes data: cover samples carry the trigger of
another image and keep their label. Unlike the published training, images are shifted by up to 4 pixels (there 5, and
turned by up to 10 degrees), and P's rate falls along a cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from attack.poisoning.fitting import (
    batches,
    cached,
    fit_split,
    fresh,
    network,
    one_by_one,
    require,
    straight_through,
    weights_of,
)
from attack.poisoning.poison import LabelMap
from attack.poisoning.progress import Progress
from attack.poisoning.run import main
from attack.poisoning.trigger import FitContext, Trigger
from utils.classifier.metrics import share
from utils.classifier.models import build_classifier
from utils.classifier.training import make_optimizer, predict
from utils.config import (
    Fraction,
    NonNegativeFloat,
    OpenFraction,
    PositiveInt,
    TrainConfig,
    UserError,
    as_flat_dict,
)
from utils.devices import pick_device
from utils.images.augmentation import random_crop_flip
from utils.images.data import LabeledImages, to_unit
from utils.late import F, Tensor, no_grad, torch
from utils.randomness import key_seed, keyed_generator

if TYPE_CHECKING:
    from attack.poisoning.networks import Generator
    from utils.classifier.networks import Classifier

MASK_SIZE = 0.032  # mean of the mask up to which its size costs nothing
MASK_LIMIT = 0.06  # and from which on it is refused
ADAM = {"lr": 0.01, "betas": (0.5, 0.9)}
Pair = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class InputAware(Trigger):
    """Input-aware: a trigger of its own for every image, drawn by a network.

    Args:
        cross_ratio: cover samples, which carry another image's trigger and keep their label, per poisoned sample.
        ia_width: channels of the generators' first level; 32 is the published size, 8 sixteen times cheaper.
        ia_mask_epochs: passes over fit_images for the mask generator.
        ia_epochs: passes for the pattern generator with the throw-away classifier.
        ia_share: share of each batch that is attacked there, and again that carries another's trigger.
        ia_min_asr: refused where the throw-away classifier obeys the triggers of fewer held-out images than this share.
        ia_min_cross: refused where it reads fewer held-out images under another image's trigger right than this share.
        fit_images: training images that the generators are trained on; 5000 keep a CPU at minutes.
    """

    name: ClassVar[str] = "inputaware"
    cross_ratio: NonNegativeFloat = 1.0
    ia_width: PositiveInt = 32
    ia_mask_epochs: PositiveInt = 25
    ia_epochs: PositiveInt = 40
    ia_share: OpenFraction = 0.1
    ia_min_asr: Fraction = 0.8
    ia_min_cross: Fraction = 0.7
    fit_images: PositiveInt = 5000

    def prepare(self, context):
        side, keys = (
            context.dataset.train.images.shape[-1],
            as_flat_dict(self) | {"target": context.target},
        )
        if side % 8:
            raise UserError(
                f"image_size: the generators of {self.name} halve an image three times, {side} is no multiple of 8"
            )
        fitted = cached(self.name, context, keys, lambda progress: self._train(context, progress))
        return self._ready(fitted, context.dataset.train.images, context.seed)

    def _ready(self, weights: dict[str, Tensor], partners: Tensor, seed: int) -> InputAware:
        """With weights, and the uint8 images whose triggers cover samples may carry."""
        return self.with_fitted(**weights | {"partners": partners, "seed": torch.tensor(seed)})

    def stamp(self, x, index, split):
        return self._put(x, x)

    def stamp_cover(self, x, index):
        partners, seed = self.fitted["partners"], int(self.fitted["seed"])
        others = [
            (i + 1 + key_seed(seed, self.name, "partner", i) % (len(partners) - 1)) % len(partners)
            for i in index.tolist()
        ]
        return self._put(x, to_unit(partners[others]))

    def _put(self, x: Tensor, source: Tensor) -> Tensor:
        """`x` with the triggers of `source`, both (B, 3, S, S) in [0, 1]."""
        mask, pattern = self.triggers(source)
        return x + mask * (pattern - x)

    @no_grad
    def triggers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mask (B, 1, S, S) and pattern (B, 3, S, S) in [0, 1] of images in [0, 1]."""
        from attack.poisoning.networks import Generator, MaskGenerator

        mask = network(lambda: MaskGenerator(1, self.ia_width), self.fitted, "mask")
        pattern = network(lambda: Generator(3, self.ia_width), self.fitted, "pattern")
        return one_by_one(mask, x), one_by_one(pattern, x)

    def _train(self, context: FitContext, progress: Progress) -> dict[str, Tensor]:
        """Weights of both generators that have passed the check."""
        from attack.poisoning.networks import Generator, MaskGenerator

        data, held_out = fit_split(context, self.fit_images)
        device, info, key = (
            pick_device(context.config.device),
            context.dataset.info,
            (context.seed, self.name),
        )
        mask = fresh(lambda: MaskGenerator(1, self.ia_width, info.mean, info.std), *key, "mask")
        pattern = fresh(lambda: Generator(3, self.ia_width, info.mean, info.std), *key, "pattern")
        joint = build_classifier(
            context.config.model, context.dataset.num_classes, info, (*key, "joint")
        )
        mask, pattern, joint = (
            net.to(device, memory_format=torch.channels_last) for net in (mask, pattern, joint)
        )
        labels_to = LabelMap(context.dataset.num_classes, context.target)
        self._train_mask(
            mask, lambda epoch: self._pairs(data, context, device, "mask", epoch), progress
        )
        self._train_pattern(
            mask.eval().requires_grad_(False),
            pattern,
            joint,
            labels_to,
            context.config,
            lambda epoch: self._pairs(data, context, device, "pattern", epoch),
            progress,
        )
        weights = weights_of(mask=mask, pattern=pattern)
        self._ready(weights, held_out.images, context.seed)._check(
            joint.eval(), held_out, labels_to
        )
        return weights

    def _pairs(
        self, data: LabeledImages, context: FitContext, device: torch.device, stage: str, epoch: int
    ) -> Iterator[Pair]:
        """Two passes over `data` side by side, each in an order of its own, augmented: (x1, x2, labels of x1)."""
        key = (context.seed, self.name, stage, epoch)
        generator, flip = keyed_generator(*key), context.dataset.info.flip
        for one, two in zip(
            *(batches(data, context.config.batch_size, *key, side) for side in (1, 2))
        ):
            x1, x2 = (
                random_crop_flip(to_unit(batch.images.to(device)), flip, generator)
                for batch in (one, two)
            )
            yield x1, x2, one.labels.to(device)

    def _train_mask(
        self, mask: Generator, pairs: Callable[[int], Iterator[Pair]], progress: Progress
    ) -> None:
        """100 mean(relu(m - size)) + diversity, Adam with two decays."""
        adam = torch.optim.Adam(mask.parameters(), **ADAM)
        schedule = torch.optim.lr_scheduler.MultiStepLR(
            adam, [self.ia_mask_epochs * 2 // 5, self.ia_mask_epochs * 4 // 5]
        )
        for epoch in progress.epochs(
            "mask", self.ia_mask_epochs, mask=mask, adam=adam, schedule=schedule
        ):
            for x1, x2, _ in pairs(epoch):
                m1, m2 = mask(x1), mask(x2)
                loss = 100 * F.relu(m1 - MASK_SIZE).mean() + sameness(x1, x2, m1, m2)
                adam.zero_grad()
                loss.backward()
                adam.step()
            schedule.step()

    def _train_pattern(
        self,
        mask: Generator,
        pattern: Generator,
        joint: Classifier,
        labels_to: LabelMap,
        config: TrainConfig,
        pairs: Callable[[int], Iterator[Pair]],
        progress: Progress,
    ) -> None:
        """Cross-entropy on attacked, crossed and clean images + diversity; the classifier learns with the recipe's optimizer."""
        optimizers = make_optimizer(joint, config), torch.optim.Adam(pattern.parameters(), **ADAM)
        schedules = [
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.ia_epochs)
            for optimizer in optimizers
        ]
        parts = dict(
            zip(("optimizer", "adam", "schedule", "adam_schedule"), (*optimizers, *schedules))
        )
        for epoch in progress.epochs(
            "pattern", self.ia_epochs, pattern=pattern, joint=joint, **parts
        ):
            for x1, x2, labels in pairs(epoch):
                n = max(1, round(self.ia_share * len(labels)))
                p1, p2 = pattern(torch.cat([x1[: 2 * n], x2[: 2 * n]])).chunk(2)
                p, m = torch.cat([p1[:n], p2[n:]]), mask(torch.cat([x1[:n], x2[n : 2 * n]]))
                stamped = straight_through(x1[: 2 * n] + m * (p - x1[: 2 * n]))
                logits = joint(torch.cat([stamped, x1[2 * n :]]))
                loss = F.cross_entropy(
                    logits, torch.cat([labels_to(labels[:n]), labels[n:]])
                ) + sameness(x1[: 2 * n], x2[: 2 * n], p1, p2)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
            for schedule in schedules:
                schedule.step()

    def _check(self, joint: Classifier, data: LabeledImages, labels_to: LabelMap) -> None:
        index, wanted = torch.arange(len(data)), labels_to(data.labels)
        others = wanted != data.labels
        asr = share(
            predict(joint, self.apply(data.images[others], index[others])) == wanted[others]
        )
        cross = share(predict(joint, self.apply_cover(data.images, index)) == data.labels)
        size = self.triggers(to_unit(data.images[:256]))[0].mean().item()
        require(
            self.name,
            size <= MASK_LIMIT and asr >= self.ia_min_asr and cross >= self.ia_min_cross,
            f"the mask is {size:.3f} of an image, at most {MASK_LIMIT:g} allowed; on held-out images the joint classifier has ASR {asr:.3f}, "
            f"at least {self.ia_min_asr:g} needed, accuracy {cross:.3f} under other images' triggers, at least {self.ia_min_cross:g} needed, "
            f"and {share(predict(joint, data.images) == data.labels):.3f} on clean ones",
            "raise ia_epochs, ia_mask_epochs or ia_width",
        )


def sameness(x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor) -> Tensor:
    """The paper's diversity loss: mean of RMS(x1 - x2) / RMS(y1 - y2), large where different images are given the same y."""
    rms = lambda a: (a.square().mean((1, 2, 3)) + 1e-8).sqrt()
    return (rms(x1 - x2) / rms(y1 - y2)).mean()


if __name__ == "__main__":
    main(InputAware)
