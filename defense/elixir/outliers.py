"""Which classes lie far from the median class, in robust standard deviations.

1.4826 times the median absolute deviation (MAD) estimates a standard deviation under normality.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAD_TO_SIGMA = 1.4826
EPSILON = 1e-6


@dataclass(frozen=True)
class Scores:
    """How far each of K classes lies from the median class.

    Attributes:
        score: float64 (K,), robust standard deviations; 0 for a class without samples, all nan
            where the median is infinite.
        threshold: the value that a flagged class exceeds (on the upper side).
        outlies: bool (K,), whether it is flagged.
        one_above: float64 (), the value one robust standard deviation above the median.
    """

    score: Tensor
    threshold: float
    outlies: Tensor
    one_above: Tensor


def robust_scores(
    values: Tensor, present: Tensor, limit: float, floor: float, two_sided: bool = False
) -> Scores:
    """Scores of values float64 (K,), which may be inf.

    Args:
        present: bool (K,), the classes that have samples; only they enter median and deviation.
        limit: the score that a flagged class exceeds.
        floor: least median absolute deviation that is divided by.
        two_sided: whether values far below the median count as well.
    """
    centre = median(values[present])
    deviation = values - centre
    unit = MAD_TO_SIGMA * (median(deviation.abs()[present]).clamp(min=floor) + EPSILON)
    score = torch.where(present, (deviation.abs() if two_sided else deviation) / unit, 0.0)
    return Scores(score, (centre + limit * unit).item(), score > limit, centre + unit)


def median(values: Tensor) -> Tensor:
    """The mean of the two middle values, as numpy.median (torch.median takes the lower one)."""
    ordered = values.sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
