"""Input-aware's generators, which draw a mask and a pattern for each image, and their training.

The mask generator M is trained first, alone, to be small and different for different images; then
the pattern generator P together with a throw-away classifier that must obey an image's own trigger
and not another's. Unlike the published training (Nguyen & Tran, arXiv 2010.08138), images are
shifted by up to 4 pixels (there 5, and turned by up to 10 degrees), and P's rate falls along a
cosine.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attack.poisoning import fitting
from attack.poisoning.fitting import Tensors, fit_split, fresh, network, one_by_one
from attack.poisoning.labels import LabelMap
from attack.poisoning.progress import Progress
from attack.poisoning.trigger import FitContext
from utils.classifier.models import build_classifier
from utils.classifier.networks import Classifier
from utils.classifier.optimizer import make_optimizer
from utils.classifier.training import predict
from utils.config import UserError
from utils.devices import pick_device
from utils.images.augmentation import random_crop_flip
from utils.images.data import LabeledImages, to_unit
from utils.randomness import keyed_generator

MASK_SIZE = 0.032  # mean of the mask up to which its size costs nothing
MASK_LIMIT = 0.06  # and from which on it is refused
ADAM = (0.01, (0.5, 0.9))  # learning rate and betas
Floats = Sequence[float]
Pairs = Callable[[int], Iterable[tuple[Tensor, Tensor, Tensor]]]  # of an epoch: x1, x2, labels


def convolutions(*widths: int) -> list[nn.Module]:
    return [
        layer
        for i, o in itertools.pairwise(widths)
        for layer in (nn.Conv2d(i, o, 3, 1, 1), nn.BatchNorm2d(o, momentum=0.05), nn.ReLU())
    ]


class Generator(nn.Module):
    """[0, 1] images (B, 3, S, S), S a multiple of 8 -> (B, channels, S, S) in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, w: int, mean: Floats = (0, 0, 0), std: Floats = (1, 1, 1)):
        super().__init__()
        down: list[nn.Module] = []
        for i, o in ((3, w), (w, 2 * w), (2 * w, 4 * w)):
            down += [*convolutions(i, o, o), nn.MaxPool2d(2)]
        up: list[nn.Module] = []
        for i, o in ((4 * w, 4 * w), (4 * w, 2 * w), (2 * w, w)):
            up += [nn.Upsample(scale_factor=2, mode="bilinear"), *convolutions(i, o, o)]
        middle = convolutions(4 * w, 4 * w)
        self.body = nn.Sequential(*down, *middle, *up, nn.Conv2d(w, channels, 3, 1, 1))
        self.register_buffer("mean", torch.tensor(mean).float().view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).float().view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body((x - self.mean) / self.std)) / 2 + 0.5


class MaskGenerator(Generator):
    """One channel, pushed towards 0 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(20 * super().forward(x) - 10) / 2 + 0.5


@torch.no_grad()
def draw(width: int, weights: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mask (B, 1, S, S) and pattern (B, 3, S, S) in [0, 1] of images in [0, 1]."""
    mask = network(lambda: MaskGenerator(1, width), weights, "mask")
    pattern = network(lambda: Generator(3, width), weights, "pattern")
    return one_by_one(mask, x), one_by_one(pattern, x)


def fit(attack: Any, context: FitContext, progress: Progress) -> Tensors:
    """For Input-aware, the weights of a mask and a pattern generator that pass `check`."""
    if context.side % 8:
        limit = f"halve an image three times, {context.side} is no multiple of 8"
        raise UserError(f"image_size: the generators of {attack.name} {limit}")
    data, held_out = fit_split(context, attack.fit_images)
    config, key, width = context.config, (context.seed, attack.name), attack.ia_width
    info, classes = context.dataset.info, context.dataset.num_classes
    mask = fresh(lambda: MaskGenerator(1, width, info.mean, info.std), *key, "mask")
    pattern = fresh(lambda: Generator(3, width, info.mean, info.std), *key, "pattern")
    joint = build_classifier(config.model, classes, info, (*key, "joint"))
    for net in (mask, pattern, joint):
        net.to(pick_device(config.device)).to(memory_format=torch.channels_last)
    train_mask(attack, mask, pairs_of(data, context, (*key, "mask")), progress)
    mask.eval().requires_grad_(False)
    pairs = pairs_of(data, context, (*key, "pattern"))
    train_pattern(attack, context, (mask, pattern, joint), pairs, progress)
    weights = fitting.weights_of(mask=mask, pattern=pattern)
    ready = attack.with_partners(weights, held_out.images, context.seed)
    check(ready, joint.eval(), held_out, LabelMap(classes, context.target))
    return weights


