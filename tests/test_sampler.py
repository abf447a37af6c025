"""Laws of the noise schedule and the reverse process, on noise predictors in closed form."""

import itertools
from math import sqrt

import pytest
import torch

from diffusion.sampler import Sampler, Schedule, subset_steps

SCHEDULE = Schedule()
SUBSETS = [(150, None, 10), (150, 75, 10), (150, 17, 10), (150, 12, 10), (40, 5, 1), (10, None, 10)]


def gaussian_noise(seed):
    """A keyed source of noise: a callable x -> N(0,I) like x."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator)


def gaussian_denoiser(mean, std):
    """The exact noise predictor of data N(mean, std^2) per pixel; std = 0 is one point."""

    def predict(x, t):
        ab = SCHEDULE.alpha_bar(int(t[0]))
        gain = sqrt(ab) * std**2 / (ab * std**2 + 1 - ab)
        x0 = mean + gain * (x - sqrt(ab) * mean)
        return (x - sqrt(ab) * x0) / sqrt(1 - ab)

    return predict


def toy_network(x, t):
    """Stands in for a U-Net: bounded, mixes pixels and channels, depends on t."""
    return torch.tanh(0.8 * x + 0.3 * x.roll(1, dims=1) - 0.2 * x.roll(2, dims=-1) + t[0] / 150)


def replay(x, network, noises):
    """The published loop in plain float32 tensors, with all steps and variance "fixedlarge"."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    ab = torch.cumprod(1 - beta, 0)
    ab_prev = torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]])
    post_var = beta * (1 - ab_prev) / (1 - ab)
    lv = torch.log(torch.cat([post_var[1:2], beta[1:]])).float()
    c1 = (beta * ab_prev.sqrt() / (1 - ab)).float()
    c2 = ((1 - ab_prev) * (1 - beta).sqrt() / (1 - ab)).float()
    a, b = (1 / ab).sqrt().float(), (1 / ab - 1).sqrt().float()
    states = []
    for i in range(len(noises) - 1, -1, -1):
        p = (a[i] * x - b[i] * network(x, torch.full((len(x),), i))).clamp(-1, 1)
        x = c1[i] * p + c2[i] * x + (i > 0) * torch.exp(0.5 * lv[i]) * noises[i]
        states.append(x)
    return states


def run(sampler, x, steps, seed=1):
    """All states of one reverse run."""
    return list(sampler.reverse(x, steps, gaussian_noise(seed)))


def outcome(sampler, steps, mean, std):
    """(mean, standard deviation) of what comes out for 120,000 pixels of data N(mean, std^2)."""
    draw = gaussian_noise(0)
    x0 = mean + std * draw(torch.empty(1, 3, 200, 200))
    x = run(sampler, sampler.q_sample(x0, steps[0], draw(x0)), steps)[-1]
    return x.mean().item(), x.std().item()


def test_published_numbers():
    ab = SCHEDULE.alphas_cumprod
    assert ab.dtype == torch.float64
    assert ab.shape == (1000,)
    found = [ab[150].sqrt(), (1 - ab[150]).sqrt(), ab[149].sqrt(), (1 - ab[149]).sqrt()]
    assert torch.stack(found).tolist() == pytest.approx(
        [0.88650269, 0.46272343, 0.88787463, 0.46008548], abs=5e-9
    )
    sigmas = [step.sigma for step in Sampler(toy_network).plan(subset_steps(150))[-10:]]
    table = [0.016712, 0.016105, 0.015474, 0.014816, 0.014128, 0.013404, 0.012640, 0.011825]
    table += [0.010951, 0]
    assert sigmas == pytest.approx(table, abs=5e-7)


@pytest.mark.parametrize("t", [0, 90, 150, 999])
def test_the_clean_image_behind_noise_is_equation_4(t):
    """Whoever knows the noise has the image back."""
    draw = gaussian_noise(t)
    x0, noise = draw(torch.empty(2, 3, 5, 5)).double().clamp(-1, 1), draw(torch.empty(2, 3, 5, 5))
    sampler = Sampler(toy_network)
    x = sampler.q_sample(x0, t, noise.double())
    torch.testing.assert_close(sampler.clean(x, t, noise.double()), x0)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[: t + 1]
    ab = (1 - beta).prod().item()
    wrong = toy_network(x, torch.tensor([t]))
    exact = (x - sqrt(1 - ab) * wrong) / sqrt(ab)
    torch.testing.assert_close(Sampler(toy_network, clip=False).clean(x, t, wrong), exact)
    torch.testing.assert_close(sampler.clean(x, t, wrong), exact.clamp(-1, 1))


def test_signal_to_noise_ratio_falls():
    ab = SCHEDULE.alphas_cumprod
    ratio = ab / (1 - ab)
    assert (ratio[1:] < ratio[:-1]).all()
    assert ratio[0] > 1e3
    assert ratio[-1] < 1e-4


