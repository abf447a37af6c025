# Ho et al., DDPM, 2020: https://arxiv.org/abs/2006.11239; Luhman & Luhman, patches as channels, 2022: https://arxiv.org/abs/2207.04316
"""A denoiser that is to be trained: its keys, and the U-Net that they describe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
    restricted_string_type,
)

from diffusion.ho_layout import FIXED
from diffusion.weights import DenoiserError

if TYPE_CHECKING:
    from torch import nn

Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])  # what a tensor can hold
Channels = restricted_string_type("Channels", r"\d+(,\d+)*")


@dataclass(frozen=True)
class DenoiserConfig:
    """A denoiser and its training.

    Args:
        out: folder to write the denoiser to; an interrupted training goes on from the checkpoint in it.
        result_file: name of a record whose (poisoned) training set is used instead of the clean one.
        data: a set of your own instead: folder of class folders, .npz file or CIFAR folder, resized to image_size; a tenth is held out to measure on.
        ddpm_T: noise levels to learn, 0 ... T-1 of the 1000-step schedule; 1000 = all.
        channels: width of the network at each resolution, from the full one down, e.g. 64,128.
        layers_per_block: residual blocks at each resolution.
        patch: 2 folds each 2x2 patch of pixels into channels first, which makes a pass far cheaper.
        attention: attend over positions at the lowest resolution.
        dropout: share of features dropped in training.
        batch_size: images per optimizer step.
        lr: learning rate of Adam after the warmup; it falls to 0 on a cosine.
        steps: optimizer steps.
        minutes: end after this time at the latest, on the same learning rate curve; null = no limit.
        ema_decay: decay per step of the averaged weights, which are the result.
        half: store the weights as float16 (they are computed with as float32).
        amp: train in bfloat16 where the device computes with it.
        compile: compile the network: auto (where there is so much to do that it pays), on or off.
        device: auto, cpu, cuda, cuda:1, ...; a missing GPU is answered with a warning and the CPU.
        save_every: steps between two checkpoints.
        random_seed: seed of every random choice.
        dry_run: say what the training would cost, from a few steps measured on the spot, and stop.
    """

    out: str
    result_file: str | None = None
    data: str | None = None
    ddpm_T: PositiveInt = 150
    channels: Channels = "64,128"
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
    random_seed: Seed = 2022
    dry_run: bool = False


def build_unet(config: DenoiserConfig, resolution: int) -> nn.Module:
    """The UNet2DModel that `config` describes, for images of side `resolution`; random weights from the global stream.

    Raises:
        DenoiserError: The images cannot be halved so often, or the widths are odd.
    """
    from diffusers import UNet2DModel

    widths, levels = (
        [int(width) for width in config.channels.split(",")],
        config.channels.count(",") + 1,
    )
    groups, unit = math.gcd(32, *widths), config.patch * 2 ** (levels - 1)
    if groups < 4 or resolution % unit:
        raise DenoiserError(
            f"channels: {config.channels} needs image sides divisible by {unit} (here {resolution}) and widths divisible by 4, better 32"
        )
    kinds = [""] * (levels - 1) + ["Attn" if config.attention else ""]
    options = FIXED | {"norm_num_groups": groups, "sample_size": resolution // config.patch}
    return UNet2DModel(
        **options,
        in_channels=3 * config.patch**2,
        out_channels=3 * config.patch**2,
        block_out_channels=widths,
        layers_per_block=config.layers_per_block,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        add_attention=config.attention,
        dropout=config.dropout,
    )
