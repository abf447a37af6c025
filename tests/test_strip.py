"""STRIP on images whose triggers hold, and by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from defense import strip
from tests.toys import INFO
from utils.classifier.networks import Classifier
from utils.config import UserError
from utils.images.data import to_unit

STRIP = strip.Strip(device="cpu", amp=False, random_seed=3)


class Holding(nn.Module):
    """Reads the mean level as one of 8 classes, softly.

    A corner that is bright, be it by half, holds class 0 under any overlay.
    """

    device = torch.device("cpu")

    def forward(self, x):
        level, corner = x.mean(dim=(1, 2, 3)), x[:, 0, 0, 0] - x[:, 0, 2, 2]
        logits = -40 * (level[:, None] - torch.linspace(-0.5, 1.5, 8)).abs()
        logits[:, 0] += 80.0 * (corner > 0.4)
        return logits


def strip_images(n, seed, triggered=0):
    images = (
        torch.randint(
            30, 120, (n, 1, 1, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        .expand(-1, 3, 4, 4)
        .clone()
    )
    images[:triggered, :, 0, 0] = 255
    images[:triggered, :, 2, 2] = 0
    return images


@pytest.mark.parametrize("mode", ["add", "mix"])
def test_strip_finds_triggers_that_hold_and_loses_its_stated_share(mode):
    config = replace(STRIP, overlay_mode=mode, overlays=40)
    found = config.find_poison(
        strip_images(400, seed=1, triggered=50),
        strip_images(300, seed=2),
        Holding(),
        torch.full((3,), 0.5),
    )
    assert found.flagged[:50].all()
    assert found.score[:50].min() > found.score[50:].median()
    assert (
        0.04 < found.flagged[50:].double().mean() < 0.17
    )  # 0.1 from 260 images: four standard deviations


def test_strip_with_another_share_loses_that():
    images, clean = strip_images(600, seed=1), strip_images(900, seed=2)
    lost = [
        replace(STRIP, false_alarms=share)
        .find_poison(images, clean, Holding(), torch.full((3,), 0.5))
        .flagged.double()
        .mean()
        for share in (0.02, 0.5)
    ]
    assert lost[0] < 0.06
    assert 0.4 < lost[1] < 0.6


@pytest.mark.parametrize(
    ("mode", "overlaid"), [("add", lambda x, o: x + o), ("mix", lambda x, o: (x + o) / 2)]
)
def test_overlays_are_added_to_normalised_images_or_mixed_with_them(mode, overlaid):
    torch.manual_seed(0)
    victim = Classifier(nn.Sequential(nn.Flatten()), 48, 5, INFO).eval()
    images, overlays = (torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8) for n in (3, 2))
    normal = lambda x: (to_unit(x) - 0.5) / 0.25
    expected = [
        torch.stack(
            [
                torch.distributions.Categorical(
                    logits=victim.head(overlaid(normal(x), normal(o)).flatten())
                ).entropy()
                for o in overlays
            ]
        ).mean()
        for x in images
    ]
    measured = replace(STRIP, overlay_mode=mode).mean_entropies(
        victim, images, overlays, torch.tensor(INFO.mean)
    )
    assert measured.tolist() == pytest.approx([e.item() for e in expected], abs=1e-5)


@pytest.mark.parametrize(
    ("clean", "overlays", "count"), [(300, 100, 100), (199, 100, 99), (3, 100, 1), (300, 7, 7)]
)
def test_at_most_half_of_the_clean_images_are_overlays(clean, overlays, count):
    assert replace(STRIP, overlays=overlays).overlay_count(clean) == count


def test_strip_needs_two_clean_images():
    with pytest.raises(UserError, match="clean_share"):
        STRIP.find_poison(strip_images(5, 0), strip_images(1, 1), Holding(), torch.zeros(3))