@pytest.mark.parametrize("t", [0, 149, 150, 999])
def test_q_sample_moments(t):
    draw = gaussian_noise(2)
    x0 = torch.full((4, 3, 100, 100), 0.5)
    x = Sampler(toy_network).q_sample(x0, t, draw(x0))
    ab = SCHEDULE.alpha_bar(t)
    assert x.mean().item() == pytest.approx(0.5 * sqrt(ab), abs=0.01)
    assert x.std().item() == pytest.approx(sqrt(1 - ab), rel=0.01)


def test_equals_a_literal_replay_of_the_published_loop():
    draw = gaussian_noise(3)
    x = draw(torch.empty(2, 3, 8, 8))
    noises = [draw(x) for _ in range(150)]
    pending = iter(noises[:0:-1])
    states = list(Sampler(toy_network).reverse(x, subset_steps(150), lambda _: next(pending)))
    assert next(pending, None) is None, "noise is drawn once for each step but the last"
    assert (torch.stack(states) - torch.stack(replay(x, toy_network, noises))).abs().max() <= 1e-6


@pytest.mark.parametrize("subset", SUBSETS)
def test_one_point_data_set_comes_back(subset):
    steps = subset_steps(*subset)
    sampler = Sampler(gaussian_denoiser(0.3, 0.0))
    x = gaussian_noise(4)(torch.empty(3, 3, 4, 4))
    states = run(sampler, x, steps)
    assert len(states) == len(steps)
    assert (states[-1] - 0.3).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("subset", "tolerance"),
    [
        ((150, None, 10), 0.02),
        ((150, 75, 10), 0.05),
        ((150, 17, 10), 0.15),
        ((1000, 100, 10), 0.15),
    ],
)
def test_gaussian_data_keep_their_moments(subset, tolerance):
    """With the beta of merged steps, 17 of 150 would come out more than 1.3 times as wide."""
    sampler = Sampler(gaussian_denoiser(0.3, 0.05), clip=False)
    mean, std = outcome(sampler, subset_steps(*subset), 0.3, 0.05)
    assert mean == pytest.approx(0.3, abs=0.002)
    assert std == pytest.approx(0.05, rel=tolerance)


def test_variance_is_beta_between_neighbours_and_posterior_over_gaps():
    steps = subset_steps(150, 17, 10)
    for step, below in zip(Sampler(toy_network).plan(steps)[:-1], steps[1:]):
        ab, ab_below = SCHEDULE.alpha_bar(step.t), SCHEDULE.alpha_bar(below)
        beta = 1 - ab / ab_below
        posterior = beta * (1 - ab_below) / (1 - ab)
        variance = beta if below == step.t - 1 else posterior
        assert step.sigma == pytest.approx(sqrt(variance), rel=1e-6)


def test_a_run_depends_on_its_noise_only():
    sampler, steps = Sampler(toy_network), subset_steps(150, 17, 10)
    x = gaussian_noise(5)(torch.empty(2, 3, 4, 4))
    first, again, other = (run(sampler, x, steps, seed)[-1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_states_are_yielded_one_by_one_without_a_graph():
    weight = torch.ones(1, requires_grad=True)
    seen = []

    def network(x, t):
        seen.append(int(t[0]))
        return weight * x

    states = Sampler(network).reverse(torch.zeros(1, 3, 2, 2), [5, 2, 0], gaussian_noise(0))
    assert not seen
    assert not next(states).requires_grad
    assert seen == [5]
    assert torch.is_grad_enabled()
    assert len(list(states)) == 2
    assert seen == [5, 2, 0]


def test_subset_steps():
    assert subset_steps(5) == subset_steps(5, 5) == subset_steps(5, None, 5) == [4, 3, 2, 1, 0]
    assert subset_steps(150, 17, 10) == [149, 129, 109, 89, 69, 49, 29, *range(9, -1, -1)]
    for T, m in ((150, 10), (37, 1), (1000, 25)):
        for count in range(m + 1, T + 1):
            steps = subset_steps(T, count, m)
            gaps = [t - s for t, s in itertools.pairwise(steps)][: count - m]
            assert len(steps) == count
            assert steps[0] == T - 1
            assert steps[-m:] == list(range(m - 1, -1, -1))
            assert min(gaps) >= 1
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((150, 10, 10), "at least 11"),
        ((150, 151, 10), "at most 150"),
        ((5, 5, 10), "keep the last 10 of 5"),
        ((5, 3, 0), "keep the last 0 of 5"),
    ],
)
def test_impossible_subsets_are_refused_in_words(arguments, words):
    with pytest.raises(ValueError, match=words):
        subset_steps(*arguments)


def test_misuse_is_refused_in_words():
    x = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="between 0 and 999"):
        Sampler(toy_network).q_sample(x, 1000, x)
    for steps in ([], [0, 1], [3, 3, 0], [1000, 0], [3, -1]):
        with pytest.raises(ValueError, match="must fall within 999..0"):
            next(Sampler(toy_network).reverse(x, steps, gaussian_noise(0)))
