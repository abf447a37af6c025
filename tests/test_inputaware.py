"""Input-aware: small masks, triggers that differ from image to image, covers with another's trigger, and a gate against universal ones.

Fitting generators that pass the gate takes minutes, so here they are fitted badly, and the gate is tested on triggers
made by hand.
"""

import pytest
import torch
from torch import nn

from attack.inputaware import MASK_LIMIT, InputAware, sameness
from attack.poisoning.networks import Generator, MaskGenerator
from attack.poisoning.poison import LabelMap
from attack.poisoning.progress import Progress
from tests.test_triggers import RECIPE, TARGET, digits, ready
from tests.toys import INFO, fit_context, random_images
from utils.config import UserError
from utils.images.data import LabeledImages, to_unit

SMALL = {
    "ia_width": 4,
    "ia_mask_epochs": 4,
    "ia_epochs": 2,
    "fit_images": 1150,
    "ia_min_asr": 0.0,
    "ia_min_cross": 0.0,
}
INDEX = torch.arange(60)


def images():
    return digits().test.images[INDEX]


def spread(maps):
    """Mean RMS difference of the maps of two different images."""
    differences = (maps[:, None] - maps[None]).square().mean((2, 3, 4)).sqrt()
    return differences.sum().item() / (len(maps) * (len(maps) - 1))


def test_masks_are_small_and_triggers_differ_from_image_to_image():
    mask, pattern = ready(InputAware).triggers(to_unit(images()))
    assert mask.shape[1] == 1
    assert 0 < mask.mean() <= MASK_LIMIT
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert spread(pattern) > 0.05
    assert spread(mask) > 0.02


def test_the_trigger_is_the_pattern_where_the_mask_is():
    x = to_unit(images())
    mask, pattern = ready(InputAware).triggers(x)
    stamped = ready(InputAware).apply(images(), INDEX, "test")
    assert torch.equal(stamped, (x + mask * (pattern - x)).mul(255).round().to(torch.uint8))
    untouched = (mask < 0.001).expand_as(x)
    assert 0.5 < untouched.double().mean() < 1
    assert torch.equal(stamped[untouched], images()[untouched])
    assert torch.equal(ready(InputAware).apply(images(), INDEX, "train"), stamped)


def test_generators_are_used_in_eval_mode():
    """Normalisation by the batch would let other images of a batch change an image's trigger."""
    generator = MaskGenerator(1, 4)
    generator.train()
    mixed = torch.cat([to_unit(images()[:1]), torch.zeros(3, 3, 32, 32)])
    assert not torch.allclose(generator(mixed)[0], generator(to_unit(images()[:4]))[0])
    alone = ready(InputAware).apply(images()[:1], INDEX[:1])
    assert torch.equal(
        ready(InputAware).apply((mixed * 255).round().to(torch.uint8), INDEX[:4])[:1], alone
    )


def test_cover_samples_carry_the_trigger_of_another_training_image():
    pool = images()[:30]
    trigger = ready(InputAware)._ready(ready(InputAware).fitted, pool, 7)
    x, covered = to_unit(pool), trigger.apply_cover(pool, INDEX[:30])
    mask, pattern = trigger.triggers(x)
    partners = []
    for i in range(30):
        every = (x[i] + mask * (pattern - x[i])).mul(255).round().to(torch.uint8)
        partners.append((every == covered[i]).flatten(1).all(1).nonzero().flatten().tolist())
    assert all(found and i not in found for i, found in enumerate(partners))
    assert len({found[0] for found in partners}) > 10


def test_sameness_is_the_ratio_of_distances():
    x1, x2 = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.6)
    y1, y2 = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.2)
    assert sameness(x1, x2, y1, y2).item() == pytest.approx(3, rel=1e-3)
    assert sameness(x1, x2, y1, y1) > 1000
    assert sameness(x1, x2, y1, y1).isfinite()


def test_the_data_set_is_normalised_inside_the_generators():
    torch.manual_seed(0)
    plain, normalising = Generator(3, 4).eval(), Generator(3, 4, INFO.mean, INFO.std).eval()
    normalising.body.load_state_dict(plain.body.state_dict())
    x = to_unit(images()[:2])
    assert torch.allclose(normalising(x), plain((x - 0.5) / 0.25), atol=1e-6)


