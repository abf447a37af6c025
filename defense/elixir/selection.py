"""Selection of the purified image, after DataElixir (https://arxiv.org/abs/2312.11057).

Of a sample's candidates, those close to the original may still show the trigger and those far from
it may have lost the object. Distance is half structural (SSIM, Wang et al. 2004,
https://doi.org/10.1109/TIP.2003.819861) and half between the victim's features; the candidate that
is farther away than four in five of the others is taken.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 3
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Of `image_distances`: with 51 images of 32x32 each, some 25 MB; more are slower.
SAMPLES_AT_ONCE = 2


@dataclass(frozen=True)
class PairDistances:
    """Distances of candidates from their original, float64 (B,M) in [0, 1] up to rounding.

    Column 0, the original's own, is exactly 0.

    Attributes:
        pixel: 1 - (SSIM + 1) / 2.
        feature: 1 - (cosine + 1) / 2.
    """

    pixel: Tensor
    feature: Tensor

    @property
    def total(self) -> Tensor:
        """The mean of the two."""
        return 0.5 * self.pixel + 0.5 * self.feature


def ssim3(x: Tensor, y: Tensor, volume: bool) -> Tensor:
    """Structural similarity of uint8 images, uniform window of width 3, K1 .01, K2 .03, range 255.

    Args:
        x: uint8 (..., 3,H,W), H and W >= 3.
        y: uint8 (..., 3,H,W); the leading dimensions are broadcast against those of `x`.
        volume: take windows 3x3x3 over row, column and channel, as the published code does under
            scikit-image 0.24; otherwise average the three channels' 2-D values.

    Returns:
        float64 (...) in [-1, 1], the mean over the windows that lie wholly inside the image.

    Raises:
        ValueError: not uint8, not three channels, or smaller than the window.
    """
    _check_images(x)
    _check_images(y)
    axes = (-3, -2, -1) if volume else (-2, -1)
    n = WINDOW ** len(axes)
    # Sums of up to 27 products of bytes stay below 2^24: exact in float32.
    x, y = x.float(), y.float()
    sx, sy, sxx, syy, sxy = (_window_sum(v, axes).double() for v in (x, y, x * x, y * y, x * y))
    sample = n * (n - 1)  # covariances divide by n - 1
    vx, vy = (n * sxx - sx * sx) / sample, (n * syy - sy * sy) / sample
    vxy = (n * sxy - sx * sy) / sample
    mx, my = sx / n, sy / n
    similarity = (2 * mx * my + C1) * (2 * vxy + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
    return similarity.mean(dim=(-3, -2, -1))


def to_distance(similarity: Tensor) -> Tensor:
    """Similarities (B,M) in [-1, 1] to distances float64 in [0, 1]; column 0 is exactly 0."""
    distance = 1 - (similarity.double() + 1) / 2
    return torch.cat([torch.zeros_like(distance[:, :1]), distance[:, 1:]], dim=1)


def image_distances(images: Tensor, features: Tensor, volume: bool) -> PairDistances:
    """Compare each sample's intermediaries with its original.

    Args:
        images: uint8 (B,M,3,H,W); column 0 is the original.
        features: float32 (B,M,D), the victim's features of these images.
        volume: see `ssim3`.

    Raises:
        ValueError: the images do not suit `ssim3`, or images and features differ in B or M.
    """
    if images.ndim != 5 or features.ndim != 3 or images.shape[:2] != features.shape[:2]:
        shapes = f"{tuple(images.shape)} and {tuple(features.shape)}"
        raise ValueError(f"images must be (B,M,3,H,W) and features (B,M,D), not {shapes}")
    ssim = torch.cat([ssim3(part[:, :1], part, volume) for part in images.split(SAMPLES_AT_ONCE)])
    cosine = F.cosine_similarity(features[:, :1], features, dim=-1, eps=1e-8)
    return PairDistances(to_distance(ssim), to_distance(cosine))


def choose(distance: Tensor, kept: Tensor, rank: float = 0.8, *, original_eligible: bool) -> Tensor:
    """The column to use as purified image: of L eligible ones by distance, number int(rank * L).

    Args:
        distance: (B,M) from the original, finite.
        kept: bool (B,M), the candidates; column 0 is not read.
        rank: in [0, 1]; 1 takes the farthest.
        original_eligible: the original takes part, as published. Otherwise it is never chosen, and
            where nothing else is kept, all intermediaries are eligible.

    Returns:
        int64 (B,), 0..M-1. Of equal distances the lower column comes first.

    Raises:
        ValueError: shapes differ, `rank` is out of range, a distance is not finite, or only the
            originals were given.
    """
    _check_choice(distance, kept, rank, original_eligible)
    eligible = kept.clone()
    eligible[:, 0] = original_eligible
    eligible[:, 1:] |= ~eligible.any(dim=1, keepdim=True)
    order = distance.masked_fill(~eligible, torch.inf).argsort(dim=1, stable=True)
    count = eligible.sum(dim=1, keepdim=True)
    # 1e-9: 0.29 * 100 is 29.
    position = (rank * count.double() + 1e-9).floor().long().minimum(count - 1)
    return order.gather(1, position).squeeze(1)


def _window_sum(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum over all windows of width 3 along `axes`, which each shrink by 2."""
    for axis in axes:
        inner = values.shape[axis] - WINDOW + 1
        parts = (values.narrow(axis, offset, inner) for offset in range(WINDOW))
        values = functools.reduce(torch.add, parts)
    return values


def _check_images(images: Tensor) -> None:
    fits = images.ndim >= 3 and images.shape[-3] == 3 and min(images.shape[-2:]) >= WINDOW
    if images.dtype != torch.uint8 or not fits:
        found = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images must be uint8 (..., 3,H,W), 3x3 or larger, not {found}")


def _check_choice(distance: Tensor, kept: Tensor, rank: float, original_eligible: bool) -> None:
    if distance.ndim != 2 or distance.shape != kept.shape or kept.dtype != torch.bool:
        shapes = f"{tuple(distance.shape)}, {tuple(kept.shape)}"
        raise ValueError(f"distance (B,M) and bool kept (B,M) do not fit: {shapes}")
    if distance.shape[1] < 2 - original_eligible:
        raise ValueError("there is no intermediary to choose")
    if not 0 <= rank <= 1:
        raise ValueError(f"rank must lie in [0, 1], not {rank}")
    if not torch.isfinite(distance).all():
        raise ValueError("a distance is not finite: do the features hold inf or nan?")
