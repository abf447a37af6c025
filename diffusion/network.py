# Ho et al., DDPM, 2020: https://arxiv.org/abs/2006.11239
# Luhman & Luhman, patches as channels, 2022: https://arxiv.org/abs/2207.04316
"""The U-Net of a denoiser that is to be trained."""

import math
import re
from typing import Any

from diffusion.config import DenoiserConfig
from diffusion.ho_layout import FIXED
from diffusion.weights import DenoiserError


def build_unet(config: DenoiserConfig, resolution: int) -> Any:
    """The UNet2DModel of `config` for images of that side; random weights from the global stream.

    Raises DenoiserError where the images cannot be halved so often, or the widths do not do.
    """
    from diffusers import UNet2DModel

    if not re.fullmatch(r"\d+(,\d+)*", config.channels):
        raise DenoiserError(f"channels: '{config.channels}' should be numbers such as 64,128")
    widths = [int(width) for width in config.channels.split(",")]
    groups, unit = math.gcd(32, *widths), config.patch * 2 ** (len(widths) - 1)
    if groups < 4 or resolution % unit:
        words = f"needs image sides divisible by {unit} (here {resolution})"
        words += " and widths divisible by 4, better 32"
        raise DenoiserError(f"channels: {config.channels} {words}")
    kinds = [""] * (len(widths) - 1) + ["Attn" if config.attention else ""]
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
