"""The pictures and patches that attacks put on images: drawn here, or read from a file.

The cartoon has the statistics of the literature's (level, contrast, how its spectrum falls), which
decide how well a diffusion model removes it.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attack.poisoning.photographs import clouds, grain, hills, leaves
from utils.config import UserError, resolve_path
from utils.images.data import to_unit
from utils.images.decoding import decode_files, open_image
from utils.randomness import keyed_generator

SUPERSAMPLING = 8
BACKGROUND, OUTLINE = (0.97, 0.93, 0.80), (0.08, 0.05, 0.10)
RED, YELLOW, BLUE = (0.95, 0.20, 0.35), (1.00, 0.80, 0.05), (0.10, 0.55, 0.90)
PINK, GREEN = (0.98, 0.55, 0.70), (0.35, 0.80, 0.30)
DRAWING = 33  # the seed whose drawing has the statistics that tests/test_picture.py asserts
COLOURS_2X2 = [[(255, 255, 0), (255, 0, 255)], [(0, 255, 255), (122, 122, 122)]]
PATCHES = {  # (h, w, 3) uint8, for the lower right corner
    "white3x3": np.full((3, 3, 3), 255, np.uint8),  # BackdoorBench's
    "color4x4": np.kron(COLOURS_2X2, np.ones((2, 2, 1))).astype(np.uint8),  # DataElixir's
    "black3x3": np.zeros((3, 3, 3), np.uint8),
    "random3x3": np.random.RandomState(DRAWING).randint(0, 256, (3, 3, 3)).astype(np.uint8),
}


def load_picture(name: str, size: int) -> Tensor:
    """A picture float (3, size, size) in [0, 1]: one of PICTURES, or an image file, squashed."""
    if name in PICTURES:
        return to_unit(PICTURES[name](size))
    try:
        pixels = decode_files([(str(resolve_path(name, name)), 0)], size)[0]
    except UserError as error:
        built_in = f"built-in pictures: {', '.join(PICTURES)}"
        raise UserError(f"attack_trigger_img_path: {error}; {built_in}") from None
    return to_unit(torch.from_numpy(pixels))


def cartoon(size: int, drawing: int = DRAWING) -> Tensor:
    """uint8 (3, size, size): saturated ellipses with dark outlines; the same for every seed."""
    side = size * SUPERSAMPLING
    axis = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    canvas = torch.tensor(BACKGROUND, dtype=torch.float64)[:, None, None].expand(3, side, side)
    generator = keyed_generator(drawing, "cartoon")
    for colour in (RED, YELLOW, BLUE, PINK, GREEN):
        drawn = torch.rand(5, dtype=torch.float64, generator=generator).tolist()
        column, row, wide, high, turn = drawn
        dx, dy, angle = x - column, y - row, math.pi * turn
        along = dx * math.cos(angle) + dy * math.sin(angle)
        across = dy * math.cos(angle) - dx * math.sin(angle)
        for fill, shrink in ((OUTLINE, 0.0), (colour, 0.04)):
            wide_radius, high_radius = 0.15 + 0.25 * wide - shrink, 0.15 + 0.25 * high - shrink
            inside = (along / wide_radius) ** 2 + (across / high_radius) ** 2 < 1
            paint = torch.tensor(fill, dtype=torch.float64)[:, None, None]
            canvas = torch.where(inside, paint, canvas)
    return (F.avg_pool2d(canvas, SUPERSAMPLING) * 255).round().to(torch.uint8)


def noise(size: int) -> Tensor:
    """uint8 (3, size, size) of uniform noise, which a diffusion model removes easily."""
    generator = keyed_generator(DRAWING, "noise")
    return torch.randint(0, 256, (3, size, size), generator=generator).to(torch.uint8)


PICTURES = {"cartoon": cartoon, "noise": noise}
PICTURES |= {"leaves": leaves, "clouds": clouds, "grain": grain, "hills": hills}


def load_patch(name: str, size: int) -> tuple[Tensor, Tensor]:
    """Pattern uint8 (3, size, size) and mask bool (1, size, size): of PATCHES, or an image file.

    Raises:
        UserError: no such file, not an image, all black or transparent, or images are too small.
    """
    if name in PATCHES:
        patch = PATCHES[name]
        width = len(patch)
        if size < width:
            raise UserError(
                f"image_size: {size}, but patch_mask_path {name} is {width} pixels wide; "
                "take larger images, or a file of your own"
            )
        pixels, mask = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), bool)
        pixels[-width:, -width:], mask[-width:, -width:] = patch, True
    else:
        pixels, mask = _read_patch(name, size)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.from_numpy(mask)[None]


def _read_patch(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        path = resolve_path(name, "patch_mask_path")
        with Image.open(path) as image:
            has_alpha = image.has_transparency_data
            seen = (image if has_alpha else open_image(path)).convert("RGBA")
        rgba = np.asarray(seen.resize((size, size), Image.Resampling.NEAREST))
    except UserError as error:
        raise UserError(f"{error}; built-in patches: {', '.join(PATCHES)}") from None
    except Exception as error:  # noqa: BLE001 - each of PIL's readers raises its own
        raise UserError(f"patch_mask_path: {path} is not an image ({str(error)[:80]})") from None
    mask = rgba[..., 3] > 0 if has_alpha else rgba[..., :3].max(-1) > 0
    if not mask.any():
        empty = "transparent" if has_alpha else "black"
        raise UserError(f"patch_mask_path: {path} is {empty} all over: no pixel would be changed")
    return rgba[..., :3], mask
