"""Keyed randomness: streams that are the same for the same key, differ for any other, and look
independent."""

import itertools

import pytest
import torch

from utils.randomness import global_stream, key_seed, keyed_generator, per_sample

WORDS = ("purify", "poison", "victim", "benign", "benign_stage1", "badnet")


def draw(*key, n=2000):
    return torch.randn(n, generator=keyed_generator(*key))


def test_no_two_keys_of_a_large_grid_share_a_seed():
    keys = [(seed, word, index) for seed in range(20) for word in WORDS for index in range(500)]
    keys += [(seed, word) for seed in range(2000) for word in WORDS] + [
        (seed,) for seed in range(2000)
    ]
    keys += [(word, seed) for seed in range(2000) for word in WORDS] + list(
        itertools.product(range(60), repeat=3)
    )
    assert len({key_seed(*key) for key in keys}) == len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), (2, 1)),
        ((0, "a", 1), (0, 1, "a")),
        ((1, 2, 3), (3, 2, 1)),
        ((0,), (0, 0)),
        ((), (0,)),
        ((12, 3), (1, 23)),
        (("ab", "c"), ("a", "bc")),
    ],
)
def test_order_and_length_of_a_key_matter(one, other):
    assert key_seed(*one) != key_seed(*other)


def test_seeds_are_what_torch_takes():
    seeds = [
        key_seed(seed, "x", index) for seed in (0, 1, 2**31, 2**63, 2**70) for index in range(200)
    ]
    assert all(0 <= seed < 2**63 for seed in seeds)
    high = torch.tensor([[seed >> bit & 1 for bit in range(63)] for seed in seeds]).double().mean(0)
    assert (high - 0.5).abs().max() < 0.08  # every bit is used: 5 standard deviations of 1000 coins


def test_the_same_key_gives_the_same_stream_whatever_ran_before():
    first = draw(7, "purify", 3)
    torch.manual_seed(0)
    torch.rand(5)
    state = torch.random.get_rng_state()
    assert torch.equal(draw(7, "purify", 3), first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_neighbouring_streams_are_uncorrelated():
    streams = torch.stack(
        [
            draw(seed, word, index)
            for seed in range(3)
            for word in ("purify", "poison")
            for index in range(10)
        ]
    )
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / 2000**0.5
    assert (streams.mean(1).abs() < 5 / 2000**0.5).all()
    assert (streams.std(1) - 1).abs().max() < 0.1


def test_samples_draw_from_their_own_streams_in_any_order():
    noise = lambda generator: torch.rand(4, 3, generator=generator)
    index, order = torch.tensor([5, 0, 17, 3, 2]), torch.tensor([4, 2, 0])
    whole = per_sample(noise, index, 7, "jitter")
    assert whole.shape == (5, 4, 3)
    assert len(whole.flatten(1).unique(dim=0)) == 5
    assert torch.equal(per_sample(noise, index[order], 7, "jitter"), whole[order])
    assert not torch.equal(per_sample(noise, index, 8, "jitter"), whole)


def test_what_networks_draw_is_named_by_a_key_and_leaves_torchs_own_stream_alone():
    def drawn(*key, **options):
        with global_stream(*key, **options):
            return torch.nn.Linear(50, 20).weight.detach()

    torch.manual_seed(0)
    first, state = drawn(7, "victim"), torch.random.get_rng_state()
    torch.rand(5)
    assert torch.equal(drawn(7, "victim"), first)
    assert torch.equal(drawn(7, "victim", process=0), first)
    assert not torch.equal(drawn(7, "benign"), first)
    assert not torch.equal(drawn(7, "victim", process=1), first)
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    drawn(7, "victim")
    assert torch.equal(torch.random.get_rng_state(), state)
