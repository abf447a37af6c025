"""SSBA's encoder, which hides bits in an image, and the decoder that reads them back.

Both are trained on clean images and random bits, through rounding to uint8: first for the bits
alone, then for bits + quality + likeness. Quality is L2 and 1 - SSIM, with a weight that is steered
to the wanted PSNR; likeness keeps the residuals of different images apart. Networks after Li et
al., arXiv 2012.03816.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attack.poisoning import fitting
from attack.poisoning.fitting import Tensors, fit_split, fresh, network, one_by_one
from attack.poisoning.progress import Progress
from attack.poisoning.trigger import FitContext
from utils.devices import pick_device
from utils.images.data import to_unit
from utils.randomness import keyed_generator

BATCH = 16
LIKE = 0.6  # correlation of two images' residuals up to which likeness costs nothing


class Encoder(nn.Module):
    """x (B, 3, S, S) in [0, 1], bits (B, L) of 0 and 1 -> residual (B, 3, S, S) within +-limit."""

    def __init__(self, side: int, bits: int, width: int, limit: float):
        super().__init__()
        self.limit, sizes = limit, [width, width, 2 * width, 4 * width, 8 * width]
        conv = lambda i, o, stride=1: nn.Conv2d(i, o, 3, stride, 1)
        steps = list(zip([6, *sizes], sizes, [1, 2, 2, 2, 2]))
        upwards = sizes[-2::-1]
        self.picture = nn.Linear(bits, 3 * side * side)
        self.down = nn.ModuleList(conv(i, o, stride) for i, o, stride in steps)
        self.up = nn.ModuleList(conv(i, o) for i, o in zip(sizes[:0:-1], upwards))
        self.join = nn.ModuleList(conv(2 * o, o) for o in upwards)
        self.last = conv(width + 6, 3)

    def forward(self, x: Tensor, bits: Tensor) -> Tensor:
        start = torch.cat([x - 0.5, self.picture(2 * bits - 1).view_as(x)], 1)
        levels = [start]
        for conv in self.down:
            levels.append(F.relu(conv(levels[-1])))
        out = levels.pop()
        for up, join, skip in zip(self.up, self.join, levels[:0:-1]):
            out = F.relu(up(F.interpolate(out, size=skip.shape[-2:])))
            out = F.relu(join(torch.cat([out, skip], 1)))
        return self.limit * torch.tanh(self.last(torch.cat([out, start], 1)))


class Decoder(nn.Module):
    """[0, 1] images (B, 3, S, S) -> logits of the bits (B, L)."""

    def __init__(self, side: int, bits: int, width: int):
        super().__init__()
        sizes = [width, width, 2 * width, 2 * width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for i, o, stride in zip([3, *sizes], sizes, [2, 1, 2, 1, 2, 2, 2]):
            layers += [nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU()]
        pixels = (-(-side // 32)) ** 2
        dense = [nn.Linear(sizes[-1] * pixels, 512), nn.ReLU(), nn.Linear(512, bits)]
        self.body = nn.Sequential(*layers, nn.Flatten(), *dense)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x - 0.5)


def encoder_for(attack: Any, side: int) -> Encoder:
    return Encoder(side, attack.ssba_bits, attack.ssba_width, attack.ssba_limit)


def decoder_for(attack: Any, side: int) -> Decoder:
    return Decoder(side, attack.ssba_bits, attack.ssba_width)


@torch.no_grad()
def residual(attack: Any, x: Tensor) -> Tensor:
    """What the encoder of a ready attack adds to images (B, 3, S, S) in [0, 1]."""
    encoder = network(lambda: encoder_for(attack, x.shape[-1]), attack.fitted, "encoder")
    return one_by_one(lambda image: encoder(image, attack.fitted["secret"][None]), x)


@torch.no_grad()
def read(attack: Any, images: Tensor) -> Tensor:
    """The bits (N, L), 0 or 1, that the decoder finds in uint8 images (N, 3, S, S)."""
    decoder = network(lambda: decoder_for(attack, images.shape[-1]), attack.fitted, "decoder")
    return one_by_one(decoder, to_unit(images)).gt(0).float()


def random_bits(count: int, length: int, *key: int | str) -> Tensor:
    """(count, length) of 0 and 1, drawn by `key`."""
    return torch.randint(0, 2, (count, length), generator=keyed_generator(*key)).float()


def fit(attack: Any, context: FitContext, progress: Progress) -> Tensors:
    """For SSBA, a secret, and the weights of an encoder and a decoder that pass `check`."""
    data, held_out = fit_split(context, attack.fit_images)
    key, epochs, side = (context.seed, attack.name), attack.ssba_epochs, context.side
    device = pick_device(context.config.device)
    secret = random_bits(1, attack.ssba_bits, *key, "secret")[0]
    encoder = fresh(lambda: encoder_for(attack, side), *key, "encoder").to(device)
    decoder = fresh(lambda: decoder_for(attack, side), *key, "decoder").to(device)
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], attack.ssba_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs)
    weight = torch.ones((), dtype=torch.float64)
    nets = {"encoder": encoder, "decoder": decoder}
    ready = lambda: attack.with_fitted(secret=secret, **fitting.weights_of(**nets))
    parts = nets | {"adam": adam, "schedule": schedule, "weight": weight}
    for epoch in progress.epochs("network", epochs, **parts):
        bits_alone = epoch < attack.ssba_warmup
        for number, batch in enumerate(fitting.batches(data, BATCH, *key, epoch)):
            half = random_bits(-(-len(batch) // 2), attack.ssba_bits, *key, epoch, number)
            bits = half.repeat(2, 1)[: len(batch)].to(device)
            x = to_unit(batch.images.to(device))
            loss = hiding_loss(encoder, decoder, x, bits, 0.0 if bits_alone else float(weight))
            adam.zero_grad()
            loss.backward()
            adam.step()
        schedule.step()
        if not bits_alone:
            weight *= correction(ready(), held_out.images[:256])
    check(ready(), held_out.images)
    return ready().fitted


def correction(attack: Any, images: Tensor) -> float:
    """Factor for the weight of quality that steers the PSNR of a ready attack to ssba_psnr."""
    hidden = attack.apply(images, torch.arange(len(images)))
    excess = psnr(images, hidden) - attack.ssba_psnr
    return 10 ** (-max(-5.0, min(5.0, excess)) / 10)


def check(attack: Any, images: Tensor) -> None:
    """Raise FitRejected where bits are lost, images are spoilt, or all get the same residual."""
    hidden = attack.apply(images, torch.arange(len(images)))
    added = attack.residual(to_unit(images[:256]))
    right = attack.read(hidden).eq(attack.fitted["secret"]).double().mean().item()
    quality, least = psnr(images, hidden), attack.ssba_psnr - 2
    alike = likeness(added, added.roll(1, 0)).mean().item()
    fitting.require(
        attack.name,
        right >= 0.99 and quality >= least and alike < 0.9,
        f"on held-out images {right:.4f} of the bits are read, at least 0.99 should be; "
        f"PSNR {quality:.1f} dB, at least {least:g} needed; "
        f"residuals of different images correlate {alike:.2f}, below 0.9 needed",
        "raise ssba_epochs, ssba_warmup or ssba_width, or lower ssba_psnr or ssba_bits",
    )


def hiding_loss(
    encoder: Encoder, decoder: Decoder, x: Tensor, bits: Tensor, weight: float
) -> Tensor:
    """Cross-entropy of the bits; where `weight` (of quality) is not 0, quality and likeness too.

    The bits (B, L) of the batch's halves are the same, so that their residuals compare.
    """
    added = encoder(x, bits)
    seen = fitting.straight_through(x + added)
    loss = 1.5 * F.binary_cross_entropy_with_logits(decoder(seen), bits)
    if not weight:
        return loss
    half = len(x) // 2
    alike = F.relu(likeness(added[:half], added[half : 2 * half]) - LIKE).mean()
    return loss + alike + weight * (2 * F.mse_loss(seen, x) + 1.5 * (1 - ssim(seen, x)))


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """(B,): correlation over pixels and channels of the residuals a and b (B, 3, S, S)."""
    a, b = (F.normalize((t - t.mean((1, 2, 3), keepdim=True)).flatten(1)) for t in (a, b))
    return (a * b).sum(1)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity of [0, 1] images (B, 3, S, S) over windows of 7x7 pixels."""
    mean = lambda t: F.avg_pool2d(t, 7, 1)
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    top = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
    return (top / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean()


def psnr(clean: Tensor, changed: Tensor) -> float:
    """Mean over uint8 images (N, 3, S, S), in dB; 98 where nothing changed."""
    error = (clean.double() - changed.double()).square().mean((1, 2, 3))
    return (20 * math.log10(255) - 10 * error.clamp_min(1e-5).log10()).mean().item()
