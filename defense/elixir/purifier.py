"""Rounds of forward and reverse diffusion: images in, intermediary images out (DataElixir, Section "Purification").

x starts as the image; each of n rounds adds noise up to level T and takes it off again step by step. The last m states
of every round are the intermediaries, and the last one, clamped, is where the next round starts. The states live in
[-1, 1] here and nowhere else; what comes out is uint8.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from defense.elixir.config import PurifyConfig
from diffusion.card import CARDS
from diffusion.weights import DenoiserError
from utils.compiled import Compiled, FixedRows
from utils.config import UserError, candidate_paths
from utils.devices import autocast, has_bfloat16
from utils.late import Tensor, inference_mode, torch
from utils.randomness import keyed_generator

if TYPE_CHECKING:
    from diffusion.denoiser import Denoiser

AUTO_TOP = 300  # the highest level that steps_T: auto tries
STREAM_SHARED_BY = {
    "cpu": 1,
    "cuda": 8,
}  # samples of one random stream: a GPU starts a kernel for each, a CPU would draw for samples that are not asked for
COMPILING_PAYS = {
    "cpu": 4e4,
    "cuda": 1e6,
}  # 10^9 operations from which on compiling takes less time than it saves
IN_FLOAT32 = 1e5  # on a CPU that multiplies no bfloat16, where there is less to save


def quantised(x: Tensor, quantise: str) -> Tensor:
    """[-1, 1] floats -> uint8; "truncate" follows the published order of float32 operations (algorithm.md 3.2)."""
    unit = ((x.clamp(-1, 1) + 1) * 0.5).clamp(0, 1) * 255
    return (unit.round() if quantise == "round" else unit).to(torch.uint8)


def requantised(images: Tensor) -> Tensor:
    """uint8 -> uint8 through [-1, 1] and truncation, as the published code does to every image it gives out."""
    return quantised(images.float() / 255 * 2 - 1, "truncate")


def open_denoiser(config: PurifyConfig, resolution: int, dataset: str) -> Denoiser:
    """The denoiser that `config.ddpm` names, checked against the images and the noise level.

    Raises:
        UserError: not found, damaged, of another resolution, or not trained up to steps_T.
    """
    from diffusion.denoiser import load_denoiser

    here = next((str(path) for path in candidate_paths(config.ddpm) if path.exists()), config.ddpm)
    try:
        denoiser = load_denoiser(
            config.ddpm if config.ddpm in CARDS else here, resolution=resolution, dataset=dataset
        )
    except DenoiserError as error:
        raise UserError(f"ddpm: {error}") from None
    if config.steps_T == "auto":
        _steps(replace(config, steps_T=min(AUTO_TOP, denoiser.t_max)))
        return denoiser
    top = config.steps_T + (config.noise_index == "T")
    if top > denoiser.t_max + (config.noise_index == "T" and denoiser.t_max < 1000):
        raise UserError(
            f"steps_T: {config.steps_T}, but the denoiser {denoiser.name} was trained for levels below {denoiser.t_max}"
        )
    _steps(config)
    return denoiser


def _steps(config: PurifyConfig) -> list[int]:
    from diffusion.sampler import subset_steps

    try:
        return subset_steps(config.steps_T, config.reverse_steps, config.last_steps_m)
    except ValueError as error:
        raise UserError(f"steps_T, reverse_steps, last_steps_m: {error}") from None


def worth_compiling(
    config: PurifyConfig, denoiser: Denoiser, passes: int, device: torch.device
) -> bool:
    """Whether to compile for that many passes, over all images: as the config says, or where the minute it takes is won back."""
    if config.compile == "auto":
        from diffusion.denoiser import Denoiser

        least = (
            IN_FLOAT32
            if device.type == "cpu" and not has_bfloat16()
            else COMPILING_PAYS.get(device.type, float("inf"))
        )
        return isinstance(denoiser, Denoiser) and passes * denoiser.gflops() > least
    return config.compile == "on"


def purifier_for(
    denoiser: Denoiser,
    config: PurifyConfig,
    images: int,
    seed: int,
    device: torch.device,
    amp: bool,
) -> Purifier:
    """A purifier for that many images, its denoiser on the device and compiled where that pays."""
    denoiser = denoiser.to(
        device,
        memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format,
    )
    purifier = Purifier(denoiser, config, seed, device, amp)
    if worth_compiling(config, denoiser, purifier.passes_per_image * images, device):
        purifier.denoiser = Compiled(denoiser)
    if device.type == "cpu":
        purifier.denoiser = FixedRows(purifier.denoiser)
    return purifier


class KeyedNoise:
    """Standard normal noise for a batch, keyed by (seed, data set index): the same for a sample in whatever batch it is.

    Args:
        index: int64 (B,) data set indices.
        seed: the run's seed.
        device: where the noise is drawn (CPU and GPU streams differ).
    """

    def __init__(self, index: Tensor, seed: int, device: torch.device):
        self.shared = STREAM_SHARED_BY.get(device.type, 1)
        blocks, position = (index // self.shared).unique(return_inverse=True)
        self.position, self.within, self.device = position, index % self.shared, device
        self.rows = self._rows()
        self.generators = [
            keyed_generator(seed, "purify", int(block), device=device) for block in blocks
        ]

    def keep(self, rows: Tensor) -> None:
        """Go on with the samples that the mask bool (B,) names."""
        blocks, self.position = self.position[rows].unique(return_inverse=True)
        self.within, self.generators = (
            self.within[rows],
            [self.generators[block] for block in blocks],
        )
        self.rows = self._rows()

    def _rows(self) -> Tensor:
        """Where the samples' noise lies in a drawing; on the device, so that no step waits for a copy."""
        return (self.position * self.shared + self.within).to(self.device)

    def __call__(self, x: Tensor) -> Tensor:
        """N(0, I) of x's shape (B, ...)."""
        drawn = torch.empty((len(self.generators) * self.shared, *x.shape[1:]), device=x.device)
        for part, generator in zip(drawn.split(self.shared), self.generators):
            part.normal_(generator=generator)
        return drawn[self.rows]


