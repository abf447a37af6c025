"""The purifier: a plain loop as reference, keyed noise, layout of the states, quantisation, and denoisers that do not fit."""

import json
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from defense.elixir.config import DataElixirConfig, PurifyConfig
from defense.elixir.purifier import (
    STREAM_SHARED_BY,
    KeyedNoise,
    Purifier,
    open_denoiser,
    quantised,
    requantised,
)
from diffusion.config import DenoiserConfig
from diffusion.denoiser import Denoiser
from diffusion.network import build_unet
from diffusion.sampler import Schedule, subset_steps
from tests.toys import CLASSES, LEVELS, FlatDenoiser, flat_images, random_images, with_corner
from utils import config as config_module
from utils.config import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
CONFIG = PurifyConfig(steps_T=12, rounds_n=3, last_steps_m=4)
PUBLISHED = DataElixirConfig(preset="published", steps_T=12, rounds_n=3, last_steps_m=4)
CPU = torch.device("cpu")
LEVELS_8BIT = torch.arange(256, dtype=torch.uint8)


def toy_network(x, t):
    """Any function of x and t will do as a predictor; each image for itself."""
    return torch.tanh(1.7 * x + 0.01 * t.view(-1, 1, 1, 1))


def purify(images, index=None, config=CONFIG, seed=0, network=toy_network):
    index = torch.arange(len(images)) if index is None else index
    return Purifier(network, config, seed, CPU).intermediaries(images, index)


def reference(image, index, config, seed):
    """The states of one sample, step by step as the method's description has them: (1 + n m, 3, H, W) in [-1, 1]."""
    noise, schedule, T = KeyedNoise(torch.tensor([index]), seed, CPU), Schedule(), config.steps_T
    ab = [*schedule.alphas_cumprod.tolist(), 1.0]  # ab[-1] = 1: the clean image
    x = image[None].double() / 255 * 2 - 1
    z, states, level = (
        lambda: noise(x.float()).double(),
        [x],
        T if config is PUBLISHED else T - 1,
    )
    for _ in range(config.rounds_n):
        x = sqrt(ab[level]) * x + sqrt(1 - ab[level]) * z()
        for i in range(T - 1, -1, -1):
            e, beta = toy_network(x.float(), torch.tensor([i])).double(), schedule.betas[i].item()
            p = (sqrt(1 / ab[i]) * x - sqrt(1 / ab[i] - 1) * e).clamp(-1, 1)
            x = (
                beta * sqrt(ab[i - 1]) / (1 - ab[i]) * p
                + (1 - ab[i - 1]) * sqrt(1 - beta) / (1 - ab[i]) * x
            )
            x = x + sqrt(beta) * z() if i > 0 else x
            states += [x] if i < config.last_steps_m else []
        x = x.clamp(-1, 1)
    return torch.cat(states)


@pytest.mark.parametrize("config", [CONFIG, PUBLISHED])
def test_states_agree_with_the_plain_loop(config):
    images = random_images(3, 3, 6, 6)
    found = purify(images, torch.tensor([40, 2, 33]), config, seed=5)
    for image, index, states in zip(images, (40, 2, 33), found):
        exact = (reference(image, index, config, 5).clamp(-1, 1) + 1) * 127.5
        wanted = exact.floor() if config is PUBLISHED else exact.round()
        off = (states.double() - wanted).abs()
        assert off.max() <= 1
        assert (off[1:] > 0).double().mean() < 0.01


@pytest.mark.parametrize("network", [toy_network, lambda x, t: x, lambda x, t: 0 * x])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 4), (2, 12)])
def test_there_are_1_plus_nm_states_and_column_0_is_the_original(n, m, network):
    images = random_images(5, 3, 6, 6)
    found = purify(images, config=replace(CONFIG, rounds_n=n, last_steps_m=m), network=network)
    assert found.shape == (5, 1 + n * m, 3, 6, 6)
    assert found.dtype == torch.uint8
    assert torch.equal(found[:, 0], images)


def test_an_exact_denoiser_restores_the_image_at_the_end_of_each_round():
    labels = torch.arange(CLASSES).repeat(4)
    found = purify(with_corner(flat_images(labels)), network=FlatDenoiser())
    n, m = CONFIG.rounds_n, CONFIG.last_steps_m
    ends = found[:, m::m]
    assert ends.shape[1] == n
    assert (ends.int() - LEVELS[labels].int().view(-1, 1, 1, 1, 1)).abs().max() == 0
    error = (
        (found[:, 1:].double() - LEVELS[labels].double().view(-1, 1, 1, 1, 1))
        .flatten(2)
        .std(dim=2)
        .mean(0)
        .view(n, m)
    )
    assert (error[:, :-1] > 0.5).all()
    assert (error.diff(dim=1) < 0).all()


def expected(images, index=None, level=50, draws=3, seed=0, network=toy_network):
    index = torch.arange(len(images)) if index is None else index
    return Purifier(network, CONFIG, seed, CPU).expected(images, index, level, draws)