class Drawn(InputAware):
    """Triggers by formula: one pixel whose level is the image's own mean ("own") or the same for all ("universal")."""

    kind, size = "own", 1

    def triggers(self, x):
        mask = torch.zeros(len(x), 1, 8, 8)
        mask[..., -self.size :, -self.size :] = 1
        level = x[:, :, :4].mean((1, 2, 3)) if self.kind == "own" else torch.full((len(x),), 0.5)
        return mask, level[:, None, None, None].expand(-1, 3, 8, 8)


class Obedient(nn.Module):
    """A joint classifier that has learned its triggers: the target where the last pixel is as `kind` says, else the class of the first pixel."""

    device = torch.device("cpu")

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        expected = x[:, :, :4].mean((1, 2, 3)) if self.kind == "own" else 0.5
        logits = 9.0 * nn.functional.one_hot((x[:, 0, 0, 0] * 255).round().long() % 5, 5)
        logits[:, TARGET] += 99.0 * ((x[:, 0, -1, -1] - expected).abs() < 0.0021)
        return logits


def check(kind, **attributes):
    """Run the gate on a trigger drawn by hand, with the classifier that obeys it."""
    data = LabeledImages(random_images(400, 3, 8, 8), torch.zeros(400, dtype=torch.int64))
    data = LabeledImages(data.images, data.images[:, 0, 0, 0].long() % 5)
    drawn = type("Drawn", (Drawn,), {"kind": kind} | attributes)()._ready({}, data.images, 0)
    drawn._check(Obedient(kind), data, LabelMap(5, TARGET))


def test_the_gate_lets_own_triggers_pass_and_stops_universal_large_and_ignored_ones():
    check("own")
    with pytest.raises(
        UserError,
        match=r"inputaware: .*ASR 1\.000, .* accuracy 0\.[0-3]\d+ under other images' triggers, at least 0.7 needed.*; raise ia_epochs",
    ):
        check("universal")
    with pytest.raises(UserError, match=r"the mask is 0.250 of an image, at most 0.06 allowed"):
        check("own", size=4)
    with pytest.raises(UserError, match=r"ASR 0\.\d+, at least 0.8 needed"):
        check("own", triggers=lambda self, x: (torch.zeros(len(x), 1, 8, 8), x))


def test_batches_are_attacked_crossed_and_clean(monkeypatch, tmp_path):
    """The classifier sees own triggers with the target, others' triggers with the true label, and clean images, in these shares."""
    seen = []
    monkeypatch.setattr(
        "attack.inputaware.F.cross_entropy",
        lambda logits, wanted: seen.append((logits, wanted)) or logits.mean() * 0,
    )
    one, two, labels = torch.zeros(20, 3, 8, 8), torch.ones(20, 3, 8, 8), torch.arange(20) % 5

    class Level(nn.Module):
        """Mask and pattern: as light as the image, a little below white so that both leave traces."""

        def __init__(self, share):
            super().__init__()
            self.share, self.weight = share, nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return (
                self.share
                + 0.25 * x
                + self.weight
                + 0.001 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
            )

    class Means(nn.Linear):
        def forward(self, x):
            return x.mean((1, 2, 3))[:, None].expand(-1, 5) + 0 * self.weight.sum()

    InputAware(ia_epochs=1, ia_share=0.1)._train_pattern(
        Level(0.25),
        Level(0.5),
        Means(1, 1),
        LabelMap(5, TARGET),
        RECIPE,
        lambda _: [(one, two, labels)],
        Progress(tmp_path / "fit"),
    )
    ((logits, wanted),) = seen
    levels = logits[:, 0]
    assert torch.allclose(
        levels[:2], torch.full((2,), 0.25 * 0.5), atol=0.01
    )  # own: mask and pattern of black images
    assert torch.allclose(
        levels[2:4], torch.full((2,), 0.5 * 0.75), atol=0.01
    )  # crossed: those of white images, on black ones
    assert (levels[4:] == 0).all()
    assert wanted.tolist() == [TARGET] * 2 + labels[2:].tolist()


def test_images_that_cannot_be_halved_three_times_are_refused():
    with pytest.raises(UserError, match="image_size: .* 12 is no multiple of 8"):
        InputAware().prepare(fit_context(12))