def pairs_of(data: LabeledImages, context: FitContext, key: tuple[int | str, ...]) -> Pairs:
    """Epoch -> two passes over `data` side by side, each in an order of its own, augmented."""
    device, size = pick_device(context.config.device), context.config.batch_size

    def pairs(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator, flip = keyed_generator(*key, epoch), context.dataset.info.flip
        augmented = lambda images: random_crop_flip(to_unit(images.to(device)), flip, generator)
        for one, two in zip(*(fitting.batches(data, size, *key, epoch, side) for side in (1, 2))):
            yield augmented(one.images), augmented(two.images), one.labels.to(device)

    return pairs


def train_mask(attack: Any, mask: Generator, pairs: Pairs, progress: Progress) -> None:
    """100 mean(relu(m - size)) + diversity, Adam with two decays."""
    epochs = attack.ia_mask_epochs
    adam = torch.optim.Adam(mask.parameters(), *ADAM)
    decays = [epochs * 2 // 5, epochs * 4 // 5]
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, decays)
    for epoch in progress.epochs("mask", epochs, mask=mask, adam=adam, schedule=schedule):
        for x1, x2, _ in pairs(epoch):
            m1, m2 = mask(x1), mask(x2)
            loss = 100 * F.relu(m1 - MASK_SIZE).mean() + sameness(x1, x2, m1, m2)
            adam.zero_grad()
            loss.backward()
            adam.step()
        schedule.step()


# mask (frozen), pattern and the joint classifier
Nets = tuple[Generator, Generator, Classifier]


def train_pattern(
    attack: Any, context: FitContext, nets: Nets, pairs: Pairs, progress: Progress
) -> None:
    """Cross-entropy on attacked, crossed and clean images + diversity."""
    (mask, pattern, joint), epochs = nets, attack.ia_epochs
    labels_to = LabelMap(context.dataset.num_classes, context.target)
    optimizer = make_optimizer(joint, context.config)
    adam = torch.optim.Adam(pattern.parameters(), *ADAM)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR
    schedules = {"schedule": falling(optimizer, epochs), "adam_schedule": falling(adam, epochs)}
    parts = {"pattern": pattern, "joint": joint, "optimizer": optimizer, "adam": adam} | schedules
    for epoch in progress.epochs("pattern", epochs, **parts):
        for x1, x2, labels in pairs(epoch):
            n = max(1, round(attack.ia_share * len(labels)))
            p1, p2 = pattern(torch.cat([x1[: 2 * n], x2[: 2 * n]])).chunk(2)
            p, m = torch.cat([p1[:n], p2[n:]]), mask(torch.cat([x1[:n], x2[n : 2 * n]]))
            stamped = fitting.straight_through(x1[: 2 * n] + m * (p - x1[: 2 * n]))
            logits = joint(torch.cat([stamped, x1[2 * n :]]))
            wanted = torch.cat([labels_to(labels[:n]), labels[n:]])
            diversity = sameness(x1[: 2 * n], x2[: 2 * n], p1, p2)
            loss = F.cross_entropy(logits, wanted) + diversity
            optimizer.zero_grad()
            adam.zero_grad()
            loss.backward()
            optimizer.step()
            adam.step()
        for schedule in schedules.values():
            schedule.step()


def check(attack: Any, joint: Classifier, data: LabeledImages, labels_to: LabelMap) -> None:
    """Raise FitRejected where triggers are large, are ignored, or work on other images as well."""
    index, wanted = torch.arange(len(data)), labels_to(data.labels)
    right = lambda images, labels: predict(joint, images).eq(labels).double().mean().item()
    others = wanted != data.labels
    asr = right(attack.apply(data.images[others], index[others]), wanted[others])
    cross = right(attack.apply_cover(data.images, index), data.labels)
    size = attack.triggers(to_unit(data.images[:256]))[0].mean().item()
    good = size <= MASK_LIMIT and asr >= attack.ia_min_asr and cross >= attack.ia_min_cross
    fitting.require(
        attack.name,
        good,
        f"the mask is {size:.3f} of an image, at most {MASK_LIMIT:g} allowed; on held-out images "
        f"the joint classifier has ASR {asr:.3f}, at least {attack.ia_min_asr:g} needed, "
        f"accuracy {cross:.3f} under other images' triggers, at least {attack.ia_min_cross:g} "
        f"needed, and {right(data.images, data.labels):.3f} on clean ones",
        "raise ia_epochs, ia_mask_epochs or ia_width",
    )


def sameness(x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor) -> Tensor:
    """The paper's diversity loss: mean RMS(x1 - x2) / RMS(y1 - y2)."""
    rms = lambda a: (a.square().mean((1, 2, 3)) + 1e-8).sqrt()
    return (rms(x1 - x2) / rms(y1 - y2)).mean()
