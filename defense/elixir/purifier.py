"""Rounds of forward and reverse diffusion: images in, intermediaries out (DataElixir, Section 3).

x starts as the image; each of n rounds adds noise up to level T and takes it off again step by
step. The last m states of every round are the intermediaries, and the last one, clamped, is where
the next round starts. The states live in [-1, 1] here and nowhere else; what comes out is uint8.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from defense.elixir.config import PUBLISHED, PurifyConfig
from diffusion.card import CARDS
from diffusion.denoiser import Denoiser, load_denoiser
from diffusion.sampler import Sampler, Schedule, subset_steps
from diffusion.weights import DenoiserError
from utils.compiled import Compiled, FixedRows
from utils.config import UserError, candidate_paths
from utils.devices import autocast, has_bfloat16
from utils.randomness import keyed_generator
from utils.storage.files import shortened

AUTO_TOP = 300  # the highest level that steps_T: auto tries
# Samples of one random stream: a GPU starts a kernel for each; a CPU would draw in vain for others.
STREAM_SHARED_BY = {"cpu": 1, "cuda": 8}
# 10^9 operations from which on compiling takes less time than it saves; on a CPU without bfloat16
# there is less to save.
COMPILING_PAYS = {"cpu": 4e4, "cuda": 1e6}
IN_FLOAT32 = 1e5
Network = Callable[[Tensor, Tensor], Tensor]  # x (B, 3, H, W) in [-1, 1], t (B,) -> noise


def quantised(x: Tensor, truncate: bool) -> Tensor:
    """[-1, 1] floats -> uint8, rounded or truncated; float32 operations in the published order."""
    unit = ((x.clamp(-1, 1) + 1) * 0.5).clamp(0, 1) * 255
    return (unit if truncate else unit.round()).to(torch.uint8)


def requantised(images: Tensor) -> Tensor:
    """uint8 -> uint8 through [-1, 1] and truncation, as the published code treats every image."""
    return quantised(images.float() / 255 * 2 - 1, truncate=True)


def open_denoiser(config: PurifyConfig, resolution: int | None, dataset: str) -> Denoiser:
    """The denoiser that `config.ddpm` names, checked against the images and the noise level.

    Raises:
        UserError: not found, damaged, of another resolution, or not trained up to steps_T.
    """
    places = (str(path) for path in candidate_paths(config.ddpm) if path.exists())
    name = config.ddpm if config.ddpm in CARDS else next(places, config.ddpm)
    try:
        denoiser = load_denoiser(name, resolution=resolution, dataset=dataset)
    except DenoiserError as error:
        raise UserError(f"ddpm: {error}") from None
    _try_denoising(denoiser)
    if config.steps_T == "auto":
        steps_of(replace(config, steps_T=min(AUTO_TOP, denoiser.t_max)))
        return denoiser
    # One level more than the network is told is its own, unless the schedule ends there.
    extra = config.rules.extra_noise and denoiser.t_max == 1000
    if config.steps_T + extra > denoiser.t_max:
        told = f"steps_T: {config.steps_T}, but the denoiser {denoiser.name} was trained for levels"
        raise UserError(f"{told} below {denoiser.t_max}")
    steps_of(config)
    return denoiser


@torch.inference_mode()
def _try_denoising(denoiser: Denoiser) -> None:
    """UserError where the network does not map a black image of its size to noise of that shape."""
    side = denoiser.resolution
    try:
        seen = tuple(denoiser(torch.zeros(1, 3, side, side), torch.zeros(1).long()).shape)
        if seen != (1, 3, side, side):
            raise ValueError(f"it gives {seen}")
    except Exception as error:  # noqa: BLE001 - each network says it in its own way
        words = f"{denoiser.name} cannot denoise colour images of {side}x{side}"
        raise UserError(f"ddpm: {words} ({shortened(error)}); give another --ddpm") from None


def steps_of(config: PurifyConfig) -> list[int]:
    """The levels that a round visits, descending.

    Raises:
        UserError: reverse_steps or last_steps_m do not fit steps_T.
    """
    assert config.steps_T != "auto"
    try:
        return subset_steps(config.steps_T, config.reverse_steps, config.last_steps_m)
    except ValueError as error:
        raise UserError(f"steps_T, reverse_steps, last_steps_m: {error}") from None


def worth_compiling(denoiser: Network, passes: int, device: torch.device) -> bool:
    """Whether the minute that compiling takes is won back in that many passes, over all images."""
    slow = device.type == "cpu" and not has_bfloat16()
    least = IN_FLOAT32 if slow else COMPILING_PAYS.get(device.type, float("inf"))
    return isinstance(denoiser, Denoiser) and passes * denoiser.gflops() > least


class KeyedNoise:
    """Standard normal noise, keyed by (seed, data set index): the same for a sample in any batch.

    It is drawn on `device`, as CPU and GPU streams differ, for data set indices int64 (B,).
    """

    def __init__(self, index: Tensor, seed: int, device: torch.device, stream="purify"):
        self.shared = STREAM_SHARED_BY.get(device.type, 1)
        blocks, position = (index // self.shared).unique(return_inverse=True)
        # Where the samples' noise lies in a drawing; on the device, so that no step waits for it.
        self.rows = (position * self.shared + index % self.shared).to(device)
        self.generators = [keyed_generator(seed, stream, int(b), device=device) for b in blocks]

    def __call__(self, x: Tensor) -> Tensor:
        """N(0, I) of x's shape (B, ...)."""
        drawn = torch.empty((len(self.generators) * self.shared, *x.shape[1:]), device=x.device)
        for part, generator in zip(drawn.split(self.shared), self.generators):
            part.normal_(generator=generator)
        return drawn[self.rows]


