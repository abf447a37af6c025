"""The keys of a denoiser that is to be trained; without torch, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class DenoiserConfig:
    """A denoiser and its training.

    Args:
        out: folder to write the denoiser to; an interrupted training goes on from its checkpoint.
        result_file: name of a record whose (poisoned) training set replaces the clean one.
        data: a set of your own instead (class folders, .npz, CIFAR folder); a tenth is held out.
        ddpm_T: noise levels to learn, 0 ... T-1 of the 1000-step schedule; 1000 = all.
        channels: width of the network at each resolution, from the full one down, e.g. 64,128.
        layers_per_block: residual blocks at each resolution.
        patch: 2 folds each 2x2 patch of pixels into channels first, which makes a pass far cheaper.
        attention: attend over positions at the lowest resolution.
        dropout: share of features dropped in training.
        batch_size: images per optimizer step.
        lr: learning rate of Adam after the warmup; it falls to 0 on a cosine.
        steps: optimizer steps.
        minutes: end after this time at the latest, on the same rate curve; null = no limit.
        ema_decay: decay per step of the averaged weights, which are the result.
        half: store the weights as float16 (they are computed with as float32).
        amp: train in bfloat16 where the device computes with it.
        compile: compile the network: auto (where there is so much to do that it pays), on or off.
        device: auto, cpu, cuda, cuda:1, ...; without a GPU it falls back to the CPU with a warning.
        save_every: steps between two checkpoints.
        random_seed: seed of every random choice.
        dry_run: say what the training would cost, from a few steps measured on the spot, and stop.
    """

    out: str
    result_file: str | None = None
    data: str | None = None
    ddpm_T: PositiveInt = 150
    channels: str = "64,128"
    layers_per_block: PositiveInt = 2
    patch: Literal[1, 2] = 1
    attention: bool = True
    dropout: ClosedUnitInterval = 0.1
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 4e-4
    steps: PositiveInt = 20000
    minutes: PositiveFloat | None = None
    ema_decay: ClosedUnitInterval = 0.9995
    half: bool = False
    amp: bool = True
    compile: Literal["auto", "on", "off"] = "auto"
    device: str = "auto"
    save_every: PositiveInt = 1000
    random_seed: NonNegativeInt = 2022
    dry_run: bool = False
