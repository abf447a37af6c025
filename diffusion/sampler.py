# Ho et al., DDPM, 2020: https://arxiv.org/abs/2006.11239
"""Forward and reverse diffusion over any noise levels; images are float (B,C,H,W) in [-1,1]."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Linear noise schedule in float64, with a = alpha, ab = alpha_bar, b = beta:

    (1) one step     q(x_t | x_{t-1}) = N(sqrt(a_t) x_{t-1}, b_t I), a_t = 1 - b_t
    (2) many steps   q(x_t | x_0) = N(sqrt(ab_t) x_0, (1 - ab_t) I), ab_t = a_0 a_1 ... a_t
    (3) the network  e(x_t, t) predicts the noise e of x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) e
    (4) its x_0      p = (x_t - sqrt(1 - ab_t) e) / sqrt(ab_t)
    (5) backwards    q(x_s | x_t, x_0) = N(c1 x_0 + c2 x_t, v I), s < t, a = ab_t / ab_s, b = 1 - a:
    (6)              c1 = b sqrt(ab_s) / (1 - ab_t), c2 = (1 - ab_s) sqrt(a) / (1 - ab_t),
                     v = b (1 - ab_s) / (1 - ab_t)

    The level t runs from 0 (nearly clean) to steps - 1 (nearly noise).
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    @cached_property
    def betas(self) -> Tensor:
        """Variance added at each step: float64 (steps,) on the CPU, increasing."""
        return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """Share of the image's variance left at each t: float64 (steps,), falling within (0,1)."""
        return torch.cumprod(1 - self.betas, dim=0)

    def alpha_bar(self, t: int) -> float:
        """alphas_cumprod[t] as a number; 1.0 for t = -1, the clean image."""
        return 1.0 if t < 0 else self.alphas_cumprod[t].item()


def subset_steps(T: int, count: int | None = None, last_m: int = 1) -> list[int]:
    """`count` (None = all T) noise levels to visit on the way down from T - 1 to 0.

    The lowest levels last_m - 1 ... 0 are all visited, the others evenly spaced. Raises ValueError
    where there is no such list.
    """
    count = T if count is None else count
    if not 1 <= last_m <= T:
        raise ValueError(f"cannot keep the last {last_m} of {T} steps: choose between 1 and {T}")
    if count > T:
        raise ValueError(f"cannot visit {count} of {T} steps: choose at most {T}")
    if count == T:
        return list(range(T - 1, -1, -1))
    if count < last_m + 1:
        words = f"too few to keep the last {last_m} and start at {T - 1}"
        raise ValueError(f"{count} steps are {words}: choose at least {last_m + 1}")
    above, span = count - last_m, T - last_m
    return [T - 1 - j * span // above for j in range(above)] + list(range(last_m - 1, -1, -1))


@dataclass(frozen=True)
class Step:
    """A reverse step from level t: p = clamp(x_scale x - e_scale e), x <- c1 p + c2 x + sigma z."""

    t: int
    x_scale: float
    e_scale: float
    c1: float
    c2: float
    sigma: float


@dataclass(frozen=True)
class Sampler:
    """Runs a noise predictor forwards and backwards.

    The reverse process is DDPM's ancestral one, equations (5) and (6). Between neighbouring levels
    its variance is the step's beta, as published ("fixedlarge"), and v where levels are skipped: the
    beta of a merged step is far too large.

    Args:
        denoiser: (x (B,C,H,W) in [-1,1] plus noise, t int64 (B,)) -> predicted noise like x.
        schedule: The noise schedule that the denoiser was trained with.
        clip: Clamp the predicted clean image to [-1,1] at every step, as published.
    """

    denoiser: Callable[[Tensor, Tensor], Tensor]
    schedule: Schedule = Schedule()
    clip: bool = True

    def q_sample(self, x0: Tensor, t: int, noise: Tensor) -> Tensor:
        """Equation (2): x0 (B,C,H,W) in [-1,1] diffused to level t with noise N(0,I) like x0."""
        if not 0 <= t < self.schedule.steps:
            last = self.schedule.steps - 1
            raise ValueError(f"noise level {t} is not on the schedule: choose between 0 and {last}")
        assert x0.shape == noise.shape, (x0.shape, noise.shape)
        ab = self.schedule.alpha_bar(t)
        return sqrt(ab) * x0 + sqrt(1 - ab) * noise

    def clean(self, x: Tensor, t: int, e: Tensor) -> Tensor:
        """Equation (4): the clean image [-1,1] (B,C,H,W) behind x, whose noise at level t is e."""
        ab = self.schedule.alpha_bar(t)
        p = (x - sqrt(1 - ab) * e) / sqrt(ab)
        return p.clamp(-1, 1) if self.clip else p

    @torch.no_grad()
    def reverse(
        self, x: Tensor, steps: list[int], noise: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """Denoise x step by step.

        Args:
            x: The start (B,C,H,W), at the noise level of steps[0].
            steps: Falling noise levels, as from `subset_steps`, down to before the clean image.
            noise: x -> N(0,I) like x; called after the denoiser, once for each noisy step.

        Yields:
            The state (B,C,H,W) after each step, not clamped; the last one is free of noise.
        """
        for step in self.plan(steps):
            e = self.denoiser(x, torch.full((len(x),), step.t, dtype=torch.long, device=x.device))
            assert e.shape == x.shape, (e.shape, x.shape)
            # in place from here on, but never in what came from others
            p = (step.x_scale * x).sub_(step.e_scale * e)
            p = p.clamp_(-1, 1) if self.clip else p
            x = p.mul_(step.c1).add_(step.c2 * x)
            if step.sigma > 0:
                x.add_(step.sigma * noise(x))
            yield x

    def plan(self, steps: list[int]) -> list[Step]:
        """A run over the falling levels `steps`, in float64; float32 where it meets x."""
        last, falling = self.schedule.steps - 1, all(t > s for t, s in itertools.pairwise(steps))
        if not steps or steps[0] > last or steps[-1] < 0 or not falling:
            raise ValueError(f"steps must fall within {last}..0, got {steps}")
        return [self._step(t, s) for t, s in zip(steps, [*steps[1:], -1])]

    def _step(self, t: int, s: int) -> Step:
        """The step from level t to s < t, -1 being the clean image; no noise where ab_s = 1."""
        ab_t, ab_s = self.schedule.alpha_bar(t), self.schedule.alpha_bar(s)
        alpha = ab_t / ab_s
        beta, shrink = 1 - alpha, (1 - ab_s) / (1 - ab_t)
        variance = beta * shrink if s < t - 1 else beta
        return Step(
            t,
            x_scale=sqrt(1 / ab_t),
            e_scale=sqrt(1 / ab_t - 1),
            c1=beta * sqrt(ab_s) / (1 - ab_t),
            c2=shrink * sqrt(alpha),
            # rounded like the published code, which keeps log variances in float32
            sigma=torch.tensor(log(variance)).mul(0.5).exp().item() if ab_s < 1 else 0.0,
        )
