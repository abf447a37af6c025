# Ho et al., DDPM, 2020: https://arxiv.org/abs/2006.11239
# networks from https://github.com/huggingface/diffusers
"""Denoisers, networks (x in [-1,1] (B,3,H,W), t) -> the noise in x, and how they are loaded."""

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffusion import ho_layout
from diffusion.card import CARD_FOLDER, CARDS, Card
from diffusion.weights import (
    FOLDER_WEIGHTS,
    READ_ERRORS,
    DenoiserError,
    checked_hash,
    first_line,
    locate,
    read_json,
    read_tensors,
)

log = logging.getLogger("dataelixir")
NOTES = "denoiser.json"


class Denoiser(nn.Module):
    """A UNet2DModel that predicts the noise in images.

    Args:
        unet: diffusers.UNet2DModel, 3 * patch^2 channels in and out, for images of side / patch.
        patch: 1, or 2 to fold 2x2 pixels into channels first.
        t_max: Largest t that it was trained for, plus 1.
        name: What the user called it.
        sha256: Of the weights file that it was loaded from, or the empty string.
        metadata: Anything else worth keeping beside the weights.

    Raises:
        DenoiserError: The U-Net does not map RGB images to noise of the same shape.
    """

    unet: Any

    def __init__(self, unet, patch=1, t_max=1000, name="", sha256="", metadata=None):
        super().__init__()
        size = unet.config.sample_size
        channels = unet.config.in_channels, unet.config.out_channels
        if not isinstance(size, int) or channels != (3 * patch**2, 3 * patch**2):
            raise DenoiserError(
                f"denoiser '{name}': {channels[0]} channels in, {channels[1]} out and image size "
                f"{size} do not fit square RGB images with patch {patch}"
            )
        self.unet, self.patch, self.t_max = unet, patch, t_max
        self.name, self.sha256, self.metadata = name, sha256, dict(metadata or {})

    @property
    def resolution(self) -> int:
        """Side of its images in pixels."""
        return self.unet.config.sample_size * self.patch

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.parameters())

    def forward(self, x: Tensor, t: Tensor | int) -> Tensor:
        """The noise in x (B,3,H,W), [-1,1] plus noise, at level t: int64 (B,), or one for all."""
        assert x.shape[1:] == (3, self.resolution, self.resolution), x.shape
        if self.patch == 1:
            return self.unet(x, t).sample
        return F.pixel_shuffle(self.unet(F.pixel_unshuffle(x, self.patch), t).sample, self.patch)

    def gflops(self, batch: int = 1) -> float:
        """10^9 operations per image and pass (a multiply-add is two), counted on `batch` images."""
        side, device = self.resolution, next(self.parameters()).device
        x = torch.zeros(batch, 3, side, side, device=device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self(x, torch.zeros(batch, dtype=torch.long, device=device))
        return counter.get_total_flops() / batch / 1e9

    def save(self, folder: str | Path, half: bool = False) -> None:
        """Write a diffusers folder with our denoiser.json; half stores the weights as float16."""
        unet = copy.deepcopy(self.unet).half() if half else self.unet
        unet.save_pretrained(str(folder))
        notes = {"patch": self.patch, "t_max": self.t_max, **self.metadata}
        (Path(folder) / NOTES).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")


def load_denoiser(name: str, resolution: int | None = None, dataset: str | None = None) -> Denoiser:
    """A denoiser ready to predict on the CPU: float32, eval mode, without gradients.

    Args:
        name: 'auto' (the card for `dataset`), a card, a diffusers folder, a checkpoint file in Ho
            et al.'s layout (.ckpt .pt .pth .bin .safetensors) or a hub id (owner/name).
        resolution: Side in pixels of the images that it is wanted for; None accepts any. Checkpoint
            files do not tell theirs: they are taken to be for this one, or for 32 if it is None.
        dataset: Name of the data set, for 'auto'.

    Raises:
        DenoiserError: Nothing there or nothing that loads, another resolution or hash, no card.
    """
    card = _card_for(dataset) if name == "auto" else CARDS.get(name)
    if card:
        _check_resolution(card.name, card.resolution, resolution)
        places = [CARD_FOLDER / card.source, Path(card.source).absolute()]
        source = locate(card.source, places)
        denoiser = _from_folder(source, card.name, card.sha256)
    elif (source := locate(name, [Path(os.path.expanduser(name)).absolute()])).is_dir():
        denoiser = _from_folder(source, name)
    else:
        denoiser = _from_checkpoint(source, name, resolution or 32)
    _check_resolution(denoiser.name, denoiser.resolution, resolution)
    log.info("denoiser %s: %s, sha256 %s", denoiser.name, source, denoiser.sha256)
    return denoiser.float().eval().requires_grad_(False)


def _card_for(dataset: str | None) -> Card:
    if card := next((card for card in CARDS.values() if dataset in card.datasets), None):
        return card
    known = ", ".join(f"{card.name} (for {card.purpose})" for card in CARDS.values())
    raise DenoiserError(
        f"denoiser 'auto': no card for data set '{dataset}'; the cards are {known}.\nTrain one: "
        f"python diffusion/train.py --dataset {dataset} --out DIR   and give DIR as the denoiser"
    )


def _check_resolution(name: str, found: int, wanted: int | None) -> None:
    if wanted is not None and found != wanted:
        raise DenoiserError(
            f"denoiser '{name}' works on {found}x{found} images, the data are {wanted}x{wanted}: "
            f"set the image size to {found}, or train one for {wanted} with diffusion/train.py"
        )


def _from_folder(folder: Path, name: str, sha256: str | None = None) -> Denoiser:
    """The denoiser in a diffusers folder or its unet/, with or without our denoiser.json."""
    base = folder / "unet" if (folder / "unet" / "config.json").exists() else folder
    config, notes_file = base / "config.json", base / NOTES
    weights = next((base / file for file in FOLDER_WEIGHTS if (base / file).exists()), None)
    if weights is None or not config.exists():
        expected = f"expected config.json and {FOLDER_WEIGHTS[0]}"
        raise DenoiserError(f"{folder}: no denoiser in this folder; {expected}")
    if (kind := read_json(config).get("_class_name")) != "UNet2DModel":
        raise DenoiserError(f"{config}: describes a {kind}; an unconditional UNet2DModel is needed")
    notes = read_json(notes_file) if notes_file.exists() else {}
    patch, t_max = notes.pop("patch", 1), notes.pop("t_max", 1000)
    if patch not in (1, 2) or not isinstance(t_max, int) or t_max < 1:
        found = f"patch {patch!r} or t_max {t_max!r}"
        raise DenoiserError(f"{notes_file}: {found} is out of range; save the denoiser again")
    sha256 = checked_hash(weights, sha256)
    return Denoiser(_unet_of(weights), patch, t_max, name, sha256, notes)


def _unet_of(weights: Path) -> Any:
    """The UNet2DModel of the weights and the config.json beside them; each tensor has its place."""
    from diffusers import UNet2DModel

    options = {"low_cpu_mem_usage": False, "use_safetensors": weights.suffix == ".safetensors"}
    folder = str(weights.parent)
    try:
        unet, info = UNet2DModel.from_pretrained(folder, output_loading_info=True, **options)
    except READ_ERRORS as error:
        reason = first_line(error)
        raise DenoiserError(f"{weights}: cannot be loaded ({reason}); save it again") from None
    if strange := sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]):
        first = f"the first tensor missing or left over is '{strange[0]}'"
        raise DenoiserError(f"{weights}: does not fit config.json; {first}")
    return unet


def _from_checkpoint(path: Path, name: str, resolution: int) -> Denoiser:
    """One file of tensors in Ho et al.'s layout, for images of side `resolution`."""
    from diffusers import UNet2DModel

    content = read_tensors(path)
    if any(key.startswith("down_blocks.") for key in content):
        words = f"holds a diffusers model's weights; give its folder, {path.parent}"
        raise DenoiserError(f"{path}: {words}")
    try:
        tensors = ho_layout.network_tensors(content)
        unet: Any = UNet2DModel(**ho_layout.unet_config(tensors, resolution))
        unet.load_state_dict(ho_layout.to_diffusers(tensors, unet.state_dict()))
    except READ_ERRORS as error:
        reason = f"no tensor {error}" if isinstance(error, KeyError) else first_line(error)
        raise DenoiserError(f"{path}: not a checkpoint in Ho et al.'s layout: {reason}") from None
    return Denoiser(unet, name=name, sha256=checked_hash(path, None))
