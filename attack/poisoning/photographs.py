"""Four pictures with the statistics of photographs, drawn, each with a spectrum of its own.

In order of how fast their power falls with frequency: grain, leaves, clouds; hills is a scene.
Leaves: Lee, Mumford and Huang, "Occlusion Models for Natural Images", IJCV 2001: discs that hide
each other, with radii of density r^-3, look alike at every scale as natural images do.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.randomness import keyed_generator

CANVAS = 512  # side in pixels on which everything is drawn, so that all sizes show one picture
DRAWING = 1
DISCS, SMALLEST, LARGEST = 6000, 1 / 64, 1 / 4  # radii, of the picture's side
SKY_ABOVE, SKY_BELOW, SUN = (0.25, 0.45, 0.85), (0.95, 0.80, 0.60), (1.00, 0.95, 0.70)
FAR, NEAR = (0.55, 0.62, 0.72), (0.10, 0.22, 0.08)  # hills fade into the air
HILLS = 4


def leaves(size: int) -> Tensor:
    """uint8 (3, size, size): discs of all sizes on top of each other, in the colours of woods."""
    generator = keyed_generator(DRAWING, "leaves")
    column, row, radius, hue, light = torch.rand(5, DISCS, generator=generator).tolist()
    axis = (torch.arange(CANVAS) + 0.5) / CANVAS
    canvas = torch.zeros(3, CANVAS, CANVAS)
    for x, y, u, tint, grey in zip(column, row, radius, hue, light):
        # the inverse of the distribution function of a density r^-3
        r = (SMALLEST**-2 - u * (SMALLEST**-2 - LARGEST**-2)) ** -0.5
        (top, bottom), (left, right) = _around(y, r), _around(x, r)
        dy, dx = axis[top:bottom, None] - y, axis[left:right] - x
        level, brown = 0.1 + 0.8 * grey, 0.35 * tint
        colour = torch.tensor([level * (0.7 + brown), level, level * (0.8 - brown)])
        part = canvas[:, top:bottom, left:right]
        part.copy_(torch.where(dy**2 + dx**2 < r**2, colour[:, None, None], part))
    return _scaled(canvas, size)


def clouds(size: int) -> Tensor:
    """uint8 (3, size, size): soft white on blue, of a spectrum whose amplitude falls as 1/f^2."""
    return _of_spectrum("clouds", 2.0, (0.45, 0.52, 0.62), size)


def grain(size: int) -> Tensor:
    """uint8 (3, size, size): sand, of a spectrum whose amplitude falls as f^-0.6."""
    return _of_spectrum("grain", 0.6, (0.60, 0.52, 0.40), size)


def hills(size: int) -> Tensor:
    """uint8 (3, size, size): a sun in an evening sky above ranges of hills, the nearest dark."""
    axis = ((torch.arange(CANVAS) + 0.5) / CANVAS).double()
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    mix = lambda one, other, share: (
        torch.tensor(one)[:, None, None] * (1 - share) + torch.tensor(other)[:, None, None] * share
    )
    canvas = mix(SKY_ABOVE, SKY_BELOW, (y / 0.6).clamp(max=1))
    glow = torch.exp(-((x - 0.7) ** 2 + (y - 0.25) ** 2).sqrt() / 0.08)
    canvas = canvas + (torch.tensor(SUN)[:, None, None] - canvas) * (6 * glow).clamp(max=1)
    generator = keyed_generator(DRAWING, "hills")
    for hill in range(HILLS):
        phases = 2 * math.pi * torch.rand(6, generator=generator)
        waves = [
            torch.sin(2 * math.pi * k * axis + phase) / k**1.2 for k, phase in enumerate(phases, 1)
        ]
        ridge = 0.45 + 0.15 * hill + 0.07 * torch.stack(waves).sum(0)
        colour = mix(FAR, NEAR, torch.full_like(y, hill / (HILLS - 1)))
        canvas = torch.where(y > ridge, colour * (1.15 - 0.5 * (y - ridge)), canvas)
    return _scaled(canvas, size)


def _of_spectrum(name: str, falling: float, mean: tuple[float, ...], size: int) -> Tensor:
    """uint8 (3, size, size): random phases, amplitudes f^-falling; channels share most of it."""
    generator = keyed_generator(DRAWING, name)
    fields = torch.fft.fft2(torch.randn(4, CANVAS, CANVAS, generator=generator))
    steps = torch.fft.fftfreq(CANVAS) * CANVAS
    frequency = (steps[:, None] ** 2 + steps**2).sqrt()
    shaped = fields / fields.abs() * frequency.clamp_min(1) ** -falling * (frequency > 0)
    shared, *own = F.adaptive_avg_pool2d(torch.fft.ifft2(shaped).real, min(size, CANVAS))
    drawn = shared + 0.2 * torch.stack(own)
    # here, since fine noise loses contrast with every halving of the size
    drawn = 0.2 * drawn / drawn.std((1, 2), keepdim=True)
    return _scaled(drawn + torch.tensor(mean)[:, None, None], size)


def _around(centre: float, radius: float) -> tuple[int, int]:
    """The first and the end of the canvas' pixels that a disc can touch along an axis."""
    ends = math.floor((centre - radius) * CANVAS), math.ceil((centre + radius) * CANVAS)
    return max(0, ends[0]), max(0, ends[1])


def _scaled(canvas: Tensor, size: int) -> Tensor:
    """[0, 1] (3, S, S) -> uint8 (3, size, size), by averages, or between pixels where it grows."""
    if size <= canvas.shape[-1]:
        small = F.adaptive_avg_pool2d(canvas, size)
    else:
        small = F.interpolate(canvas[None], (size, size), mode="bilinear")[0]
    return (small.clamp(0, 1) * 255).round().to(torch.uint8)