def test_the_expected_image_of_an_exact_denoiser_is_the_image_without_the_trigger():
    labels = torch.arange(CLASSES).repeat(4)
    found = expected(with_corner(flat_images(labels)), network=FlatDenoiser())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, flat_images(labels).float(), atol=1e-3, rtol=0)


def test_the_expected_image_is_the_mean_of_equation_4_over_draws_of_the_noise():
    images, index, level = random_images(3, 3, 6, 6), torch.tensor([9, 2, 40]), 30
    noise, ab = KeyedNoise(index, 5, CPU, "expected"), Schedule().alpha_bar(level - 1)
    x, means = images.double() / 127.5 - 1, []
    for _ in range(4):
        x_t = sqrt(ab) * x + sqrt(1 - ab) * noise(x.float()).double()
        e = toy_network(x_t, torch.full((3,), level - 1))
        means.append(((x_t - sqrt(1 - ab) * e) / sqrt(ab)).clamp(-1, 1))
    mean = (torch.stack(means).mean(0) + 1) * 127.5
    found = expected(images, index, level, draws=4, seed=5)
    torch.testing.assert_close(found.double(), mean, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("t_max", "asked"), [(20, 19), (50, 49), (1000, 49)])
def test_the_expected_image_is_asked_no_higher_than_the_denoiser_was_trained(t_max, asked):
    seen = []

    class Trained:
        def __call__(self, x, t):
            seen.extend(t.tolist())
            return 0 * x

    Trained.t_max = t_max
    expected(random_images(2, 3, 4, 4), network=Trained())
    assert seen == [asked] * 6


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_an_expected_image_does_not_depend_on_its_batch(batch):
    images = random_images(70, 3, 4, 4)
    index = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:70]
    whole = expected(images, index)
    parts = [expected(x, i) for x, i in zip(images.split(batch), index.split(batch))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(expected(images, index, seed=1), whole)
    assert not torch.equal(expected(images, index + 1), whole)


def test_noise_of_the_expected_image_is_not_that_of_the_rounds():
    noise = [KeyedNoise(torch.arange(4), 0, CPU, *stream) for stream in ((), ("expected",))]
    one, other = (source(torch.empty(4, 3, 8, 8)) for source in noise)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_a_samples_bytes_do_not_depend_on_its_batch(batch):
    images, index = (
        random_images(70, 3, 4, 4),
        torch.randperm(200, generator=torch.Generator().manual_seed(0))[:70],
    )
    whole = purify(images, index)
    parts = [purify(x, i) for x, i in zip(images.split(batch), index.split(batch))]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(70)[:30]
    assert torch.equal(purify(images[order], index[order]), whole[order])


def test_noise_is_keyed_by_seed_and_index():
    same = random_images(1, 3, 4, 4).expand(40, -1, -1, -1)
    first = purify(same)
    assert torch.equal(purify(same), first)
    assert not torch.equal(purify(same, seed=1)[:, 1:], first[:, 1:])
    assert len(first[:, 1:].flatten(1).unique(dim=0)) == 40
    assert not torch.equal(first[:, 1:5], first[:, 5:9])  # rounds draw anew


@pytest.mark.parametrize("together", [1, 8])
def test_noise_is_normal_and_independent_between_samples(together, monkeypatch):
    monkeypatch.setitem(STREAM_SHARED_BY, "cpu", together)
    noise, x = KeyedNoise(torch.arange(100), 3, CPU), torch.zeros(100, 3, 16, 16)
    first, second = noise(x).flatten(1), noise(x).flatten(1)
    assert abs(first.mean()) < 0.02
    assert abs(first.std() - 1) < 0.02
    assert not torch.equal(first, second)
    both = torch.corrcoef(torch.cat([first, second])) - torch.eye(200)
    assert both.abs().max() < 6 / (3 * 16 * 16) ** 0.5
    picked = torch.tensor([99, 31, 32, 0])
    some = KeyedNoise(picked, 3, CPU)
    assert torch.equal(some(x[:4]).flatten(1), first[picked])
    assert torch.equal(some(x[:4]).flatten(1), second[picked])


def test_on_a_cpu_noise_is_drawn_for_no_sample_that_was_not_asked_for(monkeypatch):
    drawn, normal = [], torch.Tensor.normal_
    monkeypatch.setattr(
        torch.Tensor,
        "normal_",
        lambda self, **keys: drawn.append(self.numel()) or normal(self, **keys),
    )
    KeyedNoise(torch.arange(0, 1000, 100), 0, CPU)(torch.zeros(10, 3, 4, 4))
    assert sum(drawn) == 10 * 3 * 4 * 4


@pytest.mark.parametrize(("base", "suffix"), [(CONFIG, 149), (PUBLISHED, 150)])
def test_the_first_noise_level_is_the_published_one(base, suffix):
    seen, images = [], random_images(2, 3, 4, 4)
    config = replace(base, steps_T=150, rounds_n=1, reverse_steps=11)
    purify(images, config=config, network=lambda x, t: seen.append((x, t)) or 0 * x)
    z = KeyedNoise(torch.arange(2), 0, CPU)(torch.empty(2, 3, 4, 4))
    expected = (
        GOLDEN["schedule"][f"sqrt_ab_{suffix}"] * (images / 127.5 - 1)
        + GOLDEN["schedule"][f"sqrt_1mab_{suffix}"] * z
    )
    assert torch.allclose(seen[0][0], expected, atol=1e-5)
    assert seen[0][1].tolist() == [149, 149]


@pytest.mark.parametrize("reverse_steps", [None, 6])
def test_the_network_is_asked_at_these_levels_and_this_often(reverse_steps):
    seen = []
    config = replace(CONFIG, reverse_steps=reverse_steps)
    purifier = Purifier(lambda x, t: seen.append(int(t[0])) or toy_network(x, t), config, 0, CPU)
    purifier.intermediaries(random_images(2, 3, 4, 4), torch.arange(2))
    assert seen == subset_steps(12, reverse_steps, 4) * 3
    assert purifier.passes_per_image == len(seen)


def test_quantisation_is_the_published_one_or_exact():
    unit = LEVELS_8BIT.float() / 255 * 2 - 1
    assert (
        quantised(unit, truncate=True).tolist()
        == requantised(LEVELS_8BIT).tolist()
        == GOLDEN["requantise_lut"]
    )
    assert torch.equal(quantised(unit, truncate=False), LEVELS_8BIT)
    for truncate in (False, True):
        assert quantised(torch.tensor([-7.0, 7.0]), truncate).tolist() == [0, 255]
    half = (torch.arange(255) + 0.6) / 127.5 - 1
    assert torch.equal(quantised(half, truncate=False), LEVELS_8BIT[1:])
    assert torch.equal(quantised(half, truncate=True), LEVELS_8BIT[:-1])


@pytest.mark.parametrize(("config", "truncate"), [(CONFIG, False), (PUBLISHED, True)])
def test_the_preset_says_how_every_column_is_quantised(config, truncate, monkeypatch):
    asked = []
    noted = lambda x, truncate: asked.append(truncate) or quantised(x, truncate)
    monkeypatch.setattr("defense.elixir.purifier.quantised", noted)
    images = LEVELS_8BIT.view(1, 1, 16, 16).expand(2, 3, 16, 16)
    found = purify(images, config=config)
    lut = torch.tensor(np.array(GOLDEN["requantise_lut"], dtype=np.uint8))
    assert torch.equal(found[:, 0], lut[images.long()] if truncate else images)
    assert asked[-12:] == [truncate] * 12


@pytest.fixture
def denoiser_folder(tmp_path):
    """A saved denoiser for 8x8 images and levels below 20."""
    unet = build_unet(DenoiserConfig(out="", channels="8", layers_per_block=1), 8)
    Denoiser(unet, t_max=20).save(tmp_path / "ddpm")
    return tmp_path / "ddpm"


def test_a_denoiser_is_found_from_both_places_and_ready(denoiser_folder, monkeypatch):
    monkeypatch.setattr(config_module, "SCRIPTS", denoiser_folder.parent / "attack")
    for name in (str(denoiser_folder), "../ddpm"):
        found = open_denoiser(replace(CONFIG, ddpm=name, steps_T=20), 8, "toy")
        assert (found.resolution, found.t_max, found.training) == (8, 20, False)
    assert (
        open_denoiser(replace(PUBLISHED, ddpm=str(denoiser_folder), steps_T=20), 8, "toy").t_max
        == 20
    )


@pytest.mark.parametrize(
    ("changes", "side", "words"),
    [
        ({"steps_T": 21}, 8, "steps_T: 21, but the denoiser .* was trained for levels below 20"),
        ({}, 16, "works on 8x8 images, the data are 16x16"),
        ({"last_steps_m": 13}, 8, "last_steps_m: cannot keep the last 13 of 12"),
        ({"reverse_steps": 4}, 8, "choose at least 5"),
        ({"reverse_steps": 13}, 8, "cannot visit 13 of 12"),
        ({"ddpm": "no/such/folder"}, 8, "ddpm: .*nothing at"),
        ({"ddpm": "auto"}, 8, "no card for data set 'toy'"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(denoiser_folder, changes, side, words):
    with pytest.raises(UserError, match=words):
        open_denoiser(replace(CONFIG, **{"ddpm": str(denoiser_folder)} | changes), side, "toy")


def test_the_schedules_end_is_respected(denoiser_folder, monkeypatch):
    monkeypatch.setattr(
        "defense.elixir.purifier.load_denoiser", lambda *names, **keys: FlatDenoiser()
    )
    assert open_denoiser(PurifyConfig(steps_T=1000), 8, "toy").t_max == 1000
    for config in (PurifyConfig(steps_T=1001), replace(PUBLISHED, steps_T=1000)):
        with pytest.raises(UserError, match="steps_T: 100"):
            open_denoiser(config, 8, "toy")
