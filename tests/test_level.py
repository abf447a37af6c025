"""The noise level that a set asks for."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from defense.elixir import noise_level as module
from defense.elixir.config import DataElixirConfig
from defense.elixir.noise_level import highest, rounds_survived, settled_level
from tests.toys import CLASSES, PatchReader, toy_dataset

CONFIG = DataElixirConfig(steps_T="auto", last_steps_m=3, reverse_steps=5, random_seed=0, amp=False)
DATA = toy_dataset(per_class=20).train


@pytest.mark.parametrize("last", range(8))
def test_bisection_finds_the_last_level_that_serves(last):
    asked = []
    survives = lambda level: asked.append(level) or (0.9 if level <= 10 * last else 0.3)
    assert highest([10, 20, 30, 40, 50, 60, 70], survives) == max(10, 10 * last)
    assert len(asked) <= 3


class Shifting(nn.Module):
    """Returns images unchanged up to level `limit`, above it all black."""

    name, t_max = "shifting", 120

    def __init__(self, limit):
        super().__init__()
        self.limit, self.start = limit, 0

    def forward(self, x, t):
        self.start = max(self.start, int(t[0])) if int(t[0]) else 0
        return (
            torch.zeros_like(x)
            if max(self.start, int(t[0])) < self.limit
            else 50.0 * torch.ones_like(x)
        )


@pytest.mark.parametrize(("limit", "expected"), [(45, 40), (90, 90), (1000, 120), (5, 10)])
def test_auto_takes_the_highest_level_at_which_the_classifier_agrees_with_itself(
    monkeypatch, limit, expected
):
    monkeypatch.setattr(
        module,
        "survival",
        lambda purifier, victim, images, index, batch: float(purifier.config.steps_T <= limit),
    )
    found = settled_level(CONFIG, Shifting(limit), DATA, PatchReader(), CLASSES)
    assert found == expected


def test_agreement_is_measured_on_purified_images():
    keep = settled_level(CONFIG, Shifting(10**6), DATA, PatchReader(target=4), CLASSES)
    lost = settled_level(CONFIG, Shifting(0), DATA, PatchReader(target=4), CLASSES)
    assert lost == 10 < keep


def test_a_level_that_was_found_is_kept_whatever_would_be_found_now(monkeypatch, tmp_path):
    levels = []
    monkeypatch.setattr(
        module,
        "survival",
        lambda purifier, victim, images, index, batch: float(purifier.config.steps_T <= 45),
    )
    for denoiser in (Shifting(0), None):
        levels.append(settled_level(CONFIG, denoiser, DATA, PatchReader(), CLASSES, tmp_path))
    assert levels == [40, 40]


def test_a_given_level_is_taken_as_it_is():
    assert settled_level(replace(CONFIG, steps_T=77), None, None, None, 0) == 77


def test_poison_and_what_was_not_purified_say_nothing_about_the_level():
    """With target labels first, most of what is purified may be poison, whose predictions should change."""
    read, moved, unknown = [1, 1, 1], [0, 2, 2], [-1, -1, -1]
    votes, labels = (
        torch.tensor([read] * 3 + [[1, 2, 1]] + [moved] * 9 + [unknown] * 5),
        torch.tensor([1] * 4 + [0] * 9 + [1] * 5),
    )
    share = lambda *targets: rounds_survived(
        votes, labels, 1, torch.tensor([k in targets for k in range(3)])
    ).tolist()
    assert share(0) == [0.75, 1.0]
    assert (
        share() == share(0, 1) == [3 / 13, 4 / 13]
    )  # where every class is a target label, what there is
