"""The picture that blending attacks lay over an image: drawn here, noise, or a file.

The literature's cartoon is not ours to ship. This one is drawn with the same statistics (level, contrast, how its
spectrum falls), because they decide how well a diffusion model removes it: uniform noise would be too easy a trigger.
"""

from __future__ import annotations

import math

from utils.config import UserError, resolve_path
from utils.images.data import to_unit
from utils.images.decoding import decode_files
from utils.late import F, Tensor, torch
from utils.randomness import keyed_generator

SUPERSAMPLING = 8
BACKGROUND, OUTLINE = (0.97, 0.93, 0.80), (0.08, 0.05, 0.10)
COLOURS = (
    (0.95, 0.20, 0.35),
    (1.00, 0.80, 0.05),
    (0.10, 0.55, 0.90),
    (0.98, 0.55, 0.70),
    (0.35, 0.80, 0.30),
)
DRAWING = 33  # the seed whose drawing has the statistics that tests/test_picture.py asserts


def load_picture(name: str, size: int) -> Tensor:
    """A picture float (3, size, size) in [0, 1]: "cartoon", "noise", or an image file (squashed to a square).

    Raises:
        UserError: no such file, or not an image.
    """
    if name in BUILT_IN:
        return to_unit(BUILT_IN[name](size))
    try:
        return to_unit(
            torch.from_numpy(decode_files([(str(resolve_path(name, name)), 0)], size)[0])
        )
    except UserError as error:
        raise UserError(
            f"attack_trigger_img_path: {error}; built-in pictures: {', '.join(BUILT_IN)}"
        ) from None


def cartoon(size: int, drawing: int = DRAWING) -> Tensor:
    """uint8 (3, size, size): saturated ellipses with dark outlines on a light ground; the same for every seed of a run."""
    side = size * SUPERSAMPLING
    y, x = torch.meshgrid(
        *[(torch.arange(side, dtype=torch.float64) + 0.5) / side] * 2, indexing="ij"
    )
    canvas = torch.tensor(BACKGROUND, dtype=torch.float64)[:, None, None].expand(3, side, side)
    generator = keyed_generator(drawing, "cartoon")
    for colour in COLOURS:
        column, row, wide, high, turn = torch.rand(
            5, dtype=torch.float64, generator=generator
        ).tolist()
        canvas = _ellipse(
            canvas,
            x - column,
            y - row,
            0.15 + 0.25 * wide,
            0.15 + 0.25 * high,
            math.pi * turn,
            colour,
        )
    return (F.avg_pool2d(canvas, SUPERSAMPLING) * 255).round().to(torch.uint8)


def _ellipse(
    canvas: Tensor, dx: Tensor, dy: Tensor, wide: float, high: float, turn: float, colour: tuple
) -> Tensor:
    along, across = (
        dx * math.cos(turn) + dy * math.sin(turn),
        dy * math.cos(turn) - dx * math.sin(turn),
    )
    for fill, shrink in ((OUTLINE, 0.0), (colour, 0.04)):
        inside = (along / (wide - shrink)) ** 2 + (across / (high - shrink)) ** 2 < 1
        canvas = torch.where(inside, torch.tensor(fill, dtype=canvas.dtype)[:, None, None], canvas)
    return canvas


def noise(size: int) -> Tensor:
    """uint8 (3, size, size) of uniform noise, which a diffusion model removes easily."""
    return torch.randint(0, 256, (3, size, size), generator=keyed_generator(DRAWING, "noise")).to(
        torch.uint8
    )


BUILT_IN = {"cartoon": cartoon, "noise": noise}
