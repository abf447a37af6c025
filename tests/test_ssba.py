"""SSBA: the secret is read from uint8 images, images stay good, and residuals are of their image.

That is what `check` asks of a fit, so here it is asked of encoders that are drawn by hand, and
training is asked to get nearer to it.
"""

import pytest
import torch

from attack.poisoning import fitting
from attack.poisoning.fitting import weights_of
from attack.poisoning.hidden_bits import (
    Encoder,
    check,
    correction,
    decoder_for,
    encoder_for,
    hiding_loss,
    likeness,
    psnr,
    random_bits,
    ssim,
)
from attack.ssba import SampleSpecific
from tests.toys import fit_context, random_images
from utils.config import UserError
from utils.images.data import to_unit

GREY = torch.full((40, 3, 8, 8), 128, dtype=torch.uint8)


def planted(context):
    """Ready without a training, for tests/test_triggers.py: encoder and decoder are as born."""
    attack = SampleSpecific(ssba_bits=6, ssba_width=4)
    torch.manual_seed(context.seed)
    encoder, decoder = encoder_for(attack, context.side), decoder_for(attack, context.side)
    with torch.no_grad():
        encoder.last.weight.mul_(9)  # so that the residual is seen in every image
    secret = random_bits(1, 6, context.seed, "secret")[0]
    return attack.with_fitted(secret=secret, **weights_of(encoder=encoder, decoder=decoder))


def test_the_residual_depends_on_the_image_and_not_on_its_index_or_split():
    trigger, images = planted(fit_context(32)), random_images(8, 3, 32, 32) // 2 + 64
    hidden = trigger.apply(images, torch.arange(8), "test")
    assert torch.equal(hidden, trigger.apply(images, torch.arange(8) + 5, "train"))
    residual = trigger.residual(to_unit(images))
    assert residual.abs().max() <= 0.12
    assert torch.equal(hidden, (to_unit(images) + residual).mul(255).round().to(torch.uint8))
    assert len({image.numpy().tobytes() for image in residual}) == 8
    mirrored = trigger.apply(images.flip(3), torch.arange(8), "test")
    assert not torch.equal(mirrored, hidden.flip(3))


def test_the_seed_draws_the_secret():
    draw = lambda seed: random_bits(1, 20, seed, "ssba", "secret")[0].tolist()
    assert draw(2) == draw(2) != draw(3)
    assert set(draw(2)) == {0.0, 1.0}
    assert len(draw(2)) == 20


def test_the_encoder_reads_image_and_bits_within_its_bound():
    torch.manual_seed(0)
    encoder = Encoder(32, 6, 4, 0.12)
    x, bits = to_unit(random_images(2, 3, 32, 32)), torch.tensor([[0.0, 1, 0, 1, 1, 0]] * 2)
    with torch.no_grad():
        residual, other = encoder(x, bits), encoder(x, 1 - bits)
        encoder.last.bias.add_(100)
        assert encoder(x, bits).max() <= 0.12
    assert residual.shape == x.shape
    assert not torch.allclose(residual, other)
    assert not torch.allclose(residual[0], residual[1])


def test_ssim_psnr_and_likeness_by_hand():
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert ssim(x, x) == pytest.approx(1)
    assert ssim(x, 1 - x) < 0 < ssim(x, x * 0.8) < 0.99
    assert torch.allclose(likeness(x, 3 * x + 1), torch.ones(4), atol=1e-5)
    assert torch.allclose(likeness(x, -x), -torch.ones(4), atol=1e-5)
    grey = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    assert psnr(grey, grey + 1) == pytest.approx(48.13, abs=0.01)
    assert psnr(grey, grey) == pytest.approx(98.13, abs=0.01)


class Drawn(SampleSpecific):
    """An encoder by formula; `alike` is what a one-bit encoder likes to become."""

    strength, alike, right = 0.02, False, True

    def residual(self, x):
        noise = lambda n: torch.randn(
            n, *x.shape[1:], generator=torch.Generator().manual_seed(len(x))
        )
        return self.strength * (noise(1).expand_as(x) if self.alike else noise(len(x)))

    def read(self, images):
        return torch.full((len(images), 1), float(self.right))


def drawn(**attributes):
    return type("Drawn", (Drawn,), attributes)().with_fitted(secret=torch.ones(1))


def test_what_is_hidden_badly_seen_easily_or_the_same_for_all_is_refused():
    check(drawn(), GREY)
    for attributes, words in (
        ({"alike": True}, r"residuals of different images correlate 1\.00, below 0\.9 needed"),
        ({"strength": 0.2}, r"PSNR 1\d\.\d dB, at least 28 needed"),
        ({"right": False}, r"ssba: .* 0\.0000 of the bits are read, .*; raise ssba_epochs"),
    ):
        with pytest.raises(UserError, match=words):
            check(drawn(**attributes), GREY)


def test_quality_weighs_more_where_images_are_too_bad_and_less_where_too_good():
    factors = [correction(drawn(strength=s), GREY) for s in (0.2, 0.05, 0.0316, 0.02, 0.001)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == pytest.approx(10**0.5)
    assert factors[2] == pytest.approx(1, abs=0.1)
    assert factors[-1] == pytest.approx(10**-0.5)


def test_a_fit_that_learned_too_little_is_refused_and_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(fitting, "FITTED", tmp_path)
    attack = SampleSpecific(ssba_bits=20, ssba_width=4, ssba_epochs=1, ssba_warmup=1)
    with pytest.raises(UserError, match=r"0\.\d+ of the bits are read.*at least 0.99 should be"):
        attack.prepare(fit_context(32))
    assert not list(tmp_path.iterdir())


def test_the_loss_is_of_bits_alone_or_of_quality_and_likeness_as_well():
    x, bits = to_unit(random_images(4, 3, 32, 32)), torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    loud = lambda x, bits: 0.1 * torch.ones_like(x) * torch.linspace(-1, 1, 32)
    silent = lambda x, bits: 0 * x
    decoder = lambda seen: torch.tensor([[9.0, -9.0]]).expand(len(seen), 2)
    alone = [hiding_loss(encoder, decoder, x, bits, 0.0).item() for encoder in (loud, silent)]
    assert alone[0] == pytest.approx(alone[1])
    assert alone[0] < 0.01
    wrong = lambda seen: -decoder(seen)
    assert hiding_loss(silent, wrong, x, bits, 0.0) > 9
    costs = [hiding_loss(loud, decoder, x, bits, weight).item() for weight in (1e-9, 1.0, 2.0)]
    assert costs[0] == pytest.approx(alone[0] + 0.4, abs=0.01)  # the same residual for all
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0], rel=1e-3)
    assert costs[1] > costs[0] + 0.01


def test_training_teaches_the_decoder_to_read():
    """One bit, hidden in flat noise-free images at full strength: the loss must fall by half."""
    torch.manual_seed(0)
    attack = SampleSpecific(ssba_bits=1, ssba_width=4)
    encoder, decoder = encoder_for(attack, 16), decoder_for(attack, 16)
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 4e-3)
    x, bits, losses = torch.full((8, 3, 16, 16), 0.5), torch.tensor([[0.0], [1.0]] * 4), []
    for _ in range(60):
        losses.append(loss := hiding_loss(encoder, decoder, x, bits, 0.0))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert losses[-1] < 0.5 * losses[0]
