# Ho et al., DDPM, 2020: https://arxiv.org/abs/2006.11239; networks from https://github.com/huggingface/diffusers
"""Denoisers: networks (x in [-1,1] (B,3,H,W), t) -> the noise in x; where their weights are, and how they are loaded."""

import copy
import json
import logging
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    sha256_file,
)

__all__ = ["CARDS", "Card", "Denoiser", "DenoiserError", "load_denoiser", "sha256_file"]

log = logging.getLogger("dataelixir")
NOTES = "denoiser.json"


class Denoiser(nn.Module):
    """A UNet2DModel that predicts the noise in images.

    Args:
        unet: diffusers.UNet2DModel with 3 * patch^2 channels in and out, for images of side / patch.
        patch: 1, or 2 to fold each 2x2 patch of pixels into channels first, which makes a pass far cheaper.
        t_max: Largest t that it was trained for, plus 1.
        name: What the user called it.
        sha256: Of the weights file that it was loaded from, or the empty string.
        metadata: Anything else worth keeping beside the weights.

    Raises:
        DenoiserError: The U-Net does not map RGB images to noise of the same shape.
    """

    def __init__(
        self,
        unet: nn.Module,
        patch: int = 1,
        t_max: int = 1000,
        name: str = "",
        sha256: str = "",
        metadata: dict | None = None,
    ):
        super().__init__()
        size, channels = (
            unet.config.sample_size,
            (unet.config.in_channels, unet.config.out_channels),
        )
        if not isinstance(size, int) or channels != (3 * patch**2, 3 * patch**2):
            raise DenoiserError(
                f"denoiser '{name}': {channels[0]} channels in, {channels[1]} out and image size {size} do not fit "
                f"square RGB images with patch {patch}; an unconditional noise predictor is needed"
            )
        self.unet, self.patch, self.t_max = unet, patch, t_max
        self.name, self.sha256, self.metadata = name, sha256, dict(metadata or {})

    @property
    def resolution(self) -> int:
        """Side of its images in pixels."""
        return self.unet.config.sample_size * self.patch

    def forward(self, x: Tensor, t: Tensor | int) -> Tensor:
        """Predicted noise (B,3,H,W) of images x (B,3,H,W), [-1,1] plus noise, at level t: int64 (B,), or one for all."""
        assert x.shape[1:] == (3, self.resolution, self.resolution), x.shape
        if self.patch == 1:
            return self.unet(x, t).sample
        return F.pixel_shuffle(self.unet(F.pixel_unshuffle(x, self.patch), t).sample, self.patch)

    def gflops(self, batch: int = 1) -> float:
        """10^9 floating-point operations per image and pass (a multiply-add counts as two), counted on `batch` images."""
        from torch.utils.flop_counter import FlopCounterMode

        x = torch.zeros(
            batch, 3, self.resolution, self.resolution, device=next(self.parameters()).device
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self(x, torch.zeros(batch, dtype=torch.long, device=x.device))
        return counter.get_total_flops() / batch / 1e9

    def save(self, folder: str | Path, half: bool = False) -> None:
        """Write a diffusers folder and our denoiser.json (patch, t_max, metadata); half stores the weights as float16."""
        unet = copy.deepcopy(self.unet).half() if half else self.unet
        unet.save_pretrained(str(folder))
        notes = {"patch": self.patch, "t_max": self.t_max, **self.metadata}
        (Path(folder) / NOTES).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")


def load_denoiser(
    name: str,
    resolution: int | None = None,
    dataset: str | None = None,
    device: str | torch.device = "cpu",
) -> Denoiser:
    """A denoiser ready to predict: float32, eval mode, without gradients.

    Args:
        name: 'auto' (the card for `dataset`), a card, a diffusers folder, a checkpoint file in Ho et al.'s layout
            (.ckpt .pt .pth .bin .safetensors) or a Hugging Face hub id (owner/name).
        resolution: Side in pixels of the images that it is wanted for; None accepts any. Checkpoint files do not tell
            theirs: they are taken to be for this one, or for 32 if it is None.
        dataset: Name of the data set, for 'auto'.
        device: Where the weights go.

    Raises:
        DenoiserError: Nothing there, nothing that loads, another resolution, another hash, no card for the data set.
    """
    card = _card_for(dataset) if name == "auto" else CARDS.get(name)
    if card:
        _check_resolution(card.name, card.resolution, resolution)
        source = locate(
            card.source, [CARD_FOLDER / card.source, Path(card.source).absolute()], CARDS
        )
        denoiser = _from_folder(source, card.name, card.sha256)
    else:
        source = locate(name, [Path(os.path.expanduser(name)).absolute()], CARDS)
        denoiser = (
            _from_folder(source, name)
            if source.is_dir()
            else _from_checkpoint(source, name, resolution or 32)
        )
    _check_resolution(denoiser.name, denoiser.resolution, resolution)
    log.info("denoiser %s: %s, sha256 %s", denoiser.name, source, denoiser.sha256)
    return denoiser.float().to(device).eval().requires_grad_(False)


def _card_for(dataset: str | None) -> Card:
    """The card that lists the data set."""
    for card in CARDS.values():
        if dataset in card.datasets:
            return card
    known = ", ".join(f"{card.name} (for {card.purpose})" for card in CARDS.values())
    raise DenoiserError(
        f"denoiser 'auto': no card for data set '{dataset}'; the cards are {known}.\n"
        f"Train one with: python diffusion/train.py --dataset {dataset} --out DIR   and give DIR as the denoiser"
    )


def _check_resolution(name: str, found: int, wanted: int | None) -> None:
    """Refuse images of another side than the denoiser's."""
    if wanted is not None and found != wanted:
        raise DenoiserError(
            f"denoiser '{name}' works on {found}x{found} images, the data are {wanted}x{wanted}: "
            f"set the image size to {found}, or train a denoiser for {wanted} with diffusion/train.py"
        )


def _from_folder(folder: Path, name: str, sha256: str | None = None) -> Denoiser:
    """A diffusers folder, or the unet/ folder in it, with or without our denoiser.json."""
    base = folder / "unet" if (folder / "unet" / "config.json").exists() else folder
    weights = next((base / file for file in FOLDER_WEIGHTS if (base / file).exists()), None)
    if weights is None or not (base / "config.json").exists():
        raise DenoiserError(
            f"{folder}: no denoiser in this folder; expected config.json and {FOLDER_WEIGHTS[0]}"
        )
    if (kind := read_json(base / "config.json").get("_class_name")) != "UNet2DModel":
        raise DenoiserError(
            f"{base / 'config.json'}: describes a {kind}; only an unconditional UNet2DModel can be used"
        )
    notes = read_json(base / NOTES) if (base / NOTES).exists() else {}
    patch, t_max = notes.pop("patch", 1), notes.pop("t_max", 1000)
    if patch not in (1, 2) or not isinstance(t_max, int) or t_max < 1:
        raise DenoiserError(
            f"{base / NOTES}: patch {patch!r} or t_max {t_max!r} is out of range; save the denoiser again"
        )
    found = checked_hash(weights, sha256)
    return Denoiser(_unet_of(weights), patch, t_max, name, found, notes)


def _unet_of(weights: Path) -> nn.Module:
    """The UNet2DModel of the config.json and the weights that lie side by side; each tensor must have its place."""
    from diffusers import UNet2DModel

    options = {
        "use_safetensors": weights.suffix == ".safetensors",
        "low_cpu_mem_usage": False,
        "output_loading_info": True,
    }
    try:
        unet, info = UNet2DModel.from_pretrained(str(weights.parent), **options)
    except READ_ERRORS as error:
        raise DenoiserError(
            f"{weights}: cannot be loaded ({first_line(error)}); save or download it again"
        ) from None
    strange = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if strange:
        raise DenoiserError(
            f"{weights}: does not fit config.json; the first tensor missing or left over is '{strange[0]}'"
        )
    return unet


def _from_checkpoint(path: Path, name: str, resolution: int) -> Denoiser:
    """One file of tensors in Ho et al.'s layout, for images of side `resolution`."""
    from diffusers import UNet2DModel

    content = read_tensors(path)
    if any(key.startswith("down_blocks.") for key in content):
        raise DenoiserError(
            f"{path}: holds the weights of a diffusers model; give its folder, {path.parent}"
        )
    try:
        tensors = ho_layout.network_tensors(content)
        unet = UNet2DModel(**ho_layout.unet_config(tensors, resolution))
        unet.load_state_dict(ho_layout.to_diffusers(tensors, unet.state_dict()))
    except READ_ERRORS as error:
        reason = f"no tensor {error}" if isinstance(error, KeyError) else first_line(error)
        raise DenoiserError(
            f"{path}: not a DDPM checkpoint in Ho et al.'s layout: {reason}"
        ) from None
    return Denoiser(unet, name=name, sha256=checked_hash(path, None))
