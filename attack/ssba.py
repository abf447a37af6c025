"""SSBA (ISSBA): Li et al., "Invisible Backdoor Attack with Sample-Specific Triggers", arXiv 2012.03816.

x' = x + E(x, s): an encoder hides one fixed string of bits s in every poisoned image, as a residual that depends on
the image. Encoder E and decoder D are trained on clean images and random bits, through rounding to uint8: first for
the bits alone, then bits + quality + likeness. Quality is L2 and 1 - SSIM, with a weight that is steered to the wanted
PSNR; likeness keeps the residuals of different images apart, so that the trigger is one of each sample.
"""

from __future__ import annotations

import math
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
from attack.poisoning.progress import Progress
from attack.poisoning.run import main
from attack.poisoning.trigger import FitContext, Trigger
from utils.config import Fraction, PositiveFloat, PositiveInt, as_flat_dict
from utils.devices import pick_device
from utils.images.data import to_unit
from utils.late import F, Tensor, no_grad, torch
from utils.randomness import keyed_generator

if TYPE_CHECKING:
    from attack.poisoning.networks import Decoder, Encoder

BATCH = 16
LIKE = 0.6  # correlation of two images' residuals up to which likeness costs nothing


@dataclass(frozen=True)
class SampleSpecific(Trigger):
    """SSBA: the same hidden bits in every poisoned image, by a residual of its own for each.

    Args:
        ssba_bits: length of the hidden string, which the seed draws.
        ssba_limit: bound of the residual per pixel, of [0, 1].
        ssba_width: channels of the first level of encoder and decoder; 32 is the published size, 16 four times cheaper.
        ssba_epochs: passes over fit_images.
        ssba_warmup: how many of them train for the bits alone.
        ssba_lr: learning rate of Adam.
        ssba_psnr: quality of the images in dB that the training steers to; more than 2 dB less are refused.
        fit_images: training images that encoder and decoder are trained on; 5000 keep a CPU at minutes.
    """

    name: ClassVar[str] = "ssba"
    ssba_bits: PositiveInt = 20
    ssba_limit: Fraction = 0.12
    ssba_width: PositiveInt = 32
    ssba_epochs: PositiveInt = 20
    ssba_warmup: PositiveInt = 2
    ssba_lr: PositiveFloat = 2e-3
    ssba_psnr: PositiveFloat = 30.0
    fit_images: PositiveInt = 5000

    def prepare(self, context):
        return self.with_fitted(
            **cached(
                self.name,
                context,
                as_flat_dict(self),
                lambda progress: self._train(context, progress).fitted,
            )
        )

    def stamp(self, x, index, split):
        return x + self.residual(x)

    @no_grad
    def residual(self, x: Tensor) -> Tensor:
        """What the encoder adds to images (B, 3, S, S) in [0, 1], to hide the secret."""
        encoder = network(lambda: self._encoder(x.shape[-1]), self.fitted, "encoder")
        return one_by_one(lambda image: encoder(image, self.fitted["secret"][None]), x)

    @no_grad
    def read(self, images: Tensor) -> Tensor:
        """The bits (N, L), 0 or 1, that the decoder finds in uint8 images (N, 3, S, S)."""
        decoder = network(lambda: self._decoder(images.shape[-1]), self.fitted, "decoder")
        return one_by_one(decoder, to_unit(images)).gt(0).float()

    def _encoder(self, side: int) -> Encoder:
        from attack.poisoning.networks import Encoder

        return Encoder(side, self.ssba_bits, self.ssba_width, self.ssba_limit)

    def _decoder(self, side: int) -> Decoder:
        from attack.poisoning.networks import Decoder

        return Decoder(side, self.ssba_bits, self.ssba_width)

    def _random_bits(self, count: int, *key: int | str) -> Tensor:
        return torch.randint(0, 2, (count, self.ssba_bits), generator=keyed_generator(*key)).float()

    def _train(self, context: FitContext, progress: Progress) -> SampleSpecific:
        """The trigger with a secret, an encoder and a decoder that have passed the check."""
        data, held_out = fit_split(context, self.fit_images)
        key, device, side = (
            (context.seed, self.name),
            pick_device(context.config.device),
            data.images.shape[-1],
        )
        secret = self._random_bits(1, *key, "secret")[0]
        encoder = fresh(lambda: self._encoder(side), *key, "encoder").to(device)
        decoder = fresh(lambda: self._decoder(side), *key, "decoder").to(device)
        adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], self.ssba_lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.ssba_epochs)
        weight = torch.ones((), dtype=torch.float64)
        ready = lambda: self.with_fitted(
            secret=secret, **weights_of(encoder=encoder, decoder=decoder)
        )
        for epoch in progress.epochs(
            "network",
            self.ssba_epochs,
            encoder=encoder,
            decoder=decoder,
            adam=adam,
            schedule=schedule,
            weight=weight,
        ):
            for number, batch in enumerate(batches(data, BATCH, *key, epoch)):
                bits = (
                    self._random_bits(-(-len(batch) // 2), *key, epoch, number)
                    .repeat(2, 1)[: len(batch)]
                    .to(device)
                )
                loss = hiding_loss(
                    encoder,
                    decoder,
                    to_unit(batch.images.to(device)),
                    bits,
                    float(weight) if epoch >= self.ssba_warmup else 0.0,
                )
                adam.zero_grad()
                loss.backward()
                adam.step()
            schedule.step()
            if epoch >= self.ssba_warmup:
                weight *= self._correction(held_out.images[:256], ready())
        ready()._check(held_out.images)
        return ready()

    def _correction(self, images: Tensor, ready: SampleSpecific) -> float:
        """Factor for the weight of the images' quality that brings it to ssba_psnr, whether it is too low or too high."""
        excess = psnr(images, ready.apply(images, torch.arange(len(images)))) - self.ssba_psnr
        return 10 ** (-max(-5.0, min(5.0, excess)) / 10)

    def _check(self, images: Tensor) -> None:
        hidden, residual = (
            self.apply(images, torch.arange(len(images))),
            self.residual(to_unit(images[:256])),
        )
        right, quality = (
            self.read(hidden).eq(self.fitted["secret"]).double().mean().item(),
            psnr(images, hidden),
        )
        alike = likeness(residual, residual.roll(1, 0)).mean().item()
        require(
            self.name,
            right >= 0.99 and quality >= self.ssba_psnr - 2 and alike < 0.9,
            f"on held-out images {right:.4f} of the bits are read, at least 0.99 should be; PSNR {quality:.1f} dB, at least {self.ssba_psnr - 2:g} "
            f"needed; residuals of different images correlate {alike:.2f}, below 0.9 needed",
            "raise ssba_epochs, ssba_warmup or ssba_width, or lower ssba_psnr or ssba_bits",
        )


def hiding_loss(
    encoder: Encoder, decoder: Decoder, x: Tensor, bits: Tensor, weight: float
) -> Tensor:
    """BCE(bits) alone where `weight` is 0, else with it the images' quality, and the likeness of residuals that hide the same bits.

    Args:
        x: (B, 3, S, S) in [0, 1].
        bits: (B, L); those of the batch's halves are the same.
    """
    residual = encoder(x, bits)
    seen = straight_through(x + residual)
    loss = 1.5 * F.binary_cross_entropy_with_logits(decoder(seen), bits)
    if not weight:
        return loss
    half = len(x) // 2
    alike = F.relu(likeness(residual[:half], residual[half : 2 * half]) - LIKE).mean()
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
    return (
        (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    ).mean()


def psnr(clean: Tensor, changed: Tensor) -> float:
    """Mean over uint8 images (N, 3, S, S), in dB; 98 where nothing changed."""
    error = (clean.double() - changed.double()).square().mean((1, 2, 3))
    return (20 * math.log10(255) - 10 * error.clamp_min(1e-5).log10()).mean().item()


if __name__ == "__main__":
    main(SampleSpecific)
