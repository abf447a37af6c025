# Ho et al., 2020: https://arxiv.org/abs/2006.11239
# tensor names as in https://github.com/pesser/pytorch_diffusion
"""The DDPM U-Net as Ho et al. laid it out, mapped name by name onto the UNet2DModel of diffusers.

Level i of the U-Net is `down.i` and `up.i` there, while diffusers counts `up_blocks` from the
lowest resolution upwards and has linear layers for the 1x1 convolutions of an attention block.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

UNIT = {"nin_shortcut": "conv_shortcut", "temb_proj": "time_emb_proj"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OUTSIDE = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
}
FIXED: dict[str, Any] = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "attention_head_dim": None,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
}


def network_tensors(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors without a common prefix such as `model.`; KeyError if it has none."""
    anchors = [name for name in content if re.fullmatch(r"(.+\.)?conv_in\.weight", name)]
    if not anchors:
        raise KeyError("conv_in.weight")
    prefix = min(anchors, key=len).removesuffix("conv_in.weight")
    own = (name for name in content if name.startswith(prefix))
    return {name.removeprefix(prefix): content[name] for name in own}


def unet_config(tensors: Mapping[str, Tensor], resolution: int) -> dict[str, Any]:
    """Arguments of the UNet2DModel whose tensors these are, for images of side `resolution`.

    Raises:
        KeyError: A tensor that the architecture is read from is missing; carries its name.
        ValueError: The network's levels do not fit the resolution.
    """
    levels = _count(tensors, r"down\.(\d+)\.")
    if resolution % 2 ** max(levels - 1, 0):
        raise ValueError(f"{levels} levels cannot halve images of side {resolution}")
    attends = [f"down.{i}.attn.0.q.weight" in tensors for i in range(levels)]
    widths = [tensors[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    return {
        "sample_size": resolution,
        "in_channels": tensors["conv_in.weight"].shape[1],
        "out_channels": tensors["conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": _count(tensors, r"down\.0\.block\.(\d+)\."),
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        **FIXED,
    }


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest index that `pattern` finds at the start of a name."""
    return 1 + max((int(m[1]) for name in tensors if (m := re.match(pattern, name))), default=-1)


def diffusers_name(name: str, levels: int) -> str:
    """What UNet2DModel calls Ho's tensor in a U-Net of `levels` resolutions; unknown names stay."""
    module, _, kind = name.rpartition(".")
    if m := re.fullmatch(r"(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)", module):
        side, level, family, index, part = m.groups()
        place = f"{side}_blocks.{_level(side, level, levels)}"
    elif m := re.fullmatch(r"mid\.(block|attn)_(\d)\.(\w+)", module):
        family, index, part = m[1], str(int(m[2]) - 1), m[3]
        place = "mid_block"
    elif m := re.fullmatch(r"(down|up)\.(\d+)\.(?:down|up)sample\.conv", module):
        return f"{m[1]}_blocks.{_level(m[1], m[2], levels)}.{m[1]}samplers.0.conv.{kind}"
    else:
        return f"{OUTSIDE.get(module, module)}.{kind}"
    group, parts = ("resnets", UNIT) if family == "block" else ("attentions", ATTENTION)
    return f"{place}.{group}.{index}.{parts.get(part, part)}.{kind}"


def _level(side: str, level: str, levels: int) -> int:
    return int(level) if side == "down" else levels - 1 - int(level)


def to_diffusers(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Ho's tensors under the names, shapes and float type of `expected`, the UNet2DModel's state.

    Raises:
        ValueError: The two do not correspond one to one; names the first tensor that is wrong.
    """
    levels, state = _count(tensors, r"down\.(\d+)\."), {}
    for name, tensor in tensors.items():
        target, shape = diffusers_name(name, levels), tensor.shape
        if target not in expected or target in state:
            raise ValueError(f"tensor '{name}' has no place in the network")
        wanted = expected[target].shape
        if len(wanted) == 2 and shape[2:] == (1, 1):
            shape = shape[:2]
        if shape != wanted:
            found = tuple(tensor.shape)
            raise ValueError(f"tensor '{name}' has shape {found} where {tuple(wanted)} belongs")
        state[target] = tensor.reshape(wanted).to(expected[target].dtype)
    if missing := [name for name in expected if name not in state]:
        raise ValueError(f"no tensor for '{missing[0]}'")
    return state