class Purifier:
    """Makes intermediaries with one denoiser.

    Args:
        denoiser: [-1, 1] (B, 3, H, W), t (B,) -> predicted noise; usually a Denoiser, maybe Compiled.
        config: T, n, m and the switches.
        seed: the run's seed; noise is keyed by (seed, sample).
        device: where to work.
        amp: run the network in mixed precision.
    """

    def __init__(
        self, denoiser, config: PurifyConfig, seed: int, device: torch.device, amp: bool = False
    ):
        from diffusion.sampler import Sampler

        self.config, self.seed, self.device, self.amp = config, seed, device, amp
        self.denoiser, self.steps = denoiser, _steps(config)
        self.sampler = Sampler(self.predict_noise)

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        """The denoiser's answer, float32 (B, 3, H, W)."""
        with autocast(self.device, self.amp):
            return self.denoiser(x, t).float()

    def one_round(self, x: Tensor, noise: KeyedNoise) -> tuple[Tensor, Tensor]:
        """Up to level T and back.

        Args:
            x: (B, 3, H, W) in [-1, 1], where the round starts.
            noise: of the same samples.

        Returns:
            The last m states, uint8 (B, m, 3, H, W), and where the next round starts; both on the device.
        """
        level = self.config.steps_T - (self.config.noise_index == "T-1")
        x_T = self.sampler.q_sample(x, level, noise(x))
        tail = deque(
            self.sampler.reverse(x_T, self.steps, noise), maxlen=self.config.last_steps_m
        )  # only m live
        return torch.stack([quantised(state, self.config.quantise) for state in tail], dim=1), tail[
            -1
        ].clamp(-1, 1)

    def start(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> where the first round starts, [-1, 1] on the device."""
        return (images.to(self.device).float() / 255 * 2 - 1).contiguous(
            memory_format=torch.channels_last
            if self.device.type == "cuda"
            else torch.contiguous_format
        )

    def original(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) as they stand in column 0 of the intermediaries."""
        return images if self.config.quantise == "round" else requantised(images)

    @property
    def passes_per_image(self) -> int:
        """Denoiser passes that one image costs that is given all rounds."""
        return self.config.rounds_n * len(self.steps)

    @inference_mode
    def intermediaries(self, images: Tensor, index: Tensor) -> Tensor:
        """The image and its intermediaries, after all rounds.

        Args:
            images: uint8 (B, 3, H, W).
            index: int64 (B,) data set indices, the key of the noise.

        Returns:
            uint8 (B, 1 + n m, 3, H, W) on the CPU; column 0 is the original, column 1 + r m + k is state k of the last
            m of round r (k = m - 1 is noise-free).
        """
        noise, x = KeyedNoise(index, self.seed, self.device), self.start(images)
        columns = [self.original(images)[:, None]]
        for _ in range(self.config.rounds_n):
            states, x = self.one_round(x, noise)
            columns.append(states.cpu())
        return torch.cat(columns, dim=1)