class Purifier:
    """Makes intermediaries with one denoiser.

    Args:
        denoiser: predicts the noise in x (B, 3, H, W) in [-1, 1] at the levels t (B,).
        config: T, n, m and the rules; steps_T a number.
        seed: noise is keyed by (seed, sample).
        amp: run the network in mixed precision.
    """

    def __init__(
        self, denoiser: Network, config: PurifyConfig, seed: int, device: torch.device, amp=False
    ):
        self.config, self.seed, self.device, self.amp = config, seed, device, amp
        self.denoiser, self.steps = denoiser, steps_of(config)
        self.sampler = Sampler(self.predict_noise)
        # the level that it was trained for
        self.highest_known = getattr(denoiser, "t_max", Schedule().steps)

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        """The denoiser's answer, float32 (B, 3, H, W)."""
        with autocast(self.device, self.amp):
            return self.denoiser(x, t).float()

    def one_round(self, x: Tensor, noise: KeyedNoise) -> tuple[Tensor, Tensor]:
        """Up to level T and back.

        From x (B, 3, H, W) in [-1, 1], where the round starts, to the last m states, uint8
        (B, m, 3, H, W), and where the next round starts.
        """
        level = self.steps[0] + self.config.rules.extra_noise
        x_T = self.sampler.q_sample(x, level, noise(x))
        # Only the last m states live.
        tail = deque(self.sampler.reverse(x_T, self.steps, noise), self.config.last_steps_m)
        states = [quantised(state, self.config.rules.truncate) for state in tail]
        return torch.stack(states, dim=1), tail[-1].clamp(-1, 1)

    def start(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> where the first round starts, [-1, 1] on the device."""
        x = images.to(self.device).float() / 255 * 2 - 1
        on_gpu = self.device.type == "cuda"
        order = torch.channels_last if on_gpu else torch.contiguous_format
        return x.contiguous(memory_format=order)

    @property
    def passes_per_image(self) -> int:
        """Denoiser passes that one image costs."""
        return self.config.rounds_n * len(self.steps)

    @torch.inference_mode()
    def intermediaries(self, images: Tensor, index: Tensor) -> Tensor:
        """The image and its intermediaries, after all rounds.

        Args:
            images: uint8 (B, 3, H, W).
            index: int64 (B,) data set indices, the key of the noise.

        Returns:
            uint8 (B, 1 + n m, 3, H, W) on the CPU; column 0 is the original, column 1 + r m + k is
            state k of the last m of round r (k = m - 1 is noise-free).
        """
        noise, x = KeyedNoise(index, self.seed, self.device), self.start(images)
        columns = [(requantised(images) if self.config.rules.truncate else images)[:, None]]
        for _ in range(self.config.rounds_n):
            states, x = self.one_round(x, noise)
            columns.append(states.cpu())
        return torch.cat(columns, dim=1)

    @torch.inference_mode()
    def expected(self, images: Tensor, index: Tensor, level: int, draws: int) -> Tensor:
        """E[x_0 | x_t], the image that the denoiser expects behind noise (Ho et al., equation 15).

        Args:
            images, index: as in `intermediaries`.
            level: noise up to this level, or what the denoiser was trained for.
            draws: of the noise, over which the mean is taken.

        Returns:
            float32 (B, 3, H, W) in levels of 255, on the CPU.
        """
        level = min(level, self.highest_known)
        noise, x = KeyedNoise(index, self.seed, self.device, "expected"), self.start(images)
        t = torch.full((len(x),), level - 1, device=self.device)
        mean = torch.zeros_like(x)
        for _ in range(draws):
            x_t = self.sampler.q_sample(x, level - 1, noise(x))
            mean += self.sampler.clean(x_t, level - 1, self.predict_noise(x_t, t)) / draws
        return ((mean + 1) * 127.5).cpu()


def purifier_for(
    denoiser: Denoiser,
    config: PurifyConfig,
    images: int,
    seed: int,
    device: torch.device,
    amp: bool,
) -> Purifier:
    """A purifier for that many images, its denoiser on the device and compiled where that pays.

    The published preset never compiles; nor does who says that there are no images.
    """
    order = torch.channels_last if device.type == "cuda" else torch.preserve_format
    purifier = Purifier(denoiser.to(device).to(memory_format=order), config, seed, device, amp)
    passes = purifier.passes_per_image * images
    if config.rules is not PUBLISHED and worth_compiling(denoiser, passes, device):
        purifier.denoiser = Compiled(denoiser)
    if device.type == "cpu":
        purifier.denoiser = FixedRows(purifier.denoiser)
    return purifier
