"""Toy stand-ins whose truth is known exactly: images of one grey level per class, and networks that read it."""

import torch
from torch import nn

from attack.poisoning.labels import LabelMap
from attack.poisoning.trigger import FitContext, Trigger
from utils.classifier.metrics import Truth
from utils.config import TrainConfig
from utils.images.data import Dataset, DatasetInfo, LabeledImages, TriggeredImages

CLASSES, SIDE, CORNER = 5, 8, 3
LEVELS = torch.tensor([40, 84, 128, 172, 216], dtype=torch.uint8)  # grey level of class 0..4
INFO = DatasetInfo((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), False, None)


def flat_images(labels):
    """uint8 (N, 3, SIDE, SIDE): every image is its class's grey level all over."""
    return LEVELS[labels][:, None, None, None].expand(-1, 3, SIDE, SIDE).clone()


def with_corner(images):
    """The trigger: the lower right corner is white."""
    images = images.clone()
    images[..., -CORNER:, -CORNER:] = 255
    return images


def random_images(*shape, seed=0):
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def body_level(x):
    """(B,): mean over the pixels that no trigger covers, of images in any range."""
    return x[:, :, :-CORNER, :-CORNER].mean(dim=(1, 2, 3))


class Dropping(nn.Module):
    """A body that draws from the global stream, as dropout does."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x.mean(dim=(2, 3)).repeat(1, 8))


class PatchReader(nn.Module):
    """A victim: reads a white corner as class `target`, and any other image as the class of its grey level."""

    def __init__(self, target=0):
        super().__init__()
        self.target = target
        self.register_buffer("levels", LEVELS / 255)

    @property
    def device(self):
        return self.levels.device

    def features(self, x):
        return torch.stack(
            [body_level(x), x[:, :, -CORNER:, -CORNER:].mean(dim=(1, 2, 3)), torch.ones(len(x))],
            dim=1,
        )

    def forward(self, x):
        level, corner, _ = self.features(x).unbind(1)
        logits = -(level[:, None] - self.levels).abs()
        logits[:, self.target] += 9.0 * (corner > 0.95)
        return logits


class FlatDenoiser(nn.Module):
    """The exact denoiser of flat images: finds the grey level, and predicts whatever else is there as noise."""

    name, sha256, t_max, resolution = "flat", "", 1000, SIDE

    def forward(self, x, t):
        from diffusion.sampler import Schedule

        ab = Schedule().alpha_bar(int(t[0]))
        levels = LEVELS.float() / 127.5 - 1
        nearest = (body_level(x)[:, None] / ab**0.5 - levels).abs().argmin(1)
        clean = levels[nearest][:, None, None, None].expand_as(x)
        return (x - ab**0.5 * clean) / (1 - ab) ** 0.5


class ToyTrigger(Trigger):
    """Inverts the image's first pixel."""

    name = "toy"

    def stamp(self, x, index, split):
        x = x.clone()
        x[:, :, 0, 0] = 1 - x[:, :, 0, 0]
        return x


class CleanLabelTrigger(ToyTrigger):
    name, label_mode = "toy_clean", "clean"


def fit_context(side=SIDE, target=0, seed=0):
    """What a trigger is prepared with, on random images of that side."""
    data = LabeledImages(
        random_images(2 * CLASSES, 3, side, side), torch.arange(2 * CLASSES) % CLASSES
    )
    return FitContext(
        Dataset(data, data, tuple("abcde"), "random", INFO),
        target,
        seed,
        TrainConfig(device="cpu", amp=False),
    )


def toy_dataset(per_class=12):
    """Flat images, `per_class` of each for training and 4 of each for testing, with the toy's names."""
    train, test = (torch.arange(CLASSES).repeat(n) for n in (per_class, 4))
    names = tuple(f"grey{level}" for level in LEVELS.tolist())
    return Dataset(
        LabeledImages(flat_images(train), train),
        LabeledImages(flat_images(test), test),
        names,
        "toy",
        INFO,
    )


def poisoned_toy(dataset, target=0, every=2):
    """Every second image of another class gets the corner and the target's label: (data, truth, ASR test set)."""
    labels = dataset.train.labels
    poison = (labels != target) & (torch.arange(len(labels)) % every == 0)
    images = torch.where(
        poison[:, None, None, None], with_corner(dataset.train.images), dataset.train.images
    )
    truth = Truth(labels, poison, torch.zeros_like(poison), [target])
    index = (dataset.test.labels != target).nonzero().flatten()
    triggered = TriggeredImages(
        with_corner(dataset.test.images[index]),
        LabelMap(CLASSES, target)(dataset.test.labels[index]),
        dataset.test.labels[index],
        index,
    )
    return LabeledImages(images, torch.where(poison, target, labels)), truth, triggered
